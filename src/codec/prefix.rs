//! Exact prefix sharing, as prefix caching does it: the control that costs no quality.

use super::registry::Method;
use super::sharing::{Shared, share};
use super::{CacheBatch, Codec, Coverage, Memo, Role};
use crate::error::Result;
use serde::Serialize;
use std::collections::HashMap;
use std::sync::Arc;

/// Full blocks whose tokens, and all tokens before them, are equal share one physical block in every layer.
#[derive(Debug, Clone, Copy, Default, Serialize, clap::Args)]
#[serde(rename_all = "kebab-case")]
pub struct Prefix {
    /// Never share a block between tenants
    #[arg(long, action = clap::ArgAction::Set, default_value_t = false, value_name = "BOOL")]
    pub within_tenant: bool,
}

impl Method for Prefix {
    const NAME: &'static str = "prefix";
    const ROLE: Role = Role::Share;
    const ABOUT: &'static str = "Exact prefix sharing: full blocks whose tokens, and all tokens before them, are equal are stored once, in all layers. Lossless; \
                                 what a server with prefix caching has anyway.";
    const PAPER: &'static str =
        "Kwon et al. 2023 (vLLM, arXiv 2309.06180); Zheng et al. 2024 (SGLang, arXiv 2312.07104)";

    const LOSSLESS: bool = true;

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(*self))
    }
}

impl Codec for Prefix {
    fn within_tenant(&self) -> Option<bool> {
        Some(self.within_tenant)
    }

    fn coverage(&self, layers: usize) -> Coverage {
        Coverage::of(0..layers)
    }

    fn encode(&self, batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        let layers = batch.caches.first().map_or(0, |c| c.layers.len());
        share(batch, &self.shared(batch), 0..layers);
        Ok(())
    }
}

impl Prefix {
    /// All blocks that an earlier request has, in request and token order.
    fn shared(&self, batch: &CacheBatch) -> Vec<Shared> {
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
                    shared.push(Shared { request, block, owner: (owner, block) });
                }
            }
        }
        shared
    }
}
