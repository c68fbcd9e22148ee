//! Exact prefix sharing, as prefix caching does it: the control that costs no quality.

use super::{CacheBatch, Codec};
use crate::block::Entry;
use std::collections::HashMap;
use std::ops::Range;

/// Full blocks whose tokens, and all tokens before them, are equal share one physical block in every layer.
pub struct Prefix;

impl Codec for Prefix {
    fn layers(&self, layers: usize) -> Range<usize> {
        0..layers
    }

    fn encode(&self, batch: &mut CacheBatch) {
        let CacheBatch { pool, caches, tokens } = batch;
        let size = pool.shape().block_size;
        // A chain of tokens up to a block's end -> the request that first had it.
        let mut first: HashMap<&[u32], usize> = HashMap::new();
        for request in 0..caches.len() {
            for block in 0..tokens[request].len() / size {
                let chain = &tokens[request][..(block + 1) * size];
                let owner = *first.entry(chain).or_insert(request);
                if owner == request {
                    continue;
                }
                for layer in 0..caches[request].layers.len() {
                    let entry: Entry = caches[owner].layers[layer].entries[block];
                    caches[request].layers[layer].replace(pool, block, entry);
                }
            }
        }
    }
}
