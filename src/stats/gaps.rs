//! Gaps between exceedances in reading order: under the Poisson model they are geometric, the exponential law of a discrete
//! clock; where exceedances come in runs, most gaps are 1 and some are long.

use std::collections::BTreeMap;

/// Gaps up to this have a counter of their own.
const SHORT: usize = 256;

/// Gaps between exceedances in a stretch of pairs. Stretches are joined with [`Gaps::join`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gaps {
    /// Pairs read.
    seen: u64,
    /// Position of the first and of the last exceedance, from 1.
    first: Option<u64>,
    last: u64,
    short: Vec<u64>,
    long: BTreeMap<u64, u64>,
}

impl Gaps {
    /// An exceedance at a position counted from 1 within this stretch; positions rise.
    pub fn exceeds_at(&mut self, position: u64) {
        if self.first.is_none() {
            self.first = Some(position);
        } else {
            self.count(position - self.last, 1);
        }
        self.last = position;
    }

    /// Ends the stretch after so many pairs.
    pub fn end(&mut self, seen: u64) {
        self.seen = seen;
    }

    fn count(&mut self, gap: u64, times: u64) {
        if gap as usize <= SHORT {
            self.short.resize(SHORT + 1, 0);
            self.short[gap as usize] += times;
        } else {
            *self.long.entry(gap).or_default() += times;
        }
    }

    /// Appends the stretch that follows this one.
    pub fn join(&mut self, next: &Gaps) {
        if let Some(first) = next.first {
            match self.first {
                Some(_) => self.count(self.seen - self.last + first, 1),
                None => self.first = Some(self.seen + first),
            }
            self.last = self.seen + next.last;
        }
        self.seen += next.seen;
        for (gap, times) in next.iter() {
            self.count(gap, times);
        }
    }

    /// (gap, times), rising.
    fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        let short = self.short.iter().enumerate().map(|(gap, &n)| (gap as u64, n));
        short.chain(self.long.iter().map(|(&gap, &n)| (gap, n))).filter(|&(_, n)| n > 0)
    }

    /// Kolmogorov-Smirnov distance of the gaps from the geometric law of the same mean. `None` with less than ten.
    pub fn distance(&self) -> Option<f64> {
        let n: u64 = self.iter().map(|(_, n)| n).sum();
        (n >= 10).then_some(())?;
        let mean = self.iter().map(|(gap, n)| gap as f64 * n as f64).sum::<f64>() / n as f64;
        let geometric = |gap: u64| 1.0 - (1.0 - 1.0 / mean).powf(gap as f64);
        let (mut worst, mut below) = (0.0f64, 0);
        for (gap, times) in self.iter() {
            let before = below as f64 / n as f64;
            below += times;
            let after = below as f64 / n as f64;
            worst = worst.max((after - geometric(gap)).abs()).max((before - geometric(gap - 1)).abs());
        }
        Some(worst)
    }

    /// Extremal index: 1 for exceedances that come alone, 1/k where they come in runs of k (intervals estimator, Ferro and
    /// Segers 2003). `None` with less than ten gaps.
    pub fn extremal_index(&self) -> Option<f64> {
        let sum = |f: fn(f64) -> f64| self.iter().map(|(gap, n)| f(gap as f64) * n as f64).sum::<f64>();
        let n = sum(|_| 1.0);
        (n >= 10.0).then_some(())?;
        let longest = self.iter().map(|(gap, _)| gap).max()?;
        let (above, below) = if longest > 2 {
            (sum(|t| t - 1.0).powi(2), sum(|t| (t - 1.0) * (t - 2.0)))
        } else {
            (sum(|t| t).powi(2), sum(|t| t * t))
        };
        Some(if below > 0.0 { (2.0 * above / (n * below)).min(1.0) } else { 1.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn of(exceeds: &[bool]) -> Gaps {
        let mut gaps = Gaps::default();
        (1..).zip(exceeds).filter(|(_, e)| **e).for_each(|(at, _)| gaps.exceeds_at(at));
        gaps.end(exceeds.len() as u64);
        gaps
    }

    fn bernoulli(n: usize, q: f64, run: usize) -> Vec<bool> {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        (0..n).flat_map(|_| vec![rng.random_bool(q); run]).collect()
    }

    #[test]
    fn independent_exceedances_are_geometric() {
        let gaps = of(&bernoulli(200_000, 0.02, 1));
        assert!(gaps.distance().unwrap() < 0.03, "{:?}", gaps.distance());
        assert!(gaps.extremal_index().unwrap() > 0.95);
    }

    #[test]
    fn runs_are_not() {
        let gaps = of(&bernoulli(50_000, 0.02, 5));
        assert!(gaps.distance().unwrap() > 0.5);
        assert!((gaps.extremal_index().unwrap() - 0.2).abs() < 0.05, "{:?}", gaps.extremal_index());
    }

    proptest! {
        #[test]
        fn joined_stretches_are_the_whole(
            exceeds in prop::collection::vec(any::<bool>(), 0..60), cuts in prop::collection::vec(0usize..60, 2)
        ) {
            let n = exceeds.len();
            let (a, b) = (cuts[0].min(cuts[1]).min(n), cuts[0].max(cuts[1]).min(n));
            let mut joined = of(&exceeds[..a]);
            joined.join(&of(&exceeds[a..b]));
            joined.join(&of(&exceeds[b..]));
            let whole = of(&exceeds);
            prop_assert_eq!(joined.iter().collect::<Vec<_>>(), whole.iter().collect::<Vec<_>>());
            prop_assert_eq!((joined.seen, joined.first), (whole.seen, whole.first));
        }
    }
}
