//! What a decoder needs to know of a model, read from GGUF metadata or from a HF `config.json`.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Rotary position embedding, rotate-half layout.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// Wavelength base (theta).
    pub base: f64,
    /// Numbers of a head that are rotated; all of them in the llama architecture.
    pub dims: usize,
}

/// Sizes and constants of a decoder of a llama-like architecture (docs/models.md).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub architecture: String,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    pub vocab: usize,
    /// Longest sequence the model was trained for, in tokens.
    pub context: usize,
    pub rms_epsilon: f32,
    pub rope: RopeConfig,
}

impl ModelConfig {
    /// Multiply-accumulates a token costs in the linear layers of the decoder, embeddings and output head apart.
    pub fn non_embedding_parameters(&self) -> usize {
        let q = self.heads * self.head_dim;
        let kv = self.kv_heads * self.head_dim;
        let attention = self.hidden * (q + 2 * kv) + q * self.hidden;
        self.layers * (attention + 3 * self.hidden * self.intermediate)
    }

    /// Refuses sizes no decoder can have.
    pub fn checked(self, path: &Path) -> Result<Self> {
        let sizes = [
            ("layers", self.layers),
            ("hidden size", self.hidden),
            ("attention heads", self.heads),
            ("key/value heads", self.kv_heads),
            ("head size", self.head_dim),
            ("intermediate size", self.intermediate),
            ("vocabulary size", self.vocab),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, n)| *n == 0) {
            return Err(Error::file(path, format!("{name} is missing or zero; not a usable model")));
        }
        let whole = self.heads.is_multiple_of(self.kv_heads) && self.head_dim.is_multiple_of(2);
        if !whole || self.rope.dims != self.head_dim {
            let problem = format!(
                "{} heads over {} key/value heads of size {} with {} rotated are not a decoder of these architectures",
                self.heads, self.kv_heads, self.head_dim, self.rope.dims
            );
            return Err(Error::file(path, problem));
        }
        Ok(self)
    }
}

/// The architectures this version decodes. `qwen2` is `llama` with biases on queries, keys and values.
pub const ARCHITECTURES: [&str; 2] = ["llama", "qwen2"];

pub(super) fn unknown_architecture(path: &Path, name: &str) -> Error {
    let known = ARCHITECTURES.join("' or '");
    let problem = format!("architecture '{name}' is not supported; use a '{known}' model");
    Error::file(path, problem)
}
