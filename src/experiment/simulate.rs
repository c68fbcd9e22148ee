//! `kvfuse simulate`: the model's closed forms and synthetic worlds, and both against what a sweep measured.

use super::measure::read_stats;
use super::sweep::LAYERS_CSV;
use super::table::{Columns, write_csv};
use crate::codec::fusion::Pairing;
use crate::error::{Error, Result};
use crate::files;
use crate::stats::rounded;
use crate::theory::{
    Comparison, Draws, Extent, LayerLaw, Model, MonteCarloRow, Prediction, Verdict, layer_cr, monte_carlo,
    percolation_requests, predict, representative, verdict,
};
use clap::ValueEnum;
use serde::Serialize;
use std::path::{Path, PathBuf};

pub const CLOSED_FORMS_CSV: &str = "closed_forms.csv";
pub const SCALE_CSV: &str = "scale.csv";
pub const MONTE_CARLO_CSV: &str = "monte_carlo.csv";
pub const PREDICTIONS_CSV: &str = "predictions.csv";
pub const SUMMARY_CSV: &str = "prediction_summary.csv";
pub const VERDICTS_CSV: &str = "verdicts.csv";

/// What to simulate.
#[derive(Debug, Clone, Serialize)]
pub struct SimulateOptions {
    /// A stats.csv.
    pub stats: PathBuf,
    /// A sweep.csv of the same dump, whose layers.csv lies beside it.
    pub against: Option<PathBuf>,
    /// Batch sizes to extrapolate to; empty: none.
    pub requests: Vec<usize>,
    /// Distinct blocks that a request adds; absent: as measured.
    pub blocks: Option<usize>,
    /// Thresholds; absent: those of the statistics.
    pub taus: Option<Vec<f64>>,
    /// Block size, where the statistics have several.
    pub block_size: Option<usize>,
    /// Layer whose keys the synthetic worlds are like; absent: the middle one.
    pub layer: Option<usize>,
    pub draws: Draws,
    #[serde(skip)]
    pub out: PathBuf,
    /// Arguments to record in the manifest.
    pub command: Vec<String>,
}

/// What was found.
pub struct Simulation {
    pub monte_carlo: Vec<MonteCarloRow>,
    pub scale: Vec<ScaleRow>,
    /// With a sweep to compare with.
    pub summary: Vec<SummaryRow>,
    pub verdicts: Vec<Verdict>,
}

/// One row of closed_forms.csv: the batch that was measured.
#[derive(Debug, Serialize)]
struct ClosedFormRow {
    model: Model,
    layer: usize,
    pairing: Pairing,
    tau: f64,
    #[serde(flatten)]
    prediction: Prediction,
    cr_audited: Option<f64>,
    /// Batch size (a power of two) from which on there is a giant component, and the distinct blocks a request that it is for.
    percolates_at: Option<f64>,
    own_blocks: f64,
}

/// All layers together at one batch size: one row of scale.csv.
#[derive(Debug, Clone, Serialize)]
pub struct ScaleRow {
    pub model: Model,
    pub pairing: Pairing,
    pub tau: f64,
    pub requests: usize,
    /// Full blocks before / after, over all layers; and by exact duplicates alone.
    pub cr: f64,
    pub cr_duplicates: f64,
    /// Share of the layers with a giant component.
    pub percolated: f64,
}

/// One row of predictions.csv.
#[derive(Debug, Clone, Serialize)]
struct PredictionRow {
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
}

const MODELS: [Model; 2] = [Model::Uniform, Model::ByPosition];
const PAIRINGS: [Pairing; 3] = [Pairing::Tree, Pairing::Best, Pairing::Components];

/// Runs everything asked for and writes the tables.
pub fn simulate(options: &SimulateOptions) -> Result<Simulation> {
    let rows = read_stats(&options.stats)?;
    let mut sizes: Vec<usize> = rows.iter().map(|r| r.block_size).collect();
    sizes.dedup();
    let size = options.block_size.or(sizes.first().copied()).unwrap_or(0);
    if !sizes.contains(&size) {
        let problem = format!("has no blocks of {size} tokens; it has {sizes:?}");
        return Err(Error::file(&options.stats, problem));
    }
    let laws = LayerLaw::of_rows(&rows, size);
    let taus = thresholds(options, &laws)?;
    files::writable_folder(&options.out)?;
    let measured = match &options.against {
        Some(path) => Some(measured_layers(path, &laws, &rows[0])?),
        None => None,
    };

    let layer = options.layer.unwrap_or(laws[laws.len() / 2].layer);
    let Some(law) = laws.iter().find(|l| l.layer == layer) else {
        let (first, last) = (laws[0].layer, laws[laws.len() - 1].layer);
        return Err(Error::argument(format!(
            "--layer {layer}: the statistics have layers {first} to {last}"
        )));
    };
    if !options.requests.is_empty() && laws.iter().any(|l| l.tokens.is_none() || l.requests < 2.0) {
        let problem =
            "is of a sample or of one request, which says nothing of other batch sizes (--requests)";
        return Err(Error::file(&options.stats, problem));
    }

    let closed = closed_forms(&laws, &taus, options);
    write_csv(&options.out.join(CLOSED_FORMS_CSV), &closed)?;
    let scale = scale(&laws, &taus, options);
    write_or_remove(&options.out.join(SCALE_CSV), &scale)?;

    let predictions = measured.map_or(Vec::new(), |measured| predictions(&laws, &measured));
    if let Some(path) = options.against.as_ref().filter(|_| predictions.is_empty()) {
        let problem = "has no threshold within those of the statistics; run stats with its --tau";
        return Err(Error::file(path, problem));
    }
    let summary = summary(&predictions);
    let verdicts = verdicts(&laws, &predictions);
    write_or_remove(&options.out.join(PREDICTIONS_CSV), &predictions)?;
    write_or_remove(&options.out.join(SUMMARY_CSV), &summary)?;
    write_or_remove(&options.out.join(VERDICTS_CSV), &verdicts)?;
    let worlds = monte_carlo(law, &taus, &options.draws)?;
    write_csv(&options.out.join(MONTE_CARLO_CSV), &worlds)?;
    let value = serde_json::json!({
        "kvfuse_version": env!("CARGO_PKG_VERSION"),
        "command": options.command,
        "options": options,
        "stats_sha256": files::sha256(&options.stats)?,
    });
    files::write_json(&options.out.join("simulate.manifest.json"), &value)?;
    Ok(Simulation { monte_carlo: worlds, scale, summary, verdicts })
}

/// A table of an earlier run must not stand beside those of this one.
fn write_or_remove<T: Serialize>(path: &Path, rows: &[T]) -> Result<()> {
    use crate::error::IoAt;
    if !rows.is_empty() {
        return write_csv(path, rows);
    }
    if path.exists() { std::fs::remove_file(path).at(path) } else { Ok(()) }
}

/// The thresholds asked for, which must lie between measured ones; falling, as sweeps have them.
fn thresholds(options: &SimulateOptions, laws: &[LayerLaw]) -> Result<Vec<f64>> {
    let mut known: Vec<f64> =
        laws.iter().flat_map(|l| &l.classes).flat_map(|c| &c.exceedances).map(|e| e.tau).collect();
    known.sort_by(|a, b| b.total_cmp(a));
    known.dedup();
    let (Some(&high), Some(&low)) = (known.first(), known.last()) else {
        let problem = "no layer has two distinct blocks: there are no similarities to simulate from";
        return Err(Error::file(&options.stats, problem));
    };
    let mut taus = options.taus.clone().unwrap_or(known);
    taus.sort_by(|a, b| b.total_cmp(a));
    match taus.iter().find(|t| **t > high + 1e-9 || **t < low - 1e-9) {
        Some(tau) => {
            let problem = format!("knows thresholds from {low} to {high}, not {tau}; run stats with --tau");
            Err(Error::file(&options.stats, problem))
        }
        None => Ok(taus),
    }
}

/// How much larger such a batch is than the one measured.
fn extent(law: &LayerLaw, requests: usize, blocks: Option<usize>) -> Extent {
    Extent { factor: requests as f64 / law.requests.max(1.0), own: own(law, blocks) }
}

/// How many times the distinct blocks that were measured a request adds.
fn own(law: &LayerLaw, blocks: Option<usize>) -> f64 {
    match blocks {
        Some(blocks) if law.own_blocks() > 0.0 => blocks as f64 / law.own_blocks(),
        _ => 1.0,
    }
}

fn closed_forms(laws: &[LayerLaw], taus: &[f64], options: &SimulateOptions) -> Vec<ClosedFormRow> {
    let mut rows = Vec::new();
    for law in laws {
        let own = own(law, options.blocks);
        for &tau in taus {
            for (model, pairing) in models_and_pairings() {
                let Some(prediction) = predict(law, model, pairing, tau, Extent::MEASURED) else { continue };
                rows.push(ClosedFormRow {
                    model,
                    layer: law.layer,
                    pairing,
                    tau,
                    prediction: six_digits(prediction),
                    cr_audited: layer_cr(law, prediction.blocks).map(rounded),
                    percolates_at: percolation_requests(law, model, pairing, tau, own),
                    own_blocks: rounded(own * law.own_blocks()),
                });
            }
        }
    }
    rows
}

fn models_and_pairings() -> impl Iterator<Item = (Model, Pairing)> {
    MODELS.into_iter().flat_map(|model| PAIRINGS.into_iter().map(move |pairing| (model, pairing)))
}

fn six_digits(p: Prediction) -> Prediction {
    Prediction {
        distinct: rounded(p.distinct),
        q: rounded(p.q),
        lambda: p.lambda.map(rounded),
        poisson_error: p.poisson_error.map(rounded),
        blocks: rounded(p.blocks),
        blocks_low: rounded(p.blocks_low),
        blocks_high: rounded(p.blocks_high),
        cr: rounded(p.cr),
        giant_share: rounded(p.giant_share),
        key_error: p.key_error.map(rounded),
        value_error: p.value_error.map(rounded),
    }
}

fn scale(laws: &[LayerLaw], taus: &[f64], options: &SimulateOptions) -> Vec<ScaleRow> {
    let mut rows = Vec::new();
    for (model, pairing) in models_and_pairings() {
        for &tau in taus {
            for &requests in &options.requests {
                let all: Vec<Prediction> = laws
                    .iter()
                    .filter_map(|law| {
                        predict(law, model, pairing, tau, extent(law, requests, options.blocks))
                    })
                    .collect();
                let sum = |of: fn(&Prediction) -> f64| all.iter().map(of).sum::<f64>();
                let (before, after) = (sum(|p| p.cr * p.blocks), sum(|p| p.blocks));
                if after > 0.0 {
                    rows.push(ScaleRow {
                        model,
                        pairing,
                        tau,
                        requests,
                        cr: rounded(before / after),
                        cr_duplicates: rounded(before / sum(|p| p.distinct)),
                        percolated: rounded(sum(|p| f64::from(p.giant_share > 0.0)) / all.len() as f64),
                    });
                }
            }
        }
    }
    rows
}

/// One layer of one arm of a sweep.
struct MeasuredLayer {
    pairing: Pairing,
    tau: f64,
    layer: usize,
    full_blocks: f64,
    physical_blocks: f64,
    cr_audited: f64,
    key_error: f64,
    value_error: f64,
}

/// The arms of a sweep that the model speaks of: bff on keys at one threshold, over one batch of all requests.
fn measured_layers(
    sweep: &Path,
    laws: &[LayerLaw],
    of: &crate::stats::StatRow,
) -> Result<Vec<MeasuredLayer>> {
    let path = sweep.with_file_name(LAYERS_CSV);
    if !path.exists() {
        let problem = format!("has no {LAYERS_CSV} beside it; run the same sweep again");
        return Err(Error::file(sweep, problem));
    }
    let whole = Columns::read(sweep)?;
    if whole.floats("requests")?.iter().zip(whole.floats("batch")?).any(|(requests, batch)| *requests > batch)
    {
        let problem =
            "fused its requests in several batches, the statistics are of one; sweep with a larger --batch";
        return Err(Error::file(sweep, problem));
    }
    let table = Columns::read(&path)?;
    let numbers = |name: &str| table.floats(name);
    let texts = |name: &str| table.strings(name);
    let rope = of.rope.to_possible_value().map_or(String::new(), |v| v.get_name().to_owned());
    let wanted = [
        ("method", "bff".to_owned()),
        ("similarity", "keys".to_owned()),
        ("positions", "any".to_owned()),
        ("rope", rope),
        ("group_layers", "1".to_owned()),
        ("within_tenant", "false".to_owned()),
        ("scale", "norm".to_owned()),
        ("block_size", laws[0].block_size.to_string()),
    ];
    let mut keep = vec![true; table.rows()];
    for (name, value) in &wanted {
        // Counts may be read as numbers with a point.
        let same = |x: &str| x == value || x.parse::<f64>().ok().is_some_and(|x| value.parse() == Ok(x));
        keep.iter_mut().zip(texts(name)?).for_each(|(keep, x)| *keep &= same(&x));
    }
    let pairings = texts("pairing")?;
    let representatives = texts("representative")?;
    let (tau, layer) = (numbers("tau")?, numbers("layer")?);
    let (full, physical) = (numbers("full_blocks")?, numbers("physical_blocks")?);
    let (cr, key, value) = (numbers("cr_audited")?, numbers("key_error")?, numbers("value_error")?);
    let spare = numbers("spare_layers")?;
    let layers = laws.iter().map(|l| l.layer + 1).max().unwrap_or(0);
    let mut found: Vec<MeasuredLayer> = Vec::new();
    for i in (0..table.rows()).filter(|&i| keep[i] && tau[i].is_finite()) {
        let Ok(pairing) = Pairing::from_str(&pairings[i], false) else { continue };
        let usual = representative(pairing).to_possible_value();
        if usual.is_none_or(|v| v.get_name() != representatives[i]) || pairing == Pairing::Lsh {
            continue;
        }
        let layer = layer[i] as usize;
        let spared = spare[i] as usize;
        if layer < spared || layer >= layers.saturating_sub(spared) {
            continue;
        }
        // Two settings may differ in layers that both touch alike.
        if found.iter().any(|f| (f.pairing, f.tau, f.layer) == (pairing, tau[i], layer)) {
            continue;
        }
        if let Some(law) = laws.iter().find(|l| l.layer == layer)
            && law.blocks != full[i]
        {
            let problem = format!(
                "lists {} full blocks in layer {layer}, the statistics {}: they are of different caches",
                full[i], law.blocks
            );
            return Err(Error::file(&path, problem));
        }
        found.push(MeasuredLayer {
            pairing,
            tau: tau[i],
            layer,
            full_blocks: full[i],
            physical_blocks: physical[i],
            cr_audited: cr[i],
            key_error: key[i],
            value_error: value[i],
        });
    }
    if found.is_empty() {
        let problem = format!(
            "has no arm the model speaks of: bff with --tau, --similarity keys, --positions any, blocks of {} tokens, \
             and means for tree and components or first blocks for best",
            laws[0].block_size
        );
        return Err(Error::file(&path, problem));
    }
    Ok(found)
}

fn predictions(laws: &[LayerLaw], measured: &[MeasuredLayer]) -> Vec<PredictionRow> {
    let row = |model: Model, m: &MeasuredLayer| {
        let law = laws.iter().find(|l| l.layer == m.layer)?;
        let p = predict(law, model, m.pairing, m.tau, Extent::MEASURED)?;
        let e = law.all_pairs(m.tau);
        let cr = m.full_blocks / m.physical_blocks;
        let of = |blocks: f64| m.full_blocks / blocks;
        let error = |blocks: f64| rounded(of(blocks) / cr - 1.0);
        Some(PredictionRow {
            model,
            layer: m.layer,
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
            cr_duplicates: rounded(law.blocks / law.distinct),
            cr_audited_predicted: layer_cr(law, p.blocks).map(rounded),
            cr_audited_measured: m.cr_audited,
            key_error_predicted: p.key_error.map(rounded),
            key_error_measured: m.key_error,
            value_error_predicted: p.value_error.map(rounded),
            value_error_measured: m.value_error,
        })
    };
    MODELS.into_iter().flat_map(|model| measured.iter().filter_map(move |m| row(model, m))).collect()
}

fn summary(predictions: &[PredictionRow]) -> Vec<SummaryRow> {
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
        }
    };
    groups.iter().map(of).collect()
}

fn verdicts(laws: &[LayerLaw], predictions: &[PredictionRow]) -> Vec<Verdict> {
    let mut found = Vec::new();
    for (model, pairing) in models_and_pairings() {
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
