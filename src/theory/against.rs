//! The model's predictions against the layers of a sweep.

use crate::codec::Chain;
use crate::codec::fusion::{Choices, Pairing, RopeMode, Rule};
use crate::error::{Error, Result};
use crate::files;
use crate::stats::{Interval, STATS_MANIFEST, StatRow, bootstrap_mean, rounded};
use crate::tables::{LAYERS, Table, find_long_table};
use crate::theory::{
    Comparison, Extent, LayerLaw, Model, Verdict, layer_cr, predict, representative, verdict,
};
use polars::prelude::{col, lit};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// One row of predictions.csv.
#[derive(Debug, Clone, Serialize)]
pub(super) struct PredictionRow {
    model: Model,
    layer: usize,
    pairing: Pairing,
    tau: f64,
    q: f64,
    dispersion: Option<f64>,
    rho1: Option<f64>,
    poisson_error: Option<f64>,
    /// Full blocks before / after; low and high from the interval of q.
    cr_predicted: f64,
    cr_predicted_low: f64,
    cr_predicted_high: f64,
    cr_measured: f64,
    /// Predicted / measured - 1.
    cr_error: f64,
    cr_error_low: f64,
    cr_error_high: f64,
    cr_duplicates: f64,
    /// Share of the full blocks that is removed: 1 - 1 / ratio.
    removed_predicted: f64,
    removed_measured: f64,
    /// By exact duplicates alone: what the null says that nothing but these fuses.
    removed_duplicates: f64,
    /// Whether the sweep's requests share no text with those that were measured.
    held_out: bool,
    cr_audited_predicted: Option<f64>,
    cr_audited_measured: f64,
    key_error_predicted: Option<f64>,
    key_error_measured: f64,
    value_error_predicted: Option<f64>,
    value_error_measured: f64,
}

/// All layers of one pairing and threshold: predicted / measured ratio, its median and its tenths from either end.
#[derive(Debug, Clone, Serialize)]
pub struct SummaryRow {
    pub model: Model,
    pub pairing: Pairing,
    pub tau: f64,
    pub layers: usize,
    /// Median over layers of |predicted / measured - 1|.
    pub cr_error: f64,
    pub cr_over: f64,
    pub cr_over_low: f64,
    pub cr_over_high: f64,
    pub key_error_over: Option<f64>,
    pub value_error_over: Option<f64>,
    /// Of all layers together.
    pub cr_predicted: f64,
    pub cr_measured: f64,
    /// Mean over layers of the removed share predicted less that measured, with its 95 % interval over layers.
    pub removed_bias: f64,
    pub removed_bias_low: f64,
    pub removed_bias_high: f64,
    /// 1 - squared error of the removed share over that of the null (nothing but duplicates fuses); absent where the null is right.
    pub removed_skill: Option<f64>,
    pub held_out: bool,
}

/// A row of a sweep's layers: one layer of one arm.
#[derive(Deserialize)]
struct LayerRow {
    method: String,
    layer: usize,
    full_blocks: f64,
    physical_blocks: f64,
    cr_audited: f64,
    key_error: f64,
    value_error: f64,
}

/// One of an arm that the model speaks of.
pub(super) struct MeasuredLayer {
    pairing: Pairing,
    tau: f64,
    row: LayerRow,
}

/// What a sweep measured of the model's arms.
pub(super) struct Measured {
    layers: Vec<MeasuredLayer>,
    requests: f64,
    held_out: bool,
}

/// Checksums of the texts that a manifest's requests are about; `None` without a manifest that lists them.
fn contexts(manifest: &Path) -> Option<HashSet<String>> {
    let value: serde_json::Value = serde_json::from_str(&files::read_text(manifest).ok()?).ok()?;
    serde_json::from_value(value.get("contexts")?.clone()).ok()
}

/// The arms of a sweep that the model speaks of: bff on keys at one threshold, over one batch of all requests. These are
/// the requests that were measured, or others that share no text with them.
pub(super) fn measured_layers(
    sweep: &Path,
    stats: &Path,
    laws: &[LayerLaw],
    of: &StatRow,
) -> Result<Measured> {
    let Some(path) = find_long_table(sweep.parent().unwrap_or(Path::new("")), LAYERS) else {
        let problem = format!("has no {LAYERS}.csv or {LAYERS}.parquet beside it; run the same sweep again");
        return Err(Error::file(sweep, problem));
    };
    let whole = Table::read(sweep)?;
    if whole.query(|arms| arms.filter(col("requests").gt(col("batch"))))?.height() > 0 {
        let problem =
            "fused its requests in several batches, the statistics are of one; sweep with a larger --batch";
        return Err(Error::file(sweep, problem));
    }
    let requests = whole.floats("requests")?.into_iter().fold(0.0, f64::max);
    let texts =
        (contexts(&sweep.with_file_name("manifest.json")), contexts(&stats.with_file_name(STATS_MANIFEST)));
    let held_out = match &texts {
        (Some(swept), Some(measured)) if swept.is_disjoint(measured) => true,
        (Some(swept), Some(measured)) if swept != measured => {
            let problem = "shares some of its texts with the statistics and not others: it must be of the same requests, or of \
                           requests about other texts (--half)";
            return Err(Error::file(sweep, problem));
        }
        _ => false,
    };
    let of_size = col("block_size").eq(lit(laws[0].block_size as u64));
    let rows: Vec<LayerRow> = Table::read(&path)?.query(|layers| layers.filter(of_size))?.rows()?;
    // The chains the model speaks of, by the row's method.
    let mut chains: HashMap<String, Option<(Choices, f64)>> = HashMap::new();
    let layers = laws.iter().map(|l| l.layer + 1).max().unwrap_or(0);
    let mut found: Vec<MeasuredLayer> = Vec::new();
    for row in rows {
        let spoken = chains.entry(row.method.clone()).or_insert_with_key(|method| spoken_of(method, of.rope));
        let Some((choices, tau)) = *spoken else { continue };
        let (pairing, layer) = (choices.pairing, row.layer);
        if !choices.touched(layers).contains(&layer) {
            continue;
        }
        // Two settings may differ in layers that both touch alike.
        if found.iter().any(|f| (f.pairing, f.tau, f.row.layer) == (pairing, tau, layer)) {
            continue;
        }
        if let Some(law) = laws.iter().find(|l| l.layer == layer)
            && !held_out
            && law.blocks != row.full_blocks
        {
            let problem = format!(
                "lists {} full blocks in layer {layer}, the statistics {}: they are of different caches",
                row.full_blocks, law.blocks
            );
            return Err(Error::file(&path, problem));
        }
        found.push(MeasuredLayer { pairing, tau, row });
    }
    if found.is_empty() {
        let problem = format!(
            "has no arm the model speaks of: fusion alone at a threshold tau on keys, any positions, blocks of {} tokens, \
             and means for tree and components or first blocks for best",
            laws[0].block_size
        );
        return Err(Error::file(&path, problem));
    }
    Ok(Measured { layers: found, requests, held_out })
}

/// Choices and threshold of a chain that the model speaks of: fusion alone, of keys at one threshold.
fn spoken_of(method: &str, rope: RopeMode) -> Option<(Choices, f64)> {
    // A calibration's file need not be there any more; the model does not speak of it anyway.
    let chain = Chain::parse(method).ok()?.pop()?;
    let (fusion, alone) = (chain.fusion()?, chain.stages().len() == 1);
    let Rule::Tau(tau) = *fusion.rule() else { return None };
    let choices = *fusion.choices();
    let plain = Choices {
        pairing: choices.pairing,
        representative: representative(choices.pairing),
        spare_layers: choices.spare_layers,
        rope,
        ..Choices::default()
    };
    (alone && choices == plain && choices.pairing != Pairing::Lsh).then_some((choices, tau))
}

pub(super) fn predictions(laws: &[LayerLaw], measured: &Measured) -> Vec<PredictionRow> {
    let row = |model: Model, m: &MeasuredLayer| {
        let law = laws.iter().find(|l| l.layer == m.row.layer)?;
        let factor = measured.requests / law.requests.max(1.0);
        // The batch measured, or one of as many requests about other texts.
        let extent = if measured.held_out { Extent { factor, own: 1.0 } } else { Extent::MEASURED };
        let p = predict(law, model, m.pairing, m.tau, extent)?;
        let e = law.all_pairs(m.tau);
        let cr = m.row.full_blocks / m.row.physical_blocks;
        let of = |blocks: f64| law.blocks_of(extent) / blocks;
        let duplicates = law.blocks_of(extent) / law.distinct_of(extent);
        let removed = |cr: f64| rounded(1.0 - 1.0 / cr);
        let error = |blocks: f64| rounded(of(blocks) / cr - 1.0);
        Some(PredictionRow {
            model,
            layer: m.row.layer,
            pairing: m.pairing,
            tau: m.tau,
            q: rounded(p.q),
            dispersion: e.and_then(|e| e.dispersion).map(rounded),
            rho1: e.and_then(|e| e.rho1).map(rounded),
            poisson_error: p.poisson_error.map(rounded),
            cr_predicted: rounded(of(p.blocks)),
            cr_predicted_low: rounded(of(p.blocks_high)),
            cr_predicted_high: rounded(of(p.blocks_low)),
            cr_measured: rounded(cr),
            cr_error: error(p.blocks),
            cr_error_low: error(p.blocks_high),
            cr_error_high: error(p.blocks_low),
            cr_duplicates: rounded(duplicates),
            removed_predicted: removed(of(p.blocks)),
            removed_measured: removed(cr),
            removed_duplicates: removed(duplicates),
            held_out: measured.held_out,
            cr_audited_predicted: layer_cr(law, p.blocks).map(rounded),
            cr_audited_measured: m.row.cr_audited,
            key_error_predicted: p.key_error.map(rounded),
            key_error_measured: m.row.key_error,
            value_error_predicted: p.value_error.map(rounded),
            value_error_measured: m.row.value_error,
        })
    };
    Model::ALL
        .into_iter()
        .flat_map(|model| measured.layers.iter().filter_map(move |m| row(model, m)))
        .collect()
}

pub(super) fn summary(predictions: &[PredictionRow]) -> Vec<SummaryRow> {
    let mut groups: Vec<(Model, Pairing, f64)> = Vec::new();
    for p in predictions {
        if !groups.contains(&(p.model, p.pairing, p.tau)) {
            groups.push((p.model, p.pairing, p.tau));
        }
    }
    let quantile = |mut x: Vec<f64>, p: f64| {
        x.sort_by(f64::total_cmp);
        x.get(((x.len().max(1) - 1) as f64 * p).round() as usize).copied()
    };
    let of = |&(model, pairing, tau): &(Model, Pairing, f64)| {
        let here = |p: &&PredictionRow| p.model == model && p.pairing == pairing && p.tau == tau;
        let rows: Vec<&PredictionRow> = predictions.iter().filter(here).collect();
        let all = |f: &dyn Fn(&PredictionRow) -> f64| rows.iter().map(|r| f(r)).collect::<Vec<f64>>();
        let over = |p| quantile(all(&|r| r.cr_predicted / r.cr_measured), p).map_or(f64::NAN, rounded);
        // A ratio of errors says nothing where next to nothing fuses.
        let ratio = |predicted: fn(&PredictionRow) -> Option<f64>, measured: fn(&PredictionRow) -> f64| {
            let known = rows.iter().filter(|r| measured(r) > 1e-4);
            quantile(known.filter_map(|r| Some(predicted(r)? / measured(r))).collect(), 0.5).map(rounded)
        };
        // Every layer has the same blocks before fusion.
        let together = |f: fn(&PredictionRow) -> f64| {
            rounded(rows.len() as f64 / rows.iter().map(|r| 1.0 / f(r)).sum::<f64>())
        };
        let errors = all(&|r| r.removed_predicted - r.removed_measured);
        let bias = bootstrap_mean(&errors, 2000, 0).unwrap_or(Interval { mean: 0.0, low: 0.0, high: 0.0 });
        let own: f64 = errors.iter().map(|e| e * e).sum();
        let null: f64 = rows.iter().map(|r| (r.removed_duplicates - r.removed_measured).powi(2)).sum();
        SummaryRow {
            model,
            pairing,
            tau,
            layers: rows.len(),
            cr_error: quantile(all(&|r| r.cr_error.abs()), 0.5).map_or(f64::NAN, rounded),
            cr_over: over(0.5),
            cr_over_low: over(0.1),
            cr_over_high: over(0.9),
            key_error_over: ratio(|r| r.key_error_predicted, |r| r.key_error_measured),
            value_error_over: ratio(|r| r.value_error_predicted, |r| r.value_error_measured),
            cr_predicted: together(|r| r.cr_predicted),
            cr_measured: together(|r| r.cr_measured),
            removed_bias: rounded(bias.mean),
            removed_bias_low: rounded(bias.low),
            removed_bias_high: rounded(bias.high),
            removed_skill: (null > 1e-12).then(|| rounded(1.0 - own / null)),
            held_out: rows.iter().all(|r| r.held_out),
        }
    };
    groups.iter().map(of).collect()
}

pub(super) fn verdicts(laws: &[LayerLaw], predictions: &[PredictionRow]) -> Vec<Verdict> {
    let mut found = Vec::new();
    for (model, pairing) in Model::with_pairings() {
        for law in laws {
            let of = |p: &&PredictionRow| p.model == model && p.layer == law.layer && p.pairing == pairing;
            let comparisons: Vec<Comparison> = predictions
                .iter()
                .filter(of)
                .map(|p| Comparison {
                    tau: p.tau,
                    cr_duplicates: p.cr_duplicates,
                    cr_predicted: p.cr_predicted,
                    cr_measured: p.cr_measured,
                })
                .collect();
            if !comparisons.is_empty() {
                found.push(six(verdict(law, model, pairing, &comparisons)));
            }
        }
    }
    found
}

fn six(v: Verdict) -> Verdict {
    Verdict {
        worst_error: v.worst_error.map(rounded),
        dispersion: v.dispersion.map(rounded),
        rho1_over_q: v.rho1_over_q.map(rounded),
        tail_over_gaussian: v.tail_over_gaussian.map(rounded),
        ..v
    }
}
