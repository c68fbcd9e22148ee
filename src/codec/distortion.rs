//! What encoding did to keys and values, measured on the reconstructed cache.

use super::CacheBatch;
use rayon::prelude::*;
use std::ops::AddAssign;

/// Squared errors and energies over all tokens and layers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
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

/// Compares an encoded batch with the original, block by block as the tables list them.
pub fn distortion(original: &CacheBatch, encoded: &CacheBatch) -> Distortion {
    let layers = original.caches.first().map_or(0, |c| c.layers.len());
    let layer = |n: usize| {
        let mut sum = Distortion::default();
        for (before, after) in original.caches.iter().zip(&encoded.caches) {
            for (x, y) in before.layers[n].entries.iter().zip(&after.layers[n].entries) {
                let keys = (original.pool.keys(x.block), encoded.pool.keys(y.block));
                let (error, energy) = squares(keys.0, keys.1, y.key_scale());
                sum.key_error += error;
                sum.key_energy += energy;
                let values = (original.pool.values(x.block), encoded.pool.values(y.block));
                let (error, energy) = squares(values.0, values.1, y.value_scale());
                sum.value_error += error;
                sum.value_energy += energy;
            }
        }
        sum
    };
    // Collected first: a parallel sum would add in an order that depends on the threads.
    let layers: Vec<Distortion> = (0..layers).into_par_iter().map(layer).collect();
    layers.into_iter().fold(Distortion::default(), |mut sum, layer| {
        sum += layer;
        sum
    })
}

/// Sum of (x - scale * y)^2 and sum of x^2.
fn squares(x: &[f32], y: &[f32], scale: f32) -> (f64, f64) {
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
