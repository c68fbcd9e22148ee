//! Methods against each other: what each stores at a KL, at a loss of score, and against an anchor over all rates.

mod bd;
mod interpolate;
mod measured;
mod products;

pub use bd::{Curve, Difference, bd_quality, bd_rate};
pub use interpolate::{Cubic, Slopes};
pub use measured::{Point, Series, read};
pub use products::{Product, products};

use crate::error::{Error, Result};
use crate::stats::{quantile, rounded};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// What to compare, and how.
pub struct CompareOptions {
    /// The series that all others are held against; the first one that is no control if it is left out.
    pub anchor: Option<String>,
    /// Nats a token.
    pub max_kl: f64,
    /// Loss of score that is still no loss: the interval's low end must lie above minus this.
    pub margin: f64,
    pub slopes: Slopes,
    pub resamples: usize,
    pub seed: u64,
}

/// One series: a row of compare.csv. Intervals are of 95 %, by bootstrap over requests, the same ones for all series.
#[derive(Debug, Clone, Serialize)]
pub struct Compared {
    pub series: String,
    pub points: usize,
    /// Points that no point of any series beats in both ratio and KL.
    pub on_front: usize,
    /// The ratio at the KL asked for, read between points on log axes; where all points are below it, the largest.
    pub cr_at_kl: Option<f64>,
    pub cr_at_kl_low: Option<f64>,
    pub cr_at_kl_high: Option<f64>,
    /// Whether even the coarsest point keeps to the KL.
    pub beyond_points: bool,
    /// The largest ratio of a point whose score is not lower than without encoding by the margin.
    pub cr_at_score: Option<f64>,
    /// Per cent of bits against the anchor at equal KL; negative is less.
    pub bd_rate_percent: Option<f64>,
    pub bd_rate_percent_low: Option<f64>,
    pub bd_rate_percent_high: Option<f64>,
    /// Decibels of KL at equal rate; positive is better.
    pub bd_quality_db: Option<f64>,
    /// The part of the KL that both curves cover, of what either does.
    pub overlap: Option<f64>,
}

/// Compares all series, in the order of the table.
///
/// # Errors
/// An anchor that is not there.
pub fn compare(series: &[Series], options: &CompareOptions) -> Result<Vec<Compared>> {
    let names: Vec<&str> = series.iter().map(|s| &s.name[..]).collect();
    let anchor = match &options.anchor {
        None => 0,
        Some(name) => series.iter().position(|s| s.name == *name).ok_or_else(|| {
            Error::argument(format!("no series is called '{name}'; there are {}", names.join(", ")))
        })?,
    };
    let requests = series.iter().flat_map(|s| &s.points).map(|p| p.kl_of_requests.len()).max().unwrap_or(0);
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let draws: Vec<Vec<usize>> = (0..options.resamples)
        .map(|_| (0..requests).map(|_| rng.random_range(0..requests)).collect())
        .collect();
    let rows = series.iter().map(|s| {
        let at_kl = |draw: Option<&Vec<usize>>| ratio_at(s, options.max_kl, draw);
        let curves = |draw: Option<&Vec<usize>>| (curve(&series[anchor], draw), curve(s, draw));
        let against = |draw: Option<&Vec<usize>>| {
            let (a, b) = curves(draw);
            bd_rate(&a, &b, options.slopes)
        };
        let (cr, cr_low, cr_high) = with_interval(at_kl, &draws);
        let (rate, rate_low, rate_high) = with_interval(|draw| against(draw).map(|d| d.value), &draws);
        let (a, b) = curves(None);
        let keeps = |p: &&Point| p.score_low >= -options.margin;
        Compared {
            series: s.name.clone(),
            points: s.points.len(),
            on_front: s.points.iter().filter(|p| p.on_front).count(),
            cr_at_kl: cr.map(rounded),
            cr_at_kl_low: cr_low.map(rounded),
            cr_at_kl_high: cr_high.map(rounded),
            beyond_points: s.points.iter().all(|p| p.kl <= options.max_kl),
            cr_at_score: s.points.iter().filter(keeps).map(|p| p.cr).reduce(f64::max).map(rounded),
            bd_rate_percent: rate.map(rounded),
            bd_rate_percent_low: rate_low.map(rounded),
            bd_rate_percent_high: rate_high.map(rounded),
            bd_quality_db: bd_quality(&a, &b, options.slopes).map(|d| rounded(d.value)),
            overlap: against(None).map(|d| rounded(d.overlap)),
        }
    });
    Ok(rows.collect())
}

/// A statistic of all requests and the 2.5 and 97.5 % of it over resamples; no interval where some resamples have none.
fn with_interval(
    statistic: impl Fn(Option<&Vec<usize>>) -> Option<f64>,
    draws: &[Vec<usize>],
) -> (Option<f64>, Option<f64>, Option<f64>) {
    let own = statistic(None);
    let drawn: Vec<f64> = draws.iter().filter_map(|d| statistic(Some(d))).collect();
    if own.is_none() || drawn.len() < draws.len() || drawn.is_empty() {
        return (own, None, None);
    }
    (own, quantile(&drawn, 0.025), quantile(&drawn, 0.975))
}

/// A point's mean KL over the requests drawn.
fn kl(point: &Point, draw: Option<&Vec<usize>>) -> f64 {
    match draw {
        Some(draw) if draw.len() == point.kl_of_requests.len() && !draw.is_empty() => {
            draw.iter().map(|&i| point.kl_of_requests[i]).sum::<f64>() / draw.len() as f64
        }
        _ => point.kl,
    }
}

/// KL below this is rounding.
const ZERO_KL: f64 = 1e-7;

fn curve(series: &Series, draw: Option<&Vec<usize>>) -> Curve {
    let points = series.points.iter().map(|p| (p.bits_per_element, kl(p, draw)));
    Curve::of(points.filter(|p| p.1 > ZERO_KL).map(|(rate, kl)| (rate, -10.0 * kl.log10())).collect())
}

/// The ratio at a KL, on the line between the logarithms of the two points around it; of several such, the largest. The largest
/// ratio where all points keep to the KL, none where none does.
fn ratio_at(series: &Series, bound: f64, draw: Option<&Vec<usize>>) -> Option<f64> {
    let mut points: Vec<(f64, f64)> = series.points.iter().map(|p| (p.cr, kl(p, draw))).collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut best: Option<f64> = points.iter().filter(|p| p.1 <= bound).map(|p| p.0).reduce(f64::max);
    for pair in points.windows(2) {
        let ((cr, a), (next, b)) = (pair[0], pair[1]);
        if a <= bound && b > bound {
            let a = a.max(ZERO_KL);
            let share = (bound / a).ln() / (b / a).ln();
            let between = cr * (next / cr).powf(share);
            best = Some(best.map_or(between, |best| best.max(between)));
        }
    }
    best
}
