//! `kvfuse demo`.

use super::say;
use super::sweep::summary;
use crate::dump::{DumpDtype, DumpOptions, Sort, dump};
use crate::model::registry::DEFAULT_MODEL;
use crate::plot::plot_sweep;
use crate::sweep::{Settings, sweep};
use crate::tables::SWEEP_CSV;
use crate::task::Draw;
use anyhow::Result;
use std::path::PathBuf;

/// Dump 64 requests of the built-in questions, sweep eight thresholds, draw the figures.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse demo")]
pub struct Args {
    /// Folder to write
    #[arg(short, long, value_name = "DIR", default_value = "results/demo")]
    out: PathBuf,
    /// Requests to draw
    #[arg(long, default_value_t = 64)]
    requests: usize,
}

pub fn run(args: Args, typed: Vec<String>) -> Result<()> {
    let folder = args.out.join("dump");
    dump(
        &folder,
        &DumpOptions {
            model: DEFAULT_MODEL.to_owned(),
            draw: Draw::plain("builtin:qa", args.requests, 3, 0),
            shift: 0,
            chat: false,
            max_tokens: None,
            sort: Sort::None,
            dtype: DumpDtype::F16,
            command: typed.clone(),
        },
    )?;
    let settings = Settings { dump: Some(folder), out: Some(args.out.clone()), ..Settings::default() };
    let rows = sweep(&settings.options(typed)?)?;
    let figures = plot_sweep(&args.out)?;
    say(summary(&rows))?;
    say("")?;
    for path in [args.out.join(SWEEP_CSV), args.out.join("manifest.json")].iter().chain(&figures) {
        say(path.display().to_string())?;
    }
    Ok(())
}
