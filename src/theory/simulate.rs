//! `kvfuse simulate`: the model's closed forms and synthetic worlds, and both against what a sweep measured.

use super::against::{SummaryRow, measured_layers, predictions, summary, verdicts};
use crate::codec::fusion::Pairing;
use crate::error::{Error, Result};
use crate::files;
use crate::lock::FolderLock;
use crate::stats::{read_stats, rounded};
use crate::tables::write_table;
use crate::theory::{
    Draws, Extent, LayerLaw, Model, MonteCarloRow, Prediction, Verdict, layer_cr, monte_carlo,
    percolation_requests, predict,
};
use serde::Serialize;
use std::path::{Path, PathBuf};

pub const CLOSED_FORMS_CSV: &str = "closed_forms.csv";
pub const SCALE_CSV: &str = "scale.csv";
pub const MONTE_CARLO_CSV: &str = "monte_carlo.csv";
pub const PREDICTIONS_CSV: &str = "predictions.csv";
pub const SUMMARY_CSV: &str = "prediction_summary.csv";
pub const VERDICTS_CSV: &str = "verdicts.csv";
pub const SIMULATE_MANIFEST: &str = "simulate.manifest.json";

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
    let _lock = FolderLock::take(&options.out)?;
    files::writable_folder(&options.out)?;
    let measured = match &options.against {
        Some(path) => Some(measured_layers(path, &options.stats, &laws, &rows[0])?),
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
    write_table(&options.out.join(CLOSED_FORMS_CSV), &closed)?;
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
    write_table(&options.out.join(MONTE_CARLO_CSV), &worlds)?;
    let value = serde_json::json!({
        "kvfuse_version": env!("CARGO_PKG_VERSION"),
        "command": options.command,
        "options": options,
        "stats_sha256": files::sha256(&options.stats)?,
    });
    files::write_json(&options.out.join(SIMULATE_MANIFEST), &value)?;
    Ok(Simulation { monte_carlo: worlds, scale, summary, verdicts })
}

/// A table of an earlier run must not stand beside those of this one.
fn write_or_remove<T: Serialize>(path: &Path, rows: &[T]) -> Result<()> {
    use crate::error::IoAt;
    if !rows.is_empty() {
        return write_table(path, rows);
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
            for (model, pairing) in Model::with_pairings() {
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
    for (model, pairing) in Model::with_pairings() {
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
