//! Quantiles of what was measured (ndarray-stats).

use ndarray::ArrayViewMut1;
use ndarray_stats::Quantile1dExt;
use ndarray_stats::interpolate::Nearest;
use noisy_float::types::n64;

/// The number at the rank nearest to a share `q` of the way from the least to the largest; `None` of none. Numbers that are not
/// finite come last.
pub fn quantile(numbers: &[f64], q: f64) -> Option<f64> {
    let mut finite: Vec<_> = numbers.iter().filter(|x| !x.is_nan()).map(|x| n64(*x)).collect();
    let mut view = ArrayViewMut1::from(&mut finite[..]);
    let found = view.quantile_mut(n64(q.clamp(0.0, 1.0)), &Nearest).ok()?;
    Some(found.raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_the_nearest() {
        let numbers: Vec<f64> = (0..101).rev().map(f64::from).collect();
        assert_eq!(quantile(&numbers, 0.025), Some(3.0), "half way goes up");
        assert_eq!(quantile(&numbers, 0.5), Some(50.0));
        assert_eq!((quantile(&numbers, 0.0), quantile(&numbers, 1.0)), (Some(0.0), Some(100.0)));
        assert_eq!((quantile(&[], 0.5), quantile(&[7.0], 0.9)), (None, Some(7.0)));
    }
}
