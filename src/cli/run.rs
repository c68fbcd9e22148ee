//! `kvfuse run`: all that a figure needs, as one experiment file says.

use super::plan::{Plan, STEPS};
use super::{Cli, Command, say, words_of};
use crate::dump::Manifest;
use crate::error::Error;
use crate::files;
use crate::stats::STATS_CSV;
use crate::sweep::Shard;
use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Run an experiment file: dump, train, calibrate, stats, sweep, plot, compare and simulate, as far as it has a table for them.
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
    /// Only some of the sweep's arms, and nothing that follows from the tables: I/N, or N in a job array (see `kvfuse plan`)
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Folder that results go to
    #[arg(long, value_name = "DIR", default_value = "results")]
    root: PathBuf,
}

fn definition(text: &str) -> std::result::Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    pair.map(|(name, value)| (name.to_owned(), value.to_owned())).ok_or_else(|| "write NAME=TEXT".to_owned())
}

pub fn run(args: Args) -> Result<()> {
    let plans: Vec<(String, Plan)> = args
        .experiments
        .iter()
        .map(|path| {
            let name = path.file_stem().with_context(|| format!("{} has no name", path.display()))?;
            Ok((name.to_string_lossy().into_owned(), Plan::read(path, args.quick)?))
        })
        .collect::<Result<_>>()?;
    let root = if args.quick { args.root.join("quick") } else { args.root.clone() };
    let mut all = Vec::new();
    for (name, plan) in &plans {
        let models = if args.model.is_empty() { &plan.models } else { &args.model };
        for model in models {
            let short = super::dump::stem(model);
            let out = root.join(name).join(&short);
            if let Some(Steps { model: other, .. }) = all.iter().find(|s: &&Steps| s.out == out) {
                bail!(
                    "{other} and {model} would both write {}; run them apart, with another --root",
                    out.display()
                );
            }
            all.push(Steps { plan, model, short, root: &root, out, define: &args.define, shard: args.shard });
        }
    }
    if args.shard.is_some() {
        // Shards on one file system make the same dump and codec: the first does, the others wait.
        crate::lock::be_patient();
    }
    // All files are checked before the first is run.
    all.iter().try_for_each(Steps::check)?;
    for steps in &all {
        say(format!("== {}: {}", steps.plan.title, steps.model))?;
        steps.run()?;
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
    shard: Option<Shard>,
}

/// What `steps.json` means by a finished step; goes up when a step comes to write something else.
const STEP_SCHEMA: u32 = 1;

/// A step that is finished.
#[derive(Serialize, Deserialize)]
struct Finished {
    /// Checksum of its options, inputs and schema.
    of: String,
    /// Its tables, with their checksums.
    made: BTreeMap<String, String>,
}

impl Steps<'_> {
    /// Whether every step's options can be read, as far as that can be said before there is a dump.
    fn check(&self) -> Result<()> {
        for name in STEPS.into_iter().filter(|name| self.plan.has(name)) {
            let filled = match name {
                "dump" => Vec::new(),
                "simulate" if self.plan.bounds() => vec!["--bound=-".to_owned()],
                "simulate" => vec!["--stats=-".to_owned()],
                "train" => vec!["-".to_owned(), "--out=-".to_owned()],
                _ => vec!["-".to_owned()],
            };
            let checked = match self.parse(name, &filled)?.1 {
                Command::Dump(dump) => dump.options(Vec::new()).check().map_err(anyhow::Error::from),
                Command::Calibrate(calibrate) => calibrate.options(Vec::new()).map(|_| ()),
                Command::Stats(stats) => stats.options(Vec::new()).map(|_| ()),
                Command::Simulate(simulate) => simulate.check(),
                Command::Sweep(sweep) => sweep.check(),
                _ => Ok(()),
            };
            checked.map_err(|e| self.at_line(name, e))?;
        }
        Ok(())
    }

    fn run(&self) -> Result<()> {
        files::writable_folder(&self.out)?;
        let out = format!("--out={}", self.out.display());
        let Command::Dump(dump) = self.parse("dump", &[format!("--model={}", self.model)])?.1 else {
            bail!("[dump] is no dump");
        };
        let folder = super::dump::folder(&dump)?;
        let (line, command) =
            self.parse("dump", &[format!("--model={}", self.model), format!("--out={}", folder.display())])?;
        self.step(line, command)?;
        let identity = Manifest::read(&folder)?.identity()?;
        let training = self.train()?;
        let folder = folder.display().to_string();
        if self.plan.has("calibrate") {
            // On the texts to train on, where there are some: then the sweep keeps all its questions.
            let (on, of) = match training.first() {
                Some(dump) => (dump.clone(), Manifest::read(Path::new(dump))?.identity()?),
                None => (folder.clone(), identity.clone()),
            };
            let thresholds = format!("--out={}", self.out.join("thresholds.toml").display());
            self.once("calibrate", &[on, thresholds], &of)?;
        }
        if self.plan.has("stats") && self.shard.is_none() {
            self.once("stats", &[folder.clone(), out.clone()], &identity)?;
        }
        if self.plan.bounds() && self.shard.is_none() {
            let codec = self.codec_file();
            let inputs = identity + &if codec.exists() { files::sha256(&codec)? } else { String::new() };
            self.once("simulate", &[format!("--bound={folder}"), out.clone()], &inputs)?;
        }
        if self.plan.has("sweep") {
            let mut filled = vec![folder.clone(), out.clone()];
            filled.extend(self.shard.map(|shard| format!("--shard={shard}")));
            let (line, command) = self.parse("sweep", &filled)?;
            self.step(line, command)?;
            if self.shard.is_some() {
                return Ok(());
            }
            let line = ["kvfuse".to_owned(), "plot".to_owned(), self.out.display().to_string()];
            self.step(line.to_vec(), Cli::try_parse_from(&line)?.command)?;
        }
        if self.plan.has("compare") {
            let (line, command) = self.parse("compare", &[self.out.display().to_string()])?;
            self.step(line, command)?;
        }
        if self.plan.has("simulate") && !self.plan.bounds() {
            let stats = self.out.join(STATS_CSV);
            let mut inputs = files::sha256(&stats)?;
            let mut filled = vec![format!("--stats={}", stats.display()), out];
            let sweep = self.out.join(crate::tables::SWEEP_CSV);
            if self.plan.has("sweep") {
                inputs += &files::sha256(&sweep)?;
                filled.push(format!("--against={}", sweep.display()));
            }
            self.once("simulate", &filled, &inputs)?;
        }
        Ok(())
    }

    /// Makes the dumps to train on, and the codec; returns the dumps.
    fn train(&self) -> Result<Vec<String>> {
        if !self.plan.has("train") {
            return Ok(Vec::new());
        }
        let mut folders = Vec::new();
        for line in self.plan.training(&[format!("--model={}", self.model)], &self.names())? {
            let parse = |line: &[String]| -> Result<Command> {
                Ok(Cli::try_parse_from(line).map_err(|e| self.plan.usage("dump", &words_of(&e)))?.command)
            };
            let Command::Dump(dump) = parse(&line)? else { bail!("[[training]] is no dump") };
            let folder = super::dump::folder(&dump)?;
            let line = [&line[..], &[format!("--out={}", folder.display())]].concat();
            let command = parse(&line)?;
            self.step(line, command)?;
            folders.push(folder.display().to_string());
        }
        let codec = self.codec_file();
        let filled = [&folders[..], &[format!("--out={}", codec.display())]].concat();
        // It knows itself whether the file is there; experiments that train the same share it.
        let (line, command) = self.parse("train", &filled)?;
        self.step(line, command)?;
        Ok(folders)
    }

    /// Where the codec goes, without its ending: beside the dumps, since it is as large as one; named by what it is trained on.
    fn codec(&self) -> String {
        let of = format!("{}\n{}", self.model, self.plan.trained_on());
        let name = format!("{}-{}", self.short, &files::sha256_bytes(of.as_bytes())[..8]);
        Path::new("dumps").join("codecs").join(name).display().to_string()
    }

    fn codec_file(&self) -> PathBuf {
        PathBuf::from(format!("{}.safetensors", self.codec()))
    }

    /// What names in the file stand for.
    fn names(&self) -> Vec<(String, String)> {
        let own = [
            ("out".to_owned(), self.out.display().to_string()),
            ("root".to_owned(), self.root.display().to_string()),
            ("model".to_owned(), self.short.clone()),
            ("codec".to_owned(), self.codec()),
        ];
        self.define.iter().cloned().chain(own).collect()
    }

    /// A step's command line, and what it parses to.
    fn parse(&self, command: &str, filled: &[String]) -> Result<(Vec<String>, Command)> {
        let line = self.plan.command(command, filled, &self.names())?;
        let parsed = Cli::try_parse_from(&line).map_err(|e| self.plan.usage(command, &words_of(&e)))?;
        Ok((line, parsed.command))
    }

    fn step(&self, line: Vec<String>, command: Command) -> Result<()> {
        say(format!("$ {}", line.join(" ")))?;
        let name = line[1].clone();
        command.run(line).map_err(|e| self.at_line(&name, e))
    }

    /// What only a command itself finds wrong with an option, at the option's line.
    fn at_line(&self, command: &str, error: anyhow::Error) -> anyhow::Error {
        match error.downcast_ref::<Error>() {
            Some(Error::Argument(message)) => self.plan.usage(command, message).into(),
            Some(error @ Error::Method { .. }) => self.plan.usage(command, &error.to_string()).into(),
            None => self.plan.usage(command, &format!("{error:#}")).into(),
            _ => error,
        }
    }

    /// Runs a step that cannot go on where it stopped, unless it was finished with the same options and inputs and its tables
    /// are still there.
    fn once(&self, name: &str, filled: &[String], inputs: &str) -> Result<()> {
        let (line, command) = self.parse(name, filled)?;
        let of = format!("{}\n{inputs}\n{} {STEP_SCHEMA}", line.join("\n"), env!("CARGO_PKG_VERSION"));
        let of = files::sha256_bytes(of.as_bytes());
        let path = self.out.join("runs").join("steps.json");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let mut finished: BTreeMap<String, Finished> = serde_json::from_str(&text).unwrap_or_default();
        let there = |made: &BTreeMap<String, String>| {
            made.iter().all(|(name, sum)| files::sha256(&self.out.join(name)).is_ok_and(|s| s == *sum))
        };
        if finished.get(name).is_some_and(|f| f.of == of && there(&f.made)) {
            say(format!("$ {} (done)", line.join(" ")))?;
            return Ok(());
        }
        let before = self.tables()?;
        self.step(line, command)?;
        let mut made = BTreeMap::new();
        for (name, written) in self.tables()? {
            if before.get(&name) != Some(&written) {
                made.insert(name.clone(), files::sha256(&self.out.join(name))?);
            }
        }
        finished.insert(name.to_owned(), Finished { of, made });
        files::writable_folder(&self.out.join("runs"))?;
        Ok(files::write_json(&path, &finished)?)
    }

    /// Tables and thresholds in the output folder, and when they were written.
    fn tables(&self) -> Result<BTreeMap<String, SystemTime>> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.out)? {
            let path = entry?.path();
            let table = path.extension().is_some_and(|e| e == "csv" || e == "toml");
            if let Some(name) = path.file_name().filter(|_| table) {
                found.insert(name.to_string_lossy().into_owned(), fs::metadata(&path)?.modified()?);
            }
        }
        Ok(found)
    }
}
