//! Random fusion: as many blocks are gone as a fusion would take, whichever they are. What a fusion is worth is its distance to this.

use super::registry::{Method, Scale, Search, number};
use super::{CacheBatch, Codec, Coverage, Memo, Role};
use crate::block::{BlockId, Entry, Scale as Gain};
use crate::error::Result;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
#[serde(rename_all = "kebab-case")]
pub struct Random {
    /// Share of each layer's distinct full blocks that are replaced by another one
    #[arg(long, default_value_t = 0.2, value_parser = number("a share", Bound::Excluded(0.0), Bound::Excluded(1.0)))]
    share: f64,
    /// First and last layers that stay as they are
    #[arg(long, default_value_t = 2)]
    spare_layers: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl Method for Random {
    const NAME: &'static str = "random";
    const ROLE: Role = Role::Fuse;
    const ABOUT: &'static str = "A control for fusion: some blocks, drawn at random, are replaced by others of their layer, drawn at random, with their own norms restored.";
    const PAPER: &'static str = "a control";
    const DIALS: &'static [&'static str] = &["share"];
    const SEARCH: Option<Search> =
        Some(Search { option: "share", fine: 0.001, coarse: 0.99, scale: Scale::Linear });

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(*self))
    }
}

fn norm(x: &[f32]) -> f32 {
    x.iter().map(|x| x * x).sum::<f32>().sqrt()
}

/// What turns the norm of one into that of another; as it is where there is none.
fn gain(own: &[f32], other: &[f32]) -> f32 {
    let (own, other) = (norm(own), norm(other));
    if other > 0.0 { own / other } else { 1.0 }
}

impl Codec for Random {
    fn coverage(&self, layers: usize) -> Coverage {
        let spare = self.spare_layers.min(layers / 2);
        Coverage::of(spare..layers - spare)
    }

    fn takes_changed(&self) -> bool {
        false
    }

    fn encode(&self, batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        let layers = batch.caches.first().map_or(0, |c| c.layers.len());
        let size = batch.pool.shape().block_size;
        for layer in self.coverage(layers).layers {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ (layer as u64) << 32);
            // Tenants keep to themselves; blocks of several tenants stay as they are.
            let mut tenants: BTreeMap<BlockId, BTreeSet<&str>> = BTreeMap::new();
            for (cache, tenant) in batch.caches.iter().zip(&batch.tenants) {
                for entry in &cache.layers[layer].entries {
                    if batch.pool.tokens(entry.block) == size {
                        tenants.entry(entry.block).or_default().insert(tenant);
                    }
                }
            }
            let mut by_tenant: BTreeMap<&str, Vec<BlockId>> = BTreeMap::new();
            for (block, owners) in tenants {
                if let (Some(owner), 1) = (owners.first(), owners.len()) {
                    by_tenant.entry(owner).or_default().push(block);
                }
            }
            let mut replaced: HashMap<BlockId, BlockId> = HashMap::new();
            for mut blocks in by_tenant.into_values() {
                blocks.shuffle(&mut rng);
                let gone = (self.share * blocks.len() as f64).round() as usize;
                let (gone, stay) = blocks.split_at(gone.min(blocks.len().saturating_sub(1)));
                replaced.extend(gone.iter().enumerate().map(|(i, &b)| (b, stay[i % stay.len()])));
            }
            for request in 0..batch.caches.len() {
                for block in 0..batch.caches[request].layers[layer].entries.len() {
                    let own = batch.caches[request].layers[layer].entries[block].block;
                    let Some(&other) = replaced.get(&own) else { continue };
                    let pool = &batch.pool;
                    let scale = Gain {
                        key: gain(&pool.keys(own), &pool.keys(other)),
                        value: gain(&pool.values(own), &pool.values(other)),
                    };
                    let entry = Entry { scale: Some(scale), fused: true, ..Entry::plain(other) };
                    batch.caches[request].layers[layer].replace(&mut batch.pool, block, entry);
                }
            }
        }
        Ok(())
    }
}
