//! Exact prefix sharing, as prefix caching does it: the control that costs no quality.

use super::{CacheBatch, Codec, Coverage, Memo};
use crate::block::Entry;
use crate::error::Result;
use std::collections::HashMap;
use std::ops::Range;

/// Full blocks whose tokens, and all tokens before them, are equal share one physical block in every layer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Prefix {
    /// Whether requests of different tenants must not share.
    pub within_tenant: bool,
}

impl Codec for Prefix {
    fn coverage(&self, layers: usize) -> Coverage {
        Coverage::of(0..layers)
    }

    fn encode(&self, batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        let layers = batch.caches.first().map_or(0, |c| c.layers.len());
        share(batch, &self.shared(batch), 0..layers);
        Ok(())
    }
}

/// A block of a request whose numbers are another request's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shared {
    pub request: usize,
    pub block: usize,
    /// The earliest request that has it.
    pub owner: usize,
}

/// Points blocks at what their owners point at, in some layers.
pub(super) fn share(batch: &mut CacheBatch, shared: &[Shared], layers: Range<usize>) {
    for &Shared { request, block, owner } in shared {
        for layer in layers.clone() {
            let entry: Entry = batch.caches[owner].layers[layer].entries[block];
            batch.caches[request].layers[layer].replace(&mut batch.pool, block, entry);
        }
    }
}

impl Prefix {
    /// All blocks that an earlier request has, in request and token order.
    pub(super) fn shared(&self, batch: &CacheBatch) -> Vec<Shared> {
        let CacheBatch { pool, caches, tokens, tenants, .. } = batch;
        let size = pool.shape().block_size;
        let mut shared = Vec::new();
        // A chain of tokens up to a block's end -> the request that first had it.
        let mut first: HashMap<(&str, &[u32]), usize> = HashMap::new();
        for request in 0..caches.len() {
            let tenant = if self.within_tenant { &tenants[request][..] } else { "" };
            for block in 0..tokens[request].len() / size {
                let chain = &tokens[request][..(block + 1) * size];
                let owner = *first.entry((tenant, chain)).or_insert(request);
                if owner != request {
                    shared.push(Shared { request, block, owner });
                }
            }
        }
        shared
    }
}
