//! `kvfuse report`.

use super::say;
use anyhow::Result;
use std::path::PathBuf;

/// Put a results folder into one HTML file.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse report results/demo")]
pub struct Args {
    /// Folder that `kvfuse sweep`, `stats`, `simulate` or `run` wrote
    out: PathBuf,
}

pub fn run(args: Args) -> Result<()> {
    say(args.out.display().to_string());
    Ok(())
}
