//! Rotated scalar quantisation: after random signs and a Hadamard transform all coordinates of a head look Gaussian, and one set
//! of Lloyd-Max levels suits them all.

use super::per_head::seek;
use super::{BitSink, BitSource, Cost, PageShape, Quantized, Quantizer, put_f16, take_f16};
use crate::block::Part;
use crate::codec::registry::{Method, Scale, Search};
use crate::codec::{Codec, Role};
use crate::error::Result;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use statrs::distribution::{Continuous, ContinuousCDF, Normal};
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct Rotated {
    /// Bits of a number
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=8))]
    bits: u32,
    /// Decides the random signs
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl Method for Rotated {
    const NAME: &'static str = "rotated";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "Every head's vector is turned by random signs and a Hadamard transform, scaled by its own norm (f16) and rounded to Lloyd-Max levels of a \
                                 Gaussian.";
    const PAPER: &'static str =
        "after Zandieh et al. 2025, TurboQuant (arXiv 2504.19874); Lloyd 1982, Max 1960";
    const DIALS: &'static [&'static str] = &["bits"];
    const SEARCH: Option<Search> =
        Some(Search { option: "bits", fine: 8.0, coarse: 1.0, scale: Scale::Whole });

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Quantized::new(Turning {
            bits: self.bits,
            seed: self.seed,
            levels: lloyd_max(1 << self.bits),
        })))
    }
}

/// [`Rotated`] with its levels.
struct Turning {
    bits: u32,
    seed: u64,
    /// Of a standard Gaussian, rising.
    levels: Vec<f32>,
}

/// The levels of the scalar quantiser of a standard Gaussian with the least squared error: every level is the mean of what
/// is nearest to it.
pub fn lloyd_max(count: usize) -> Vec<f32> {
    let gaussian = Normal::standard();
    let mut levels: Vec<f64> =
        (0..count).map(|i| gaussian.inverse_cdf((i as f64 + 0.5) / count as f64)).collect();
    for _ in 0..2000 {
        let edge = |i: usize| match i {
            0 => f64::NEG_INFINITY,
            i if i == count => f64::INFINITY,
            i => 0.5 * (levels[i - 1] + levels[i]),
        };
        let density = |x: f64| if x.is_finite() { gaussian.pdf(x) } else { 0.0 };
        let next: Vec<f64> = (0..count)
            .map(|i| {
                let (low, high) = (edge(i), edge(i + 1));
                (density(low) - density(high)) / (gaussian.cdf(high) - gaussian.cdf(low))
            })
            .collect();
        levels = next;
    }
    levels.into_iter().map(|x| x as f32).collect()
}

impl Turning {
    fn signs(&self, head_dim: usize) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        (0..head_dim).map(|_| if rng.random_bool(0.5) { 1.0 } else { -1.0 }).collect()
    }

    /// One head of one token.
    fn take(&self, signs: &[f32], source: &mut BitSource, out: &mut Vec<f32>) {
        let deviation = take_f16(source);
        let from = out.len();
        for _ in signs {
            let level = self.levels.get(source.take(self.bits) as usize).copied().unwrap_or(0.0);
            out.push(level * deviation);
        }
        hadamard(&mut out[from..]);
        out[from..].iter_mut().zip(signs).for_each(|(x, s)| *x *= s);
    }
}

/// The index of the level nearest to a number; levels rise.
pub fn nearest(levels: &[f32], x: f32) -> u32 {
    let above = levels.partition_point(|level| *level < x);
    let nearer = |i: usize| (levels[i] - x).abs();
    match above {
        0 => 0,
        n if n == levels.len() => n as u32 - 1,
        n if nearer(n) < nearer(n - 1) => n as u32,
        n => n as u32 - 1,
    }
}

/// The orthonormal Hadamard transform, its own inverse, of stretches of the largest power of two that divides the length.
pub fn hadamard(x: &mut [f32]) {
    let n = 1 << x.len().trailing_zeros();
    for stretch in x.chunks_exact_mut(n) {
        let mut half = 1;
        while half < n {
            for pair in stretch.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let norm = 1.0 / (n as f32).sqrt();
        stretch.iter_mut().for_each(|x| *x *= norm);
    }
}

impl Quantizer for Turning {
    fn encode(&self, _: Part, page: &[f32], shape: PageShape, sink: &mut BitSink) {
        let signs = self.signs(shape.head_dim);
        for head in page.chunks_exact(shape.head_dim) {
            let mut turned: Vec<f32> = head.iter().zip(&signs).map(|(x, s)| x * s).collect();
            hadamard(&mut turned);
            // Of Gaussian coordinates, their standard deviation.
            let power = turned.iter().map(|x| x * x).sum::<f32>() / shape.head_dim as f32;
            let deviation = put_f16(sink, power.sqrt());
            for x in turned {
                let code = if deviation > 0.0 { nearest(&self.levels, x / deviation) } else { 0 };
                sink.put(Cost::Code, code, self.bits);
            }
        }
    }

    fn decode(&self, _: Part, shape: PageShape, source: &mut BitSource) -> Vec<f32> {
        let mut page = Vec::with_capacity(shape.numbers());
        let signs = self.signs(shape.head_dim);
        for _ in 0..shape.tokens * shape.kv_heads {
            self.take(&signs, source, &mut page);
        }
        page
    }

    fn read_head(&self, part: Part, shape: PageShape, head: usize, bytes: &[u8], out: &mut Vec<f32>) -> bool {
        let mut source = BitSource::new(bytes);
        let signs = self.signs(shape.head_dim);
        for token in 0..shape.tokens {
            seek(&mut source, part, shape, token, head, 16 + u64::from(self.bits) * shape.head_dim as u64);
            self.take(&signs, &mut source, out);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Max 1960, table I: the levels of one and two bits.
    #[test]
    fn levels_are_those_of_the_literature() {
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-3);
        assert!(near(&lloyd_max(2), &[-0.7979, 0.7979]));
        assert!(near(&lloyd_max(4), &[-1.510, -0.4528, 0.4528, 1.510]), "{:?}", lloyd_max(4));
    }

    #[test]
    fn the_transform_is_its_own_inverse() {
        let x: Vec<f32> = (0..96).map(|i| (i * i % 17) as f32 - 8.0).collect();
        let mut y = x.clone();
        hadamard(&mut y);
        let energy = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
        assert!((energy(&x) / energy(&y) - 1.0).abs() < 1e-5);
        hadamard(&mut y);
        assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-4));
    }
}
