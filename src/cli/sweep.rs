//! `kvfuse sweep`.

use super::table::table;
use super::{say, say_rows};
use crate::codec::Chain;
use crate::sweep::{Labelled, PACKING, Row, Settings, Shard, SweepOptions, series_labels, sweep};
use anyhow::Result;
use std::path::PathBuf;

/// Encode a dump's caches by every method and threshold, decode, and compare with no fusion.
///
/// Writes sweep.csv (a row an arm; columns in docs/sweep-columns.md), requests.csv (a row a request and arm), timings.csv,
/// manifest.json and runs/. The controls `none` and `prefix` always run. Finished arms are skipped when run again.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    kvfuse sweep dumps/qa --method bff:tau=0.95:0.60:0.05 -o results/qa\n  \
    kvfuse sweep dumps/qa --method 'prefix+bff:tau=0.99|0.95:0.80:0.05,pairing=tree|best' -o results/pairings")]
pub struct Args {
    #[command(flatten)]
    settings: Settings,
    /// TOML file with any of these settings; the command line wins
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Run only every N-th arm, from the I-th on, into OUT/shards/I-of-N; N alone takes I from SLURM_ARRAY_TASK_ID or HQ_TASK_ID.
    /// `kvfuse merge` puts shards together
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Print the rows as JSON lines instead of a table
    #[arg(long)]
    json: bool,
}

impl Args {
    /// What can be checked of the options before there are a dump and thresholds.
    pub fn check(self) -> Result<()> {
        if let Some(method) = &self.settings.method {
            Chain::check_text(method)?;
        }
        Settings { dump: Some(PathBuf::new()), method: None, ..self.settings }.options(Vec::new())?;
        Ok(())
    }
}

pub fn run(args: Args, typed: Vec<String>) -> Result<()> {
    let file = args.config.as_deref().map(Settings::read).transpose()?.unwrap_or_default();
    let options = SweepOptions { shard: args.shard, ..args.settings.or(file)?.options(typed)? };
    let rows = sweep(&options)?;
    if args.json {
        return say_rows(&rows);
    }
    say(summary(&rows))?;
    say(format!("\n{}", options.folder().join(crate::tables::SWEEP_CSV).display()))?;
    Ok(())
}

/// Rows as labels see them.
fn labelled(rows: &[Row]) -> Vec<Labelled> {
    let text = |value: &serde_json::Value| match value {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let row = |row: &Row| {
        let arm = serde_json::to_value(&row.arm).unwrap_or_default();
        let packing = PACKING.iter().map(|(name, _)| ((*name).to_owned(), text(&arm[*name])));
        let options = row.arm.options.iter().map(|(name, value)| (name.clone(), text(value)));
        Labelled { method: row.arm.method.clone(), cells: packing.chain(options).collect() }
    };
    rows.iter().map(row).collect()
}

/// The rows in short, for people.
pub fn summary(rows: &[Row]) -> String {
    let interval = |mid: Option<f64>, low: Option<f64>, high: Option<f64>| match (mid, low, high) {
        (Some(mid), Some(low), Some(high)) => format!("{mid:.3} [{low:.3}, {high:.3}]"),
        _ => "-".to_owned(),
    };
    let known = labelled(rows);
    let dials = known.iter().map(|k| Some(k.name()).filter(|name| !name.is_empty()));
    let lines: Vec<Vec<String>> = rows
        .iter()
        .zip(series_labels(&known))
        .zip(dials)
        .map(|((r, label), dial)| {
            vec![
                label,
                dial.unwrap_or("-".to_owned()),
                r.arm.block_size.to_string(),
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
        "dial",
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
