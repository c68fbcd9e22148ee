//! Ways of shrinking a KV cache, and the ledger of what they really store.

mod distortion;
pub mod fusion;
mod ledger;
mod prefix;
mod prefix_fusion;

pub use distortion::{
    Distortion, Drift, distortion, distortion_by_layer, distortion_in, relative, relative_error,
};
pub use ledger::{LayerRate, Ledger};
pub use prefix::Prefix;
pub use prefix_fusion::PrefixFusion;

use crate::block::{BlockPool, BlockShape, RequestCache, Storage};
use crate::error::Result;
use crate::model::Ropes;
use fusion::Blocks;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// The caches of a batch of requests, and the tokens they hold.
#[derive(Clone)]
pub struct CacheBatch {
    pub pool: BlockPool,
    pub caches: Vec<RequestCache>,
    /// Tokens in each cache.
    pub tokens: Vec<Vec<u32>>,
    /// Whose request each is.
    pub tenants: Vec<String>,
    /// What turns the keys of this model's layers.
    pub ropes: Arc<Ropes>,
}

impl CacheBatch {
    /// No requests yet, blocks of this shape.
    pub fn empty(shape: BlockShape, storage: Storage, ropes: Arc<Ropes>) -> Self {
        CacheBatch {
            pool: BlockPool::new(shape, storage),
            caches: Vec::new(),
            tokens: Vec::new(),
            tenants: Vec::new(),
            ropes,
        }
    }

    pub fn push(&mut self, cache: RequestCache, tokens: Vec<u32>, tenant: &str) {
        self.caches.push(cache);
        self.tokens.push(tokens);
        self.tenants.push(tenant.to_owned());
    }

    /// Whether a block of a request shares storage with another, or is restored from numbers that were made for several.
    pub fn is_fused(&self, request: usize, layer: usize, block: usize) -> bool {
        let entry = &self.caches[request].layers[layer].entries[block];
        entry.fused || self.pool.references(entry.block) > 1
    }

    /// Keys and values of one block of one request as attention reads them: scaled, and turned to their positions.
    /// `[tokens, kv_heads, head_dim]` each.
    pub fn read(&self, request: usize, layer: usize, block: usize) -> (Vec<f32>, Vec<f32>) {
        let entry = &self.caches[request].layers[layer].entries[block];
        let shape = self.pool.shape();
        let mut keys = self.pool.keys(entry.block).to_vec();
        if entry.stripped {
            let rope = self.ropes.layer(layer);
            rope.rotate_tokens(&mut keys, shape.token_width(), block * shape.block_size);
        }
        keys.iter_mut().for_each(|x| *x *= entry.key_scale());
        let values = self.pool.values(entry.block).iter().map(|x| x * entry.value_scale()).collect();
        (keys, values)
    }
}

/// What a codec touches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    pub layers: Range<usize>,
    /// Consecutive touched layers that share one block table and one set of scales.
    pub table_layers: usize,
    /// Only so many first tokens of every request were offered for fusion, counted in whole stretches of this; the paper's ratio
    /// counts these blocks alone. `None`: all full blocks.
    pub leaf_tokens: Option<usize>,
}

impl Coverage {
    /// These layers, a table each.
    pub fn of(layers: Range<usize>) -> Self {
        Coverage { layers, table_layers: 1, leaf_tokens: None }
    }
}

/// What arms over the same unfused batch have in common and compute only once: its blocks and their similarities.
#[derive(Default)]
pub struct Memo {
    blocks: OnceLock<Blocks>,
    /// Of the blocks that exact prefix sharing leaves: between all requests, and within tenants.
    unshared: [OnceLock<Blocks>; 2],
}

impl Memo {
    /// The blocks of the batch this memo is for.
    pub fn blocks(&self, batch: &CacheBatch) -> &Blocks {
        self.blocks.get_or_init(|| Blocks::of_requests(batch))
    }

    /// The blocks that are left after exact prefix sharing, listed by `list` the first time.
    pub fn unshared(&self, within_tenant: bool, list: impl FnOnce() -> Blocks) -> &Blocks {
        self.unshared[usize::from(within_tenant)].get_or_init(list)
    }
}

/// A way of shrinking the caches of a batch: it changes block tables and scales, and frees blocks of the pool.
pub trait Codec: Sync {
    /// What it touches of a model of so many layers.
    fn coverage(&self, layers: usize) -> Coverage;

    /// Encodes in place. Afterwards the pool holds what the codec stores and nothing else. All calls with one memo must
    /// be given clones of the same batch.
    fn encode(&self, batch: &mut CacheBatch, memo: &Memo) -> Result<()>;
}

/// Leaves everything as it is: the control.
pub struct Unfused;

impl Codec for Unfused {
    fn coverage(&self, _layers: usize) -> Coverage {
        Coverage::of(0..0)
    }

    fn encode(&self, _batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        Ok(())
    }
}
