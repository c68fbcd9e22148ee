//! The command line: one file a subcommand; parse, call, print.

mod bench;
mod calibrate;
mod check;
mod compare;
mod completions;
mod demo;
mod draw;
mod dump;
mod encode;
mod engine;
mod explain;
mod inspect;
mod methods;
mod migrate;
mod model;
mod plan;
pub use plan::Plan;
mod plot;
mod project;
mod report;
mod run;
mod search;
mod serve;
mod serve_bench;
mod shards;
mod simulate;
mod stats;
mod sweep;
mod table;
mod train;

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
    Methods(methods::Args),
    Sweep(Box<sweep::Args>),
    Encode(encode::EncodeArgs),
    Decode(encode::DecodeArgs),
    Train(train::Args),
    Sensitivity(train::SensitivityArgs),
    Search(search::Args),
    Calibrate(calibrate::Args),
    Explain(explain::Args),
    Stats(stats::Args),
    Simulate(simulate::Args),
    Plot(plot::Args),
    Run(run::Args),
    Plan(shards::PlanArgs),
    Merge(shards::MergeArgs),
    Compare(compare::Args),
    Check(check::Args),
    Report(report::Args),
    Serve(serve::Args),
    ServeBench(Box<serve_bench::Args>),
    Migrate(migrate::Args),
    Project(project::Args),
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
        self.command.run(typed_command())
    }
}

impl Command {
    /// Runs it; `typed` is the command line, for manifests.
    fn run(self, typed: Vec<String>) -> Result<()> {
        match self {
            Command::Model(command) => model::run(command),
            Command::Dump(args) => dump::run(args, typed),
            Command::Inspect(args) => inspect::run(args),
            Command::Methods(args) => methods::run(args),
            Command::Sweep(args) => sweep::run(*args, typed),
            Command::Encode(args) => encode::run(args),
            Command::Decode(args) => encode::run_decode(args),
            Command::Train(args) => train::run(args, typed),
            Command::Sensitivity(args) => train::run_sensitivity(args),
            Command::Search(args) => search::run(args),
            Command::Calibrate(args) => calibrate::run(args, typed),
            Command::Explain(args) => explain::run(args),
            Command::Stats(args) => stats::run(args, typed),
            Command::Simulate(args) => simulate::run(args, typed),
            Command::Plot(args) => plot::run(args),
            Command::Run(args) => run::run(args),
            Command::Plan(args) => shards::plan(args),
            Command::Merge(args) => shards::run_merge(args),
            Command::Compare(args) => compare::run(args),
            Command::Check(args) => check::run(args),
            Command::Report(args) => report::run(args),
            Command::Serve(args) => serve::run(args),
            Command::ServeBench(args) => serve_bench::run(*args, typed),
            Command::Migrate(args) => migrate::run(args, typed),
            Command::Project(args) => project::run(args),
            Command::Demo(args) => demo::run(args, typed),
            Command::Bench(args) => bench::run(args),
            Command::Completions(args) => completions::run(args),
            Command::Man(args) => completions::man(args),
        }
    }
}

/// Prints to stdout. A reader that has gone (`| head`) is not an error; a full disk is.
fn say(text: impl AsRef<str>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{}", text.as_ref()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e).context("stdout"),
        _ => Ok(()),
    }
}

/// Prints rows as JSON lines (`--json`).
fn say_rows<T: serde::Serialize>(rows: &[T]) -> Result<()> {
    rows.iter().try_for_each(|row| say(serde_json::to_string(row)?))
}

/// A usage error of clap's in one line.
pub fn words_of(usage: &clap::Error) -> String {
    let text = usage.to_string();
    let lines = text.lines().map(str::trim).take_while(|l| !l.starts_with("Usage:"));
    let said: Vec<&str> = lines.filter(|l| !l.is_empty() && !l.starts_with("For more")).collect();
    said.join(" ").trim_start_matches("error: ").to_owned()
}

/// The command as typed, for manifests: the program's path may differ between machines, its arguments say it all.
fn typed_command() -> Vec<String> {
    let arguments = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned());
    std::iter::once("kvfuse".to_owned()).chain(arguments).collect()
}
