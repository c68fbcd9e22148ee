//! Percentile bootstrap of a mean over requests (Efron 1979).

use super::quantile;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// A mean and its 95 % bootstrap interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

pub fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// Mean of `x` with the 2.5 % and 97.5 % quantiles of the means of `resamples` samples with replacement.
///
/// Paired comparisons pass differences: resampling them resamples requests. `None` without data.
pub fn bootstrap_mean(x: &[f64], resamples: usize, seed: u64) -> Option<Interval> {
    if x.is_empty() {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let means: Vec<f64> = (0..resamples.max(1))
        .map(|_| (0..x.len()).map(|_| x[rng.random_range(0..x.len())]).sum::<f64>() / x.len() as f64)
        .collect();
    Some(Interval { mean: mean(x), low: quantile(&means, 0.025)?, high: quantile(&means, 0.975)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interval_of_a_constant_is_a_point() {
        let i = bootstrap_mean(&[2.0; 9], 200, 1).unwrap();
        assert_eq!((i.mean, i.low, i.high), (2.0, 2.0, 2.0));
        assert_eq!(bootstrap_mean(&[], 200, 1), None);
    }

    /// The interval of n uniform numbers covers the true mean about 95 times in 100.
    #[test]
    fn coverage_is_near_nominal() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let covered = (0..300).filter(|&seed| {
            let x: Vec<f64> = (0..60).map(|_| rng.random_range(0.0..1.0)).collect();
            let i = bootstrap_mean(&x, 400, seed).unwrap();
            i.low <= 0.5 && 0.5 <= i.high
        });
        let share = covered.count() as f64 / 300.0;
        assert!((0.90..=0.985).contains(&share), "{share}");
    }
}
