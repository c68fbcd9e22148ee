//! `kvfuse report`.

use super::say;
use crate::report::report;
use anyhow::Result;
use std::path::PathBuf;

/// Put a results folder into one HTML file that needs nothing else: claims and verdicts, figures, tables that sort,
/// manifests.
///
/// Writes report.html into the folder, of all results in it and below it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse report results/demo")]
pub struct Args {
    /// Folder that `kvfuse sweep`, `stats`, `simulate` or `run` wrote
    out: PathBuf,
}

pub fn run(args: Args) -> Result<()> {
    say(report(&args.out)?.display().to_string())?;
    Ok(())
}
