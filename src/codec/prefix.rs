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
    /// All blocks that an earlier request has.
    fn shared(&self, batch: &CacheBatch) -> Vec<Shared> {
        let request = |(tenant, tokens)| (if self.within_tenant { tenant } else { "" }, tokens);
        let tenants = batch.tenants.iter().map(String::as_str);
        let requests = tenants.zip(batch.tokens.iter().map(Vec::as_slice)).map(request);
        repeated(requests, batch.pool.shape().block_size)
    }
}

/// Full blocks of requests (tenant and tokens) whose tokens, and all tokens before them, an earlier request of the tenant has, in request
/// and token order.
pub fn repeated<'a>(requests: impl Iterator<Item = (&'a str, &'a [u32])>, block_size: usize) -> Vec<Shared> {
    let mut shared = Vec::new();
    // The chain of blocks before one, and the block -> the chain with it; and who first had each chain.
    let mut chains: HashMap<(Option<usize>, &str, &[u32]), usize> = HashMap::new();
    let mut owners: Vec<usize> = Vec::new();
    for (request, (tenant, tokens)) in requests.enumerate() {
        let mut before = None;
        for (block, own) in tokens.chunks_exact(block_size).enumerate() {
            let chain = *chains.entry((before, tenant, own)).or_insert_with(|| {
                owners.push(request);
                owners.len() - 1
            });
            if owners[chain] != request {
                shared.push(Shared { request, block, owner: (owners[chain], block) });
            }
            before = Some(chain);
        }
    }
    shared
}
