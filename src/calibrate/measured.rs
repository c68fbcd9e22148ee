//! `kvfuse calibrate`: thresholds of single layers from questions that a sweep will then leave out.
//!
//! Every layer is fused alone at every candidate pair of thresholds, which gives its rate and the KL it causes. The layers'
//! choices then minimise stored bits + lambda * KL, as if the layers' KLs added up; because they do not quite, lambda is
//! found by bisection on the KL that all layers together really cause.

use super::floors::floors;
use crate::codec::fusion::{Choices, Fusion, LayerThresholds, Rule, Thresholds};
use crate::dump::{Manifest, open_model};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::progress::{Progress, Unit};
use crate::sweep::{Packing, Source, Stage, SweepOptions};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;
use std::sync::Arc;

/// What the thresholds must keep to on the calibration questions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// KL from no fusion, nats a token, mean over the questions.
    Kl(f64),
    /// Relative squared error of every layer's keys, and of its values.
    Error(f64),
    /// Audited compression ratio; of the model-based calibration only.
    Cr(f64),
}

/// What to calibrate.
pub struct CalibrateOptions {
    /// Dump, block size, batch and model; its grid is not looked at.
    pub sweep: SweepOptions,
    pub choices: Choices,
    /// Each gets thresholds of its own; the layers are measured once.
    pub targets: Vec<Target>,
    /// Questions to look at; absent: half of the dump's.
    pub questions: Option<usize>,
    /// Quantile of the similarity of unrelated blocks below which no threshold may lie.
    pub floor: Option<f64>,
    pub seed: u64,
}

impl CalibrateOptions {
    pub(super) fn packing(&self) -> Result<Packing> {
        match self.sweep.packings()[..] {
            [packing] => Ok(packing),
            _ => Err(Error::argument("calibration takes one --block-size and one --batch")),
        }
    }
}

/// What was found out about one layer.
#[derive(Debug, Clone)]
pub struct LayerReport {
    pub thresholds: LayerThresholds,
    /// Floors of keys and values, where asked for.
    pub floor: Option<(f64, f64)>,
    /// Audited compression ratio of the layer.
    pub cr: f64,
    /// KL of the layer fused alone; absent if not measured.
    pub kl: Option<f64>,
}

const KEYS: [f64; 14] = [0.99, 0.97, 0.95, 0.93, 0.91, 0.89, 0.87, 0.85, 0.83, 0.81, 0.78, 0.75, 0.72, 0.68];
const VALUES: [f64; 5] = [-1.0, 0.4, 0.6, 0.75, 0.9];
/// Candidates of a layer whose KL is measured, at most: each takes a pass over all answers.
const FRONT: usize = 12;
/// Bisection steps on the logarithm of lambda.
const STEPS: usize = 14;

/// One possible choice of a layer.
#[derive(Clone)]
struct Candidate {
    thresholds: LayerThresholds,
    bits: u64,
    key_error: f64,
    value_error: f64,
    /// Measured where a KL is asked for.
    kl: Option<f64>,
}

/// Calibrates; returns for each target the thresholds and a report of each layer.
pub fn calibrate(options: &CalibrateOptions) -> Result<Vec<(Thresholds, Vec<LayerReport>)>> {
    let manifest = Manifest::read(&options.sweep.dump)?;
    let questions = draw(options, &manifest)?;
    let packing = options.packing()?;
    let block_size = packing.block_size;
    let model = open_model(&options.sweep.dump, options.sweep.model.as_deref(), &manifest)?;
    let layers = model.decoder.config().layers;
    let source = Source { model: &model, options: &options.sweep, manifest: &manifest };
    let stage = Stage::new(source, &questions, packing)?;
    let touched: Vec<usize> = options.choices.touched(layers).collect();
    let floors = match options.floor {
        Some(quantile) => Some(floors(stage.batches(), &touched, quantile, &options.choices, options.seed)?),
        None => None,
    };
    let thresholds = |layers: Vec<LayerThresholds>| Thresholds {
        layers,
        ..empty_thresholds(options, &manifest, &questions, block_size)
    };
    let codec = |layers: Vec<LayerThresholds>| {
        Fusion::new(options.choices, Rule::Thresholds(Arc::new(thresholds(layers))))
    };

    let progress = Progress::new("calibrating", touched.len() as u64, Unit::Items("layers"));
    let mut all: Vec<Vec<Candidate>> = Vec::new();
    for (i, &layer) in touched.iter().enumerate() {
        let floor = floors.as_ref().map(|f| f[i]);
        let alone = |t: LayerThresholds| {
            Fusion::of_layer(options.choices, Rule::Thresholds(Arc::new(thresholds(vec![t]))), layer)
        };
        let mut candidates = candidates(&stage, layer, floor, &alone)?;
        if options.targets.iter().any(|t| matches!(t, Target::Kl(_))) {
            candidates = front(candidates);
            for c in &mut candidates {
                c.kl = Some(stage.rate_and_kl(&alone(c.thresholds)?)?.1);
            }
        }
        all.push(candidates);
        progress.increment();
    }
    progress.finish();

    let mut results = Vec::new();
    for &target in &options.targets {
        let (chosen, kl) = match target {
            Target::Error(most) => {
                let within = |c: &&Candidate| c.key_error <= most && c.value_error <= most;
                let least = |c: &Vec<Candidate>| c.iter().filter(within).min_by_key(|c| c.bits).cloned();
                (all.iter().filter_map(least).collect(), None)
            }
            Target::Cr(_) => {
                return Err(Error::argument(
                    "--target-cr needs --model-based; measured calibration takes --target-kl",
                ));
            }
            Target::Kl(most) => {
                let (chosen, kl) = within_kl(&stage, &all, most, |chosen| codec(thresholds_of(chosen)))?;
                (chosen, Some(kl))
            }
        };
        let (ledger, _) = stage.rate_and_distortion(&codec(thresholds_of(&chosen))?)?;
        let found = Thresholds {
            target: target.to_string(),
            calibration_kl: kl,
            calibration_cr_audited: ledger.cr_audited(),
            ..thresholds(thresholds_of(&chosen))
        };
        let report = |(i, c): (usize, &Candidate)| LayerReport {
            thresholds: c.thresholds,
            floor: floors.as_ref().map(|f| f[i]),
            cr: ledger.layers[c.thresholds.layer].cr(),
            kl: c.kl,
        };
        results.push((found, chosen.iter().enumerate().map(report).collect()));
    }
    Ok(results)
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Target::Kl(kl) => write!(f, "kl {kl}"),
            Target::Error(error) => write!(f, "error {error}"),
            Target::Cr(cr) => write!(f, "cr {cr}"),
        }
    }
}

/// A thresholds file without thresholds.
pub(super) fn empty_thresholds(
    options: &CalibrateOptions,
    manifest: &Manifest,
    questions: &[usize],
    block_size: usize,
) -> Thresholds {
    Thresholds {
        schema: Thresholds::schema(),
        name: String::new(),
        model: manifest.model.name.clone(),
        model_sha256: manifest.model.sha256.clone(),
        block_size,
        seed: options.seed,
        target: String::new(),
        floor: options.floor,
        calibration_kl: None,
        calibration_cr_audited: 1.0,
        questions: questions.iter().map(|&i| manifest.requests[i].request.id.clone()).collect(),
        contexts: manifest.contexts(questions).into_iter().map(str::to_owned).collect(),
        choices: options.choices,
        layers: Vec::new(),
    }
}

fn thresholds_of(chosen: &[Candidate]) -> Vec<LayerThresholds> {
    chosen.iter().map(|c| c.thresholds).collect()
}

/// The calibration questions, in the order of the dump. All questions that share a passage or context, by content, are drawn
/// together, by seed, until there are enough: what fuses is blocks of texts, and those of unseen questions must be unseen
/// too.
pub(super) fn draw(options: &CalibrateOptions, manifest: &Manifest) -> Result<Vec<usize>> {
    let all = manifest.requests.len();
    let wanted = options.questions.unwrap_or(all / 2);
    let mut groups = manifest.by_context();
    let count = groups.len();
    groups.shuffle(&mut ChaCha8Rng::seed_from_u64(options.seed));
    let mut drawn = Vec::new();
    for questions in groups {
        if drawn.len() < wanted {
            drawn.extend(questions);
        }
    }
    if drawn.len() < 2 || drawn.len() >= all {
        let problem = format!(
            "has {all} questions about {count} groups of texts that share nothing: calibration needs at least 2 questions and must \
             leave some about other texts, not {wanted}"
        );
        return Err(Error::file(&options.sweep.dump, problem));
    }
    drawn.sort_unstable();
    Ok(drawn)
}

/// Rates and errors of a layer at all thresholds of the grid; of several that fuse alike, the strictest.
fn candidates(
    stage: &Stage,
    layer: usize,
    floor: Option<(f64, f64)>,
    codec: &dyn Fn(LayerThresholds) -> Result<Fusion>,
) -> Result<Vec<Candidate>> {
    let (key_floor, value_floor) = floor.unwrap_or((-1.0, -1.0));
    let mut grid = vec![LayerThresholds { layer, key: 1.0, value: -1.0 }];
    for &value in VALUES.iter().rev() {
        for &key in &KEYS {
            // A value that is not looked at has no threshold to raise.
            let value = if value < 0.0 { value } else { value.max(rounded(value_floor)) };
            let at = LayerThresholds { layer, key: key.max(rounded(key_floor)), value };
            if !grid.contains(&at) {
                grid.push(at);
            }
        }
    }
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for thresholds in grid {
        interrupt::check()?;
        let (ledger, error) = stage.rate_and_distortion(&codec(thresholds)?)?;
        let candidate = Candidate {
            thresholds,
            bits: ledger.layers[layer].bits,
            key_error: error.keys(),
            value_error: error.values(),
            kl: None,
        };
        if seen.insert((candidate.bits, candidate.key_error.to_bits(), candidate.value_error.to_bits())) {
            found.push(candidate);
        }
    }
    Ok(found)
}

/// Three digits, upwards: a floor may only rise.
fn rounded(x: f64) -> f64 {
    ((x * 1e3).ceil() / 1e3).min(1.0)
}

/// Candidates that no other beats in both bits and error, most bits first.
fn front(mut candidates: Vec<Candidate>) -> Vec<Candidate> {
    let error = |c: &Candidate| c.key_error + c.value_error;
    candidates.sort_by(|a, b| a.bits.cmp(&b.bits).then(error(a).total_cmp(&error(b))));
    let mut least = f64::INFINITY;
    candidates.retain(|c| {
        let better = error(c) < least;
        least = least.min(error(c));
        better
    });
    candidates.reverse();
    thinned(candidates, FRONT)
}

/// So many of a list, both ends and others at even distances.
fn thinned<T>(list: Vec<T>, most: usize) -> Vec<T> {
    let n = list.len();
    if n <= most {
        return list;
    }
    let kept: HashSet<usize> = (0..most).map(|i| i * (n - 1) / (most - 1)).collect();
    list.into_iter().enumerate().filter(|(i, _)| kept.contains(i)).map(|(_, x)| x).collect()
}

/// The choices with the fewest bits whose joint KL stays within `most`, and that KL.
fn within_kl(
    stage: &Stage,
    all: &[Vec<Candidate>],
    most: f64,
    codec: impl Fn(&[Candidate]) -> Result<Fusion>,
) -> Result<(Vec<Candidate>, f64)> {
    // Bits a nat is worth; at the highest only what is free is taken.
    let choose = |log_lambda: f64| -> Vec<Candidate> {
        let lambda = log_lambda.exp();
        let cost = |c: &Candidate| c.bits as f64 + lambda * c.kl.unwrap_or(0.0);
        all.iter().filter_map(|c| c.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).cloned()).collect()
    };
    let bits: u64 = all.iter().filter_map(|c| c.iter().map(|c| c.bits).max()).sum();
    let (mut loose, mut strict) = (((bits as f64) * 1e-4).ln(), ((bits as f64) * 1e8).ln());
    let mut best = choose(strict);
    let mut best_kl = stage.rate_and_kl(&codec(&best)?)?.1;
    for _ in 0..STEPS {
        let middle = 0.5 * (loose + strict);
        let chosen = choose(middle);
        let (_, kl) = stage.rate_and_kl(&codec(&chosen)?)?;
        if kl <= most {
            (strict, best, best_kl) = (middle, chosen, kl);
        } else {
            loose = middle;
        }
    }
    Ok((best, best_kl))
}
