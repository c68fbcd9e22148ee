//! `kvfuse calibrate --model-based`: thresholds of single layers from pair statistics alone. No cache is fused and no answer
//! computed; what a threshold would do to rate and distortion is what the model by position says (docs/theory.md, 8).

use super::measured::{CalibrateOptions, LayerReport, Target, draw, empty_thresholds};
use crate::codec::fusion::{LayerThresholds, Pairing, Positions, Thresholds};
use crate::dump::Manifest;
use crate::error::{Error, Result};
use crate::stats::{SimilarityOptions, similarities};
use crate::theory::{Extent, LayerLaw, Model, layer_cr, predict, representative};

/// Thresholds that are tried.
const TAUS: [f64; 23] = [
    0.4, 0.45, 0.5, 0.55, 0.6, 0.64, 0.67, 0.7, 0.72, 0.74, 0.76, 0.78, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9,
    0.92, 0.94, 0.96, 0.98, 0.99,
];

/// One threshold of one layer, as predicted.
#[derive(Clone, Copy)]
struct Candidate {
    thresholds: LayerThresholds,
    /// Stored bits, as a share of the unfused layer's.
    rate: f64,
    key_error: f64,
    value_error: f64,
}

/// Predicts from the calibration questions; returns for each target the thresholds and a report of each layer.
pub fn calibrate_from_model(options: &CalibrateOptions) -> Result<Vec<(Thresholds, Vec<LayerReport>)>> {
    let choices = &options.choices;
    if choices.representative != representative(choices.pairing)
        || choices.positions != Positions::Any
        || choices.pairing == Pairing::Lsh
    {
        return Err(Error::argument(
            "--model-based knows pairing=tree and components with means and best with first blocks, positions=any",
        ));
    }
    let manifest = Manifest::read(&options.sweep.dump)?;
    let questions = draw(options, &manifest)?;
    let block_size = options.packing()?.block_size;
    let measured = SimilarityOptions {
        block_sizes: vec![block_size],
        rope: choices.rope,
        sample: None,
        seed: options.seed,
        taus: TAUS.to_vec(),
        layers: None,
        lsh_recall: None,
        fuse: Vec::new(),
    };
    let rows = similarities(&options.sweep.dump, &manifest, &questions, &measured)?;
    let laws = LayerLaw::of_rows(&rows, block_size);
    let touched = &laws[choices.touched(laws.len())];
    let all: Vec<Vec<Candidate>> = touched.iter().map(|law| candidates(law, choices.pairing)).collect();
    // Layers that are left alone keep all their bits.
    let untouched = (laws.len() - all.len()) as f64;
    let total =
        |chosen: &[Candidate]| laws.len() as f64 / (untouched + chosen.iter().map(|c| c.rate).sum::<f64>());
    let mut results = Vec::new();
    for &target in &options.targets {
        let chosen = match target {
            Target::Error(most) => all
                .iter()
                .filter_map(|c| {
                    let within = c.iter().filter(|c| c.key_error <= most && c.value_error <= most);
                    within.min_by(|a, b| a.rate.total_cmp(&b.rate)).copied()
                })
                .collect(),
            Target::Cr(least) => at_ratio(&all, least, total)?,
            Target::Kl(_) => {
                return Err(Error::argument("--model-based knows no KL: use --target-cr or --target-error"));
            }
        };
        let report =
            |c: &Candidate| LayerReport { thresholds: c.thresholds, floor: None, cr: 1.0 / c.rate, kl: None };
        let found = Thresholds {
            target: format!("model {target}"),
            calibration_cr_audited: total(&chosen),
            layers: chosen.iter().map(|c| c.thresholds).collect(),
            ..empty_thresholds(options, &manifest, &questions, block_size)
        };
        results.push((found, chosen.iter().map(report).collect()));
    }
    Ok(results)
}

fn candidates(law: &LayerLaw, pairing: Pairing) -> Vec<Candidate> {
    let strictest = std::iter::once(1.0);
    let of = |key: f64| {
        let blocks =
            if key < 1.0 { predict(law, Model::ByPosition, pairing, key, Extent::MEASURED) } else { None };
        let rate = |blocks: f64| layer_cr(law, blocks).map(|cr| 1.0 / cr);
        let thresholds = LayerThresholds { layer: law.layer, key, value: -1.0 };
        match blocks {
            Some(p) => Some(Candidate {
                thresholds,
                rate: rate(p.blocks)?,
                key_error: p.key_error?,
                value_error: p.value_error?,
            }),
            None => {
                let rate = rate(law.distinct)?;
                Some(Candidate { thresholds, rate, key_error: 0.0, value_error: 0.0 })
            }
        }
    };
    strictest.chain(TAUS.into_iter().rev()).filter_map(of).collect()
}

/// The choices with the least error, keys' and values' relative errors added over the layers, whose ratio is at least `least`.
fn at_ratio(
    all: &[Vec<Candidate>],
    least: f64,
    total: impl Fn(&[Candidate]) -> f64,
) -> Result<Vec<Candidate>> {
    let choose = |lambda: f64| -> Vec<Candidate> {
        let cost = |c: &Candidate| c.key_error + c.value_error + lambda * c.rate;
        all.iter().filter_map(|c| c.iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).copied()).collect()
    };
    let (mut low, mut high) = (1e-6f64.ln(), 1e6f64.ln());
    let most = total(&choose(high.exp()));
    if most < least {
        return Err(Error::argument(format!("--target-cr {least}: the model reaches {most:.2} at most")));
    }
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if total(&choose(middle.exp())) >= least { high = middle } else { low = middle }
    }
    Ok(choose(high.exp()))
}
