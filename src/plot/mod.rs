//! Figures from result tables. Nothing is computed here beyond axes.

mod bound;
mod canvas;
mod dodge;
mod family;
mod heatmap;
mod loads;
mod migration;
mod palette;
mod positions;
mod prediction;
mod rate;
mod scale;
mod series;
mod serving;
mod similarity;
mod tradeoff;
mod worlds;

use crate::error::Result;
use crate::serve::{MIGRATION_CSV, SERVE_SUMMARY_CSV, SERVE_TIMELINE_CSV};
use crate::stats::{STATS_CSV, STATS_MANIFEST, read_stats};
use crate::tables::{BOUND_CSV, BOUND_LAYERS_CSV, POSITIONS_CSV, SWEEP_CSV, Table};
use crate::theory::{
    BOUND_MANIFEST, MONTE_CARLO_CSV, PREDICTIONS_CSV, SCALE_CSV, SIMULATE_MANIFEST, SUMMARY_CSV,
};
use rate::Rate;
use serde_json::Value;
use series::SweepTable;
use std::path::{Path, PathBuf};

/// Draws the figures of all tables in a folder; one with none is treated as a sweep's.
pub fn plot_all(out: &Path) -> Result<Vec<PathBuf>> {
    let (stats, simulation) = (out.join(STATS_CSV).exists(), out.join(MONTE_CARLO_CSV).exists());
    let bounds = out.join(BOUND_LAYERS_CSV).exists();
    let serving = out.join(SERVE_SUMMARY_CSV).exists();
    let migration = out.join(MIGRATION_CSV).exists();
    let mut written = Vec::new();
    if serving {
        written.extend(plot_serving(out)?);
    }
    if migration {
        let rows = migration::Migration::new(&Table::read(&out.join(MIGRATION_CSV))?)?;
        written.extend(canvas::save(&rows, out, "migration", &measured(&out.join("manifest.json")))?);
    }
    if bounds {
        written.extend(plot_bound(out)?);
    }
    if out.join(SWEEP_CSV).exists() || !(stats || simulation || bounds || serving || migration) {
        written.extend(plot_sweep(out)?);
    }
    if stats {
        written.extend(plot_stats(out)?);
    }
    if simulation {
        written.extend(plot_simulation(out)?);
    }
    Ok(written)
}

/// Series up to which figures with a panel or a line for each are drawn.
const MOST_PANELS: usize = 12;

/// Tokens from which on KL by position is drawn.
const LONG: f64 = 100.0;

/// Draws all figures of a sweep folder from its sweep.csv, as PNG and SVG; returns what was written.
pub fn plot_sweep(out: &Path) -> Result<Vec<PathBuf>> {
    let csv = out.join(SWEEP_CSV);
    let mut table = SweepTable::new(&csv, &Table::read(&csv)?)?;
    let bound = out.join(BOUND_CSV);
    if bound.exists() {
        table.bound_by(&Table::read(&bound)?)?;
    }
    let mut written = canvas::save(&tradeoff::Tradeoff { table: &table }, out, "quality_vs_cr", "")?;
    // Panels by dial and by layer are for a few methods; with many, only the plane they share can be read.
    if (1..=MOST_PANELS).contains(&table.fusion.len()) {
        let mut dials: Vec<&str> =
            table.fusion.iter().filter_map(|s| Some(&s[0].dial.as_ref()?.0[..])).collect();
        dials.sort_unstable();
        dials.dedup();
        for dial in dials {
            let name = format!("cr_vs_{}", dial.replace('-', "_"));
            written.extend(canvas::save(&Rate { table: &table, dial }, out, &name, "")?);
        }
        // Tables of other programs have no ratios of layers.
        if table.fusion.iter().flatten().all(|p| !p.layer_cr.is_empty()) {
            written.extend(canvas::save(&heatmap::LayerMap { table: &table }, out, "layer_cr", "")?);
        }
    }
    let positions = out.join(POSITIONS_CSV);
    if positions.exists() {
        let positions = positions::Positions::new(&Table::read(&positions)?)?;
        let (arms, last) = positions.extent();
        // Answers of a few words have no course to show.
        if (1..=MOST_PANELS).contains(&arms) && last >= LONG {
            written.extend(canvas::save(&positions, out, "kl_by_position", &table.title)?);
        }
    }
    Ok(written)
}

/// Draws the figures of a stats.csv beside it.
pub fn plot_stats(out: &Path) -> Result<Vec<PathBuf>> {
    let rows = read_stats(&out.join(STATS_CSV))?;
    let of = measured(&out.join(STATS_MANIFEST));
    let mut written = Vec::new();
    let mut sizes: Vec<usize> = rows.iter().map(|r| r.block_size).collect();
    sizes.dedup();
    for &size in &sizes {
        let own: Vec<_> = rows.iter().filter(|r| r.block_size == size).collect();
        // One size needs no number in its names.
        let name =
            |figure: &str| if sizes.len() == 1 { figure.to_owned() } else { format!("{figure}-{size}") };
        written.extend(canvas::save(
            &similarity::Densities { rows: &own, size },
            out,
            &name("similarity"),
            &of,
        )?);
        written.extend(canvas::save(
            &similarity::Exceedances { rows: &own, size },
            out,
            &name("exceedance"),
            &of,
        )?);
        written.extend(canvas::save(
            &similarity::Dispersions { rows: &own, size },
            out,
            &name("dispersion"),
            &of,
        )?);
    }
    Ok(written)
}

/// Draws what serving took and did.
pub fn plot_serving(out: &Path) -> Result<Vec<PathBuf>> {
    let arms = Table::read(&out.join(SERVE_SUMMARY_CSV))?;
    let timeline = Table::read(&out.join(SERVE_TIMELINE_CSV))?;
    let of = |m: Value| match (m["model"].as_str(), m["data"]["spec"].as_str()) {
        (Some(model), Some(data)) => {
            let trace = m["trace"]["spec"].as_str().map(|t| format!(", trace {}", series::short(t)));
            let requests = &m["data"]["requests"];
            format!("{model}, {}, {requests} requests{}", series::short(data), trace.unwrap_or_default())
        }
        _ => String::new(),
    };
    let of = of(json(&out.join("manifest.json")));
    let mut written = canvas::save(&serving::Arms::new(&arms)?, out, "serving", &of)?;
    written.extend(canvas::save(&serving::Timeline::new(&timeline)?, out, "serving_timeline", &of)?);
    for (name, curves) in [
        ("serving_load", loads::Curves::of_loads(&arms)?),
        ("serving_budget", loads::Curves::of_budgets(&arms)?),
    ] {
        if let Some(curves) = curves {
            written.extend(canvas::save(&curves, out, name, &of)?);
        }
    }
    Ok(written)
}

/// Draws a codec against its Gaussian bound.
pub fn plot_bound(out: &Path) -> Result<Vec<PathBuf>> {
    let layers = Table::read(&out.join(BOUND_LAYERS_CSV))?;
    canvas::save(&bound::Bounds::new(&layers)?, out, "bound", &measured(&out.join(BOUND_MANIFEST)))
}

/// Draws the figures of a simulation from its tables.
pub fn plot_simulation(out: &Path) -> Result<Vec<PathBuf>> {
    let table = |name: &str| -> Result<Option<Table>> {
        let path = out.join(name);
        if path.exists() { Table::read(&path).map(Some) } else { Ok(None) }
    };
    let stats = json(&out.join(SIMULATE_MANIFEST))["options"]["stats"].as_str().map(PathBuf::from);
    let of = stats.map_or(String::new(), |stats| measured(&stats.with_file_name(STATS_MANIFEST)));
    let mut written = Vec::new();
    if let Some(rows) = table(MONTE_CARLO_CSV)? {
        written.extend(canvas::save(&worlds::Worlds::new(&rows)?, out, "monte_carlo", &of)?);
    }
    if let (Some(rows), Some(summary)) = (table(PREDICTIONS_CSV)?, table(SUMMARY_CSV)?) {
        written.extend(canvas::save(
            &prediction::Predictions::new(&rows, &summary)?,
            out,
            "prediction",
            &of,
        )?);
    }
    if let Some(rows) = table(SCALE_CSV)? {
        written.extend(canvas::save(&scale::Scale::new(&rows)?, out, "scale", &of)?);
    }
    Ok(written)
}

/// What statistics are of, for a figure's corner; empty if their manifest is not there.
fn measured(manifest: &Path) -> String {
    let manifest = json(manifest);
    let dump = &manifest["dump"];
    match (dump["model"]["name"].as_str(), dump["data"]["name"].as_str()) {
        (Some(model), Some(data)) => {
            let all = &dump["requests"];
            let requests = match manifest["requests"].as_u64() {
                Some(own) if *all != own => format!("{own} of {all}"),
                _ => all.to_string(),
            };
            format!("{model}, {}, {requests} requests", series::short(data))
        }
        _ => String::new(),
    }
}

/// A manifest; null if there is none.
fn json(path: &Path) -> Value {
    std::fs::read_to_string(path).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}
