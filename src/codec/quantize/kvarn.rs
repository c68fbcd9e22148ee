//! KVarN: rows and columns of a rotated page are brought to equal variance before they are rounded.

use super::rotated::hadamard;
use super::{BitSink, BitSource, PageShape, Quantized, Quantizer, affine, put_f16, take_f16};
use crate::block::Part;
use crate::block::by_head;
use crate::codec::registry::{Method, Scale, Search};
use crate::codec::{Codec, Role};
use crate::error::Result;
use ndarray::s;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct KvarN {
    /// Bits of a number of the keys
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=8))]
    bits: u32,
    /// By how many bits values are coarser
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=7))]
    less: u32,
    /// First tokens of every request that stay in 16 bits
    #[arg(long, default_value_t = 4)]
    sinks: usize,
}

impl Method for KvarN {
    const NAME: &'static str = "kvarn";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "Every head of a page: Hadamard transform, then tokens and channels are divided by their deviations in turn, sixteen times, then asymmetric rounding by token. Best with large blocks (128 in the paper): a page pays f16 for every channel.";
    const PAPER: &'static str = "KVarN 2026 (arXiv 2606.03458)";
    const DIALS: &'static [&'static str] = &["bits"];
    const SEARCH: Option<Search> =
        Some(Search { option: "bits", fine: 8.0, coarse: 1.0, scale: Scale::Whole });

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Quantized::new(*self)))
    }
}

/// Rounds of the normalisation.
const ROUNDS: usize = 16;

impl KvarN {
    fn part_bits(&self, part: Part) -> u32 {
        match part {
            Part::Key => self.bits,
            Part::Value => self.bits.saturating_sub(self.less).max(1),
        }
    }
}

/// Factors of channels after which all rows and columns of `x` (`[rows, columns]`) have a deviation of one; rows are scaled too, but what
/// they are divided by need not be known: rounding by row finds it.
fn column_scales(x: &[f32], columns: usize) -> Vec<f32> {
    let rows = x.len() / columns;
    let (mut row_log, mut column_log) = (vec![0.0f32; rows], vec![0.0f32; columns]);
    let mut power = vec![0.0f32; rows.max(columns)];
    for round in 0..2 * ROUNDS {
        let by_row = round % 2 == 0;
        power.fill(0.0);
        for (i, row) in x.chunks_exact(columns).enumerate() {
            for (j, x) in row.iter().enumerate() {
                let scaled = x * (-row_log[i] - column_log[j]).exp();
                power[if by_row { i } else { j }] += scaled * scaled;
            }
        }
        let count = if by_row { columns } else { rows } as f32;
        let logs = if by_row { &mut row_log } else { &mut column_log };
        for (log, power) in logs.iter_mut().zip(&power).filter(|(_, p)| **p > 0.0) {
            *log += 0.5 * (power / count).ln();
        }
    }
    column_log.iter().map(|l| l.exp()).collect()
}

/// One head of a page, `[tokens, head_dim]`.
fn head_of(page: &[f32], shape: PageShape, head: usize) -> Vec<f32> {
    by_head(page, shape.kv_heads, shape.head_dim).slice(s![.., head, ..]).iter().copied().collect()
}

impl Quantizer for KvarN {
    fn encode(&self, part: Part, page: &[f32], shape: PageShape, sink: &mut BitSink) {
        let d = shape.head_dim;
        for head in 0..shape.kv_heads {
            let mut x = head_of(page, shape, head);
            x.chunks_exact_mut(d).for_each(hadamard);
            let scales: Vec<f32> = column_scales(&x, d).iter().map(|s| put_f16(sink, *s)).collect();
            for row in x.chunks_exact_mut(d) {
                row.iter_mut().zip(&scales).for_each(|(x, s)| *x = if *s > 0.0 { *x / s } else { 0.0 });
                affine::put(sink, row, &(0..d).collect::<Vec<_>>(), self.part_bits(part));
            }
        }
    }

    fn decode(&self, part: Part, shape: PageShape, source: &mut BitSource) -> Vec<f32> {
        let (d, width) = (shape.head_dim, shape.width());
        let mut page = vec![0.0; shape.numbers()];
        for head in 0..shape.kv_heads {
            let scales: Vec<f32> = (0..d).map(|_| take_f16(source)).collect();
            for t in 0..shape.tokens {
                let row = &mut page[t * width + head * d..][..d];
                affine::take(source, row, &(0..d).collect::<Vec<_>>(), self.part_bits(part));
                row.iter_mut().zip(&scales).for_each(|(x, s)| *x *= s);
                hadamard(row);
            }
        }
        page
    }

    fn raw_first(&self) -> usize {
        self.sinks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A channel a hundred times as large, and a token: after the division by column scales every row is even.
    #[test]
    fn outliers_are_evened_out() {
        let (rows, columns) = (8, 16);
        let x: Vec<f32> = (0..rows * columns)
            .map(|i| {
                let (r, c) = (i / columns, i % columns);
                let base = ((i * 37 % 19) as f32 / 19.0) - 0.45;
                base * if c == 3 { 100.0 } else { 1.0 } * if r == 5 { 30.0 } else { 1.0 }
            })
            .collect();
        let scales = column_scales(&x, columns);
        for row in x.chunks_exact(columns) {
            let scaled: Vec<f32> = row.iter().zip(&scales).map(|(x, s)| x / s).collect();
            let deviation = (scaled.iter().map(|x| x * x).sum::<f32>() / columns as f32).sqrt();
            let most = scaled.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert!(most < 3.0 * deviation, "{most} {deviation}");
        }
    }
}
