//! `kvfuse sweep`.

use super::table::table;
use super::{say, typed_command};
use crate::experiment::{FirstToken, Method, Row, SweepConfig, SweepOptions, parse_taus, sweep};
use anyhow::{Context, Result};
use std::path::PathBuf;

/// Encode a dump's caches by every method and threshold, decode, and compare with no fusion.
///
/// Writes sweep.csv (a row an arm; columns in docs/sweep-columns.md), timings.csv, manifest.json and runs/ (every
/// request's answers). The controls `none` and `prefix` always run. Finished arms are skipped when run again.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  kvfuse sweep dumps/qa --method none,prefix,bff --tau 0.95:0.60:0.05 -o results/qa"
)]
pub struct Args {
    /// Folder that `kvfuse dump` wrote
    dump: Option<PathBuf>,
    /// Methods to run besides the controls
    #[arg(long, value_enum, value_delimiter = ',')]
    method: Option<Vec<Method>>,
    /// Thresholds on cosine similarity in (-1, 1]: numbers and high:low:step ranges [default: 0.95:0.60:0.05]
    #[arg(long, allow_hyphen_values = true)]
    tau: Option<String>,
    /// Tokens a block; a list runs the grid for each [default: 16]
    #[arg(long, value_delimiter = ',')]
    block_size: Option<Vec<usize>>,
    /// Folder to write [default: sweep/ inside of the dump]
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Cache that the first answer token comes from: `prefill` spares it, as the paper does [default: fused]
    #[arg(long, value_enum)]
    first_token: Option<FirstToken>,
    /// Requests fused and decoded together [default: 64]
    #[arg(long)]
    batch: Option<usize>,
    /// Longest answer in tokens [default: 32]
    #[arg(long)]
    max_new_tokens: Option<usize>,
    /// Bootstrap resamples of an interval [default: 2000]
    #[arg(long)]
    resamples: Option<usize>,
    /// Seed of the bootstrap [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// Model to decode with, if it lies elsewhere than when dumped
    #[arg(long)]
    model: Option<String>,
    /// TOML file with any of these settings; the command line wins
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    let config = args.config.as_deref().map(SweepConfig::read).transpose()?.unwrap_or_default();
    let dump = args.dump.or(config.dump).context("name the dump to sweep: kvfuse sweep DIR")?;
    let out = args.out.or(config.out).unwrap_or_else(|| dump.join("sweep"));
    let taus = args.tau.or(config.tau);
    let options = SweepOptions {
        methods: args.method.or(config.method).unwrap_or_else(|| vec![Method::Bff]),
        taus: parse_taus(taus.as_deref().unwrap_or(DEFAULT_TAUS))?,
        block_sizes: args.block_size.or(config.block_size).unwrap_or_else(|| vec![16]),
        first_token: args.first_token.or(config.first_token).unwrap_or(FirstToken::Fused),
        batch: args.batch.or(config.batch).unwrap_or(64),
        max_new_tokens: args.max_new_tokens.or(config.max_new_tokens).unwrap_or(32),
        resamples: args.resamples.or(config.resamples).unwrap_or(2000),
        seed: args.seed.or(config.seed).unwrap_or(0),
        model: args.model.or(config.model),
        command: typed_command(),
        dump,
    };
    let rows = sweep(&out, &options)?;
    say(summary(&rows));
    say(format!("\n{}", out.join(crate::experiment::SWEEP_CSV).display()));
    Ok(())
}

/// Thresholds of a sweep that names none.
pub const DEFAULT_TAUS: &str = "0.95:0.60:0.05";

/// The rows in short, for people.
pub fn summary(rows: &[Row]) -> String {
    let interval = |mid: Option<f64>, low: Option<f64>, high: Option<f64>| match (mid, low, high) {
        (Some(mid), Some(low), Some(high)) => format!("{mid:.3} [{low:.3}, {high:.3}]"),
        _ => "-".to_owned(),
    };
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                r.method.clone(),
                r.tau.map_or("-".to_owned(), |t| t.to_string()),
                r.block_size.to_string(),
                format!("{:.2}", r.cr_audited),
                format!("{:.2}", r.cr_paper),
                format!("{:.2}", r.cr_beyond_prefix),
                format!("{:.3}", r.key_error),
                format!("{:.3}", r.value_error),
                format!("{:.4} [{:.4}, {:.4}]", r.kl, r.kl_low, r.kl_high),
                format!("{:.2}", r.top1),
                interval(r.f1, r.f1_low, r.f1_high),
                interval(r.f1_diff, r.f1_diff_low, r.f1_diff_high),
            ]
        })
        .collect();
    let header = [
        "method",
        "tau",
        "block",
        "CR audited",
        "CR paper",
        "CR/prefix",
        "K err",
        "V err",
        "KL nats/token [95 %]",
        "top-1",
        "F1 [95 %]",
        "F1 - none [95 %]",
    ];
    table(&header, &lines)
}
