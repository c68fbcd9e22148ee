//! Ways of shrinking a KV cache, and the ledger of what they really store.

mod distortion;
pub mod fusion;
mod ledger;
mod prefix;

pub use distortion::{Distortion, distortion, relative};
pub use ledger::{LayerRate, Ledger};
pub use prefix::Prefix;

use crate::block::{BlockPool, BlockShape, RequestCache, Storage};
use std::ops::Range;

/// The caches of a batch of requests, and the tokens they hold.
#[derive(Clone)]
pub struct CacheBatch {
    pub pool: BlockPool,
    pub caches: Vec<RequestCache>,
    /// Tokens in each cache.
    pub tokens: Vec<Vec<u32>>,
}

impl CacheBatch {
    /// No requests yet, blocks of this shape.
    pub fn empty(shape: BlockShape, storage: Storage) -> Self {
        CacheBatch { pool: BlockPool::new(shape, storage), caches: Vec::new(), tokens: Vec::new() }
    }
}

/// A way of shrinking the caches of a batch: it changes block tables and scales, and frees blocks of the pool.
pub trait Codec: Sync {
    /// The layers it touches, of `layers`.
    fn layers(&self, layers: usize) -> Range<usize>;

    /// Encodes in place. Afterwards the pool holds what the codec stores and nothing else.
    fn encode(&self, batch: &mut CacheBatch);
}

/// Leaves everything as it is: the control.
pub struct Unfused;

impl Codec for Unfused {
    fn layers(&self, _layers: usize) -> Range<usize> {
        0..0
    }

    fn encode(&self, _batch: &mut CacheBatch) {}
}
