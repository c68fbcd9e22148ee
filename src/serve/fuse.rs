//! Fusion while serving: a new block is read from the most similar one that is there, if that is similar enough.
//!
//! What is there is read by others already and stays as it is, so the representative is the block that came first (the
//! paper's means would change under its readers); gate, scale, positions and layers are those of `bff`.

use crate::block::{BlockId, BlockPool, Entry, Part, RequestCache, Scale};
use crate::codec::fusion::{Fusion, Positions, ScaleRule};
use crate::model::gemm::{View, product};
use crate::model::kernels::inner;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;

/// A block that others may be read from, in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Candidate {
    pub block: BlockId,
    /// Where it stands.
    pub index: usize,
}

/// Points a request's full blocks at similar ones; returns how many pages that saved. `candidates` of every layer are
/// of the request's own tenant.
pub fn fuse(
    fusion: &Fusion,
    pool: &mut BlockPool,
    cache: &mut RequestCache,
    blocks: Range<usize>,
    candidates: &[Vec<Candidate>],
) -> usize {
    let layers = cache.layers.len();
    let touched = fusion.choices().touched(layers);
    let shared: &BlockPool = pool;
    let found: Vec<(usize, Vec<(usize, Entry)>)> = touched
        .into_par_iter()
        .map(|layer| {
            let own = blocks.clone().map(|b| (b, cache.layers[layer].entries[b].block)).collect::<Vec<_>>();
            (layer, matches(fusion, shared, layer, &own, &candidates[layer]))
        })
        .collect();
    let mut saved = 0;
    for (layer, found) in found {
        for (block, entry) in found {
            saved += usize::from(pool.references(cache.layers[layer].entries[block].block) == 1);
            cache.layers[layer].replace(pool, block, entry);
        }
    }
    saved
}

/// Keys or values of some pages, `[pages, width]`, and their norms.
fn vectors(pool: &BlockPool, part: Part, pages: &[BlockId]) -> (Vec<f32>, Vec<f64>) {
    let mut rows = Vec::with_capacity(pages.len() * pool.shape().block_width());
    pages.iter().for_each(|&page| rows.extend_from_slice(&pool.numbers(page, part)));
    let norm = |row: &[f32]| f64::from(inner(row, row)).sqrt();
    let norms = rows.chunks_exact(pool.shape().block_width()).map(norm).collect();
    (rows, norms)
}

fn matches(
    fusion: &Fusion,
    pool: &BlockPool,
    layer: usize,
    own: &[(usize, BlockId)],
    candidates: &[Candidate],
) -> Vec<(usize, Entry)> {
    let (n, width) = (candidates.len(), pool.shape().block_width());
    if n == 0 || own.is_empty() {
        return Vec::new();
    }
    let gate = fusion.gate(layer);
    let pages: Vec<BlockId> = own.iter().map(|o| o.1).collect();
    let others: Vec<BlockId> = candidates.iter().map(|c| c.block).collect();
    let parts = Part::BOTH.map(|part| {
        let (mine, my_norms) = vectors(pool, part, &pages);
        let (theirs, their_norms) = vectors(pool, part, &others);
        let mut products = vec![0.0; own.len() * n];
        let theirs = View::row_major(&theirs, n, width).transposed();
        product(View::row_major(&mine, own.len(), width), theirs, &mut products);
        (products, my_norms, their_norms)
    });
    let mut found = Vec::new();
    for (i, &(block, page)) in own.iter().enumerate() {
        let cosine = |part: usize, j: usize| {
            let (products, mine, theirs) = &parts[part];
            let norms = mine[i] * theirs[j];
            if norms > 0.0 { (f64::from(products[i * n + j]) / norms) as f32 } else { 0.0 }
        };
        let allowed = |j: &usize| {
            candidates[*j].block != page
                && (fusion.choices().positions == Positions::Any || candidates[*j].index == block)
        };
        let margin = |j: usize| gate.margin(cosine(0, j), cosine(1, j));
        // Of equal ones the first: candidates are in a fixed order.
        let mut best: Option<(usize, f32)> = None;
        for j in (0..n).filter(allowed) {
            let own = margin(j);
            if own > best.map_or(0.0, |b| b.1) {
                best = Some((j, own));
            }
        }
        let Some((j, _)) = best else { continue };
        let factor = |part: usize| {
            let (products, mine, theirs) = &parts[part];
            let square = theirs[j] * theirs[j];
            (match fusion.choices().scale {
                _ if square == 0.0 => 1.0,
                ScaleRule::Norm => mine[i] / theirs[j],
                ScaleRule::LeastSquares => f64::from(products[i * n + j]) / square,
                ScaleRule::None => 1.0,
            }) as f32
        };
        let scale = Some(Scale { key: factor(0), value: factor(1) });
        let scale = scale.filter(|_| fusion.choices().scale != ScaleRule::None);
        found.push((block, Entry { block: candidates[j].block, scale, stripped: false, fused: true }));
    }
    found
}

/// The pages of some columns by layer, each once, in a fixed order.
pub fn candidates<'a>(
    columns: impl Iterator<Item = (usize, &'a [Entry])>,
    layers: usize,
) -> Vec<Vec<Candidate>> {
    let mut by_layer: Vec<BTreeMap<BlockId, usize>> = vec![BTreeMap::new(); layers];
    for (index, entries) in columns {
        for (known, entry) in by_layer.iter_mut().zip(entries) {
            // A fused entry is another column's page, which stands where that column does.
            if !entry.fused {
                known.insert(entry.block, index);
            }
        }
    }
    let of = |known: BTreeMap<BlockId, usize>| {
        known.into_iter().map(|(block, index)| Candidate { block, index }).collect()
    };
    by_layer.into_iter().map(of).collect()
}
