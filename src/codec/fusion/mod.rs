//! Fusion of similar blocks: of different requests (the paper's BFF) or of different chunks of one prompt (CFF).
//!
//! Pairing, similarity, representative and scale are independent choices ([`Choices`]); the default is the paper's
//! algorithm (docs/fusion.md).

mod blocks;
mod choices;
mod chunks;
mod cluster;
mod geometry;
mod gram;
mod lsh;
mod methods;
mod rule;
mod settle;
mod thresholds;
mod tree;

pub use blocks::keep_tables;
pub use blocks::{Blocks, Place};
pub use choices::{Choices, Pairing, Positions, Representative, RopeMode, ScaleRule, Similarity};
pub use chunks::ChunkFusion;
pub use gram::gram;
pub use lsh::Signatures;
pub(super) use methods::METHODS;
pub use rule::{Gate, Rule};
pub use thresholds::{LayerThresholds, Thresholds};

use super::sharing::share;
use super::{CacheBatch, Codec, Coverage, Memo};
use crate::block::{Entry, Part};
use crate::error::{Error, Result};
use cluster::Cluster;
use geometry::{Geometry, Units};
use rayon::prelude::*;
use settle::{Fused, Settling, Source};
use std::ops::Range;
use tree::Tree;

/// Fusion of similar blocks by some choices and a rule.
#[derive(Debug, Clone)]
pub struct Fusion {
    choices: Choices,
    rule: Rule,
    /// Layers to touch, if not all that the paper does.
    only: Option<Range<usize>>,
}

/// From so many blocks on, layers are planned one after the other: their tables would take too much memory together.
const MANY_BLOCKS: usize = 4096;

impl Fusion {
    pub fn new(choices: Choices, rule: Rule) -> Result<Self> {
        rule.check(&choices)?;
        if choices.group_layers == 0 {
            return Err(Error::argument("group-layers must be at least 1"));
        }
        Ok(Fusion { choices, rule, only: None })
    }

    /// The paper's algorithm at a threshold.
    pub fn paper(tau: f64) -> Result<Self> {
        Self::new(Choices::default(), Rule::Tau(tau))
    }

    /// Touches one layer only.
    pub fn of_layer(choices: Choices, rule: Rule, layer: usize) -> Result<Self> {
        Ok(Fusion { only: Some(layer..layer + 1), ..Self::new(choices, rule)? })
    }

    pub fn choices(&self) -> &Choices {
        &self.choices
    }

    pub fn rule(&self) -> &Rule {
        &self.rule
    }

    /// What two blocks of a layer must meet to be fused.
    pub fn gate(&self, layer: usize) -> Gate {
        self.rule.gate(&self.choices, layer)
    }

    /// Fuses some blocks of a batch in place. `blocks` must have been listed of this batch, or of one it is a clone of.
    pub fn encode_blocks(&self, batch: &mut CacheBatch, blocks: &Blocks) -> Result<()> {
        let covered = self.coverage(batch.caches.first().map_or(0, |c| c.layers.len()));
        let groups: Vec<Range<usize>> = covered
            .layers
            .clone()
            .step_by(covered.table_layers)
            .map(|first| first..covered.layers.end.min(first + covered.table_layers))
            .collect();
        let shared = &*batch;
        let plan = |group: &Range<usize>| self.plan(shared, blocks, group.clone());
        // Tables that are too large to keep are too large to hold for several layers at once.
        let plans: Vec<Vec<Fused>> = if blocks.places.len() > MANY_BLOCKS {
            groups.iter().map(plan).collect::<Result<_>>()?
        } else {
            groups.par_iter().map(plan).collect::<Result<_>>()?
        };
        for (group, plan) in groups.into_iter().zip(plans) {
            self.apply(batch, blocks, group, plan);
        }
        Ok(())
    }

    /// What the blocks of one group of layers become.
    fn plan(&self, batch: &CacheBatch, blocks: &Blocks, group: Range<usize>) -> Result<Vec<Fused>> {
        if blocks.places.is_empty() {
            return Ok(Vec::new());
        }
        let choices = &self.choices;
        let gate = self.rule.gate(choices, group.start);
        let mut geometry = Geometry::new(batch, blocks, choices.rope, group);
        let means = choices.pairing == Pairing::Tree && !choices.representative.is_verbatim();
        if choices.pairing != Pairing::Lsh {
            for (part, needed) in [(Part::Key, gate.needs_keys()), (Part::Value, gate.needs_values())] {
                if needed || means {
                    geometry.tabulate(part)?;
                }
            }
        }
        let geometry = &geometry;
        let units = match choices.pairing {
            Pairing::Tree => Units::blocks(geometry, choices),
            _ => Units::distinct(geometry, choices),
        };
        let clusters: Vec<Cluster> = match choices.pairing {
            Pairing::Tree => {
                Tree { geometry, units: &units, gate, representative: choices.representative }.clusters()
            }
            Pairing::Best => cluster::best(geometry, &units, &gate, cluster::edges(geometry, &units, &gate)),
            Pairing::Components => cluster::components(&units, &cluster::edges(geometry, &units, &gate)),
            Pairing::Lsh => cluster::best(geometry, &units, &gate, lsh::edges(geometry, &units, &gate)?),
        };
        let settling = Settling { geometry, units: &units, choices, gate, budget: self.rule.budget() };
        Ok(clusters.into_iter().flat_map(|c| settling.settle(c)).collect())
    }

    /// Points the tables at what is shared; blocks that nothing points at any more are freed.
    fn apply(&self, batch: &mut CacheBatch, blocks: &Blocks, group: Range<usize>, plan: Vec<Fused>) {
        for fused in plan {
            for (i, layer) in group.clone().enumerate() {
                let (block, stripped) = match &fused.source {
                    Source::Place(place) => {
                        let block = blocks.entry(batch, layer, *place).block;
                        batch.pool.retain(block);
                        (block, false)
                    }
                    Source::New(layers) => {
                        let (keys, values) = &layers[i];
                        (batch.pool.allocate(keys, values), self.choices.rope == RopeMode::Strip)
                    }
                };
                for &(place, scale) in &fused.entries {
                    let at = blocks.places[place];
                    let table = &mut batch.caches[at.request].layers[layer];
                    table.replace(&mut batch.pool, at.block, Entry { block, scale, stripped, fused: true });
                }
                // The tables hold their own references now.
                batch.pool.release(block);
            }
        }
    }
}

impl Codec for Fusion {
    fn within_tenant(&self) -> Option<bool> {
        Some(self.choices.within_tenant)
    }

    fn fusion(&self) -> Option<&Fusion> {
        Some(self)
    }

    fn coverage(&self, layers: usize) -> Coverage {
        let touched = self.choices.touched(layers);
        Coverage {
            layers: self.only.clone().unwrap_or(touched),
            table_layers: self.choices.group_layers,
            trained: super::Trained::default(),
            leaf_tokens: None,
        }
    }

    fn encode(&self, batch: &mut CacheBatch, memo: &Memo) -> Result<()> {
        // Who shares a block with another keeps sharing what becomes of it; layers that are spared keep what they have.
        let blocks = memo.blocks(batch);
        self.encode_blocks(batch, blocks)?;
        let layers = batch.caches.first().map_or(0, |c| c.layers.len());
        share(batch, &blocks.shared, self.coverage(layers).layers);
        Ok(())
    }
}
