//! Blocks that share storage, whoever made them do so.

use super::CacheBatch;
use crate::block::BlockId;
use std::collections::HashMap;
use std::ops::Range;

/// A block of a request whose numbers are those of an earlier block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shared {
    pub request: usize,
    pub block: usize,
    /// The earliest block that has them: request and block.
    pub owner: (usize, usize),
}

/// Points blocks at what their owners point at, in some layers.
pub(super) fn share(batch: &mut CacheBatch, shared: &[Shared], layers: Range<usize>) {
    for &Shared { request, block, owner } in shared {
        for layer in layers.clone() {
            let entry = batch.caches[owner.0].layers[layer].entries[owner.1];
            batch.caches[request].layers[layer].replace(&mut batch.pool, block, entry);
        }
    }
}

/// All full blocks that point, in every layer, at what an earlier block points at; in request and token order.
pub(super) fn sharing(batch: &CacheBatch) -> Vec<Shared> {
    let size = batch.pool.shape().block_size;
    let mut first: HashMap<Vec<BlockId>, (usize, usize)> = HashMap::new();
    let mut shared = Vec::new();
    for (request, cache) in batch.caches.iter().enumerate() {
        for block in 0..cache.tokens / size {
            let ids = cache.layers.iter().map(|table| table.entries[block].block).collect();
            let owner = *first.entry(ids).or_insert((request, block));
            if owner != (request, block) {
                shared.push(Shared { request, block, owner });
            }
        }
    }
    shared
}
