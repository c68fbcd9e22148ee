//! A KVTC transform, fitted to the text that a joint codec is trained on.

use super::TrainOptions;
use crate::codec::TrainedFile;
use crate::codec::joint::corpus::Corpus;
use crate::codec::kvtc::{Book, Origin, SCHEMA, fit};
use crate::dump::Manifest;
use crate::error::{Error, Result};
use crate::progress::{Progress, Unit};
use std::path::{Path, PathBuf};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Where it goes: beside the joint codec.
fn path(joint: &Path) -> PathBuf {
    let stem = joint.file_stem().unwrap_or_default().to_string_lossy();
    joint.with_file_name(format!("{stem}-kvtc.safetensors"))
}

/// Whether that of these dumps, of so many directions at most, is there.
pub fn is_there(options: &TrainOptions, dumps: &[serde_json::Value], directions: usize) -> bool {
    let same = |o: &Origin| o.directions == directions && o.dumps == dumps && o.kvfuse_version == VERSION;
    Book::read(&path(&options.out)).is_ok_and(|book| same(&book.origin))
}

/// Fits and writes it.
pub fn train(
    options: &TrainOptions,
    first: &Manifest,
    corpus: &Corpus,
    dumps: Vec<serde_json::Value>,
    directions: usize,
) -> Result<()> {
    let progress = Progress::new("fitting a transform", 2, Unit::Items("parts"));
    let fitted = |part| {
        let transform = fit(corpus, part, directions)?;
        progress.increment();
        Ok::<_, Error>(transform)
    };
    let parts = [fitted(0)?, fitted(1)?];
    progress.finish();
    let config = &first.model.config;
    let origin = Origin {
        schema: SCHEMA,
        kvfuse_version: VERSION.to_owned(),
        model: first.model.name.clone(),
        model_sha256: first.model.sha256.clone(),
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        training_tokens: corpus.tokens(),
        dumps,
        directions,
    };
    Book::write(&path(&options.out), &origin, &parts)
}
