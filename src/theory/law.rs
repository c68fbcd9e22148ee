//! What the model needs of a layer's measured similarities, read from the rows of stats.csv.

use crate::stats::{Class, StatRow};
use std::collections::BTreeMap;

/// Exceedances of one threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exceedance {
    pub tau: f64,
    /// P(S > tau), with its 95 % interval (equal ends where there is none).
    pub q: f64,
    pub low: f64,
    pub high: f64,
    /// Mean cosine of the keys above tau, and of the same pairs' values; absent where no pair is.
    pub mean_above: Option<f64>,
    pub value_above: Option<f64>,
    pub dispersion: Option<f64>,
    pub rho1: Option<f64>,
    pub gaussian: Option<f64>,
}

impl Exceedance {
    /// No pairs at all.
    pub fn none(tau: f64) -> Self {
        Exceedance {
            tau,
            q: 0.0,
            low: 0.0,
            high: 0.0,
            mean_above: None,
            value_above: None,
            dispersion: None,
            rho1: None,
            gaussian: None,
        }
    }
}

/// Pairs of one class.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClassLaw {
    pub pairs: f64,
    pub mean: f64,
    pub sd: f64,
    pub neighbour_correlation: f64,
    /// By threshold, rising.
    pub exceedances: Vec<Exceedance>,
}

/// Keys of one layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerLaw {
    pub layer: usize,
    pub block_size: usize,
    pub requests: f64,
    /// Full blocks, distinct ones, and those of them that at least half of the requests hold: a shared preamble.
    pub blocks: f64,
    pub distinct: f64,
    pub common: f64,
    /// Full blocks that are copies of common ones.
    pub common_places: f64,
    /// Tokens in the caches, requests whose last block is not full, and numbers a token has in K; absent of a sample.
    pub tokens: Option<f64>,
    pub partial_blocks: Option<f64>,
    pub token_width: Option<f64>,
    /// Mean cosine of the values of any two blocks.
    pub value_mean: f64,
    /// In the order of [`Class::ALL`].
    pub classes: Vec<ClassLaw>,
    /// Pairs of blocks at one position, by position.
    pub positions: Vec<PositionLaw>,
}

/// Pairs of blocks of different requests at one position.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PositionLaw {
    /// Distinct blocks, and common ones of them.
    pub distinct: f64,
    pub common: f64,
    /// (tau, q, mean cosine above), rising; the last may be the lowest threshold that no pair exceeds. Empty without pairs.
    pub exceedances: Vec<(f64, f64, f64)>,
}

impl PositionLaw {
    /// Exceedance and mean cosine above at any threshold; between two known ones on straight lines. `None` without pairs.
    pub fn at(&self, tau: f64) -> Option<(f64, f64)> {
        self.exceedances.first()?;
        let Some(right) = self.exceedances.iter().position(|e| e.0 >= tau - 1e-9) else {
            return Some((0.0, 1.0));
        };
        let (high, q, s) = self.exceedances[right];
        Some(match right.checked_sub(1).map(|left| self.exceedances[left]) {
            Some((low, lower_q, lower_s)) if high - tau > 1e-9 => {
                let share = (tau - low) / (high - low);
                (lower_q + share * (q - lower_q), lower_s + share * (s - lower_s))
            }
            _ => (q, s),
        })
    }
}

/// A batch like the one measured: `factor` times as many requests, each adding `own` times as many distinct blocks to the
/// common ones.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Extent {
    pub factor: f64,
    pub own: f64,
}

impl Extent {
    pub const MEASURED: Extent = Extent { factor: 1.0, own: 1.0 };
}

impl LayerLaw {
    /// Laws of the keys in all layers of one block size, by layer.
    pub fn of_rows(rows: &[StatRow], block_size: usize) -> Vec<LayerLaw> {
        let mut layers: BTreeMap<usize, Vec<&StatRow>> = BTreeMap::new();
        for row in rows.iter().filter(|r| r.block_size == block_size) {
            layers.entry(row.layer).or_default().push(row);
        }
        layers.into_iter().map(|(layer, rows)| Self::of_layer(layer, block_size, &rows)).collect()
    }

    fn of_layer(layer: usize, block_size: usize, rows: &[&StatRow]) -> LayerLaw {
        let find = |part: &str, class: Class, statistic: &str, at: Option<f64>| {
            rows.iter().find(|r| r.is(part, class.name(), statistic, at)).copied()
        };
        let count = |statistic| find("both", Class::All, statistic, None).map(|r| r.value);
        let class = |class: Class| {
            let one = |statistic| find("key", class, statistic, None).map_or(0.0, |r| r.value);
            let mut taus: Vec<f64> = rows
                .iter()
                .filter(|r| r.part == "key" && r.class == class.name() && r.statistic == "exceedance")
                .filter_map(|r| r.at)
                .collect();
            taus.sort_by(f64::total_cmp);
            let exceedance = |tau: f64| {
                let at = |statistic| find("key", class, statistic, Some(tau));
                let value = |statistic| at(statistic).map(|r| r.value);
                let q = at("exceedance")?;
                Some(Exceedance {
                    tau,
                    q: q.value,
                    low: q.low.unwrap_or(q.value),
                    high: q.high.unwrap_or(q.value),
                    mean_above: value("mean_above"),
                    value_above: value("value_above"),
                    dispersion: value("dispersion"),
                    rho1: value("rho1"),
                    gaussian: value("gaussian_exceedance"),
                })
            };
            ClassLaw {
                pairs: one("pairs"),
                mean: one("mean"),
                sd: one("sd"),
                neighbour_correlation: one("neighbour_correlation"),
                exceedances: taus.into_iter().filter_map(exceedance).collect(),
            }
        };
        let position = |n: usize| {
            let name = format!("position_{n}");
            let own: Vec<&&StatRow> = rows.iter().filter(|r| r.class == name).collect();
            let distinct = own.iter().find(|r| r.statistic == "distinct")?.value;
            let above = |tau: Option<f64>| {
                own.iter().find(|r| r.statistic == "mean_above" && r.at == tau).map(|r| r.value)
            };
            let mut exceedances: Vec<(f64, f64, f64)> = own
                .iter()
                .filter(|r| r.statistic == "exceedance")
                .filter_map(|r| Some((r.at?, r.value, above(r.at).unwrap_or(1.0))))
                .collect();
            exceedances.sort_by(|a, b| a.0.total_cmp(&b.0));
            let common = own.iter().find(|r| r.statistic == "common").map_or(0.0, |r| r.value);
            Some(PositionLaw { distinct, common, exceedances })
        };
        LayerLaw {
            positions: (0..).map_while(position).collect(),
            layer,
            block_size,
            requests: count("requests").unwrap_or(0.0),
            blocks: count("blocks").unwrap_or(0.0),
            distinct: count("distinct").unwrap_or(0.0),
            common: count("common").unwrap_or(0.0),
            common_places: count("common_places").unwrap_or(0.0),
            tokens: count("tokens"),
            partial_blocks: count("partial_blocks"),
            token_width: count("token_width"),
            value_mean: find("value", Class::All, "mean", None).map_or(0.0, |r| r.value),
            classes: Class::ALL.into_iter().map(class).collect(),
        }
    }

    pub fn class(&self, class: Class) -> &ClassLaw {
        &self.classes[class as usize]
    }

    /// Distinct blocks that each request adds to the common ones, on average.
    pub fn own_blocks(&self) -> f64 {
        (self.distinct - self.common).max(0.0) / self.requests.max(1.0)
    }

    /// Distinct blocks of such a batch.
    pub fn distinct_of(&self, extent: Extent) -> f64 {
        self.common + (self.distinct - self.common) * extent.factor * extent.own
    }

    /// Full blocks of such a batch.
    pub fn blocks_of(&self, extent: Extent) -> f64 {
        extent.factor * (self.common_places + extent.own * (self.blocks - self.common_places))
    }

    /// How many pairs of each class (but for all) such a batch has: exactly those measured, of the batch measured.
    fn pairs_of(&self, extent: Extent) -> [(Class, f64); 3] {
        let Extent { factor, own } = extent;
        let within = self.class(Class::SameRequest).pairs;
        // Common blocks are in (nearly) every request: their pairs with each other and with a request's own are within it.
        let common = (0.5 * self.common * (self.common - 1.0)).clamp(0.0, within);
        let mixed = (self.common * (self.distinct - self.common)).clamp(0.0, within - common);
        let rest = within - common - mixed;
        let across = if self.requests > 1.0 {
            factor * (factor * self.requests - 1.0).max(0.0) / (self.requests - 1.0)
        } else {
            0.0
        };
        [
            (Class::SameRequest, common + factor * (own * mixed + own * own * rest)),
            (Class::SamePosition, across * own * self.class(Class::SamePosition).pairs),
            (Class::Other, across * own * own * self.class(Class::Other).pairs),
        ]
    }

    /// Exceedances among the pairs of some classes in such a batch. Of a batch without such pairs, none; `None` if the
    /// threshold lies outside of those measured.
    pub fn exceedance(&self, tau: f64, extent: Extent, classes: &[Class]) -> Option<Exceedance> {
        let weights: Vec<(Class, f64)> =
            self.pairs_of(extent).into_iter().filter(|(class, _)| classes.contains(class)).collect();
        if weights.iter().all(|(class, weight)| *weight <= 0.0 || self.class(*class).pairs == 0.0) {
            return Some(Exceedance::none(tau));
        }
        self.mixture(tau, &weights)
    }

    /// How the pairs of all distinct blocks measured exceed a threshold.
    pub fn all_pairs(&self, tau: f64) -> Option<Exceedance> {
        self.class(Class::All).at(tau)
    }

    fn mixture(&self, tau: f64, weights: &[(Class, f64)]) -> Option<Exceedance> {
        let parts: Vec<(f64, Exceedance)> = weights
            .iter()
            .filter(|(class, weight)| *weight > 0.0 && self.class(*class).pairs > 0.0)
            .filter_map(|&(class, weight)| Some((weight, self.class(class).at(tau)?)))
            .collect();
        let total: f64 = parts.iter().map(|(w, _)| w).sum();
        (total > 0.0).then_some(())?;
        let mean =
            |of: &dyn Fn(&Exceedance) -> f64| parts.iter().map(|(w, e)| w * of(e)).sum::<f64>() / total;
        // Of pairs above the threshold there are weight * q.
        let above = |of: fn(&Exceedance) -> Option<f64>| {
            let known: Vec<(f64, f64)> = parts.iter().filter_map(|(w, e)| Some((w * e.q, of(e)?))).collect();
            let total: f64 = known.iter().map(|(w, _)| w).sum();
            (total > 0.0).then(|| known.iter().map(|(w, x)| w * x).sum::<f64>() / total)
        };
        Some(Exceedance {
            tau,
            q: mean(&|e| e.q),
            low: mean(&|e| e.low),
            high: mean(&|e| e.high),
            mean_above: above(|e| e.mean_above),
            value_above: above(|e| e.value_above),
            // These are of all pairs together, whatever their classes: no mixture has them.
            dispersion: None,
            rho1: None,
            gaussian: None,
        })
    }
}

impl ClassLaw {
    /// Exceedances of any threshold between measured ones: straight lines on a log scale of q. `None` outside of them.
    pub fn at(&self, tau: f64) -> Option<Exceedance> {
        let above = self.exceedances.iter().position(|e| e.tau >= tau - 1e-9)?;
        let right = self.exceedances[above];
        if (right.tau - tau).abs() < 1e-9 {
            return Some(right);
        }
        let left = self.exceedances[above.checked_sub(1)?];
        let share = (tau - left.tau) / (right.tau - left.tau);
        let log = |a: f64, b: f64| {
            if a > 0.0 && b > 0.0 { (a.ln() + share * (b.ln() - a.ln())).exp() } else { a + share * (b - a) }
        };
        let line = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => Some(a + share * (b - a)),
            (a, b) => a.or(b),
        };
        let q = log(left.q, right.q);
        Some(Exceedance {
            tau,
            q,
            // A zero end takes the line off the log scale.
            low: log(left.low, right.low).min(q),
            high: log(left.high, right.high).max(q),
            mean_above: line(left.mean_above, right.mean_above),
            value_above: line(left.value_above, right.value_above),
            dispersion: line(left.dispersion, right.dispersion),
            rho1: line(left.rho1, right.rho1),
            gaussian: line(left.gaussian, right.gaussian),
        })
    }
}
