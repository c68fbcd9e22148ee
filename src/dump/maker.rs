//! The model that made a dump.

use super::Manifest;
use crate::error::{Error, Result};
use crate::model::Model;
use std::path::Path;

/// Opens the model that made a dump: that of the manifest, or of a `name` that means the same.
///
/// # Errors
/// Any other model, by checksum or configuration.
pub fn open_model(dump: &Path, name: Option<&str>, manifest: &Manifest) -> Result<Model> {
    let name = name.unwrap_or(&manifest.model.name);
    let model = Model::load(name)?;
    if model.sha256 != manifest.model.sha256 || *model.decoder.config() != manifest.model.config {
        let problem = format!(
            "was made with another model ({}, sha256 {}...) than {name} (sha256 {}...); name the one that made it",
            manifest.model.name,
            &manifest.model.sha256[..12.min(manifest.model.sha256.len())],
            &model.sha256[..12]
        );
        return Err(Error::file(dump, problem));
    }
    Ok(model)
}
