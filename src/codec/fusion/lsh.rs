//! Candidate pairs by banded random signatures (Charikar 2002; Indyk and Motwani 1998), for more blocks than can be
//! compared each with each. Every candidate's cosine is then computed exactly.

use super::cluster::Edge;
use super::geometry::{Geometry, Units};
use super::rule::Gate;
use crate::block::Part;
use crate::error::Result;
use crate::interrupt;
use crate::model::gemm::{View, product};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::collections::HashMap;

/// Of few vectors (all that could be compared each with each), a pair is a candidate if all bits of one band agree: at a cosine
/// (after centring) of 0.9 98 % of pairs are, at 0.8 79 %, at 0.5 17 %.
const BAND_BITS: usize = 12;
const BANDS: usize = 24;
/// More vectors have twice as many bands at the same chances: similarities of real keys are less after centring than they look.
const FEW: usize = 24_576;
/// Chance that a bit agrees at a cosine of 0.9: 1 - acos(0.9) / pi.
const AGREES: f64 = 0.856;
/// Vectors projected at a time.
const TILE: usize = 512;
/// Tiles whose projections are in memory at a time.
const ROUND: usize = 16;

/// Signs of random projections of centred unit vectors, packed into bands.
pub struct Signatures {
    bands: usize,
    /// `[vectors, bands]`.
    codes: Vec<u32>,
}

impl Signatures {
    /// Whether two vectors are a candidate pair.
    pub fn meet(&self, a: usize, b: usize) -> bool {
        self.meet_before(a, b, self.bands)
    }

    /// Whether they agree in one of so many first bands.
    fn meet_before(&self, a: usize, b: usize, bands: usize) -> bool {
        let of = |v: usize| &self.codes[v * self.bands..][..bands];
        of(a).iter().zip(of(b)).any(|(x, y)| x == y)
    }

    fn code(&self, vector: usize, band: usize) -> u32 {
        self.codes[vector * self.bands + band]
    }

    /// Of `count` vectors that are unit vectors of some layers and parts, one after the other, each `[width]`: `rows` appends
    /// those of one kind for some of the vectors.
    ///
    /// More vectors get longer bands, so that those that agree in one by chance do not grow with their square, and more of them,
    /// so that those alike still meet.
    pub fn new(
        count: usize,
        width: usize,
        kinds: &[(usize, Part)],
        rows: impl Fn((usize, Part), std::ops::Range<usize>, &mut Vec<f32>) + Sync,
    ) -> Result<Self> {
        let (band_bits, bands) = bands(count);
        let bits = band_bits * bands;
        let planes: Vec<Vec<f32>> =
            kinds.iter().map(|&(layer, part)| planes(layer, part, width, bits)).collect();
        let project = |first: &usize| {
            let tile = *first..count.min(first + TILE);
            let mut projected = vec![0.0f32; tile.len() * bits];
            let mut numbers = Vec::with_capacity(tile.len() * width);
            let mut product_of = vec![0.0; tile.len() * bits];
            for (&kind, planes) in kinds.iter().zip(&planes) {
                numbers.clear();
                rows(kind, tile.clone(), &mut numbers);
                let numbers = View::row_major(&numbers, tile.len(), width);
                product(numbers, View::row_major(planes, width, bits), &mut product_of);
                projected.iter_mut().zip(&product_of).for_each(|(sum, x)| *sum += x);
            }
            projected
        };
        let tiles: Vec<usize> = (0..count).step_by(TILE).collect();
        let few = tiles.len() <= ROUND;
        // Keys share a large common component: without it, the signs tell them apart far better.
        let mut mean = vec![0.0f64; bits];
        let mut kept = Vec::new();
        for round in tiles.chunks(ROUND) {
            interrupt::check()?;
            let projected: Vec<Vec<f32>> = round.par_iter().map(project).collect();
            for row in projected.iter().flat_map(|tile| tile.chunks_exact(bits)) {
                mean.iter_mut().zip(row).for_each(|(m, &x)| *m += f64::from(x) / count as f64);
            }
            if few {
                kept = projected;
            }
        }
        let pack = |tile: &[f32]| -> Vec<u32> {
            let band = |row: &[f32], band: usize| {
                let bits = band * band_bits..(band + 1) * band_bits;
                bits.fold(0, |code, i| code << 1 | u32::from(f64::from(row[i]) > mean[i]))
            };
            tile.chunks_exact(bits)
                .flat_map(|row| (0..bands).map(move |b| (row, b)))
                .map(|(r, b)| band(r, b))
                .collect()
        };
        let codes: Vec<Vec<u32>> = match few {
            true => kept.par_iter().map(|tile| pack(tile)).collect(),
            // What is too much to keep is projected again.
            false => tiles.par_iter().map(|first| pack(&project(first))).collect(),
        };
        Ok(Signatures { bands, codes: codes.concat() })
    }
}

/// Bits of a band, and bands, for so many vectors.
fn bands(count: usize) -> (usize, usize) {
    let bits = (count.max(2).ilog2() as usize).saturating_sub(2).clamp(BAND_BITS, 31);
    let bands = BANDS as f64 / AGREES.powi((bits - BAND_BITS) as i32) * if count > FEW { 2.0 } else { 1.0 };
    (bits, bands.ceil() as usize)
}

/// Candidate pairs that really lie above the gate.
pub fn edges(geometry: &Geometry, units: &Units, gate: &Gate) -> Result<Vec<Edge>> {
    let width = geometry.batch.pool.shape().block_width();
    let parts = [(Part::Key, gate.needs_keys()), (Part::Value, gate.needs_values())];
    let parts = parts.into_iter().filter(|(_, needed)| *needed);
    let kinds: Vec<(usize, Part)> =
        parts.flat_map(|(part, _)| geometry.layers.clone().map(move |layer| (layer, part))).collect();
    let signatures = Signatures::new(geometry.distinct(), width, &kinds, |(layer, part), vectors, out| {
        for vector in vectors {
            let factor = geometry.inverse_norms(part)[vector];
            let numbers = geometry.numbers(part, layer, geometry.first[vector]);
            out.extend(numbers.iter().map(|x| x * factor));
        }
    })?;
    let mut found = Vec::new();
    for band in 0..signatures.bands {
        interrupt::check()?;
        let mut buckets: HashMap<(u32, u32), Vec<usize>> = HashMap::new();
        for unit in 0..units.len() {
            let key = (units.class[unit], signatures.code(units.vector[unit], band));
            buckets.entry(key).or_default().push(unit);
        }
        let mut buckets: Vec<Vec<usize>> = buckets.into_values().filter(|b| b.len() > 1).collect();
        buckets.sort_unstable();
        let pairs = buckets.par_iter().flat_map(|bucket| {
            (1..bucket.len())
                .into_par_iter()
                .flat_map_iter(move |i| bucket[..i].iter().map(move |&b| (bucket[i], b)))
        });
        let own = pairs.filter_map(|(a, b)| {
            let (va, vb) = (units.vector[a], units.vector[b]);
            // Most pairs of a band were found by an earlier one already.
            if signatures.meet_before(va, vb, band) {
                return None;
            }
            let margin = geometry.margin(gate, va, vb);
            (margin > 0.0).then_some(Edge { a, b, margin })
        });
        found.extend(own.collect::<Vec<_>>());
    }
    Ok(found)
}

/// Random signs, `[width, bits]`; the same for the same layer and part on every run.
fn planes(layer: usize, part: Part, width: usize, bits: usize) -> Vec<f32> {
    let stream = 2 * layer as u64 + u64::from(part == Part::Value);
    let mut rng = ChaCha8Rng::seed_from_u64(stream);
    (0..width * bits).map(|_| if rng.random::<bool>() { 1.0 } else { -1.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_vectors_get_longer_bands_and_more() {
        assert_eq!(bands(2), (12, 24));
        assert_eq!(bands(24_576), (12, 24));
        assert_eq!(bands(100_000), (14, 66));
        assert_eq!(bands(1_000_000), (17, 105));
    }

    /// Vectors at a cosine of 0.9 meet as often as the bands promise, whatever their number; others hardly do.
    #[test]
    fn what_is_alike_meets() {
        let (count, width) = (6000, 32);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut gauss = |n: usize| -> Vec<f32> {
            (0..n).map(|_| (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0).collect()
        };
        let unit = |x: Vec<f32>| -> Vec<f32> {
            let norm = x.iter().map(|x| x * x).sum::<f32>().sqrt();
            x.iter().map(|x| x / norm).collect()
        };
        // Every second vector is its neighbour's at a cosine of about 0.9.
        let mut vectors: Vec<Vec<f32>> = Vec::new();
        for _ in 0..count / 2 {
            let a = unit(gauss(width));
            let noise = unit(gauss(width));
            let b = a.iter().zip(&noise).map(|(a, n)| 0.9 * a + 0.436 * n).collect();
            vectors.extend([a, unit(b)]);
        }
        let made = Signatures::new(count, width, &[(0, Part::Key)], |_, tile, out| {
            vectors[tile].iter().for_each(|v| out.extend(v));
        })
        .unwrap();
        let alike =
            (0..count / 2).filter(|i| made.meet(2 * i, 2 * i + 1)).count() as f64 / (count / 2) as f64;
        let strange = (0..count / 2 - 1).filter(|i| made.meet(2 * i, 2 * i + 2)).count();
        assert!(alike > 0.95, "{alike}");
        assert!(strange < 100, "{strange}");
    }
}
