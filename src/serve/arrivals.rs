//! When requests arrive: as vLLM's `bench serve` draws them.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Gamma};

/// How requests come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrivals {
    /// Requests a second; infinite for all at once.
    pub rate: f64,
    /// Shape of the gamma distribution of the gaps: 1 is Poisson, below 1 bursts, above 1 more even.
    pub burstiness: f64,
}

impl Arrivals {
    /// Seconds at which `n` requests arrive, rising. The gaps are scaled so that the last comes at `n / rate`, as vLLM does:
    /// runs of one rate then offer the same load.
    pub fn times(&self, n: usize, seed: u64) -> Vec<f64> {
        let gamma = match Gamma::new(self.burstiness, 1.0 / (self.rate * self.burstiness)) {
            Ok(gamma) if self.rate.is_finite() => gamma,
            _ => return vec![0.0; n],
        };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut at = 0.0;
        let times: Vec<f64> = (0..n)
            .map(|_| {
                at += gamma.sample(&mut rng);
                at
            })
            .collect();
        let scale = n as f64 / self.rate / at;
        times.into_iter().map(|t| t * scale).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_rate_and_the_spread_that_were_asked_for() {
        for (burstiness, spread) in [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0)] {
            let times = Arrivals { rate: 2.0, burstiness }.times(20_000, 7);
            let gaps: Vec<f64> =
                std::iter::once(times[0]).chain(times.windows(2).map(|w| w[1] - w[0])).collect();
            let mean = crate::stats::mean(&gaps);
            let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
            assert!((mean - 0.5).abs() < 1e-9);
            assert!((variance.sqrt() / mean - spread).abs() < 0.05 * spread, "{burstiness}");
        }
        assert_eq!(Arrivals { rate: f64::INFINITY, burstiness: 1.0 }.times(3, 0), [0.0; 3]);
    }
}
