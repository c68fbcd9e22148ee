//! `kvfuse stats`: the similarity table of a dump, with where it came from.

use crate::dump::{Half, Manifest};
use crate::error::{Error, Result};
use crate::files;
use crate::lock::FolderLock;
use crate::model::kernels::instructions;
use crate::stats::{SimilarityOptions, StatRow, similarities};
use crate::tables::{Table, write_table};
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
    write_table(&options.out.join(STATS_CSV), &rows)?;
    let value = serde_json::json!({
        "kvfuse_version": env!("CARGO_PKG_VERSION"),
        "kernels": [instructions()],
        "command": options.command,
        "options": options.similarity,
        "requests": requests.len(),
        "contexts": manifest.contexts(&requests),
        "dump": manifest.origin()?,
    });
    files::write_json(&options.out.join(STATS_MANIFEST), &value)?;
    Ok(rows)
}

/// Reads a stats.csv.
pub fn read_stats(path: &Path) -> Result<Vec<StatRow>> {
    let rows: Vec<StatRow> = Table::read(path)?.rows()?;
    match rows.iter().all(|r| r.value.is_finite()) {
        true => Ok(rows),
        false => Err(Error::file(path, "is no table of `kvfuse stats`")),
    }
}
