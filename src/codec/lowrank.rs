//! xKV-like low rank: the caches of some layers side by side, as few directions as are asked for, found for each prompt anew and stored with it.

use super::registry::{Method, Scale, Search, number};
use super::{CacheBatch, Codec, Coverage, Memo, Role};
use crate::block::{BlockId, Payload, halves};
use crate::error::{Error, Result};
use crate::model::gemm::{View, product};
use faer::{Mat, Side};
use rayon::prelude::*;
use serde::Serialize;
use std::ops::{Bound, Range};
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct LowRank {
    /// Directions kept, as a share of the most there can be: of a token's numbers in the layers of a group, or of the tokens if these
    /// are fewer
    #[arg(long, default_value_t = 0.25, value_parser = number("a share", Bound::Excluded(0.0), Bound::Included(1.0)))]
    rank: f64,
    /// Layers side by side
    #[arg(long, default_value_t = 4, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=64))]
    group: usize,
}

impl Method for LowRank {
    const NAME: &'static str = "lowrank";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "Of each request's own blocks (not those it shares), keys without position and values of neighbouring layers side by side: the leading \
                                 directions of the prompt itself, and each token's place along them, all in f16. The directions are stored with every prompt; where that \
                                 saves nothing, blocks stay raw.";
    const PAPER: &'static str = "after Chang et al. 2025, xKV (arXiv 2503.18893)";
    const DIALS: &'static [&'static str] = &["rank"];
    const SEARCH: Option<Search> =
        Some(Search { option: "rank", fine: 0.9, coarse: 0.005, scale: Scale::Logarithmic });

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(*self))
    }
}

/// Pages of one request that nobody shares, in the layers of a group: `[layers][blocks]`, with the blocks' places.
struct Stack {
    layers: Range<usize>,
    blocks: Vec<usize>,
    pages: Vec<Vec<BlockId>>,
    tokens: usize,
}

impl Codec for LowRank {
    fn coverage(&self, layers: usize) -> Coverage {
        Coverage::of(0..layers)
    }

    fn takes_changed(&self) -> bool {
        false
    }

    fn encode(&self, batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        let stacks = self.stacks(batch, |batch, page| batch.pool.references(page) == 1);
        let shared: &CacheBatch = batch;
        let coded: Vec<Vec<u8>> =
            stacks.par_iter().map(|stack| self.bytes(shared, stack)).collect::<Result<_>>()?;
        for (stack, bytes) in stacks.iter().zip(coded) {
            self.read(batch, stack, &bytes)?;
        }
        Ok(())
    }

    fn decode(&self, batch: &mut CacheBatch) -> Result<()> {
        for stack in self.stacks(batch, |batch, page| batch.pool.payload(page).is_some()) {
            let bytes = batch.pool.payload(stack.pages[0][0]).map(|p| p.bytes.clone()).unwrap_or_default();
            self.read(batch, &stack, &bytes)?;
        }
        Ok(())
    }
}

impl LowRank {
    fn stacks(&self, batch: &CacheBatch, own: impl Fn(&CacheBatch, BlockId) -> bool) -> Vec<Stack> {
        let mut stacks = Vec::new();
        for cache in &batch.caches {
            let layers = cache.layers.len();
            for first in (0..layers).step_by(self.group) {
                let range = first..(first + self.group).min(layers);
                let page = |layer: usize, block: usize| cache.layers[layer].entries[block].block;
                let blocks: Vec<usize> = (0..cache.layers[first].entries.len())
                    .filter(|&b| range.clone().all(|layer| own(batch, page(layer, b))))
                    .collect();
                let pages: Vec<Vec<BlockId>> =
                    range.clone().map(|layer| blocks.iter().map(|&b| page(layer, b)).collect()).collect();
                let tokens: usize = pages[0].iter().map(|p| batch.pool.tokens(*p)).sum();
                let side = range.len() * batch.pool.shape().token_width();
                // Directions and places must take less than the numbers themselves.
                if tokens > 0 && self.rank(tokens, side) * (side + tokens) < tokens * side {
                    stacks.push(Stack { layers: range, blocks, pages, tokens });
                }
            }
        }
        stacks
    }

    /// Directions of keys and of values, then places of tokens along them.
    fn bytes(&self, batch: &CacheBatch, stack: &Stack) -> Result<Vec<u8>> {
        let width = batch.pool.shape().token_width();
        let size = batch.pool.shape().block_size;
        let side = stack.layers.len() * width;
        let mut bytes = Vec::new();
        for part in 0..2 {
            // `[tokens, layers * width]`.
            let mut x = vec![0.0f32; stack.tokens * side];
            for (n, (layer, pages)) in stack.layers.clone().zip(&stack.pages).enumerate() {
                let mut row = 0;
                for (&page, &block) in pages.iter().zip(&stack.blocks) {
                    let numbers = if part == 0 {
                        let mut keys = batch.pool.keys(page).into_owned();
                        batch.ropes.layer(layer).strip_tokens(&mut keys, width, block * size);
                        keys
                    } else {
                        batch.pool.values(page).into_owned()
                    };
                    for own in numbers.chunks_exact(width) {
                        x[row * side + n * width..][..width].copy_from_slice(own);
                        row += 1;
                    }
                }
            }
            let rank = self.rank(stack.tokens, side);
            let directions = directions(&x, stack.tokens, side, rank)?;
            let stored = halves::to_bytes(&directions);
            let rounded = halves::from_bytes(&stored);
            let mut places = vec![0.0f32; stack.tokens * rank];
            let by = View::row_major(&rounded, side, rank);
            product(View::row_major(&x, stack.tokens, side), by, &mut places);
            bytes.extend(stored);
            bytes.extend(halves::to_bytes(&places));
        }
        Ok(bytes)
    }

    fn rank(&self, tokens: usize, side: usize) -> usize {
        let most = side.min(tokens);
        ((self.rank * most as f64).ceil() as usize).clamp(1, most)
    }

    /// Puts what the bytes say into the pages.
    fn read(&self, batch: &mut CacheBatch, stack: &Stack, bytes: &[u8]) -> Result<()> {
        let width = batch.pool.shape().token_width();
        let size = batch.pool.shape().block_size;
        let side = stack.layers.len() * width;
        let rank = self.rank(stack.tokens, side);
        let numbers = halves::from_bytes(bytes);
        if numbers.len() != 2 * rank * (side + stack.tokens) {
            return Err(Error::argument("has a stack of pages of another shape"));
        }
        let rebuilt: Vec<Vec<f32>> = numbers
            .chunks_exact(rank * (side + stack.tokens))
            .map(|part| {
                let (directions, places) = part.split_at(side * rank);
                let mut x = vec![0.0f32; stack.tokens * side];
                let by = View::row_major(directions, side, rank).transposed();
                product(View::row_major(places, stack.tokens, rank), by, &mut x);
                x
            })
            .collect();
        let pages = (stack.layers.len() * stack.blocks.len()) as u64;
        let ropes = Arc::clone(&batch.ropes);
        for (n, (layer, own)) in stack.layers.clone().zip(&stack.pages).enumerate() {
            let mut row = 0;
            for (i, (&page, &block)) in own.iter().zip(&stack.blocks).enumerate() {
                let tokens = batch.pool.tokens(page);
                let rows = |x: &[f32]| -> Vec<f32> {
                    let of = |t: usize| &x[(row + t) * side + n * width..][..width];
                    (0..tokens).flat_map(of).copied().collect()
                };
                let (mut keys, values) = (rows(&rebuilt[0]), rows(&rebuilt[1]));
                ropes.layer(layer).rotate_tokens(&mut keys, width, block * size);
                row += tokens;
                let first = n == 0 && i == 0;
                // The bits are shared out evenly, the bytes are with the first page.
                let bits = 8 * bytes.len() as u64;
                let share = bits / pages + if first { bits % pages } else { 0 };
                let bytes = if first { bytes.to_vec() } else { Vec::new() };
                batch.pool.recode(
                    page,
                    keys,
                    values,
                    Payload { bytes, code_bits: share, side_bits: 0 },
                    None,
                );
            }
        }
        Ok(())
    }
}

/// The leading right singular vectors of `x` `[rows, columns]`: `[columns, rank]`.
pub(super) fn directions(x: &[f32], rows: usize, columns: usize, rank: usize) -> Result<Vec<f32>> {
    let failed = |_| Error::Number("caches are not finite".to_owned());
    let flat = |v: Mat<f32>| -> Vec<f32> {
        (0..columns).flat_map(|i| (0..rank).map(move |k| (i, k))).map(|p| v[p]).collect()
    };
    let x = Mat::from_fn(rows, columns, |i, j| x[i * columns + j]);
    if rows < columns {
        // Of the smaller product, turned over.
        let gram = &x * x.transpose();
        let eigen = gram.self_adjoint_eigen(Side::Lower).map_err(failed)?;
        let (u, s) = (eigen.U(), eigen.S());
        // Directions in which there is nothing are none.
        let least = 1e-9 * s[rows - 1].max(0.0);
        let leading = Mat::from_fn(rows, rank, |i, k| {
            let k = rows - 1 - k;
            if s[k] > least { u[(i, k)] / s[k].sqrt() } else { 0.0 }
        });
        return Ok(flat(x.transpose() * leading));
    }
    let gram = x.transpose() * &x;
    let eigen = gram.self_adjoint_eigen(Side::Lower).map_err(failed)?;
    let u = eigen.U();
    Ok(flat(Mat::from_fn(columns, rank, |i, k| u[(i, columns - 1 - k)])))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows that lie in a plane are given back from two directions, whichever side is longer.
    #[test]
    fn few_directions_hold_what_has_few() {
        for (rows, columns, rank) in [(20, 6, 2), (5, 12, 2), (5, 12, 5)] {
            let x: Vec<f32> = (0..rows * columns)
                .map(|i| {
                    let (r, c) = ((i / columns) as f32, (i % columns) as f32);
                    (r + 1.0) * (c - 2.0) + (r * r - 3.0) * (c * 0.7).sin()
                })
                .collect();
            let v = directions(&x, rows, columns, rank).unwrap();
            assert!(v.iter().all(|v| v.abs() <= 1.001), "unit vectors, or none: {v:?}");
            let mut places = vec![0.0; rows * rank];
            product(View::row_major(&x, rows, columns), View::row_major(&v, columns, rank), &mut places);
            let mut back = vec![0.0; rows * columns];
            let by = View::row_major(&v, columns, rank).transposed();
            product(View::row_major(&places, rows, rank), by, &mut back);
            let most = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let worst = x.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-3 * most, "{worst} of {most}");
        }
    }
}
