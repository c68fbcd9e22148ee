//! `kvfuse inspect`.

use super::say;
use super::table::table;
use crate::dump::inspect;
use anyhow::Result;
use std::path::PathBuf;

/// Read a dump from end to end, check it against its manifest, and summarise it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse inspect results/demo/dump")]
pub struct Args {
    /// Folder that `kvfuse dump` wrote
    dump: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let (manifest, summary) = inspect(&args.dump)?;
    if args.json {
        say(serde_json::to_string(&summary)?)?;
        return Ok(());
    }
    let c = &manifest.model.config;
    let dtype = format!("{:?}", manifest.dtype).to_lowercase();
    say(format!(
        "model     {} (sha256 {})\ndata      {} ({} shots, seed {})\nrequests  {} of {} to {} tokens, {} in all\n\
         shared    the first {} tokens of every prompt\ncache     {} layers x {} heads x {}, {dtype}, finite throughout\n",
        manifest.model.name,
        manifest.model.sha256,
        manifest.data.name,
        manifest.data.shots.len(),
        manifest.seed,
        summary.requests,
        summary.shortest,
        summary.longest,
        summary.tokens,
        manifest.shared_prefix_tokens,
        c.layers,
        c.kv_heads,
        c.head_dim,
    ))?;
    let rows: Vec<Vec<String>> = summary
        .layer_rms
        .iter()
        .enumerate()
        .map(|(n, (k, v))| vec![n.to_string(), format!("{k:.4}"), format!("{v:.4}")])
        .collect();
    say(table(&["layer", "key RMS", "value RMS"], &rows))?;
    Ok(())
}
