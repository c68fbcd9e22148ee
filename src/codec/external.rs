//! Caches that another program rebuilt: a dump whose manifest says how many bits each request took (docs/external.md).

use super::registry::Method;
use super::{CacheBatch, Codec, Coverage, Memo, Role};
use crate::block::Payload;
use crate::dump::{Manifest, Shard, open_request};
use crate::error::{Error, Result};
use serde::{Serialize, Serializer};
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Debug, Clone, Serialize, clap::Args)]
pub struct External {
    /// Dump with the caches as they are read back, and with the bits of each request
    #[arg(long, value_name = "DIR", value_parser = Rebuilt::read, value_hint = clap::ValueHint::FilePath)]
    dir: Option<Rebuilt>,
}

/// A dump made elsewhere, known by its name and checksum.
#[derive(Debug, Clone)]
struct Rebuilt {
    folder: PathBuf,
    manifest: Arc<Manifest>,
    name: String,
}

impl Rebuilt {
    fn read(path: &str) -> std::result::Result<Self, String> {
        let folder = PathBuf::from(path);
        let read = || {
            let manifest = Manifest::read(&folder)?;
            if let Some(missing) = manifest.requests.iter().find(|r| r.bits.is_none_or(|bits| bits == 0)) {
                let problem = format!(
                    "its manifest does not say how many bits request {} takes (requests[].bits)",
                    missing.request.id
                );
                return Err(Error::file(&folder, problem));
            }
            let stem = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let name = format!("{stem}-{}", &manifest.identity()?[..8]);
            Ok(Rebuilt { folder: folder.clone(), manifest: Arc::new(manifest), name })
        };
        read().map_err(|e: Error| e.to_string())
    }
}

impl Serialize for Rebuilt {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name)
    }
}

impl Method for External {
    const NAME: &'static str = "external";
    const ROLE: Role = Role::Whole;
    const ABOUT: &'static str = "Caches that another program rebuilt, with the bits it says they took. Read as they are and charged as said.";
    const PAPER: &'static str = "";

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        match &self.dir {
            Some(rebuilt) => Ok(Arc::new(rebuilt.clone())),
            None => Err(Error::argument("external needs dir=DIR")),
        }
    }
}

impl Rebuilt {
    /// The shard of a request, by its tokens, and the bits it took.
    fn shard(&self, tokens: &[u32]) -> Result<(Shard, u64)> {
        for (i, entry) in self.manifest.requests.iter().enumerate() {
            // A sweep leaves the last prompt token out of the cache.
            if !(tokens.len()..=tokens.len() + 1).contains(&entry.tokens) {
                continue;
            }
            let shard = open_request(&self.folder, &self.manifest, i)?;
            if shard.tokens().starts_with(tokens) {
                return Ok((shard, entry.bits.unwrap_or_default()));
            }
        }
        let problem = format!("holds no request with the {} tokens of one that is swept", tokens.len());
        Err(Error::file(&self.folder, problem))
    }
}

impl Codec for Rebuilt {
    fn coverage(&self, layers: usize) -> Coverage {
        Coverage::of(0..layers)
    }

    fn encode(&self, batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        let shape = batch.pool.shape();
        let config = &self.manifest.model.config;
        let layers = batch.caches.first().map_or(0, |c| c.layers.len());
        if (config.kv_heads, config.head_dim, config.layers) != (shape.kv_heads, shape.head_dim, layers) {
            return Err(Error::file(&self.folder, "is of a model of another shape"));
        }
        for request in 0..batch.caches.len() {
            let (shard, bits) = self.shard(&batch.tokens[request])?;
            for layer in 0..layers {
                let (keys, values) = shard.layer(layer)?;
                let width = shape.block_width();
                let entries = batch.caches[request].layers[layer].entries.clone();
                let pages = keys.chunks(width).zip(values.chunks(width)).zip(&entries);
                for (i, ((keys, values), entry)) in pages.enumerate() {
                    let numbers = batch.pool.keys(entry.block).len();
                    let (keys, values) =
                        (batch.pool.round(&keys[..numbers]), batch.pool.round(&values[..numbers]));
                    // All bits of a layer stand with its first page; what a division leaves, with the first layer.
                    let own = bits / layers as u64 + if layer == 0 { bits % layers as u64 } else { 0 };
                    let code_bits = if i == 0 { own } else { 0 };
                    let payload = Payload { bytes: Vec::new(), code_bits, side_bits: 0 };
                    batch.pool.recode(entry.block, keys, values, payload, None);
                }
            }
        }
        Ok(())
    }
}
