//! Two laws of similarity: a Gaussian for the body, a generalised Pareto law for the tail.

use super::histogram::Histogram;
use statrs::distribution::{ContinuousCDF, Normal};

/// P(Z > z) of a standard Gaussian.
pub fn gaussian_tail(z: f64) -> f64 {
    Normal::standard().sf(z)
}

/// A Gaussian.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gaussian {
    pub mean: f64,
    pub sd: f64,
}

impl Gaussian {
    /// Fitted to the middle half: median, and interquartile range / 1.349. So the tail, which is what the fit is held
    /// against, has no say in it. `None` without spread.
    pub fn of_body(histogram: &Histogram) -> Option<Self> {
        let spread = histogram.quantile(0.75)? - histogram.quantile(0.25)?;
        // Within a bin or two nothing is known of it.
        (spread > Histogram::edge(2) - Histogram::edge(0)).then_some(())?;
        Some(Gaussian { mean: histogram.quantile(0.5)?, sd: spread / 1.348_979_5 })
    }

    /// P(S > x).
    pub fn exceedance(&self, x: f64) -> f64 {
        gaussian_tail((x - self.mean) / self.sd)
    }
}

/// A tail: P(S > x) = rate * (1 + shape (x - threshold) / scale)^(-1/shape) for x above the threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pareto {
    pub threshold: f64,
    /// Share of all observations above the threshold.
    pub rate: f64,
    /// xi: negative for a tail that ends, 0 for an exponential one.
    pub shape: f64,
    pub scale: f64,
    /// Kolmogorov-Smirnov distance of the observations above the threshold from the fit.
    pub distance: f64,
}

/// Shares of observations above the thresholds that are tried.
const TAILS: [f64; 8] = [0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001];
/// Observations without which a tail is not fitted. Pairs are counted twice: these are 100 of them.
const FEWEST: u64 = 200;

impl Pareto {
    /// Of several thresholds the one whose tail lies closest to its fit (Clauset, Shalizi and Newman 2009), each fitted by
    /// probability-weighted moments (Hosking and Wallis 1987). `None` where no tail has enough observations.
    pub fn of_tail(histogram: &Histogram) -> Option<Self> {
        let fits = TAILS.iter().filter_map(|share| {
            let bin = Histogram::bin_of(histogram.quantile(1.0 - share)?);
            Self::above(histogram, bin)
        });
        fits.min_by(|a, b| a.distance.total_cmp(&b.distance))
    }

    fn above(histogram: &Histogram, bin: usize) -> Option<Self> {
        let tail = histogram.above(bin);
        let n = tail.total() as f64;
        let threshold = Histogram::edge(bin);
        (tail.total() >= FEWEST).then_some(())?;
        // a0 = E[X], a1 = E[X (1 - F(X))], X the overshoot; within a bin all have the middle rank.
        let (mut a0, mut a1, mut above) = (0.0, 0.0, n);
        for (x, count) in tail.filled() {
            let count = count as f64;
            let overshoot = x - threshold;
            a0 += overshoot * count / n;
            a1 += overshoot * count / n * (above - 0.5 * count) / n;
            above -= count;
        }
        let spread = a0 - 2.0 * a1;
        (spread > 0.0).then_some(())?;
        let mut fit = Pareto {
            threshold,
            rate: n / histogram.total() as f64,
            shape: 2.0 - a0 / spread,
            scale: 2.0 * a0 * a1 / spread,
            distance: 0.0,
        };
        (fit.scale > 0.0).then_some(())?;
        fit.distance = tail.kolmogorov_smirnov(|x| 1.0 - fit.survival(x));
        Some(fit)
    }

    /// P(S > x | S > threshold).
    pub fn survival(&self, x: f64) -> f64 {
        let z = (x - self.threshold).max(0.0) / self.scale;
        if self.shape.abs() < 1e-9 {
            return (-z).exp();
        }
        let base = 1.0 + self.shape * z;
        if base > 0.0 { base.powf(-1.0 / self.shape) } else { 0.0 }
    }

    /// P(S > x); `None` below the threshold.
    pub fn exceedance(&self, x: f64) -> Option<f64> {
        (x >= self.threshold).then(|| self.rate * self.survival(x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    fn draw(n: usize, seed: u64, law: impl Fn(f64) -> f64) -> Histogram {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut h = Histogram::default();
        (0..n).for_each(|_| h.add(law(rng.random_range(0.0..1.0)).clamp(-1.0, 1.0)));
        h
    }

    /// Tabulated: Q(1) = 0.158655, Q(2) = 0.0227501, Q(4) = 3.16712e-5, Q(6) = 9.86588e-10.
    #[test]
    fn gaussian_tails() {
        for (z, q) in
            [(0.0, 0.5), (1.0, 0.158_655_25), (2.0, 0.022_750_13), (4.0, 3.167_124e-5), (6.0, 9.865_88e-10)]
        {
            assert!((gaussian_tail(z) / q - 1.0).abs() < 1e-5, "{z}");
        }
    }

    #[test]
    fn the_body_is_found_in_spite_of_a_tail() {
        let normal = Normal::new(0.3, 0.05).unwrap();
        // One in twenty lies far out.
        let h = draw(200_000, 1, |u| if u < 0.95 { normal.inverse_cdf(u / 0.95) } else { 0.9 });
        let g = Gaussian::of_body(&h).unwrap();
        assert!((g.mean - 0.3).abs() < 0.005 && (g.sd - 0.05).abs() < 0.004, "{g:?}");
    }

    #[test]
    fn known_tails_are_recovered() {
        for (shape, scale) in [(-0.3, 0.1), (0.0, 0.05), (0.2, 0.04)] {
            // A pure Pareto tail above 0: every threshold has the same shape, and scale + shape * threshold.
            let law = |u: f64| {
                let v = 1.0 - u;
                if shape == 0.0 { -scale * v.ln() } else { scale / shape * (v.powf(-shape) - 1.0) }
            };
            let fit = Pareto::of_tail(&draw(400_000, 2, law)).unwrap();
            assert!((fit.shape - shape).abs() < 0.06, "{shape}: {fit:?}");
            let expected = scale + shape * fit.threshold;
            assert!((fit.scale / expected - 1.0).abs() < 0.06, "{scale}: {fit:?}");
            // Two e-folds out the probability itself.
            let x = fit.threshold + 2.0 * expected;
            let exact = if shape == 0.0 {
                (-x / scale).exp()
            } else {
                (1.0 + shape * x / scale).max(0.0).powf(-1.0 / shape)
            };
            assert!((fit.exceedance(x).unwrap() / exact - 1.0).abs() < 0.1, "{fit:?}");
        }
    }

    #[test]
    fn too_little_is_no_fit() {
        assert_eq!(Pareto::of_tail(&draw(150, 3, |u| u)), None);
        assert_eq!(Gaussian::of_body(&draw(50, 3, |_| 0.5)), None);
        assert_eq!(Pareto::of_tail(&draw(5000, 3, |_| 1.0)), None);
        assert_eq!(Gaussian::of_body(&Histogram::default()), None);
    }
}
