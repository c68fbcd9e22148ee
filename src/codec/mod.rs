//! Ways of shrinking a KV cache, and the ledger of what they really store.

mod chain;
mod columns;
mod distortion;
pub mod evict;
mod external;
pub mod fusion;
pub mod joint;
pub mod kvtc;
mod ledger;
mod lowrank;
mod minicache;
mod prefix;
pub mod quantize;
mod random;
pub mod registry;
mod sharing;
pub mod spec;
mod trained;

pub use chain::{Chain, Stage, Turnable};
pub use distortion::{
    Distortion, Drift, distortion, distortion_by_layer, distortion_in, relative, relative_error,
};
pub use ledger::{LayerRate, Ledger};
pub use prefix::{Prefix, repeated};
pub use quantize::PageShape;
pub use random::Random;
pub use registry::Method;
pub use trained::TrainedFile;

use crate::block::{BlockPool, BlockShape, RequestCache, Storage};
use crate::error::{Error, Result};
use crate::model::Ropes;
use evict::{Needs, Observed};
use fusion::{Blocks, ChunkFusion, Fusion};
use joint::Bound;
use serde::Serialize;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

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
    /// How tokens were attended to in prefill, request by request, where a codec needs it.
    pub observed: Option<Arc<Vec<Observed>>>,
    /// Blocks of every request that stand before those that are here: a server keeps ends of prompts by themselves.
    pub first_block: usize,
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
            observed: None,
            first_block: 0,
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
        let mut keys = self.pool.keys(entry.block).into_owned();
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
    /// What was trained beforehand and is charged with the caches.
    pub trained: Trained,
}

/// A trained file's bits, paid for by a number of cached tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Trained {
    pub bits: u64,
    /// All requests' tokens together that the file serves; 0 if there is none.
    pub tokens: u64,
}

impl Trained {
    /// The share of so many tokens.
    fn share(&self, tokens: u64) -> u64 {
        if self.tokens == 0 {
            0
        } else {
            (u128::from(self.bits) * u128::from(tokens) / u128::from(self.tokens)) as u64
        }
    }
}

impl Coverage {
    /// These layers, a table each.
    pub fn of(layers: Range<usize>) -> Self {
        Coverage { layers, table_layers: 1, leaf_tokens: None, trained: Trained::default() }
    }
}

/// What arms over the same batch have in common and compute only once: its blocks and their similarities.
#[derive(Default)]
pub struct Memo {
    blocks: OnceLock<Blocks>,
    observed: Mutex<Vec<(Needs, Arc<Vec<Observed>>)>>,
    /// Of what stages of chains leave of the batch, by the stage.
    next: Mutex<HashMap<String, Arc<Memo>>>,
}

impl Memo {
    /// The blocks of the batch this memo is for, each once.
    pub fn blocks(&self, batch: &CacheBatch) -> &Blocks {
        self.blocks.get_or_init(|| Blocks::of_requests(batch))
    }

    /// How the batch's tokens were attended to, as far as that is needed; measured once.
    pub fn observed(
        &self,
        needs: Needs,
        measure: impl FnOnce() -> Result<Vec<Observed>>,
    ) -> Result<Arc<Vec<Observed>>> {
        let mut known = self.observed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, found)) = known.iter().find(|(has, _)| has.cover(needs)) {
            return Ok(Arc::clone(found));
        }
        let found = Arc::new(measure()?);
        known.push((needs, Arc::clone(&found)));
        Ok(found)
    }

    /// The memo of the batch after a stage of this name.
    pub fn after(&self, stage: &str) -> Arc<Memo> {
        // A panic elsewhere leaves the map as it was.
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(next.entry(stage.to_owned()).or_default())
    }
}

/// What a codec does to caches. In a chain, roles rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    Nothing,
    /// Points equal blocks at one.
    Share,
    /// Points similar blocks at one.
    Fuse,
    /// Drops tokens.
    Evict,
    /// Stores the blocks that are left in fewer bits.
    Code,
    /// Puts other caches in their place.
    Whole,
}

/// A way of shrinking the caches of a batch: it changes block tables and scales, and frees blocks of the pool.
pub trait Codec: Send + Sync {
    /// Whether it shares within tenants only; `None` if it shares nothing.
    fn within_tenant(&self) -> Option<bool> {
        None
    }

    /// The fusion it is, if it is one of finished caches.
    fn fusion(&self) -> Option<&Fusion> {
        None
    }

    /// If it prefills anew instead of encoding finished caches: how.
    fn chunks(&self) -> Option<&ChunkFusion> {
        None
    }

    /// Whether it takes what fusions and evictions leave: blocks with scales or without positions, tokens with gaps.
    fn takes_changed(&self) -> bool {
        true
    }

    /// Whether full pages of this shape can be read from their bytes as they are used ([`crate::block::ReadPage`]).
    fn reads_in_place(&self, _shape: BlockShape) -> bool {
        false
    }

    /// Whether the bytes of a block of tokens can be read without those of others.
    fn blocks_stand_alone(&self) -> bool {
        false
    }

    /// What it must know of how tokens were attended to ([`CacheBatch::observed`]).
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// The trained file that it works with, if it does: where it is and its SHA-256.
    fn trained_file(&self) -> Option<(&Path, &str)> {
        None
    }

    /// Rebuilds in place what [`Codec::encode`] coded: pages of the pool hold payloads, and zeros for their numbers.
    ///
    /// # Errors
    /// Payloads that are not this codec's.
    fn decode(&self, _batch: &mut CacheBatch) -> Result<()> {
        Err(Error::argument("its pages are not coded"))
    }

    /// Encodes, and says how far it is from the Gaussian bound of its own predictors.
    ///
    /// # Errors
    /// Codecs without such a bound.
    fn bound(&self, _batch: &mut CacheBatch) -> Result<Bound> {
        Err(Error::argument("it has no Gaussian bound; joint has"))
    }

    /// What it touches of a model of so many layers.
    fn coverage(&self, layers: usize) -> Coverage;

    /// Encodes in place. Afterwards the pool holds what the codec stores and nothing else. All calls with one memo must
    /// be given clones of the same batch.
    fn encode(&self, batch: &mut CacheBatch, memo: &Memo) -> Result<()>;
}

/// Leaves everything as it is: the control.
#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct Unfused {}

impl Method for Unfused {
    const NAME: &'static str = "none";
    const ROLE: Role = Role::Nothing;
    const ABOUT: &'static str =
        "The caches as they are, in 16 bits a number: the control that every arm is compared with.";
    const PAPER: &'static str = "";
    const LOSSLESS: bool = true;

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(*self))
    }
}

impl Codec for Unfused {
    fn coverage(&self, _layers: usize) -> Coverage {
        Coverage::of(0..0)
    }

    fn encode(&self, _batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        Ok(())
    }
}
