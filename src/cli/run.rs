//! `kvfuse run`: all that a figure needs, as one experiment file says.

use super::plan::Plan;
use super::{Cli, Command, say, words_of};
use crate::dump::Manifest;
use crate::error::Error;
use crate::experiment::STATS_CSV;
use crate::files;
use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Run an experiment file: dump, calibrate, stats, sweep, simulate and plot, as far as it has a table for them.
///
/// Each table ([dump], [sweep] ...) holds options of the command of its name, spelt with `_`. The figures and tables go to
/// results/NAME/MODEL, or with --quick to results/quick/NAME/MODEL, at the sizes of the file's [quick] table. What is
/// finished is skipped when run again.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  kvfuse run experiments/block-size.toml --quick\n  \
    kvfuse run experiments/pairings.toml --define xquad=xquad-en-a.json")]
pub struct Args {
    /// Experiment files
    #[arg(required = true)]
    experiments: Vec<PathBuf>,
    /// Small sizes, from each file's [quick] table
    #[arg(long)]
    quick: bool,
    /// Run with these models instead of the file's
    #[arg(long, value_delimiter = ',')]
    model: Vec<String>,
    /// What {NAME} in a file stands for
    #[arg(long, value_name = "NAME=TEXT", value_parser = definition)]
    define: Vec<(String, String)>,
    /// Folder that results go to
    #[arg(long, value_name = "DIR", default_value = "results")]
    root: PathBuf,
}

fn definition(text: &str) -> std::result::Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    pair.map(|(name, value)| (name.to_owned(), value.to_owned())).ok_or_else(|| "write NAME=TEXT".to_owned())
}

pub fn run(args: Args) -> Result<()> {
    // All files are checked before the first is run.
    let plans: Vec<(String, Plan)> = args
        .experiments
        .iter()
        .map(|path| {
            let name = path.file_stem().with_context(|| format!("{} has no name", path.display()))?;
            Ok((name.to_string_lossy().into_owned(), Plan::read(path, args.quick)?))
        })
        .collect::<Result<_>>()?;
    let root = if args.quick { args.root.join("quick") } else { args.root.clone() };
    for (name, plan) in plans {
        say(format!("== {name}: {}", plan.title));
        let models = if args.model.is_empty() { &plan.models } else { &args.model };
        for model in models {
            let short = super::dump::stem(model);
            let out = root.join(&name).join(&short);
            Steps { plan: &plan, model, short, root: &root, out, define: &args.define }.run()?;
        }
    }
    Ok(())
}

/// One experiment with one model.
struct Steps<'a> {
    plan: &'a Plan,
    model: &'a str,
    short: String,
    root: &'a Path,
    out: PathBuf,
    define: &'a [(String, String)],
}

/// Which steps are finished, each with a checksum of all it depends on.
#[derive(Default, Serialize, Deserialize)]
struct Finished(BTreeMap<String, String>);

impl Steps<'_> {
    fn run(&self) -> Result<()> {
        files::writable_folder(&self.out)?;
        let out = format!("--out={}", self.out.display());
        let Command::Dump(dump) = self.parse("dump", &[format!("--model={}", self.model)])?.1 else {
            bail!("[dump] is no dump");
        };
        let folder = super::dump::folder(&dump);
        let (line, command) =
            self.parse("dump", &[format!("--model={}", self.model), format!("--out={}", folder.display())])?;
        self.step(line, command)?;
        let identity = Manifest::read(&folder)?.identity()?;
        let folder = folder.display().to_string();
        let thresholds = format!("--out={}", self.out.join("thresholds.toml").display());
        for (command, filled) in [("calibrate", &thresholds), ("stats", &out)] {
            if self.plan.has(command) {
                self.once(command, &[folder.clone(), filled.clone()], &identity)?;
            }
        }
        if self.plan.has("sweep") {
            let (line, command) = self.parse("sweep", &[folder, out.clone()])?;
            self.step(line, command)?;
            let line = ["kvfuse".to_owned(), "plot".to_owned(), self.out.display().to_string()];
            self.step(line.to_vec(), Cli::try_parse_from(&line)?.command)?;
        }
        if self.plan.has("simulate") {
            let stats = self.out.join(STATS_CSV);
            let mut inputs = files::sha256(&stats)?;
            let mut filled = vec![format!("--stats={}", stats.display()), out];
            let sweep = self.out.join(crate::experiment::SWEEP_CSV);
            if self.plan.has("sweep") {
                inputs += &files::sha256(&sweep)?;
                filled.push(format!("--against={}", sweep.display()));
            }
            self.once("simulate", &filled, &inputs)?;
        }
        Ok(())
    }

    /// A step's command line, and what it parses to.
    fn parse(&self, command: &str, filled: &[String]) -> Result<(Vec<String>, Command)> {
        let own = [
            ("out".to_owned(), self.out.display().to_string()),
            ("root".to_owned(), self.root.display().to_string()),
            ("model".to_owned(), self.short.clone()),
        ];
        let names: Vec<(String, String)> = self.define.iter().cloned().chain(own).collect();
        let line = self.plan.command(command, filled, &names)?;
        let parsed = Cli::try_parse_from(&line).map_err(|e| self.plan.usage(command, &words_of(&e)))?;
        Ok((line, parsed.command))
    }

    fn step(&self, line: Vec<String>, command: Command) -> Result<()> {
        say(format!("$ {}", line.join(" ")));
        let name = line[1].clone();
        command.run(line).map_err(|e| match e.downcast_ref::<Error>() {
            // What only the command itself finds wrong with an option.
            Some(Error::Argument(message)) => self.plan.usage(&name, message).into(),
            None => self.plan.usage(&name, &format!("{e:#}")).into(),
            _ => e,
        })
    }

    /// Runs a step that cannot go on where it stopped, unless it was finished with the same options and inputs.
    fn once(&self, name: &str, filled: &[String], inputs: &str) -> Result<()> {
        let (line, command) = self.parse(name, filled)?;
        let key = files::sha256_bytes(format!("{}\n{inputs}", line.join("\n")).as_bytes());
        let path = self.out.join("runs").join("steps.json");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let mut finished: Finished = serde_json::from_str(&text).unwrap_or_default();
        if finished.0.get(name) == Some(&key) {
            say(format!("$ {} (done)", line.join(" ")));
            return Ok(());
        }
        self.step(line, command)?;
        finished.0.insert(name.to_owned(), key);
        files::writable_folder(&self.out.join("runs"))?;
        Ok(files::write_json(&path, &finished)?)
    }
}
