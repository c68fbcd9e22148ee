//! Bjontegaard differences: how much less one method stores at equal quality, and how much better it is at equal rate.

use super::interpolate::{Cubic, Slopes};

/// One method's points: bits per element, and -10 log10 of KL.
#[derive(Debug, Clone, Default)]
pub struct Curve {
    pub points: Vec<(f64, f64)>,
}

/// A difference over the overlap of two curves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    pub value: f64,
    /// The overlap as a share of what both curves cover together.
    pub overlap: f64,
}

impl Curve {
    /// The points of a method that are of use: quality rises with the rate, and each is the cheapest of its quality.
    pub fn of(mut points: Vec<(f64, f64)>) -> Self {
        points.retain(|(rate, quality)| *rate > 0.0 && rate.is_finite() && quality.is_finite());
        points.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
        let mut useful: Vec<(f64, f64)> = Vec::new();
        for point in points {
            if useful.last().is_none_or(|last| point.0 > last.0 && point.1 > last.1) {
                useful.push(point);
            }
        }
        Curve { points: useful }
    }

    fn parts(&self) -> (Vec<f64>, Vec<f64>) {
        self.points.iter().map(|(rate, quality)| (rate.log10(), *quality)).unzip()
    }
}

/// Mean difference of `test` and `anchor` over their overlap.
fn mean_difference(anchor: (&[f64], &[f64]), test: (&[f64], &[f64]), slopes: Slopes) -> Option<Difference> {
    let a = Cubic::through(anchor.0, anchor.1, slopes)?;
    let b = Cubic::through(test.0, test.1, slopes)?;
    let (from, to) = (a.range().0.max(b.range().0), a.range().1.min(b.range().1));
    if from >= to {
        return None;
    }
    let all = a.range().1.max(b.range().1) - a.range().0.min(b.range().0);
    let value = (b.integral(from, to) - a.integral(from, to)) / (to - from);
    Some(Difference { value, overlap: (to - from) / all })
}

/// By how many per cent `test` stores more than `anchor` at equal quality (negative: less); `None` without overlap.
pub fn bd_rate(anchor: &Curve, test: &Curve, slopes: Slopes) -> Option<Difference> {
    let ((rate_a, quality_a), (rate_b, quality_b)) = (anchor.parts(), test.parts());
    let found = mean_difference((&quality_a, &rate_a), (&quality_b, &rate_b), slopes)?;
    Some(Difference { value: (10f64.powf(found.value) - 1.0) * 100.0, ..found })
}

/// By how many decibels of KL `test` is better than `anchor` at equal rate; `None` without overlap.
pub fn bd_quality(anchor: &Curve, test: &Curve, slopes: Slopes) -> Option<Difference> {
    let ((rate_a, quality_a), (rate_b, quality_b)) = (anchor.parts(), test.parts());
    mean_difference((&rate_a, &quality_a), (&rate_b, &quality_b), slopes)
}
