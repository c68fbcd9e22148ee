//! `kvfuse stats`: the similarity table of a dump, with where it came from.

use crate::dump::{Half, Manifest};
use crate::error::{Error, Result};
use crate::files;
use crate::lock::FolderLock;
use crate::model::kernels::instructions;
use crate::stats::{SimilarityOptions, StatRow, similarities};
use crate::tables::{Columns, write_csv};
use std::path::{Path, PathBuf};

pub const STATS_CSV: &str = "stats.csv";
pub const STATS_MANIFEST: &str = "stats.manifest.json";

/// What to measure, and where to write it.
pub struct StatsOptions {
    pub dump: PathBuf,
    pub out: PathBuf,
    /// Requests to measure: a half of them, or all.
    pub half: Option<Half>,
    pub similarity: SimilarityOptions,
    /// Arguments to record in the manifest.
    pub command: Vec<String>,
}

/// Measures the requests of a dump; writes stats.csv and stats.manifest.json.
pub fn measure(options: &StatsOptions) -> Result<Vec<StatRow>> {
    let manifest = Manifest::read(&options.dump)?;
    let _lock = FolderLock::take(&options.out)?;
    files::writable_folder(&options.out)?;
    let requests = manifest.half(options.half, &options.dump)?;
    let rows = similarities(&options.dump, &manifest, &requests, &options.similarity)?;
    write_csv(&options.out.join(STATS_CSV), &rows)?;
    let value = serde_json::json!({
        "kvfuse_version": env!("CARGO_PKG_VERSION"),
        "kernels": [instructions()],
        "command": options.command,
        "options": options.similarity,
        "contexts": manifest.contexts(&requests),
        "dump": manifest.origin()?,
    });
    files::write_json(&options.out.join(STATS_MANIFEST), &value)?;
    Ok(rows)
}

/// Reads a stats.csv.
pub fn read_stats(path: &Path) -> Result<Vec<StatRow>> {
    let table = Columns::read(path)?;
    let texts = |name: &str| table.strings(name);
    let numbers = |name: &str| -> Result<Vec<Option<f64>>> {
        Ok(table.floats(name)?.into_iter().map(|x| x.is_finite().then_some(x)).collect())
    };
    let bad = || Error::file(path, "is no table of `kvfuse stats`");
    let (size, layer, at) = (numbers("block_size")?, numbers("layer")?, numbers("at")?);
    let (value, low, high) = (numbers("value")?, numbers("low")?, numbers("high")?);
    let (part, rope, class, statistic) =
        (texts("part")?, texts("rope")?, texts("class")?, texts("statistic")?);
    let count = |x: Option<f64>| x.filter(|x| *x >= 0.0).map(|x| x as usize).ok_or_else(bad);
    let row = |i: usize| {
        Ok(StatRow {
            block_size: count(size[i])?,
            layer: count(layer[i])?,
            part: part[i].clone(),
            rope: clap::ValueEnum::from_str(&rope[i], false).map_err(|_| bad())?,
            class: class[i].clone(),
            statistic: statistic[i].clone(),
            at: at[i],
            value: value[i].ok_or_else(bad)?,
            low: low[i],
            high: high[i],
        })
    };
    (0..table.rows()).map(row).collect()
}
