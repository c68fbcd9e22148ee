//! `kvfuse search`.

use super::table::table;
use super::{say, say_rows};
use crate::dump::Half;
use crate::sweep::{FirstToken, Goal, SearchOptions, search};
use anyhow::Result;
use std::path::PathBuf;

/// Find the cheapest setting of a chain that keeps to a KL, or to a loss of score, in a few tries.
///
/// The last stage that can be turned from fine to coarse is: joint's step, bff's tau, bits of quantisers, the share that evictions keep. With
/// --max-kl answers are not decoded; sweep the setting that was found.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  kvfuse search dumps/qa --method prefix+joint:codec=joint.safetensors --max-kl 0.02\n  kvfuse search dumps/qa --method prefix+bff --max-kl 0.02\n  kvfuse search dumps/qa --method prefix+kivi --min-f1-diff -0.01"
)]
pub struct Args {
    /// Folder that `kvfuse dump` wrote
    dump: PathBuf,
    /// One chain, without the option that is looked for
    #[arg(long, value_name = "CHAIN")]
    method: String,
    /// KL from no encoding, nats per token, at most
    #[arg(long, value_name = "NATS", value_parser = positive, required_unless_present = "min_f1_diff")]
    max_kl: Option<f64>,
    /// F1 (or the requests' own score) less that of no encoding, mean over requests, at least; answers are decoded. The mean of few
    /// requests is noise: see the interval that a sweep gives
    #[arg(long, value_name = "DIFFERENCE", conflicts_with = "max_kl", allow_negative_numbers = true, value_parser = difference)]
    min_f1_diff: Option<f64>,
    /// Tokens a block
    #[arg(long, default_value_t = 16, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=65_535))]
    block_size: usize,
    /// Requests encoded together
    #[arg(long, default_value_t = 64, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    batch: usize,
    /// Which cache the first answer token is computed from
    #[arg(long, value_enum, default_value = "fused")]
    first_token: FirstToken,
    /// Only requests of one half, which shares no text with the other
    #[arg(long, value_enum)]
    half: Option<Half>,
    /// Settings to try, at most
    #[arg(long, default_value_t = 8, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=50))]
    evaluations: usize,
    /// Print what was tried as JSON lines instead of a table
    #[arg(long)]
    json: bool,
}

fn positive(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x > 0.0 && x.is_finite() => Ok(x),
        _ => Err("write a number above 0".to_owned()),
    }
}

fn difference(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if (-1.0..=1.0).contains(&x) => Ok(x),
        _ => Err("write a number from -1 to 1".to_owned()),
    }
}

pub fn run(args: Args) -> Result<()> {
    let tried = search(&SearchOptions {
        dump: args.dump,
        method: args.method,
        goal: match (args.max_kl, args.min_f1_diff) {
            (_, Some(least)) => Goal::Score(least),
            (most, None) => Goal::Kl(most.unwrap_or_default()),
        },
        block_size: args.block_size,
        batch: args.batch,
        first_token: args.first_token,
        half: args.half,
        evaluations: args.evaluations,
    })?;
    if args.json {
        return say_rows(&tried);
    }
    let line = |t: &crate::sweep::Tried| {
        let mark = if t.best { "best" } else { "" };
        let score = t.score_diff.map_or("-".to_owned(), |d| format!("{d:+.4}"));
        vec![t.method.clone(), format!("{:.2}", t.cr_audited), format!("{:.4}", t.kl), score, mark.to_owned()]
    };
    let lines: Vec<Vec<String>> = tried.iter().map(line).collect();
    say(table(&["method", "CR audited", "KL nats/token", "score - none", ""], &lines))
}
