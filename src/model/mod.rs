//! Language models: files, tokenizer and a decoder whose KV cache lives outside of it.

pub mod attention;
mod builtin;
mod chat;
mod coded;
mod config;
mod decoder;
mod fetch;
pub mod gemm;
mod generation;
mod ggml;
mod gguf;
mod hf;
mod hf_config;
mod hub;
pub mod kernels;
mod numbers;
mod panels;
mod probe;
pub mod registry;
mod rope;
mod tokenizer;
mod weights;

pub use chat::Message;
pub use config::{ARCHITECTURES, ModelConfig, RopeConfig, Sliding, Traits, traits};
pub use decoder::{Decoder, Fault, Segment, Tap, Tapped};
pub use generation::Generation;
pub use gguf::Gguf;
pub use hf::{HfFolder, to_f32};
pub use numbers::Numbers;
pub use probe::{Probe, argmax, log_sum_exp, probe};
pub use rope::{Rope, Ropes};
pub use tokenizer::Tokenizer;
pub use weights::{TensorSource, Weights};

use crate::error::{Error, Result};
use crate::files;
use std::path::Path;

/// Raised whenever the decoder, a tokenizer rule or a metric comes to give other numbers: dumps and runs of older code are then
/// made again.
pub const NUMERICS: u32 = 2;

/// A model ready to run.
pub struct Model {
    pub decoder: Decoder,
    pub tokenizer: Tokenizer,
    /// How answers are decoded, greedily.
    pub generation: Generation,
    /// SHA-256 of the GGUF file; for a folder, of its files' checksums in order.
    pub sha256: String,
}

/// Checksum of what `--model` means, as [`Model::sha256`] has it, without loading its weights.
pub fn checksum(spec: &str) -> Result<String> {
    if let Some(builtin) = registry::builtin(spec) {
        return Ok(builtin.sha256.to_owned());
    }
    let path = registry::resolve(spec)?;
    if path.is_dir() { HfFolder::open(&path)?.sha256() } else { files::sha256(&path) }
}

impl Model {
    /// Opens what `--model` means: a built-in name (fetched on first use), a GGUF file or a HF folder.
    pub fn load(spec: &str) -> Result<Self> {
        let path = registry::resolve(spec)?;
        let model = Self::open(&path)?;
        match registry::builtin(spec) {
            Some(builtin) if builtin.sha256 != model.sha256 => {
                let problem = format!("is not the {spec} that was fetched; delete it to fetch it again");
                Err(Error::file(path, problem))
            }
            _ => Ok(model),
        }
    }

    /// Opens a GGUF file or a HF folder.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::file(path, "no such model file or folder"));
        }
        if path.is_dir() {
            let folder = HfFolder::open(path)?;
            let tokenizer = Tokenizer::from_file(&folder.tokenizer_path())?;
            let generation = folder.generation()?;
            Self::assemble(folder.config().clone(), &folder, tokenizer, generation, folder.sha256()?)
        } else {
            let gguf = Gguf::open(path)?;
            let tokenizer = Tokenizer::from_gguf(gguf.metadata())?;
            Self::assemble(
                gguf.config().clone(),
                &gguf,
                tokenizer,
                Generation::default(),
                files::sha256(path)?,
            )
        }
    }

    fn assemble(
        config: ModelConfig,
        source: &dyn TensorSource,
        tokenizer: Tokenizer,
        generation: Generation,
        sha256: String,
    ) -> Result<Self> {
        let tokenizer = tokenizer.of_model(config.vocab)?;
        let weights = Weights::load(&config, source)?;
        Ok(Model { decoder: Decoder::new(config, weights), tokenizer, generation, sha256 })
    }
}
