//! Threshold lists: `0.9`, `0.95,0.9`, `0.95:0.60:0.05`, or a mixture.

use crate::codec::spec::range;
use crate::error::{Error, Result};

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
    let number = |value: String| {
        let x: Option<f64> = value.parse().ok();
        let x = x.ok_or_else(|| bad("write a number or high:low:step, as 0.95:0.60:0.05"))?;
        if x.is_finite() { Ok(x) } else { Err(bad("is not a finite number")) }
    };
    range(part).map_err(|problem| bad(&problem))?.into_iter().map(number).collect()
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
