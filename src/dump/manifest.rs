//! `manifest.json`: all that is needed to know where a dump came from and to check its shards.

use super::shard::DumpDtype;
use crate::error::{Error, IoAt, Result};
use crate::files;
use crate::model::ModelConfig;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

pub const MANIFEST: &str = "manifest.json";
/// Raised when a reader of the old schema would misread the new one.
pub const SCHEMA: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub schema: u32,
    pub kvfuse_version: String,
    /// Arguments of the command that made the dump.
    pub command: Vec<String>,
    pub model: ModelEntry,
    pub data: DataEntry,
    pub seed: u64,
    /// Storage of keys and values.
    pub dtype: DumpDtype,
    /// Leading tokens that all requests share; prefilled once.
    pub shared_prefix_tokens: usize,
    /// Text that ends an answer besides the model's end-of-text tokens.
    pub stop: Option<String>,
    /// Longest answer that the data's authors let a model give, in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_tokens: Option<usize>,
    /// Prompts are wrapped in the model's chat template.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub chat: bool,
    pub requests: Vec<RequestEntry>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelEntry {
    /// As given to `--model`.
    pub name: String,
    pub sha256: String,
    /// Sizes, and base and dims of RoPE (rotate-half).
    pub config: ModelConfig,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataEntry {
    /// As given to `--data`.
    pub name: String,
    pub sha256: String,
    pub template: String,
    /// Ids of the questions shown as worked examples.
    pub shots: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestEntry {
    /// File name of the shard.
    pub shard: String,
    /// Tokens of the prompt.
    pub tokens: usize,
    #[serde(flatten)]
    pub request: crate::task::Request,
}

impl Manifest {
    pub fn read(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::file(folder, "no such dump folder; `kvfuse dump` makes one"));
        }
        let path = folder.join(MANIFEST);
        if !path.exists() {
            return Err(Error::file(&path, "missing; this folder is no dump (`kvfuse dump` makes one)"));
        }
        let text = fs::read_to_string(&path).at(&path)?;
        let bad = |e: serde_json::Error| Error::file(&path, format!("not a dump manifest: {e}"));
        let manifest: Manifest = serde_json::from_str(&text).map_err(bad)?;
        if manifest.schema != SCHEMA {
            let problem = format!("has schema {}, this kvfuse reads {SCHEMA}; dump again", manifest.schema);
            return Err(Error::file(&path, problem));
        }
        if manifest.requests.is_empty() {
            return Err(Error::file(&path, "lists no requests"));
        }
        Ok(manifest)
    }

    /// Whether two manifests describe the same dump, however it was typed.
    pub fn same_dump(&self, other: &Manifest) -> bool {
        let command = other.command.clone();
        Manifest { command, ..self.clone() } == *other
    }

    pub fn write(&self, folder: &Path) -> Result<()> {
        files::write_json(&folder.join(MANIFEST), self)
    }

    pub fn shard_path(&self, folder: &Path, request: usize) -> PathBuf {
        folder.join(&self.requests[request].shard)
    }

    /// Where a dump came from, for the manifests of what is made of it.
    pub fn origin(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({
            "identity": self.identity()?,
            "command": self.command,
            "model": self.model,
            "data": self.data,
            "seed": self.seed,
            "requests": self.requests.len(),
            "dtype": self.dtype,
        }))
    }

    /// SHA-256 of the manifest without its command line: the identity of the dump.
    pub fn identity(&self) -> Result<String> {
        let plain = Manifest { command: Vec::new(), ..self.clone() };
        let json = serde_json::to_vec(&plain).map_err(|e| Error::argument(e.to_string()))?;
        Ok(files::sha256_bytes(&json))
    }
}
