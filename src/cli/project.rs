//! `kvfuse project`.

use super::say;
use super::table::table;
use crate::serve::{PROJECTION_CSV, ProjectOptions, project};
use anyhow::Result;
use std::path::PathBuf;

/// Compare the runs of a serve-bench with a roofline model, and project its chains to accelerators.
///
/// roofline.csv: how long the arithmetic of every run should have taken at the rate of the first method's runs, and took. projection.csv:
/// tokens/s of each chain by data sheets of accelerators, with what the bench measured of it (bytes held, prefix hits, bytes read);
/// nothing in it was measured there, and the time that a method itself takes is left out.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse project results/serve-few-shot")]
pub struct Args {
    /// Folder that `kvfuse serve-bench` wrote
    results: PathBuf,
    /// Tokens of a prompt [default: the bench's mean]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    input_len: Option<u32>,
    /// Tokens of an answer [default: the bench's mean]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    output_len: Option<u32>,
}

pub fn run(args: Args) -> Result<()> {
    let (checked, projected) = project(&ProjectOptions {
        results: args.results.clone(),
        input: args.input_len.map(f64::from),
        output: args.output_len.map(f64::from),
    })?;
    let mut arms: Vec<&str> = Vec::new();
    checked.iter().for_each(|c| {
        if !arms.contains(&&c.method[..]) {
            arms.push(&c.method)
        }
    });
    let line = |name: &&str| {
        let own: Vec<f64> =
            checked.iter().filter(|c| c.method == *name).map(|c| c.measured_over_predicted).collect();
        let (least, most) =
            own.iter().fold((f64::INFINITY, 0.0f64), |(low, high), r| (low.min(*r), high.max(*r)));
        vec![(*name).to_owned(), own.len().to_string(), format!("{least:.2}"), format!("{most:.2}")]
    };
    say(table(
        &["method", "runs", "measured/predicted: least", "most"],
        &arms.iter().map(line).collect::<Vec<_>>(),
    ))?;
    say("\nProjected, not measured:")?;
    let rows = projected.iter().map(|p| {
        vec![
            p.accelerator.clone(),
            p.model.clone(),
            p.method.clone(),
            format!("{:.0}", p.requests_at_once),
            format!("{:.2}", p.decode_step_ms),
            p.bound.to_owned(),
            format!("{:.0}", p.tokens_per_second),
            p.gain_percent.map_or("-".to_owned(), |g| format!("{g:+.0} %")),
        ]
    });
    let header =
        ["accelerator", "model", "method", "at once", "step ms", "bound by", "tokens/s", "over prefix"];
    say(table(&header, &rows.collect::<Vec<_>>()))?;
    say(format!("\n{}", args.results.join(PROJECTION_CSV).display()))
}
