//! One layer of a dump by itself: its shards, and what fusion makes of it.

use crate::block::{BlockShape, Storage};
use crate::codec::fusion::Fusion;
use crate::codec::{CacheBatch, Chain, Codec, Distortion, LayerRate, Ledger, Memo, distortion};
use crate::dump::{Manifest, Shard, open_request};
use crate::encoded::push_request;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::{Rope, Ropes};
use crate::progress::note;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// The shards of some requests, each open only while it is read: what stays mapped would count as memory.
pub struct Shards<'a> {
    dump: &'a Path,
    manifest: &'a Manifest,
    /// Indices in the dump.
    requests: &'a [usize],
    /// Whole prompts.
    pub tokens: Vec<Vec<u32>>,
}

impl<'a> Shards<'a> {
    /// Checks that they are those that the manifest lists.
    pub fn open(dump: &'a Path, manifest: &'a Manifest, requests: &'a [usize]) -> Result<Self> {
        let tokens = |&i: &usize| Ok(open_request(dump, manifest, i)?.tokens().to_vec());
        let tokens = requests.iter().map(tokens).collect::<Result<_>>()?;
        Ok(Shards { dump, manifest, requests, tokens })
    }

    /// Keys and values of one layer of the n-th request, `[tokens, kv_heads, head_dim]` each.
    pub fn layer(&self, n: usize, layer: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let path = self.manifest.shard_path(self.dump, self.requests[n]);
        Shard::open(&path, &self.manifest.model.config)?.layer(layer)
    }

    /// Caches of one layer in blocks of f16 numbers, all prompt tokens but the last.
    ///
    /// # Errors
    /// Numbers beyond f16.
    pub fn batch(&self, layer: usize, block_size: usize) -> Result<CacheBatch> {
        let config = &self.manifest.model.config;
        let shape = BlockShape { block_size, kv_heads: config.kv_heads, head_dim: config.head_dim };
        let longest = self.tokens.iter().map(Vec::len).max().unwrap_or(1);
        let ropes = Ropes::same(Rope::new(config.layer_rope(layer), longest));
        let mut batch = CacheBatch::empty(shape, Storage::F16, Arc::new(ropes));
        for (n, tokens) in self.tokens.iter().enumerate() {
            interrupt::check()?;
            let own = [self.layer(n, layer)?];
            let request = (self.dump, self.manifest, self.requests[n]);
            push_request(&mut batch, request, &tokens[..tokens.len() - 1], layer, &own)?;
        }
        Ok(batch)
    }
}

/// What a fusion stores of a layer, and its error there. `layer`: which one it is, for what is said.
///
/// # Errors
/// Chains that are no fusion of finished caches; more blocks than its pairing can compare.
pub fn fused_alone(unfused: &CacheBatch, layer: usize, chain: &Chain) -> Result<(LayerRate, Distortion)> {
    let name = chain.name();
    let fusion = chain.fusion().ok_or_else(|| {
        Error::argument(format!("--fuse {name}: is no fusion of finished caches, as bff is"))
    })?;
    let alone = Fusion::of_layer(*fusion.choices(), fusion.rule().clone(), 0)?;
    let mut batch = unfused.clone();
    let started = Instant::now();
    alone.encode(&mut batch, &Memo::default())?;
    let seconds = started.elapsed().as_secs_f64();
    let rate = Ledger::of(&batch, &alone.coverage(1)).layers.swap_remove(0);
    note(&format!("{name} of layer {layer}: {} blocks, {seconds:.1} s", rate.logical_blocks));
    Ok((rate, distortion(unfused, &batch).0))
}
