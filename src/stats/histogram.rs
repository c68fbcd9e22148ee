//! Cosines counted in narrow bins: all that is kept of pairs too many to keep.

use std::ops::AddAssign;

/// Bins over [-1, 1]: 0.0005 each, finer than any threshold is chosen.
pub const BINS: usize = 4000;

/// Counts of numbers in [-1, 1].
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: vec![0; BINS], total: 0 }
    }
}

impl AddAssign<&Histogram> for Histogram {
    fn add_assign(&mut self, other: &Histogram) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        self.total += other.total;
    }
}

impl Histogram {
    pub fn add(&mut self, x: f64) {
        let bin = ((x + 1.0) * (BINS / 2) as f64) as usize;
        self.counts[bin.min(BINS - 1)] += 1;
        self.total += 1;
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    /// Lower edge of a bin.
    pub fn edge(bin: usize) -> f64 {
        bin as f64 / (BINS / 2) as f64 - 1.0
    }

    /// (middle, count) of the bins that hold anything, from the lowest.
    pub fn filled(&self) -> impl DoubleEndedIterator<Item = (f64, u64)> {
        let middle = |bin| Self::edge(bin) + 0.5 / (BINS / 2) as f64;
        self.counts.iter().enumerate().filter(|(_, c)| **c > 0).map(move |(bin, &c)| (middle(bin), c))
    }

    /// The p-quantile, straight lines within a bin. `None` if empty.
    pub fn quantile(&self, p: f64) -> Option<f64> {
        let rank = p.clamp(0.0, 1.0) * self.total as f64;
        let mut below = 0;
        for (bin, &count) in self.counts.iter().enumerate() {
            if count > 0 && (below + count) as f64 >= rank {
                let share = (rank - below as f64) / count as f64;
                return Some(Self::edge(bin) + share.clamp(0.0, 1.0) / (BINS / 2) as f64);
            }
            below += count;
        }
        None
    }

    /// What lies at or above an edge, and the part of the histogram that does.
    pub fn above(&self, bin: usize) -> Histogram {
        let mut counts = self.counts.clone();
        counts[..bin].fill(0);
        let total = counts.iter().sum();
        Histogram { counts, total }
    }

    /// The bin whose lower edge is nearest to `x`.
    pub fn bin_of(x: f64) -> usize {
        (((x + 1.0) * (BINS / 2) as f64).round() as usize).min(BINS - 1)
    }

    /// Kolmogorov-Smirnov distance from a distribution function, taken at the bins' edges.
    pub fn kolmogorov_smirnov(&self, cdf: impl Fn(f64) -> f64) -> f64 {
        self.steps().map(|(x, f)| (f - cdf(x)).abs()).fold(0.0, f64::max)
    }

    /// Anderson-Darling distance, divided by the number of observations: the integral of (F_n - F)^2 / (F (1 - F)) dF. It
    /// weighs both tails up.
    pub fn anderson_darling(&self, cdf: impl Fn(f64) -> f64) -> f64 {
        let mut sum = 0.0;
        let mut before: f64 = 0.0;
        for (x, f) in self.steps() {
            let now = cdf(x);
            let middle = 0.5 * (before + now);
            // Beyond these the weight is larger than what is known of either distribution.
            if middle > 1e-9 && middle < 1.0 - 1e-9 {
                sum += (f - now).powi(2) / (middle * (1.0 - middle)) * (now - before);
            }
            before = now;
        }
        sum
    }

    /// Upper edges of all bins with the share of observations below each.
    fn steps(&self) -> impl Iterator<Item = (f64, f64)> {
        let mut below = 0;
        self.counts.iter().enumerate().map(move |(bin, &count)| {
            below += count;
            (Self::edge(bin + 1), below as f64 / self.total.max(1) as f64)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_a_uniform_law() {
        let mut h = Histogram::default();
        (0..100_000).for_each(|i| h.add((f64::from(i) + 0.5) / 100_000.0));
        for p in [0.001, 0.25, 0.5, 0.9, 0.999] {
            assert!((h.quantile(p).unwrap() - p).abs() < 1e-4);
        }
        let uniform = |x: f64| x.clamp(0.0, 1.0);
        assert!(h.kolmogorov_smirnov(uniform) < 1e-4);
        assert!(h.anderson_darling(uniform) < 1e-6);
        assert!((h.kolmogorov_smirnov(|x| (x - 0.1).clamp(0.0, 1.0)) - 0.1).abs() < 1e-3);
        assert_eq!(Histogram::default().quantile(0.5), None);
    }

    #[test]
    fn ends_are_counted() {
        let mut h = Histogram::default();
        [-1.0, 1.0].into_iter().for_each(|x| h.add(x));
        assert_eq!(h.total(), 2);
        assert!(h.quantile(1.0).unwrap() > 0.999 && h.quantile(0.0).unwrap() <= -0.999);
    }
}
