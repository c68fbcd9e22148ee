//! Exact prefix sharing, then fusion of what is left: what a server with prefix caching gains from fusion.

use super::fusion::{Blocks, Fusion};
use super::prefix::{Prefix, Shared, share};
use super::{CacheBatch, Codec, Coverage, Memo};
use crate::error::Result;
use std::collections::HashSet;

/// [`Prefix`] in all layers, then [`Fusion`] of the blocks that nobody earlier has. Layers that fusion spares keep what prefix
/// sharing gives them; requests that share a block share what it is fused to.
pub struct PrefixFusion {
    prefix: Prefix,
    fusion: Fusion,
}

impl PrefixFusion {
    /// Both within tenants, if fusion is.
    pub fn new(fusion: Fusion) -> Self {
        PrefixFusion { prefix: Prefix { within_tenant: fusion.choices().within_tenant }, fusion }
    }
}

impl Codec for PrefixFusion {
    /// What fusion touches: the paper counts these layers only.
    fn coverage(&self, layers: usize) -> Coverage {
        self.fusion.coverage(layers)
    }

    fn encode(&self, batch: &mut CacheBatch, memo: &Memo) -> Result<()> {
        let shared = self.prefix.shared(batch);
        self.prefix.encode(batch, memo)?;
        let blocks = memo.unshared(self.prefix.within_tenant, || {
            let shared: HashSet<(usize, usize)> =
                shared.iter().map(|&Shared { request, block, .. }| (request, block)).collect();
            Blocks::of_requests_without(batch, &shared)
        });
        self.fusion.encode_blocks(batch, blocks)?;
        let layers = batch.caches.first().map_or(0, |c| c.layers.len());
        share(batch, &shared, self.fusion.coverage(layers).layers);
        Ok(())
    }
}
