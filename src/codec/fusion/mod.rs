//! Fusion of similar blocks of different requests (the paper's BFF).

mod similarity;
mod tree;

pub use similarity::pairs_above;

use super::{CacheBatch, Codec};
use crate::block::{BlockId, Entry, RequestCache, Scale};
use crate::codec::fusion::tree::{Leaf, Row, fuse};
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

/// Batch fast-fusion as the paper's released patch computes it (shared/paper.md; docs/fusion.md): layer by layer,
/// recursive halving over the requests, unweighted means of unit blocks, last match wins, own norms restored.
pub struct BatchFusion {
    tau: f32,
}

/// Layers the paper leaves alone at either end of the model.
const SPARED: usize = 2;

impl BatchFusion {
    /// `tau`: cosine similarity above which two blocks fuse, in (-1, 1].
    pub fn new(tau: f64) -> Result<Self> {
        if tau > -1.0 && tau <= 1.0 {
            Ok(BatchFusion { tau: tau as f32 })
        } else {
            Err(Error::argument(format!("tau {tau} lies outside of (-1, 1]")))
        }
    }
}

impl Codec for BatchFusion {
    fn layers(&self, layers: usize) -> Range<usize> {
        SPARED.min(layers)..layers.saturating_sub(SPARED).max(SPARED.min(layers))
    }

    fn encode(&self, batch: &mut CacheBatch) {
        let layers = self.layers(batch.caches.first().map_or(0, |c| c.layers.len()));
        let shared = &*batch;
        let fused: Vec<LayerFusion> =
            layers.into_par_iter().map(|n| LayerFusion::of(shared, n, self.tau)).collect();
        for layer in fused {
            layer.apply(batch);
        }
    }
}

/// What one layer's full blocks become.
struct LayerFusion {
    layer: usize,
    /// Representatives as unit vectors: keys, values.
    representatives: Vec<(Vec<f32>, Vec<f32>)>,
    /// (request, block) -> representative and the block's own norms.
    assignments: Vec<Assignment>,
}

struct Assignment {
    request: usize,
    block: usize,
    representative: usize,
    scale: Scale,
}

impl LayerFusion {
    fn of(batch: &CacheBatch, layer: usize, tau: f32) -> Self {
        let size = batch.pool.shape().block_size;
        let is_full = |e: &&Entry| batch.pool.tokens(e.block) == size;
        let blocks = |cache: &RequestCache| -> Vec<BlockId> {
            cache.layers[layer].entries.iter().filter(is_full).map(|e| e.block).collect()
        };
        let leaves: Vec<Leaf> = batch.caches.iter().map(|c| Leaf::new(&batch.pool, &blocks(c))).collect();
        let scales: Vec<Scale> = leaves.iter().flat_map(|l| l.scales.iter().copied()).collect();
        let lengths: Vec<usize> = leaves.iter().map(|l| l.scales.len()).collect();
        let root = fuse(leaves, batch.pool.shape().block_width(), tau);

        // Number the rows that are representatives; a row that is a single block as it was needs none.
        let mut representatives = Vec::new();
        let numbers: Vec<Option<usize>> = (0..root.rows.len())
            .map(|row| {
                (root.rows[row] == Row::Fused).then(|| {
                    representatives.push((root.key_row(row).to_vec(), root.value_row(row).to_vec()));
                    representatives.len() - 1
                })
            })
            .collect();
        let places = lengths.iter().enumerate().flat_map(|(request, &n)| (0..n).map(move |b| (request, b)));
        let assignments =
            places.zip(root.back.iter().zip(scales)).filter_map(|((request, block), (&row, scale))| {
                let representative = numbers[row]?;
                Some(Assignment { request, block, representative, scale })
            });
        LayerFusion { layer, assignments: assignments.collect(), representatives }
    }

    /// Points the tables at the representatives; blocks that nothing points at any more are freed.
    fn apply(self, batch: &mut CacheBatch) {
        let pool = &mut batch.pool;
        let blocks: Vec<BlockId> = self.representatives.iter().map(|(k, v)| pool.allocate(k, v)).collect();
        for a in &self.assignments {
            let entry = Entry { block: blocks[a.representative], scale: Some(a.scale) };
            batch.caches[a.request].layers[self.layer].replace(pool, a.block, entry);
        }
        // The tables hold their own references now.
        for block in blocks {
            pool.release(block);
        }
    }
}
