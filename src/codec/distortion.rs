//! What encoding did to keys and values, measured on the reconstructed cache.

use super::CacheBatch;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::ops::{AddAssign, Range};

/// Squared errors and energies over all tokens and layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Distortion {
    pub key_error: f64,
    pub key_energy: f64,
    pub value_error: f64,
    pub value_energy: f64,
}

impl Distortion {
    /// Relative squared error of the keys; 0 for an empty cache.
    pub fn keys(&self) -> f64 {
        relative(self.key_error, self.key_energy)
    }

    /// Relative squared error of the values; 0 for an empty cache.
    pub fn values(&self) -> f64 {
        relative(self.value_error, self.value_energy)
    }
}

/// Squared error as a share of the energy; 0 where there is none.
pub fn relative(error: f64, energy: f64) -> f64 {
    if energy > 0.0 { error / energy } else { 0.0 }
}

impl AddAssign for Distortion {
    fn add_assign(&mut self, other: Distortion) {
        self.key_error += other.key_error;
        self.key_energy += other.key_energy;
        self.value_error += other.value_error;
        self.value_energy += other.value_energy;
    }
}

/// What encoding did to one request.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Drift {
    /// Blocks, counted in every layer, that share storage with another or are restored from numbers not their own
    /// ([`CacheBatch::is_fused`]).
    pub fused_blocks: u64,
    /// The highest relative squared error of one block of one layer, of its keys or of its values.
    pub worst_block_error: f64,
}

impl Drift {
    fn join(&mut self, other: &Drift) {
        self.fused_blocks += other.fused_blocks;
        self.worst_block_error = self.worst_block_error.max(other.worst_block_error);
    }
}

/// Compares an encoded batch with the original, block by block as the tables list them: over all layers, and for each
/// request.
pub fn distortion(original: &CacheBatch, encoded: &CacheBatch) -> (Distortion, Vec<Drift>) {
    distortion_in(original, encoded, 0..original.caches.first().map_or(0, |c| c.layers.len()))
}

/// [`distortion`] of some layers.
pub fn distortion_in(
    original: &CacheBatch,
    encoded: &CacheBatch,
    layers: Range<usize>,
) -> (Distortion, Vec<Drift>) {
    let (layers, drifts) = distortion_by_layer(original, encoded, layers);
    let mut total = Distortion::default();
    layers.into_iter().for_each(|layer| total += layer);
    (total, drifts)
}

/// [`distortion_in`], each layer for itself.
pub fn distortion_by_layer(
    original: &CacheBatch,
    encoded: &CacheBatch,
    layers: Range<usize>,
) -> (Vec<Distortion>, Vec<Drift>) {
    let layer = |n: usize| {
        let mut sum = Distortion::default();
        let mut drifts = vec![Drift::default(); original.caches.len()];
        for (request, drift) in drifts.iter_mut().enumerate() {
            let (before, after) = (&original.caches[request], &encoded.caches[request]);
            if after.layers[n].kept.is_some() {
                let (own, worst) = evicted(original, encoded, request, n);
                sum += own;
                let blocks = 0..after.layers[n].entries.len();
                let fused = blocks.filter(|b| encoded.is_fused(request, n, *b)).count() as u64;
                drift.join(&Drift { fused_blocks: fused, worst_block_error: worst });
                continue;
            }
            let entries = before.layers[n].entries.iter().zip(&after.layers[n].entries);
            for (block, (x, y)) in entries.enumerate() {
                let keys = original.pool.keys(x.block);
                let turned = y.stripped.then(|| encoded.read(request, n, block).0);
                let (key_error, key_energy) = match &turned {
                    Some(turned) => squares(&keys, turned, 1.0),
                    None => squares(&keys, &encoded.pool.keys(y.block), y.key_scale()),
                };
                let values = (original.pool.values(x.block), encoded.pool.values(y.block));
                let (value_error, value_energy) = squares(&values.0, &values.1, y.value_scale());
                sum += Distortion { key_error, key_energy, value_error, value_energy };
                let worst = relative(key_error, key_energy).max(relative(value_error, value_energy));
                let fused = encoded.is_fused(request, n, block);
                drift.join(&Drift { fused_blocks: u64::from(fused), worst_block_error: worst });
            }
        }
        (sum, drifts)
    };
    // Collected first: a parallel sum would add in an order that depends on the threads.
    let layers: Vec<(Distortion, Vec<Drift>)> = layers.into_par_iter().map(layer).collect();
    let mut all = vec![Drift::default(); original.caches.len()];
    for (_, drifts) in &layers {
        all.iter_mut().zip(drifts).for_each(|(all, drift)| all.join(drift));
    }
    (layers.into_iter().map(|(sum, _)| sum).collect(), all)
}

/// One layer of a request that lost tokens: what is gone counts with all its energy. With the worst block of the original.
fn evicted(original: &CacheBatch, encoded: &CacheBatch, request: usize, n: usize) -> (Distortion, f64) {
    let width = original.pool.shape().token_width();
    let size = original.pool.shape().block_size;
    let table = &encoded.caches[request].layers[n];
    let blocks = 0..table.entries.len();
    // In slots.
    let (keys, values): (Vec<_>, Vec<_>) = blocks.map(|block| encoded.read(request, n, block)).unzip();
    let (keys, values) = (keys.concat(), values.concat());
    let gone = vec![0.0; width];
    let (mut sum, mut worst) = (Distortion::default(), 0.0f64);
    for (block, entry) in original.caches[request].layers[n].entries.iter().enumerate() {
        let mut own = Distortion::default();
        let (before, stored) = (original.pool.keys(entry.block), original.pool.values(entry.block));
        let rows = before.chunks_exact(width).zip(stored.chunks_exact(width));
        for (t, (key, value)) in rows.enumerate() {
            let position = block * size + t;
            let slot = table.slots_before(position);
            let there = table.slots_before(position + 1) > slot;
            let (k, v) = match there {
                true => (&keys[slot * width..][..width], &values[slot * width..][..width]),
                false => (&gone[..], &gone[..]),
            };
            let (key_error, key_energy) = squares(key, k, 1.0);
            let (value_error, value_energy) = squares(value, v, 1.0);
            own += Distortion { key_error, key_energy, value_error, value_energy };
        }
        worst = worst.max(own.keys()).max(own.values());
        sum += own;
    }
    (sum, worst)
}

/// Relative squared error of `y` as a stand-in for `x`.
pub fn relative_error(x: &[f32], y: &[f32]) -> f64 {
    let (error, energy) = squares(x, y, 1.0);
    relative(error, energy)
}

/// Sum of (x - scale * y)^2 and sum of x^2.
pub(super) fn squares(x: &[f32], y: &[f32], scale: f32) -> (f64, f64) {
    const LANES: usize = 8;
    let (mut error, mut energy) = ([0.0f32; LANES], [0.0f32; LANES]);
    let (x_lanes, x_rest) = x.as_chunks::<LANES>();
    let (y_lanes, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in x_lanes.iter().zip(y_lanes) {
        for i in 0..LANES {
            let difference = x[i] - scale * y[i];
            error[i] += difference * difference;
            energy[i] += x[i] * x[i];
        }
    }
    for (x, y) in x_rest.iter().zip(y_rest) {
        error[0] += (x - scale * y) * (x - scale * y);
        energy[0] += x * x;
    }
    (error.iter().map(|&e| f64::from(e)).sum(), energy.iter().map(|&e| f64::from(e)).sum())
}
