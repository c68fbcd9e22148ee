//! Threshold lists: `0.9`, `0.95,0.9`, `0.95:0.60:0.05`, or a mixture.

use crate::error::{Error, Result};

/// More thresholds than anyone means.
const MOST: usize = 1000;

/// Thresholds of a comma-separated list of numbers and `high:low:step` ranges (both ends included), in its order.
pub fn parse_taus(text: &str) -> Result<Vec<f64>> {
    let mut taus = Vec::new();
    for part in text.split(',') {
        taus.extend(parse_part(part.trim())?);
    }
    if let Some(tau) = taus.iter().find(|t| !(**t > -1.0 && **t <= 1.0)) {
        return Err(Error::argument(format!("--tau {text}: {tau} lies outside of (-1, 1]")));
    }
    let mut seen = taus.clone();
    seen.sort_by(f64::total_cmp);
    if let Some(pair) = seen.windows(2).find(|p| p[0] == p[1]) {
        return Err(Error::argument(format!("--tau {text}: {} is listed twice", pair[0])));
    }
    Ok(taus)
}

fn parse_part(part: &str) -> Result<Vec<f64>> {
    let bad = |problem: &str| Error::argument(format!("--tau {part}: {problem}"));
    let number = |s: &str| {
        let x: f64 =
            s.trim().parse().map_err(|_| bad("write a number or high:low:step, as 0.95:0.60:0.05"))?;
        if x.is_finite() { Ok(x) } else { Err(bad("is not a finite number")) }
    };
    let fields: Vec<f64> = part.split(':').map(number).collect::<Result<_>>()?;
    match fields[..] {
        [tau] => Ok(vec![tau]),
        [high, low, step] => {
            if step <= 0.0 {
                return Err(bad("the step must be above 0"));
            }
            if high < low {
                return Err(bad("the range is reversed; write high:low:step, as 0.95:0.60:0.05"));
            }
            // A little more than the exact count: 0.35 / 0.05 is just below 7 in floating point.
            let steps = ((high - low) / step + 1e-9).floor();
            if steps >= MOST as f64 {
                return Err(bad("the range has more than 1000 thresholds"));
            }
            // Six decimals: 0.95 - 2 * 0.05 must be the number that prints as 0.85.
            Ok((0..=steps as usize).map(|i| ((high - i as f64 * step) * 1e6).round() / 1e6).collect())
        }
        _ => Err(bad("write a number or high:low:step, as 0.95:0.60:0.05")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_include_both_ends() {
        let taus = parse_taus("0.95:0.60:0.05").unwrap();
        assert_eq!(taus, [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6]);
        assert_eq!(parse_taus("1,0.5:0.5:0.1").unwrap(), [1.0, 0.5]);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in
            ["", "a", "1.2", "-1", "0.6:0.9:0.1", "0.9:0.6:0", "0.9:0.6", "nan", "0.9,0.9", "1:-0.99:1e-9"]
        {
            assert!(parse_taus(bad).is_err(), "{bad}");
        }
    }
}
