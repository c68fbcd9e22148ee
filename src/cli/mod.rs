//! The command line: one file a subcommand; parse, call, print.

mod bench;
mod calibrate;
mod completions;
mod demo;
mod dump;
mod explain;
mod inspect;
mod model;
mod plot;
mod simulate;
mod stats;
mod sweep;
mod table;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use std::io::Write;

/// Rate-distortion experiments on KV-cache block fusion.
///
/// Dump the KV caches of a real language model, fuse similar blocks across requests, and see what it costs.
/// Start with `kvfuse demo`.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "Environment:\n  \
    KVFUSE_HOME  folder that models are kept in (default: $XDG_CACHE_HOME/kvfuse or ~/.cache/kvfuse)\n  \
    HF_ENDPOINT, HF_HOME, HF_TOKEN  as in Hugging Face tools\n  \
    NO_COLOR     no colours in help and progress\n\n\
    Exit status: 0 when all went well, 2 on any error."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Threads to compute with; results do not depend on it [default: all cores]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Show no progress; errors are still shown
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List, fetch and try models
    #[command(subcommand)]
    Model(model::Command),
    // The others say themselves what they are for.
    Dump(dump::Args),
    Inspect(inspect::Args),
    Sweep(Box<sweep::Args>),
    Calibrate(calibrate::Args),
    Explain(explain::Args),
    Stats(stats::Args),
    Simulate(simulate::Args),
    Plot(plot::Args),
    Demo(demo::Args),
    Bench(bench::Args),
    Completions(completions::Args),
    Man(completions::ManArgs),
}

impl Cli {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        crate::interrupt::install();
        if self.quiet {
            crate::progress::silence();
        }
        if let Some(threads) = self.threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into());
            pool.build_global().context("--threads")?;
        }
        match self.command {
            Command::Model(command) => model::run(command),
            Command::Dump(args) => dump::run(args),
            Command::Inspect(args) => inspect::run(args),
            Command::Sweep(args) => sweep::run(*args),
            Command::Calibrate(args) => calibrate::run(args),
            Command::Explain(args) => explain::run(args),
            Command::Stats(args) => stats::run(args),
            Command::Simulate(args) => simulate::run(args),
            Command::Plot(args) => plot::run(args),
            Command::Demo(args) => demo::run(args),
            Command::Bench(args) => bench::run(args),
            Command::Completions(args) => completions::run(args),
            Command::Man(args) => completions::man(args),
        }
    }
}

/// Prints to stdout. A reader that has gone (`| head`) is not an error.
fn say(text: impl AsRef<str>) {
    let _ = writeln!(std::io::stdout().lock(), "{}", text.as_ref());
}

/// The command as typed, for manifests: the program's path may differ between machines, its arguments say it all.
fn typed_command() -> Vec<String> {
    let arguments = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned());
    std::iter::once("kvfuse".to_owned()).chain(arguments).collect()
}
