//! `kvfuse migrate`.

use super::engine::{above_zero, at_least_one};
use super::table::table;
use super::{say, say_rows};
use crate::codec::Chain;
use crate::serve::{MIGRATION_CSV, MigrateOptions, MigrateRow, migrate};
use anyhow::Result;
use std::path::PathBuf;

/// Measure what it takes to move requests' caches to another machine, and compare it with recomputing them.
///
/// Bytes and the seconds of encoding, decoding and prefill are measured on this machine, one request at a time; seconds on a link are
/// bytes over its rate, a projection. Writes migration.csv and manifest.json; `kvfuse plot` draws them (docs/serving.md).
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  kvfuse migrate dumps/qa --method none,kivi:bits=4,int8 -o results/migration"
)]
pub struct Args {
    /// Folder that `kvfuse dump` wrote
    dump: PathBuf,
    /// Chains to encode with (see `kvfuse methods`)
    #[arg(long, default_value = "none,int8,kivi:bits=4", value_name = "CHAINS")]
    method: String,
    /// Rates of links, Gbit/s
    #[arg(long, value_name = "RATES", value_delimiter = ',', default_value = "1,10,25,100,400")]
    link_gbits: Vec<f64>,
    /// The dump's first requests
    #[arg(long, default_value_t = 8)]
    requests: usize,
    /// Repetitions of each measurement; the median is reported
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Tokens a block
    #[arg(long, default_value_t = 16)]
    block_size: usize,
    /// Model to prefill with, if it lies elsewhere than when dumped
    #[arg(long)]
    model: Option<String>,
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Print the rows as JSON lines instead of a table
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args, typed: Vec<String>) -> Result<()> {
    args.link_gbits.iter().try_for_each(|rate| above_zero("--link-gbits", *rate).map(|_| ()))?;
    let rows = migrate(&MigrateOptions {
        dump: args.dump,
        model: args.model,
        chains: Chain::parse(&args.method)?,
        links_gbits: args.link_gbits,
        requests: at_least_one("--requests", args.requests)?,
        repeats: at_least_one("--repeats", args.repeats)?,
        block_size: at_least_one("--block-size", args.block_size)?,
        out: args.out.clone(),
        command: typed,
    })?;
    if args.json {
        return say_rows(&rows);
    }
    say(shown(&rows))?;
    say(format!("\n{}", args.out.join(MIGRATION_CSV).display()))
}

/// A line a chain: what was measured, then the total on every link.
fn shown(rows: &[MigrateRow]) -> String {
    let mut header: Vec<String> =
        ["method", "kB", "encode ms", "decode ms", "recompute ms", "break-even Gbit/s"]
            .map(str::to_owned)
            .to_vec();
    let mut lines: Vec<Vec<String>> = Vec::new();
    let milliseconds = |seconds: f64| format!("{:.2}", 1e3 * seconds);
    for row in rows {
        let known = lines.last().is_some_and(|line| line[0] == row.method);
        if !known {
            lines.push(vec![
                row.method.clone(),
                format!("{:.1}", row.bytes / 1e3),
                milliseconds(row.encode_seconds),
                milliseconds(row.decode_seconds),
                milliseconds(row.recompute_seconds),
                row.break_even_gbits.map_or("-".to_owned(), |g| format!("{g:.3}")),
            ]);
        }
        if lines.len() == 1 {
            header.push(format!("total ms at {} Gbit/s", row.link_gbits));
        }
        if let Some(line) = lines.last_mut() {
            line.push(milliseconds(row.total_seconds));
        }
    }
    table(&header.iter().map(String::as_str).collect::<Vec<_>>(), &lines)
}
