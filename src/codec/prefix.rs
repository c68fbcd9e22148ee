//! Exact prefix sharing, as prefix caching does it: the control that costs no quality.

use super::{CacheBatch, Codec, Coverage, Memo};
use crate::block::Entry;
use crate::error::Result;
use std::collections::HashMap;

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
        let CacheBatch { pool, caches, tokens, tenants, .. } = batch;
        let size = pool.shape().block_size;
        // A chain of tokens up to a block's end -> the request that first had it.
        let mut first: HashMap<(&str, &[u32]), usize> = HashMap::new();
        for request in 0..caches.len() {
            let tenant = if self.within_tenant { &tenants[request][..] } else { "" };
            for block in 0..tokens[request].len() / size {
                let chain = &tokens[request][..(block + 1) * size];
                let owner = *first.entry((tenant, chain)).or_insert(request);
                if owner == request {
                    continue;
                }
                for layer in 0..caches[request].layers.len() {
                    let entry: Entry = caches[owner].layers[layer].entries[block];
                    caches[request].layers[layer].replace(pool, block, entry);
                }
            }
        }
        Ok(())
    }
}
