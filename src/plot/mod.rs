//! Figures from result tables. Nothing is computed here beyond axes.

mod canvas;
mod heatmap;
mod rate;
mod series;
mod tradeoff;

use crate::error::Result;
use crate::experiment::{SWEEP_CSV, read_csv};
use rate::{Against, Rate};
use series::SweepTable;
use std::path::{Path, PathBuf};

/// Draws all figures of a sweep folder from its sweep.csv, as PNG and SVG; returns what was written.
pub fn plot_sweep(out: &Path) -> Result<Vec<PathBuf>> {
    let csv = out.join(SWEEP_CSV);
    let table = SweepTable::new(&csv, &read_csv(&csv)?)?;
    let mut written = canvas::save(&tradeoff::Tradeoff { table: &table }, out, "quality_vs_cr")?;
    if !table.fusion.is_empty() {
        for (against, name) in [(Against::Tau, "cr_vs_tau"), (Against::MaxError, "cr_vs_max_error")] {
            let rate = Rate { table: &table, against };
            if !rate.is_empty() {
                written.extend(canvas::save(&rate, out, name)?);
            }
        }
        written.extend(canvas::save(&heatmap::LayerMap { table: &table }, out, "layer_cr")?);
    }
    Ok(written)
}

/// Stub.
pub fn plot_stats(_out: &Path) -> Result<Vec<PathBuf>> { Ok(Vec::new()) }

/// Stub.
pub fn plot_simulation(_out: &Path) -> Result<Vec<PathBuf>> { Ok(Vec::new()) }
