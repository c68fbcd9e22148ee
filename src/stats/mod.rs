//! Statistics: intervals over requests, and how alike the blocks of a cache are (docs/statistics.md).

mod alone;
mod blocks;
mod bootstrap;
mod fit;
mod gaps;
mod histogram;
mod measure;
mod pairs;
mod quantile;
mod recall;
mod similarity;

pub use blocks::{Class, DistinctBlocks, Home, distinct_blocks};
pub use bootstrap::{Interval, bootstrap_mean, mean};
pub use fit::{Gaussian, Pareto, gaussian_tail};
pub use gaps::Gaps;
pub use histogram::Histogram;
pub use measure::{STATS_CSV, STATS_MANIFEST, StatsOptions, measure, read_stats};
pub use pairs::{LayerSums, PairSums, count_pairs};
pub use quantile::quantile;
pub use similarity::{SimilarityOptions, StatRow, similarities};

/// Six significant digits: more than any number in a result table carries.
pub fn rounded(x: f64) -> f64 {
    if x == 0.0 || !x.is_finite() { x } else { format!("{x:.5e}").parse().unwrap_or(x) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_digits() {
        assert_eq!(rounded(1.234_567_89), 1.23457);
        assert_eq!(rounded(-0.000_012_345_678), -1.23457e-5);
        assert_eq!(rounded(0.0), 0.0);
    }
}
