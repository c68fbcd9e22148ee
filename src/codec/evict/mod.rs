//! Evictions: tokens that the model is thought not to need are dropped, the others keep their positions.
//!
//! All heads of a layer keep the same tokens, because a page holds all heads: what is dropped is really freed. Which tokens are kept is
//! side information, a bit a token and layer.

mod expected;
mod h2o;
mod kvzip;
mod observe;
mod snapkv;
mod streaming;

pub use observe::{Needs, Observed, Seen, observe, show_attention};

use super::registry::{Entry, Scale, Search, entry, number};
use super::{CacheBatch, Codec, Coverage, Memo};
use crate::block::{BlockId, BlockTable, Kept, Part};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::ops::Bound;
use std::sync::Arc;

/// Rows of the registry.
pub(super) const METHODS: &[Entry] = &[
    entry::<streaming::Streaming>(),
    entry::<h2o::H2o>(),
    entry::<snapkv::SnapKv>(),
    entry::<expected::Expected>(),
    entry::<kvzip::KvZip>(),
];

/// Decides which tokens of a request stay in a layer.
pub trait Scorer: Send + Sync {
    /// Share of the tokens that stay.
    fn keep(&self) -> f64;

    /// How much each of `tokens` tokens is needed; infinite for those that stay in any case.
    fn scores(&self, tokens: usize, seen: Option<&Seen>) -> Vec<f32>;

    /// What of attention scores come from.
    fn needs(&self) -> Needs;
}

/// A scorer as a codec of all layers.
pub struct Evicting<S>(pub S);

impl<S: Scorer> Codec for Evicting<S> {
    fn coverage(&self, layers: usize) -> Coverage {
        Coverage::of(0..layers)
    }

    fn takes_changed(&self) -> bool {
        false
    }

    fn needs(&self) -> Needs {
        self.0.needs()
    }

    fn encode(&self, batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        let observed = batch.observed.clone();
        if self.0.needs() != Needs::default() && observed.is_none() {
            return Err(Error::argument("needs attention weights, which a model gives; none is at hand"));
        }
        let mut compact = Compact::default();
        for request in 0..batch.caches.len() {
            let tokens = batch.caches[request].tokens;
            let count = ((self.0.keep() * tokens as f64).ceil() as usize).clamp(1.min(tokens), tokens);
            for layer in 0..batch.caches[request].layers.len() {
                let seen = observed.as_ref().map(|o| &o[request].layers[layer]);
                let kept = highest(&self.0.scores(tokens, seen), count);
                compact.keep(batch, request, layer, kept);
            }
        }
        Ok(())
    }
}

/// Indices of the `count` highest scores, rising; of equal ones the latest.
fn highest(scores: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]).then(b.cmp(&a)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// A share of tokens to keep.
fn share() -> impl Fn(&str) -> std::result::Result<f64, String> + Clone {
    number("a share", Bound::Excluded(0.0), Bound::Included(1.0))
}

/// How all evictions are turned from fine to coarse.
const KEEP: Search = Search { option: "keep", fine: 0.999, coarse: 0.02, scale: Scale::Linear };

/// The scores of what was seen, and the first tokens in any case.
fn behind_sinks(tokens: usize, sinks: usize, seen: Option<&Vec<f32>>) -> Vec<f32> {
    let score = |t: usize| seen.and_then(|s| s.get(t)).copied().unwrap_or(0.0);
    (0..tokens).map(|t| if t < sinks { f32::INFINITY } else { score(t) }).collect()
}

/// Pages made of kept tokens: equal ones, of equal sources, are one.
#[derive(Default)]
struct Compact {
    known: HashMap<Vec<(BlockId, usize)>, BlockId>,
}

impl Compact {
    /// Leaves these tokens in a layer of a request.
    fn keep(&mut self, batch: &mut CacheBatch, request: usize, layer: usize, kept: Vec<u32>) {
        let size = batch.pool.shape().block_size;
        let width = batch.pool.shape().token_width();
        let tokens = batch.caches[request].tokens;
        if kept.len() == tokens {
            return;
        }
        let old = std::mem::take(&mut batch.caches[request].layers[layer]);
        let source = |position: &u32| {
            let position = *position as usize;
            (old.entries[position / size].block, position % size)
        };
        let mut table = BlockTable::default();
        for positions in kept.chunks(size) {
            let sources: Vec<(BlockId, usize)> = positions.iter().map(source).collect();
            let (first, whole) = (sources[0].0, batch.pool.tokens(sources[0].0));
            let unchanged =
                sources.len() == whole && sources.iter().enumerate().all(|(i, s)| *s == (first, i));
            let block = match self.known.get(&sources) {
                _ if unchanged => first,
                Some(&block) => block,
                None => {
                    let rows = |part: Part| -> Vec<f32> {
                        // A page is read once for all of its tokens that follow each other.
                        let run = |run: &[(BlockId, usize)]| -> Vec<f32> {
                            let page = batch.pool.numbers(run[0].0, part);
                            run.iter().flat_map(|(_, slot)| &page[slot * width..][..width]).copied().collect()
                        };
                        sources.chunk_by(|a, b| a.0 == b.0).flat_map(run).collect()
                    };
                    let (keys, values) = (rows(Part::Key), rows(Part::Value));
                    let block = batch.pool.allocate(&keys, &values);
                    self.known.insert(sources, block);
                    // The table's own reference is the first.
                    table.push(block);
                    continue;
                }
            };
            batch.pool.retain(block);
            table.push(block);
        }
        table.kept = Some(Arc::new(Kept { positions: kept, tokens }));
        // Pages that this frees may be handed out again; what is known of them would be wrong then.
        let freed: Vec<BlockId> =
            old.entries.iter().map(|e| e.block).filter(|b| batch.pool.references(*b) == 1).collect();
        if !freed.is_empty() {
            self.known.retain(|sources, _| sources.iter().all(|(block, _)| !freed.contains(block)));
        }
        old.release(&mut batch.pool);
        batch.caches[request].layers[layer] = table;
    }
}
