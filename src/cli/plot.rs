//! `kvfuse plot`.

use super::say;
use crate::plot::plot_all;
use anyhow::Result;
use std::path::PathBuf;

/// Draw the figures of a folder's tables (sweep.csv, stats.csv, those of `kvfuse simulate`) from these alone, as PNG and SVG
/// beside them.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse plot results/demo")]
pub struct Args {
    /// Folder that `kvfuse sweep`, `stats` or `simulate` wrote
    out: PathBuf,
}

pub fn run(args: Args) -> Result<()> {
    for path in plot_all(&args.out)? {
        say(path.display().to_string())?;
    }
    Ok(())
}
