//! `kvfuse plan` and `kvfuse merge`: experiments on several machines.

use super::say;
use crate::sweep::merge;
use anyhow::{Result, anyhow};
use clap::ValueEnum;
use serde_json::json;
use std::path::PathBuf;

/// Print the command lines that share an experiment's arms among processes.
///
/// Every line can run on any machine: shards may share a file system or not. Then `kvfuse merge` puts together what they made,
/// and the experiment is run once more for what follows from it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    kvfuse plan experiments/accuracy.toml --shards 4 --format slurm > job.sh && sbatch job.sh\n  \
    kvfuse merge results/accuracy/smollm2-135m")]
pub struct PlanArgs {
    /// Experiment files
    #[arg(required = true)]
    experiments: Vec<PathBuf>,
    /// Processes to share the arms
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    shards: u32,
    /// What to print
    #[arg(long, value_enum, default_value = "lines")]
    format: Format,
    /// Further options of `kvfuse run`, behind --
    #[arg(last = true)]
    more: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// A command a line
    Lines,
    Json,
    /// A job script with an array
    Slurm,
    /// A submission of a task array
    Hyperqueue,
}

pub fn plan(args: PlanArgs) -> Result<()> {
    let experiments = args.experiments.iter().map(|e| e.display().to_string());
    let line: Vec<String> =
        ["kvfuse".to_owned(), "run".to_owned()].into_iter().chain(experiments).chain(args.more).collect();
    let (n, last) = (args.shards, args.shards - 1);
    let of = |shard: String| [&line[..], &[format!("--shard={shard}")]].concat();
    let quoted = |words: &[String]| words.iter().map(|w| quote(w)).collect::<Vec<_>>().join(" ");
    let text = match args.format {
        Format::Lines => (0..n).map(|i| quoted(&of(format!("{i}/{n}")))).collect::<Vec<_>>().join("\n"),
        Format::Json => {
            let shards: Vec<_> =
                (0..n).map(|i| json!({"shard": i, "of": n, "command": of(format!("{i}/{n}"))})).collect();
            serde_json::to_string_pretty(&shards)?
        }
        // The index is that of the array's task.
        Format::Slurm => format!(
            "#!/bin/sh\n#SBATCH --job-name=kvfuse\n#SBATCH --array=0-{last}\n#SBATCH --ntasks=1\nexec {}",
            quoted(&of(n.to_string()))
        ),
        Format::Hyperqueue => format!("hq submit --array 0-{last} -- {}", quoted(&of(n.to_string()))),
    };
    say(text)
}

/// A word as a shell reads it.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// Put together what the shards of a sweep made: the same tables as of one process, byte for byte.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  kvfuse merge results/accuracy/smollm2-135m\n  \
    kvfuse merge node1/results/accuracy/smollm2-135m node2/results/accuracy/smollm2-135m -o results/accuracy/smollm2-135m")]
pub struct MergeArgs {
    /// Folders that shards wrote into: those of sweeps, or single shards'
    #[arg(required = true)]
    folders: Vec<PathBuf>,
    /// Folder to write [default: the first]
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn run_merge(args: MergeArgs) -> Result<()> {
    let out = args.out.unwrap_or_else(|| args.folders[0].clone());
    if out.join("shard.json").exists() {
        return Err(anyhow!("{} is one shard's; name another folder with -o", out.display()));
    }
    let arms = merge(&args.folders, &out)?;
    say(format!("{}: {arms} arms", out.join(crate::tables::SWEEP_CSV).display()))
}
