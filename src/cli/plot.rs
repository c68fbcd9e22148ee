//! `kvfuse plot`.

use super::say;
use crate::plot::plot_sweep;
use anyhow::Result;
use std::path::PathBuf;

/// Draw a sweep's figures from its sweep.csv alone, as PNG and SVG beside it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse plot results/demo")]
pub struct Args {
    /// Folder that `kvfuse sweep` wrote
    out: PathBuf,
}

pub fn run(args: Args) -> Result<()> {
    for path in plot_sweep(&args.out)? {
        say(path.display().to_string());
    }
    Ok(())
}
