//! `manifest.json`: all that is needed to know where a dump came from and to check its shards.

use super::shard::DumpDtype;
use crate::error::{Error, Result};
use crate::files;
use crate::model::{ModelConfig, NUMERICS};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub const MANIFEST: &str = "manifest.json";
/// Raised when a reader of the old schema would misread the new one.
pub const SCHEMA: u32 = 2;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub schema: u32,
    pub kvfuse_version: String,
    /// [`NUMERICS`] of the code that made the dump.
    pub numerics: u32,
    /// Instruction sets of the machines that made the dump ([`instructions`](crate::model::kernels::instructions)); no part of its
    /// identity, which its shards' checksums are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernels: Vec<String>,
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
    /// The chain that encoded the caches, where they were decoded from a file; `bits` are then its ledger's, dealt by tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoded: Option<EncodedBy>,
    pub requests: Vec<RequestEntry>,
}

/// What caches were encoded by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EncodedBy {
    /// The chain in normal form.
    pub method: String,
    /// `stage.option` -> value, defaults filled in.
    pub options: BTreeMap<String, Value>,
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
    /// SHA-256 of the shard; empty until it is written. A dump is complete when every shard has one.
    #[serde(default)]
    pub sha256: String,
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Bits that the cache took where it was rebuilt by another program (docs/external.md) or encoded; absent of a dump.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u64>,
    #[serde(flatten)]
    pub request: crate::task::Request,
}

impl Manifest {
    /// Reads the manifest of a complete dump.
    pub fn read(folder: &Path) -> Result<Self> {
        let manifest = Self::read_unfinished(folder)?;
        if manifest.numerics != NUMERICS {
            let problem = format!(
                "was made by a decoder of other numerics ({}, this is {NUMERICS}); dump again into another folder",
                manifest.numerics
            );
            return Err(Error::file(folder.join(MANIFEST), problem));
        }
        if let Some(missing) = manifest.requests.iter().find(|r| r.sha256.is_empty()) {
            let problem = "missing or unfinished; run the same dump command again to complete the dump";
            return Err(Error::file(folder.join(&missing.shard), problem));
        }
        Ok(manifest)
    }

    /// Reads the manifest of a dump that may still lack shards.
    pub fn read_unfinished(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::file(folder, "no such dump folder; `kvfuse dump` makes one"));
        }
        let path = folder.join(MANIFEST);
        if !path.exists() {
            return Err(Error::file(&path, "missing; this folder is no dump (`kvfuse dump` makes one)"));
        }
        let text = files::read_text(&path)?;
        let bad = |e: serde_json::Error| Error::file(&path, format!("not a dump manifest: {e}"));
        let value: serde_json::Value = serde_json::from_str(&text).map_err(bad)?;
        let schema = value["schema"].as_u64().unwrap_or(SCHEMA.into());
        if schema != u64::from(SCHEMA) {
            let problem = format!("has schema {schema}, this kvfuse reads {SCHEMA}; dump again");
            return Err(Error::file(&path, problem));
        }
        let manifest: Manifest = serde_json::from_value(value).map_err(bad)?;
        if manifest.requests.is_empty() {
            return Err(Error::file(&path, "lists no requests"));
        }
        manifest.model.config.check(&path)?;
        Ok(manifest)
    }

    /// Whether two manifests describe the same dump, however it was typed and however far it has come.
    pub fn same_dump(&self, other: &Manifest) -> bool {
        self.bare() == other.bare()
    }

    /// Without its command line and its shards' checksums.
    fn bare(&self) -> Manifest {
        let mut bare = Manifest { command: Vec::new(), kernels: Vec::new(), ..self.clone() };
        bare.requests.iter_mut().for_each(|r| r.sha256.clear());
        bare
    }

    /// SHA-256 of what the dump is to be: model, data, options and prompts. Every shard carries it.
    pub fn plan(&self) -> Result<String> {
        checksum(&self.bare())
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

    /// SHA-256 of the manifest without its command line, but with its shards' checksums: the identity of the dump and of the
    /// caches in it.
    pub fn identity(&self) -> Result<String> {
        checksum(&Manifest { command: Vec::new(), kernels: Vec::new(), ..self.clone() })
    }
}

fn checksum(manifest: &Manifest) -> Result<String> {
    let json = serde_json::to_vec(manifest).map_err(|e| Error::argument(e.to_string()))?;
    Ok(files::sha256_bytes(&json))
}
