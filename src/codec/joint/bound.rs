//! How far a codec is from the Gaussian rate-distortion bound of its own predictors (docs/theory.md, 10).
//!
//! What predictions leave of a token's components has a covariance, given the class of its reference and the step. A Gaussian source
//! of that covariance needs, at the squared error that the codec makes, the bits of reverse water-filling. The covariance's directions are
//! taken from one half of the text and variances along them from the other, so nothing is fitted to what it is held against; all
//! sightings of a token are in one half.

use super::book::{Book, LayerBook};
use super::layers::Seen;
use super::links::{Plan, Reference};
use super::reference::{CLASSES, SAME};
use crate::error::{Error, Result};
use faer::{Mat, Side};
use half::f16;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// One layer's coded components against the bound; whole layers, or all of them together.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LayerBound {
    /// KV numbers that were coded: those of distinct blocks, first tokens of requests apart.
    pub elements: u64,
    /// Bits that the codec spent on components, and the share of keys in it.
    pub coded: Parts,
    /// Bits of the Gaussian source at the same squared error.
    pub gaussian: Parts,
    /// The same of the widths that training found, knowing of these caches only which tokens match which.
    pub predicted: Parts,
}

/// Bits of keys and of values. A component that mixes both counts by its energy in each.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Parts {
    pub keys: f64,
    pub values: f64,
}

impl Parts {
    pub fn total(&self) -> f64 {
        self.keys + self.values
    }

    fn add(&mut self, bits: f64, keys: f64) {
        self.keys += bits * keys;
        self.values += bits * (1.0 - keys);
    }
}

/// All layers at one water level, and each at its own.
#[derive(Debug, Clone, PartialEq)]
pub struct Bound {
    pub all: LayerBound,
    pub layers: Vec<LayerBound>,
    /// By class of reference; class 0 has none.
    pub matches: Vec<Matches>,
}

/// Tokens whose references are of one class.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Matches {
    pub tokens: u64,
    /// Stretches of tokens that refer to tokens in a row.
    pub runs: u64,
    /// Spent on their components.
    pub bits: f64,
}

/// Tokens whose rests have one covariance: same class of reference, same step.
type Group = (usize, i32);
/// Groups of fewer tokens than this are too small for a covariance and go together.
const SMALL: usize = 200;

/// What an encoder coded, in steps.
pub struct Watch {
    /// Group and half of each token.
    tokens: Vec<(Group, bool)>,
    /// `[layers][tokens, components]`.
    rests: Vec<Vec<f16>>,
    /// Per layer and component.
    bits: Vec<Vec<f64>>,
    errors: Vec<Vec<f64>>,
    matches: Vec<Matches>,
}

impl Watch {
    /// Of columns in the order in which they are coded.
    pub fn new(book: &Book, plans: &[Plan]) -> Self {
        let zeros: Vec<Vec<f64>> = book.layers.iter().map(|l| vec![0.0; l.components]).collect();
        let mut watch = Watch {
            tokens: Vec::new(),
            rests: vec![Vec::new(); book.layers.len()],
            bits: zeros.clone(),
            errors: zeros,
            matches: vec![Matches::default(); CLASSES],
        };
        let mut halves: Vec<Vec<bool>> = Vec::with_capacity(plans.len());
        for (number, plan) in plans.iter().enumerate() {
            let half = |reference: &Option<Reference>| match reference {
                Some(r) if r.class >= SAME => halves[r.column][r.token],
                _ => number.is_multiple_of(2),
            };
            let own: Vec<bool> = plan.sources.iter().map(half).collect();
            watch.column(plan, &own);
            halves.push(own);
        }
        watch
    }

    fn column(&mut self, plan: &Plan, halves: &[bool]) {
        let first = usize::from(plan.raw_first);
        let tokens = plan.classes.iter().zip(&plan.steps).zip(halves).enumerate();
        for (t, ((&class, &step), &half)) in tokens.skip(first) {
            self.tokens.push(((class, step), half));
            self.matches[class].tokens += 1;
            // A run ends with its column.
            let goes_on = t > first
                && match (plan.sources[t - 1], plan.sources[t]) {
                    (Some(a), Some(b)) => a.column == b.column && a.token + 1 == b.token,
                    (None, None) => true,
                    _ => false,
                };
            self.matches[class].runs += u64::from(!goes_on);
        }
    }

    /// Notes a layer: `[coded tokens, components]`.
    pub fn layer(&mut self, n: usize, seen: &[Seen]) {
        let r = self.bits[n].len().max(1);
        for (i, s) in seen.iter().enumerate() {
            let ((class, _), _) = self.tokens[i / r];
            self.bits[n][i % r] += f64::from(s.bits);
            self.errors[n][i % r] += f64::from(s.error).powi(2);
            self.matches[class].bits += f64::from(s.bits);
        }
        self.rests[n] = seen.iter().map(|s| f16::from_f32(s.rest)).collect();
    }

    /// The codec against the bound.
    ///
    /// # Errors
    /// Numbers that are not finite.
    pub fn bounds(&self, book: &Book) -> Result<Bound> {
        let groups = self.groups();
        let spectra: Vec<Spectrum> = book
            .layers
            .par_iter()
            .zip(&self.rests)
            .map(|(layer, rests)| spectrum(layer, rests, &groups))
            .collect::<Result<_>>()?;
        let mut counts: BTreeMap<Group, f64> = BTreeMap::new();
        for (group, _) in &self.tokens {
            *counts.entry(*group).or_default() += 1.0;
        }
        let trained: Vec<Spectrum> = book.layers.iter().map(|layer| trained(layer, &counts)).collect();
        let errors: Vec<f64> = self.errors.iter().map(|own| own.iter().sum()).collect();
        let elements = (self.tokens.len() * book.width()) as u64;
        let layers: Vec<LayerBound> = (0..book.layers.len())
            .map(|n| {
                let (gaussian, predicted) = (spectra[n].rate(errors[n]), trained[n].rate(errors[n]));
                let mut coded = Parts::default();
                let shares = key_shares(&book.layers[n]);
                self.bits[n].iter().zip(shares).for_each(|(bits, keys)| coded.add(*bits, keys));
                LayerBound { elements, coded, gaussian, predicted }
            })
            .collect();
        let joined = |all: Vec<Spectrum>| Spectrum(all.into_iter().flat_map(|s| s.0).collect());
        let error = self.errors.iter().flatten().sum();
        let mut all = LayerBound {
            gaussian: joined(spectra).rate(error),
            predicted: joined(trained).rate(error),
            ..LayerBound::default()
        };
        for layer in &layers {
            all.elements += layer.elements;
            all.coded.keys += layer.coded.keys;
            all.coded.values += layer.coded.values;
        }
        Ok(Bound { all, layers, matches: self.matches.clone() })
    }

    /// Tokens of each group, in two halves.
    fn groups(&self) -> Vec<[Vec<usize>; 2]> {
        let mut all: BTreeMap<Group, [Vec<usize>; 2]> = BTreeMap::new();
        for (t, (group, half)) in self.tokens.iter().enumerate() {
            all.entry(*group).or_default()[usize::from(*half)].push(t);
        }
        let (large, small): (Vec<_>, Vec<_>) =
            all.into_values().partition(|halves| halves.iter().all(|h| h.len() >= SMALL));
        let mut rest = [Vec::new(), Vec::new()];
        for halves in small {
            rest.iter_mut().zip(halves).for_each(|(all, own)| all.extend(own));
        }
        large.into_iter().chain(rest.iter().any(|h| !h.is_empty()).then_some(rest)).collect()
    }
}

/// Independent parts of a source: how many tokens have it, its variance in squared steps, its share of keys.
struct Spectrum(Vec<(f64, f64, f64)>);

impl Spectrum {
    /// Bits at a total squared error, by reverse water-filling: every part is left with the same error, or with its variance.
    fn rate(&self, error: f64) -> Parts {
        let left = |level: f64| self.0.iter().map(|(n, v, _)| n * v.min(level)).sum::<f64>();
        let (mut low, mut high) = (0.0, self.0.iter().map(|p| p.1).fold(0.0, f64::max));
        for _ in 0..100 {
            let level = 0.5 * (low + high);
            if left(level) < error { low = level } else { high = level }
        }
        let mut bits = Parts::default();
        for (n, variance, keys) in &self.0 {
            if *variance > high && high > 0.0 {
                bits.add(0.5 * n * (variance / high).log2(), *keys);
            }
        }
        bits
    }
}

/// One layer's, by group: directions of one half, variances of the other.
fn spectrum(layer: &LayerBook, rests: &[f16], groups: &[[Vec<usize>; 2]]) -> Result<Spectrum> {
    let r = layer.components;
    let width = layer.turn.len() / r.max(1);
    let turn = Mat::from_fn(width / 2, r, |i, k| f64::from(layer.turn[i * r + k]));
    let mut parts = Vec::new();
    for halves in groups {
        let rows = halves
            .each_ref()
            .map(|tokens| Mat::from_fn(tokens.len(), r, |i, k| rests[tokens[i] * r + k].to_f64()));
        for (directions, measured) in [(&rows[0], &rows[1]), (&rows[1], &rows[0])] {
            if measured.nrows() == 0 {
                continue;
            }
            let covariance = directions.transpose() * directions;
            let eigen = covariance
                .self_adjoint_eigen(Side::Lower)
                .map_err(|_| Error::Number("what predictions leave is not finite".into()))?;
            let along = measured * eigen.U();
            let keys = &turn * eigen.U();
            let n = measured.nrows() as f64;
            for k in 0..r {
                let variance = along.col(k).iter().map(|x| x * x).sum::<f64>() / n;
                let share: f64 = keys.col(k).iter().map(|x| x * x).sum();
                parts.push((n, variance, share.clamp(0.0, 1.0)));
            }
        }
    }
    Ok(Spectrum(parts))
}

/// The widths that training gives a layer's components, for each class and step as often as caches have it.
fn trained(layer: &LayerBook, counts: &BTreeMap<Group, f64>) -> Spectrum {
    let (r, shares) = (layer.components, key_shares(layer));
    let part = |((class, step), count): (&Group, &f64)| -> Vec<(f64, f64, f64)> {
        let variance = |k: usize| {
            let octaves = f64::from(i32::from(layer.sigma[class * r + k]) - step) / 8.0;
            (2.0 * octaves).exp2()
        };
        (0..r).map(|k| (*count, variance(k), shares[k])).collect()
    };
    Spectrum(counts.iter().flat_map(part).collect())
}

/// Of each component, the share of keys in its energy.
fn key_shares(layer: &LayerBook) -> Vec<f64> {
    let r = layer.components;
    let half = layer.turn.len() / r.max(1) / 2;
    let share = |k: usize| (0..half).map(|i| f64::from(layer.turn[i * r + k]).powi(2)).sum::<f64>();
    (0..r).map(|k| share(k).clamp(0.0, 1.0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cover and Thomas, 10.3.3: what is above the water level pays half the logarithm of the ratio, what is below nothing.
    #[test]
    fn water_fills_from_the_bottom() {
        let spectrum = Spectrum(vec![(1.0, 16.0, 1.0), (1.0, 4.0, 0.0), (1.0, 0.25, 0.5)]);
        let bits = spectrum.rate(2.25);
        assert!((bits.keys - 2.0).abs() < 1e-9 && (bits.values - 1.0).abs() < 1e-9, "{bits:?}");
        assert!(spectrum.rate(20.25).total() < 1e-9);
        // Many times the same source cost many times the same.
        let twice = Spectrum(spectrum.0.iter().map(|(n, v, k)| (2.0 * n, *v, *k)).collect());
        assert!((twice.rate(4.5).total() - 6.0).abs() < 1e-9);
    }
}
