//! From clusters to what is stored: a representative, and for each block the factors that restore it. What would break
//! the gate (from a verbatim representative) or the error budget is taken out and tried again among its like; what a mean
//! of the tree cannot restore within the budget stays as it is.

use super::choices::{Choices, Representative, RopeMode, ScaleRule};
use super::cluster::{Centre, Cluster};
use super::geometry::{Geometry, Units};
use super::rule::Gate;
use crate::block::Part;
use crate::block::Scale;
use crate::codec::distortion::squares;
use crate::model::kernels::inner;
use std::collections::BTreeMap;

/// Blocks that share storage from now on.
pub struct Fused {
    pub source: Source,
    /// Places and the factors that restore them.
    pub entries: Vec<(usize, Option<Scale>)>,
}

/// Where the shared numbers come from.
pub enum Source {
    /// The block of this place, as it is.
    Place(usize),
    /// New numbers for every layer of the group, keys and values; keys without positions if so compared.
    New(Vec<(Vec<f32>, Vec<f32>)>),
}

/// Everything that settling a cluster depends on.
pub struct Settling<'a> {
    pub geometry: &'a Geometry<'a>,
    pub units: &'a Units,
    pub choices: &'a Choices,
    pub gate: Gate,
    /// The most that a block's relative squared error may be.
    pub budget: Option<f64>,
}

/// Numbers that may stand for several blocks.
struct Candidate {
    /// The unit that it is a copy of.
    unit: Option<usize>,
    /// Keys and values of each layer of the group, as the pool will hold them.
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    /// Norms over the group before rounding.
    key_norm: f64,
    value_norm: f64,
}

impl Settling<'_> {
    /// Settles one cluster.
    pub fn settle(&self, cluster: Cluster) -> Vec<Fused> {
        let mut settled = Vec::new();
        if let Some(centre) = &cluster.centre {
            let candidate = self.centre(centre, &cluster.units);
            let (kept, mut out) = self.keep(&candidate, &cluster.units);
            // Without a budget all stay, were it only one whose partners have gone elsewhere: the paper's rule.
            if self.budget.is_none() || kept.len() > 1 {
                settled.push(self.fused(candidate, kept));
            } else {
                out = cluster.units;
            }
            settled.extend(self.equals(&out));
            return settled;
        }
        let mut rest = cluster.units;
        while rest.len() > 1 {
            let candidate = self.candidate(&rest);
            let (kept, out) = self.keep(&candidate, &rest);
            if kept.len() > 1 {
                settled.push(self.fused(candidate, kept));
                rest = out;
            } else {
                // Nobody goes with this representative: it stays alone, or, if it is nobody's own, all do.
                let alone = candidate.unit.map_or(rest.len(), |_| 1);
                let first = candidate.unit.and_then(|u| rest.iter().position(|&r| r == u)).unwrap_or(0);
                rest[..=first].rotate_right(1);
                settled.extend(rest.drain(..alone).filter_map(|u| self.duplicates(u)));
            }
        }
        settled.extend(rest.into_iter().filter_map(|u| self.duplicates(u)));
        settled
    }

    /// Units of the tree, which are single blocks, that are exact duplicates of each other share one block.
    fn equals(&self, units: &[usize]) -> Vec<Fused> {
        let mut by_vector: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for &unit in units {
            by_vector.entry(self.units.vector[unit]).or_default().extend(&self.units.places[unit]);
        }
        let shared = by_vector.into_values().filter(|places| places.len() > 1);
        let fused = |places: Vec<usize>| Fused {
            source: Source::Place(places[0]),
            entries: places.into_iter().map(|p| (p, None)).collect(),
        };
        shared.map(fused).collect()
    }

    /// Exact duplicates share one block and lose nothing.
    fn duplicates(&self, unit: usize) -> Option<Fused> {
        let places = &self.units.places[unit];
        (places.len() > 1).then(|| Fused {
            source: Source::Place(places[0]),
            entries: places.iter().map(|&p| (p, None)).collect(),
        })
    }

    /// The representative of some units, by the rule chosen.
    fn candidate(&self, units: &[usize]) -> Candidate {
        match self.choices.representative {
            Representative::Mean => self.centre(&self.votes(units, |_| 1.0), units),
            Representative::Weighted => {
                self.centre(&self.votes(units, |u| self.units.places[u].len() as f32), units)
            }
            Representative::First => self.verbatim(units[0]),
            Representative::Medoid => self.verbatim(self.medoid(units)),
        }
    }

    fn votes(&self, units: &[usize], votes: impl Fn(usize) -> f32) -> Centre {
        let weights: Vec<(usize, f32)> = units.iter().map(|&u| (self.units.vector[u], votes(u))).collect();
        Centre { key: weights.clone(), value: weights }
    }

    /// The unit most similar to all blocks, its own included; of equals the one with most energy, then the first.
    fn medoid(&self, units: &[usize]) -> usize {
        let total = |a: usize| -> i64 {
            let to = |&b: &usize| {
                let (u, v) = (self.units.vector[a], self.units.vector[b]);
                let margin =
                    if u == v { self.gate.margin(1.0, 1.0) } else { self.geometry.margin(&self.gate, u, v) };
                f64::from(margin) * self.units.places[b].len() as f64
            };
            // Rounded: sums in another order must tie.
            (units.iter().map(to).sum::<f64>() * 1e5).round() as i64
        };
        let mut best = (i64::MIN, 0.0, units[0]);
        for &unit in units {
            let rank = (total(unit), self.geometry.energy(self.units.vector[unit]));
            if rank.0 > best.0 || rank.0 == best.0 && rank.1 > best.1 {
                best = (rank.0, rank.1, unit);
            }
        }
        best.2
    }

    /// A block as it is.
    fn verbatim(&self, unit: usize) -> Candidate {
        let place = self.units.places[unit][0];
        let numbers = |part: Part, layer: usize| {
            let numbers = self.geometry.numbers(part, layer, place);
            // A stripped key is a new number and is rounded; a block of the pool has been.
            if self.choices.rope == RopeMode::Strip && part == Part::Key {
                self.geometry.batch.pool.round(&numbers)
            } else {
                numbers.into_owned()
            }
        };
        let layers = self.geometry.layers.clone().map(|l| (numbers(Part::Key, l), numbers(Part::Value, l)));
        let vector = self.units.vector[unit];
        Candidate {
            unit: Some(unit),
            layers: layers.collect(),
            key_norm: self.geometry.norm(Part::Key, vector),
            value_norm: self.geometry.norm(Part::Value, vector),
        }
    }

    /// The direction of a weighted sum of unit vectors, of unit norm, or of the blocks' mean norm if they will have no
    /// factors of their own.
    fn centre(&self, centre: &Centre, units: &[usize]) -> Candidate {
        let (keys, key_norm) = self.direction(Part::Key, &centre.key, units);
        let (values, value_norm) = self.direction(Part::Value, &centre.value, units);
        Candidate { unit: None, layers: keys.into_iter().zip(values).collect(), key_norm, value_norm }
    }

    fn direction(&self, part: Part, weights: &[(usize, f32)], units: &[usize]) -> (Vec<Vec<f32>>, f64) {
        let g = self.geometry;
        let mut sums = vec![vec![0.0f32; g.batch.pool.shape().block_width()]; g.layers.len()];
        for &(vector, weight) in weights {
            let factor = weight * g.inverse_norms(part)[vector];
            for (sum, layer) in sums.iter_mut().zip(g.layers.clone()) {
                for (s, x) in sum.iter_mut().zip(&*g.numbers(part, layer, g.first[vector])) {
                    *s += factor * x;
                }
            }
        }
        let square = sums.iter().flatten().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
        let norm = match self.choices.scale {
            ScaleRule::None => {
                let blocks: usize = units.iter().map(|&u| self.units.places[u].len()).sum();
                let of = |&u: &usize| g.norm(part, self.units.vector[u]) * self.units.places[u].len() as f64;
                units.iter().map(of).sum::<f64>() / blocks as f64
            }
            ScaleRule::Norm | ScaleRule::LeastSquares => 1.0,
        };
        let factor = if square > 0.0 { (norm / square.sqrt()) as f32 } else { 0.0 };
        let rounded = sums.into_iter().map(|sum| {
            let scaled: Vec<f32> = sum.into_iter().map(|x| x * factor).collect();
            g.batch.pool.round(&scaled)
        });
        (rounded.collect(), norm)
    }

    /// The units that may be restored from a candidate, with their factors, and the others.
    fn keep(&self, candidate: &Candidate, units: &[usize]) -> (Vec<(usize, Option<Scale>)>, Vec<usize>) {
        let (mut kept, mut out) = (Vec::new(), Vec::new());
        for &unit in units {
            let scale = self.scale(candidate, unit);
            let near = match candidate.unit {
                Some(own) => {
                    own == unit || {
                        let (a, b) = (self.units.vector[own], self.units.vector[unit]);
                        self.geometry.margin(&self.gate, a, b) > 0.0
                    }
                }
                None => true,
            };
            if near && self.affordable(candidate, unit, scale) {
                kept.push((unit, scale));
            } else {
                out.push(unit);
            }
        }
        (kept, out)
    }

    fn scale(&self, candidate: &Candidate, unit: usize) -> Option<Scale> {
        let vector = self.units.vector[unit];
        let own = candidate.unit == Some(unit);
        let factor = |part: Part, norm: f64| {
            let factor = match self.choices.scale {
                ScaleRule::LeastSquares if !own => self.least_squares(candidate, part, unit),
                _ if own || norm == 0.0 => 1.0,
                _ => self.geometry.norm(part, vector) / norm,
            };
            factor as f32
        };
        (self.choices.scale != ScaleRule::None).then(|| Scale {
            key: factor(Part::Key, candidate.key_norm),
            value: factor(Part::Value, candidate.value_norm),
        })
    }

    /// <x, c> / <c, c> over the layers of the group.
    fn least_squares(&self, candidate: &Candidate, part: Part, unit: usize) -> f64 {
        let place = self.units.places[unit][0];
        let (mut dot, mut square) = (0.0, 0.0);
        for ((keys, values), layer) in candidate.layers.iter().zip(self.geometry.layers.clone()) {
            let c = if part == Part::Key { keys } else { values };
            let x = self.geometry.numbers(part, layer, place);
            dot += f64::from(inner(&x, c));
            square += f64::from(inner(c, c));
        }
        if square > 0.0 { dot / square } else { 1.0 }
    }

    /// Whether a unit restored from a candidate stays within the budget, in every layer, for keys and for values.
    fn affordable(&self, candidate: &Candidate, unit: usize, scale: Option<Scale>) -> bool {
        let Some(budget) = self.budget else { return true };
        let place = self.units.places[unit][0];
        let scale = scale.unwrap_or(Scale { key: 1.0, value: 1.0 });
        candidate.layers.iter().zip(self.geometry.layers.clone()).all(|((keys, values), layer)| {
            let within = |part: Part, c: &[f32], scale: f32| {
                let (error, energy) = squares(&self.geometry.numbers(part, layer, place), c, scale);
                // A hair less than the budget: keys that are rotated after this are rounded once more.
                error <= budget * energy * (1.0 - 1e-5)
            };
            within(Part::Key, keys, scale.key) && within(Part::Value, values, scale.value)
        })
    }

    fn fused(&self, candidate: Candidate, kept: Vec<(usize, Option<Scale>)>) -> Fused {
        let places = kept.iter().flat_map(|(u, scale)| self.units.places[*u].iter().map(|&p| (p, *scale)));
        let source = match candidate.unit {
            Some(unit) if self.choices.rope == RopeMode::Keep => Source::Place(self.units.places[unit][0]),
            _ => Source::New(candidate.layers),
        };
        Fused { source, entries: places.collect() }
    }
}
