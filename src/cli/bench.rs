//! `kvfuse bench`.

use anyhow::Result;

/// Measure this machine.
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> Result<()> {
    Ok(())
}
