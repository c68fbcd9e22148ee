//! How alike blocks are that have nothing to do with each other: below this no threshold should lie.

use crate::block::Part;
use crate::codec::CacheBatch;
use crate::codec::fusion::{Blocks, Choices, Place, Positions};
use crate::error::{Error, Result};
use crate::model::kernels::cosine;
use crate::stats;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::collections::HashSet;

/// Pairs that are drawn of each batch; those that are related do not count.
const PAIRS: usize = 20_000;
/// Unrelated pairs without which a quantile says nothing.
const FEWEST: usize = 100;

/// Pairs of unrelated blocks of one batch.
struct Unrelated<'a> {
    batch: &'a CacheBatch,
    blocks: Blocks,
    /// Indices into the blocks' places.
    pairs: Vec<(usize, usize)>,
}

/// For every layer, the quantile of the cosines (keys, values) of pairs of unrelated blocks: of different requests, with no
/// three consecutive tokens in common; in the frame (RoPE, positions) in which blocks are compared.
pub fn floors<'a>(
    batches: impl Iterator<Item = &'a CacheBatch>,
    layers: &[usize],
    quantile: f64,
    choices: &Choices,
    seed: u64,
) -> Result<Vec<(f64, f64)>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let drawn: Vec<Unrelated> = batches.map(|batch| draw(batch, choices.positions, &mut rng)).collect();
    let count: usize = drawn.iter().map(|d| d.pairs.len()).sum();
    if count < FEWEST {
        let message = format!("--floor: only {count} pairs of unrelated blocks; take more questions");
        return Err(Error::argument(message));
    }
    let of = |&layer: &usize| {
        let cosines = |part: Part| {
            let pairs = drawn.iter().flat_map(|d| d.pairs.iter().map(move |&(a, b)| (d, a, b)));
            let found: Vec<f64> = pairs
                .map(|(Unrelated { batch, blocks, .. }, a, b)| {
                    let numbers = |place| blocks.numbers(batch, choices.rope, part, layer, place);
                    cosine(&numbers(a), &numbers(b))
                })
                .collect();
            stats::quantile(&found, quantile).unwrap_or(f64::NAN)
        };
        (cosines(Part::Key), cosines(Part::Value))
    };
    Ok(layers.par_iter().map(of).collect())
}

fn draw<'a>(batch: &'a CacheBatch, positions: Positions, rng: &mut ChaCha8Rng) -> Unrelated<'a> {
    let size = batch.pool.shape().block_size;
    let blocks = Blocks::of_requests(batch);
    let trigrams = |place: usize| -> HashSet<&[u32]> {
        let Place { request, block, .. } = blocks.places[place];
        batch.tokens[request][block * size..(block + 1) * size].windows(3).collect()
    };
    let mut pairs = Vec::new();
    for _ in 0..if blocks.places.is_empty() { 0 } else { PAIRS } {
        let (a, b) = (rng.random_range(0..blocks.places.len()), rng.random_range(0..blocks.places.len()));
        let (p, q) = (blocks.places[a], blocks.places[b]);
        let may_meet = positions == Positions::Any || p.block == q.block;
        if p.request != q.request && may_meet && trigrams(a).is_disjoint(&trigrams(b)) {
            pairs.push((a, b));
        }
    }
    Unrelated { batch, blocks, pairs }
}
