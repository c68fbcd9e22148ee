//! Whether the model holds in a layer, and if not, which of its assumptions the data contradict.

use super::law::LayerLaw;
use super::predict::Model;
use crate::codec::fusion::Pairing;
use crate::stats::Class;
use serde::Serialize;

/// One threshold of one layer, predicted and measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    pub tau: f64,
    /// Ratio by exact duplicates alone.
    pub cr_duplicates: f64,
    pub cr_predicted: f64,
    pub cr_measured: f64,
}

/// One row of verdicts.csv.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    pub model: Model,
    pub layer: usize,
    pub pairing: Pairing,
    /// Thresholds at which more than exact duplicates fuses, predicted or measured.
    pub thresholds: usize,
    /// The largest |predicted / measured - 1| of the ratio over these.
    pub worst_error: Option<f64>,
    /// The threshold of the worst error; what follows is of all pairs at this threshold.
    pub worst_tau: Option<f64>,
    /// The lowest threshold at which, and above which everywhere, the ratio is within the tolerance.
    pub holds_down_to: Option<f64>,
    pub dispersion: Option<f64>,
    pub rho1_over_q: Option<f64>,
    /// Measured exceedance over that of the Gaussian body, where that is one pair at least.
    pub tail_over_gaussian: Option<f64>,
    pub holds: Option<bool>,
    pub why: String,
}

/// A prediction within this share of what was measured holds.
pub const TOLERANCE: f64 = 0.1;
/// A ratio this much above that of duplicates is fusion.
const FUSES: f64 = 1.02;

/// Judges one layer and pairing.
pub fn verdict(law: &LayerLaw, model: Model, pairing: Pairing, comparisons: &[Comparison]) -> Verdict {
    let fuses = |c: &&Comparison| c.cr_predicted.max(c.cr_measured) > FUSES * c.cr_duplicates;
    let counted: Vec<&Comparison> = comparisons.iter().filter(fuses).collect();
    let error = |c: &Comparison| (c.cr_predicted / c.cr_measured - 1.0).abs();
    let worst = counted.iter().max_by(|a, b| error(a).total_cmp(&error(b)));
    let Some(worst) = worst else {
        return Verdict {
            model,
            layer: law.layer,
            pairing,
            thresholds: 0,
            worst_error: None,
            worst_tau: None,
            holds_down_to: None,
            dispersion: None,
            rho1_over_q: None,
            tail_over_gaussian: None,
            holds: None,
            why: "nothing but exact duplicates fuses".to_owned(),
        };
    };
    let mut falling = counted.clone();
    falling.sort_by(|a, b| b.tau.total_cmp(&a.tau));
    let holds_down_to = falling.iter().take_while(|c| error(c) <= TOLERANCE).last().map(|c| c.tau);
    let e = law.all_pairs(worst.tau);
    let dispersion = e.and_then(|e| e.dispersion);
    let rho1_over_q = e.and_then(|e| e.rho1.map(|rho1| rho1 / e.q)).filter(|x| x.is_finite());
    // A tail of less than one pair is no tail to compare with.
    let pairs = law.class(Class::All).pairs;
    let tail = e.and_then(|e| e.gaussian.filter(|g| g * pairs >= 1.0).map(|g| e.q / g));
    let holds = error(worst) <= TOLERANCE;
    Verdict {
        model,
        layer: law.layer,
        pairing,
        thresholds: counted.len(),
        worst_error: Some(error(worst)),
        worst_tau: Some(worst.tau),
        holds_down_to,
        dispersion,
        rho1_over_q,
        tail_over_gaussian: tail,
        holds: Some(holds),
        // Independent pairs have 1 - q.
        why: why(
            pairing,
            worst,
            holds,
            dispersion.zip(e).map(|(d, e)| d / (1.0 - e.q).max(1e-9)),
            rho1_over_q,
        ),
    }
}

fn why(
    pairing: Pairing,
    worst: &Comparison,
    holds: bool,
    dispersion: Option<f64>,
    rho1_over_q: Option<f64>,
) -> String {
    let (d, r) = (dispersion.unwrap_or(1.0), rho1_over_q.unwrap_or(1.0));
    let clustered = d > 2.0 || r > 2.0;
    let over = worst.cr_predicted > worst.cr_measured;
    let clusters = format!("pairs above tau share blocks (dispersion/(1-q) {d:.1}, rho1/q {r:.1})");
    match (holds, clustered, over) {
        (true, false, _) => "pairs above tau are close to independent".to_owned(),
        (true, true, _) => format!("in spite of it: {clusters}"),
        // The same number of pairs among fewer blocks fuses fewer of them.
        (false, true, true) => format!("too high: {clusters}"),
        (false, _, false) if pairing == Pairing::Tree => {
            "too low: means of merged blocks are more alike than blocks are".to_owned()
        }
        (false, true, false) => format!("too low although {clusters}"),
        (false, false, true) => "too high: best partners are taken, so others find none".to_owned(),
        (false, false, false) => {
            "too low: chains of pairs, or blocks more alike than the tail says".to_owned()
        }
    }
}
