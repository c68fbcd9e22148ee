//! `kvfuse bench`.

use super::say;
use super::table::table;
use crate::bench::bench;
use crate::model::registry::DEFAULT_MODEL;
use anyhow::Result;

/// Measure this machine: its f32 matrix product, and prefill, batched decode and fusion beside it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse bench --threads 2")]
pub struct Args {
    /// Built-in name, GGUF file or Hugging Face folder
    #[arg(long, default_value = DEFAULT_MODEL)]
    model: String,
}

pub fn run(args: Args) -> Result<()> {
    let cell = |x: Option<f64>, digits: usize| x.map_or("-".to_owned(), |x| format!("{x:.digits$}"));
    let rows: Vec<Vec<String>> = bench(&args.model)?
        .into_iter()
        .map(|m| {
            vec![
                m.what,
                format!("{:.4}", m.seconds),
                cell(m.tokens_per_second, 1),
                cell(m.gflops, 1),
                cell(m.share_of_gemm.map(|s| 100.0 * s), 1),
                cell(m.share_of_core.map(|s| 100.0 * s), 1),
            ]
        })
        .collect();
    say(table(&["what", "seconds", "tokens/s", "GFLOP/s", "% of GEMM", "% of one core's peak"], &rows))?;
    Ok(())
}
