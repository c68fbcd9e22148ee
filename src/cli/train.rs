//! `kvfuse train` and `kvfuse sensitivity`.

use super::table::table;
use super::{say, say_rows};
use crate::codec::joint::eighths;
use crate::codec::joint::train::Training;
use crate::codec::registry::number;
use crate::files;
use crate::tables::write_table;
use crate::train::{EVEN, Part, Sensitivity, SensitivityOptions, TrainOptions, sensitivity, train};
use anyhow::Result;
use std::ops::Bound;
use std::path::PathBuf;

/// Train a joint codec for a model: predictors, components, tables and how much errors matter (docs/joint.md).
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  kvfuse train dumps/train -o joint.safetensors\n  kvfuse sweep dumps/qa --method 'prefix+joint:codec=joint.safetensors,step=0.01|0.02'"
)]
pub struct Args {
    /// Folders that `kvfuse dump` wrote, of one model; errors are measured on questions of the first
    #[arg(required = true)]
    dumps: Vec<PathBuf>,
    /// File to write
    #[arg(short, long)]
    out: PathBuf,
    /// Step of the quantiser while training
    #[arg(long, default_value_t = 0.006)]
    step: f64,
    /// Layers below that a layer is predicted from; 0 for none
    #[arg(long, default_value_t = 2)]
    taps: usize,
    /// Besides, codecs without a part, each in a file FILE-without-PART.safetensors: what is each part worth?
    #[arg(long, value_enum, value_delimiter = ',')]
    without: Vec<Part>,
    /// Besides, a KVTC transform of the same text, in FILE-kvtc.safetensors (`kvfuse methods kvtc`)
    #[arg(long)]
    kvtc: bool,
    /// Directions of the KVTC transform, at most
    #[arg(long, default_value_t = 4096, value_name = "N")]
    directions: usize,
    /// Questions whose answers errors are measured on
    #[arg(long, default_value_t = 24)]
    questions: usize,
    /// Ridge of the predictors, as a share of their inputs' variances
    #[arg(long, default_value_t = 1e-2)]
    ridge: f64,
    /// Most numbers between the two factors of a predictor
    #[arg(long, default_value_t = 128)]
    rank: usize,
    /// Share of the weights of errors that is taken as if answers attended to all tokens alike
    #[arg(long, default_value_t = EVEN, value_parser = number("a share", Bound::Included(0.0), Bound::Included(1.0)), value_name = "SHARE")]
    even: f64,
    /// How often sensitivities are measured again, with the codec's own errors
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Decides the noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Measure how much errors in the keys and values of each layer matter: KL by noise, one layer at a time.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse sensitivity dumps/qa -o sensitivity.csv")]
pub struct SensitivityArgs {
    /// Folder that `kvfuse dump` wrote
    dump: PathBuf,
    /// CSV file to write
    #[arg(short, long)]
    out: PathBuf,
    /// Questions whose answers errors are measured on
    #[arg(long, default_value_t = 24)]
    questions: usize,
    /// Decides the noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print the rows as JSON lines instead of a table
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args, typed: Vec<String>) -> Result<()> {
    let training =
        Training { step: eighths(args.step), taps: args.taps, klt: true, ridge: args.ridge, rank: args.rank };
    let trained = train(&TrainOptions {
        dumps: args.dumps,
        out: args.out.clone(),
        training,
        without: args.without,
        kvtc: args.kvtc.then_some(args.directions.max(1)),
        questions: args.questions,
        even: args.even,
        rounds: args.rounds,
        seed: args.seed,
        command: typed,
    })?;
    let components: usize = trained.components.iter().sum();
    say(format!(
        "{}{}: {} training tokens, {:.1} components a layer, {:.1} MB",
        args.out.display(),
        if trained.known { " is there already" } else { "" },
        trained.tokens,
        components as f64 / trained.components.len().max(1) as f64,
        trained.bytes as f64 / 1e6
    ))
}

pub fn run_sensitivity(args: SensitivityArgs) -> Result<()> {
    files::writable_beside(&args.out)?;
    let rows =
        sensitivity(&SensitivityOptions { dump: args.dump, questions: args.questions, seed: args.seed })?;
    write_table(&args.out, &rows)?;
    if args.json {
        return say_rows(&rows);
    }
    let line = |r: &Sensitivity| {
        vec![
            r.layer.to_string(),
            format!("{:?}", r.part).to_lowercase(),
            format!("{:.3e}", r.kl_per_unit),
            format!("{:.4}", r.kl),
            format!("{:.3}", r.kl_per_variance),
        ]
    };
    let lines: Vec<Vec<String>> = rows.iter().map(line).collect();
    say(table(&["layer", "part", "KL per unit", "KL measured", "KL per variance"], &lines))?;
    say(format!("\n{}", args.out.display()))
}
