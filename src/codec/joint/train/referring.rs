//! What a reference says of a token's components, and what is left of them.

use crate::codec::joint::corpus::Corpus;
use crate::codec::joint::entropy::{eighths, from_eighths};
use crate::codec::joint::reference::{CLASSES, class_of};
use half::f16;

/// Components after references, coded in closed loop.
pub struct Referred {
    /// As decoders rebuild them: `[tokens, r]`.
    pub coded: Vec<f32>,
    /// What is left of them, in steps: `[tokens, r]`.
    pub left: Vec<f16>,
    /// What of a reference's component is expected again: `[CLASSES, r]`.
    pub gain: Vec<f32>,
    /// Standard deviations of what is left, in eighths of an octave: `[CLASSES, r]`.
    pub sigma: Vec<i16>,
}

/// Codes the components `u` (`[tokens, r]`) in their order with a step in eighths of an octave.
pub fn referred(corpus: &Corpus, u: &[f32], r: usize, level: i32) -> Referred {
    let step = from_eighths(level);
    let tokens = corpus.tokens();
    // Gains come from components that are quantised without a reference.
    let plain: Vec<f32> = u.iter().map(|x| quantised(x / step) * step).collect();
    let seen_by = corpus.sightings();
    let gain = gains(corpus, &seen_by, u, &plain, r, step);
    // Means of sightings, as later tokens find them.
    let mut means = vec![0.0f32; tokens * r];
    let mut coded = vec![0.0f32; tokens * r];
    let mut left = vec![f16::ZERO; tokens * r];
    let mut energy = vec![0.0f64; CLASSES * r];
    let mut seen = [0.0f64; CLASSES];
    for t in corpus.coded() {
        let own = &mut coded[t * r..][..r];
        let (past, mean) = means.split_at_mut(t * r);
        let from = corpus.source[t].map(|(s, _)| &past[s * r..][..r]);
        let class = corpus.source[t].map_or(0, |(s, matched)| class_of(matched, seen_by[s]));
        seen[class] += 1.0;
        for k in 0..r {
            let base = from.map_or(0.0, |from| gain[class * r + k] * from[k]);
            let rest = (u[t * r + k] - base) / step;
            energy[class * r + k] += f64::from(rest * rest);
            left[t * r + k] = f16::from_f32(rest);
            own[k] = base + quantised(rest) * step;
            let before = from.filter(|_| seen_by[t] > 1).map_or(own[k], |from| from[k]);
            mean[k] = before + (own[k] - before) / seen_by[t] as f32;
        }
    }
    let sigma = sigmas(&energy, &seen, r, level);
    Referred { coded, left, gain, sigma }
}

/// A number of steps as a plain quantiser with a dead zone rebuilds it.
fn quantised(x: f32) -> f32 {
    let magnitude = (x.abs() + 0.4).floor();
    if magnitude > 0.0 { (magnitude - 0.03).copysign(x) } else { 0.0 }
}

/// Standard deviations by class, in eighths of an octave; where a class was seldom seen, as those of the class before it.
fn sigmas(energy: &[f64], seen: &[f64; CLASSES], r: usize, step: i32) -> Vec<i16> {
    const PRIOR: f64 = 50.0;
    let all: f64 = seen.iter().sum::<f64>().max(1.0);
    let mut before: Vec<f64> =
        (0..r).map(|k| (0..CLASSES).map(|c| energy[c * r + k]).sum::<f64>() / all).collect();
    let mut sigma = Vec::with_capacity(CLASSES * r);
    for class in 0..CLASSES {
        for (k, before) in before.iter_mut().enumerate() {
            *before = (energy[class * r + k] + PRIOR * *before) / (seen[class] + PRIOR);
            sigma.push((step + eighths(before.sqrt())).clamp(-30_000, 30_000) as i16);
        }
    }
    sigma
}

/// For every class and component, what of a reference's component is expected again.
fn gains(corpus: &Corpus, seen_by: &[u32], u: &[f32], plain: &[f32], r: usize, step: f32) -> Vec<f32> {
    let mut means = plain.to_vec();
    let (mut both, mut own) = (vec![0.0f64; CLASSES * r], vec![0.0f64; CLASSES * r]);
    for (t, source) in corpus.source.iter().enumerate() {
        let Some((s, matched)) = *source else { continue };
        if corpus.raw[t] {
            continue;
        }
        let class = class_of(matched, seen_by[s]);
        for k in 0..r {
            let from = means[s * r + k];
            if seen_by[t] > 1 {
                means[t * r + k] = from + (plain[t * r + k] - from) / seen_by[t] as f32;
            }
            let from = f64::from(from);
            both[class * r + k] += from * f64::from(u[t * r + k]);
            own[class * r + k] += from * from;
        }
    }
    let prior = 30.0 * f64::from(step).powi(2);
    both.iter().zip(&own).map(|(b, o)| (b / (o + prior)).clamp(0.0, 1.0) as f32).collect()
}
