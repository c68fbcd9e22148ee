//! A KVTC transform, fitted to the text that a joint codec is trained on.

use super::{TrainOptions, collect};
use crate::codec::TrainedFile;
use crate::codec::kvtc::{Book, Origin, SCHEMA, fit};
use crate::dump::{Manifest, open_model};
use crate::error::{Error, Result};
use crate::progress::{Progress, Unit};
use std::path::{Path, PathBuf};

/// Where it goes: beside the joint codec.
fn path(joint: &Path) -> PathBuf {
    let stem = joint.file_stem().unwrap_or_default().to_string_lossy();
    joint.with_file_name(format!("{stem}-kvtc.safetensors"))
}

/// Fits and writes a transform of so many directions at most, unless it is there already.
pub fn train(
    options: &TrainOptions,
    manifests: &[Manifest],
    dumps: Vec<serde_json::Value>,
    directions: usize,
) -> Result<()> {
    let path = path(&options.out);
    let version = env!("CARGO_PKG_VERSION");
    let same = |o: &Origin| o.directions == directions && o.dumps == dumps && o.kvfuse_version == version;
    if Book::read(&path).is_ok_and(|book| same(&book.origin)) {
        return Ok(());
    }
    let first = &manifests[0];
    let model = open_model(&options.dumps[0], None, first)?;
    let corpus = collect::corpus(&options.dumps, manifests, &model)?;
    let progress = Progress::new("fitting a transform", 2, Unit::Items("parts"));
    let fitted = |part| {
        let transform = fit(&corpus, part, directions)?;
        progress.increment();
        Ok::<_, Error>(transform)
    };
    let parts = [fitted(0)?, fitted(1)?];
    progress.finish();
    let config = model.decoder.config();
    let origin = Origin {
        schema: SCHEMA,
        kvfuse_version: version.to_owned(),
        model: first.model.name.clone(),
        model_sha256: first.model.sha256.clone(),
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        training_tokens: corpus.tokens(),
        dumps,
        directions,
    };
    Book::write(&path, &origin, &parts)
}
