//! Synthetic caches in which the model's assumptions hold, or fail one at a time.

use super::law::LayerLaw;
use crate::stats::Class;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::Serialize;

/// What the blocks of a synthetic cache have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum World {
    /// Independent directions: the model's own world. Thresholds are moved so that the same pairs lie above them as in
    /// `common`.
    Iid,
    /// The same directions plus one common component: means drift towards it.
    Common,
    /// Components of position and request beside the common one, and blocks that have more or less of it: the measured
    /// means of all classes of pairs, their spread, and the correlation of pairs that share a block.
    Law,
}

/// Shares of a block's squared norm, and how they vary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// Cosine that any two blocks have from the common component.
    pub common: f64,
    /// Standard deviation over blocks of their loading on it.
    pub loading_sd: f64,
    /// Cosine that blocks of one position, of one request, have in addition.
    pub position: f64,
    pub request: f64,
    /// Dimensions of every random direction.
    pub dimensions: usize,
}

impl Recipe {
    /// Matches the moments of a layer's keys.
    pub fn new(world: World, law: &LayerLaw) -> Self {
        // A single request has pairs within it only.
        let class = if law.class(Class::Other).pairs > 0.0 { Class::Other } else { Class::All };
        let other = law.class(class);
        let mean = other.mean.clamp(0.0, 0.98);
        let variance = other.sd.powi(2).max(1e-6);
        let dims = |residual: f64, variance: f64| {
            // Two random unit vectors of d dimensions have cosine variance 1/d.
            let d = (residual * residual / variance.max(1e-9)).clamp(4.0, 2048.0);
            (d as usize).next_multiple_of(2)
        };
        let plain = Recipe {
            common: mean,
            loading_sd: 0.0,
            position: 0.0,
            request: 0.0,
            dimensions: dims(1.0 - mean, variance),
        };
        match world {
            World::Iid => Recipe { common: 0.0, ..plain },
            World::Common => plain,
            World::Law => {
                let extra = |class| {
                    let law = law.class(class);
                    if law.pairs > 0.0 { (law.mean - mean).max(0.0) } else { 0.0 }
                };
                let (position, request) = (extra(Class::SamePosition), extra(Class::SameRequest));
                let room = (0.99 - mean) / (position + request).max(0.99 - mean);
                let (position, request) = (position * room, request * room);
                // Pairs with a common block are correlated through its loading: Cov = mean * Var(loading).
                let correlation = other.neighbour_correlation.clamp(0.0, 0.45);
                let loading_sd = if mean > 0.0 { (correlation * variance / mean).sqrt() } else { 0.0 };
                let residual = 1.0 - mean - position - request;
                // Directions of different positions and requests vary like the residual.
                let squares = residual * residual + position * position + request * request;
                Recipe {
                    common: mean,
                    loading_sd,
                    position,
                    request,
                    dimensions: dims(squares.sqrt(), (1.0 - 2.0 * correlation) * variance),
                }
            }
        }
    }

    /// The threshold of the iid world that the same pairs lie above as in the common one.
    pub fn threshold(world: World, tau: f64, common: f64) -> f64 {
        // Below -1 it is that all pairs lie above it.
        if world == World::Iid { ((tau - common) / (1.0 - common)).max(-0.999) } else { tau }
    }

    /// Numbers of a block: the common direction, then position, request and residual, each in dimensions of its own.
    pub fn width(&self) -> usize {
        (1 + 3 * self.dimensions).next_multiple_of(2)
    }

    /// Keys of `requests` requests of `blocks` blocks each, `[blocks, width]`, of unit norm.
    pub fn draw(&self, requests: usize, blocks: usize, rng: &mut ChaCha8Rng) -> Vec<Vec<f32>> {
        let d = self.dimensions;
        let positions: Vec<Vec<f64>> = (0..blocks).map(|_| direction(d, rng)).collect();
        let request = |rng: &mut ChaCha8Rng| {
            let own = direction(d, rng);
            let mut keys = Vec::with_capacity(blocks * self.width());
            for position in &positions {
                let residual = direction(d, rng);
                let normal: f64 = StandardNormal.sample(rng);
                let loading = (self.common.sqrt() + self.loading_sd * normal).clamp(-0.999, 0.999);
                // What the common component leaves is shared out in fixed proportions.
                let left = (1.0 - loading * loading) / (1.0 - self.common);
                let residual_share = 1.0 - self.common - self.position - self.request;
                let start = keys.len();
                keys.push(loading as f32);
                for (part, share) in
                    [(position, self.position), (&own, self.request), (&residual, residual_share)]
                {
                    let factor = (share.max(0.0) * left).sqrt();
                    keys.extend(part.iter().map(|x| (x * factor) as f32));
                }
                keys.resize(start + self.width(), 0.0);
            }
            keys
        };
        (0..requests).map(|_| request(rng)).collect()
    }
}

/// A random unit vector.
fn direction(dimensions: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
    let mut x: Vec<f64> = rng.sample_iter(StandardNormal).take(dimensions).collect();
    let norm = x.iter().map(|v| v * v).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    x.iter_mut().for_each(|v| *v /= norm);
    x
}
