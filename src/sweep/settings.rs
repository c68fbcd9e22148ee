//! The settings of a sweep: the command line and TOML files share one list of them.

use super::arms::{Arm, Packing, arms};
use super::evaluate::FirstToken;
use super::shard::Shard;
use crate::codec::Chain;
use crate::codec::fusion::Thresholds;
use crate::dump::{Half, Manifest};
use crate::error::{Error, Result};
use crate::files;
use crate::memory::Bytes;
use crate::tables::Format;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Chains of a sweep that names none.
const DEFAULT_METHOD: &str = "bff";

/// Every field is optional; where a list is taken, the sweep runs every combination.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Folder that `kvfuse dump` wrote
    pub dump: Option<PathBuf>,
    /// Folder to write [default: sweep/ inside of the dump]
    #[arg(short, long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Chains of methods to run besides the controls `none` and `prefix`, as prefix+bff:tau=0.95:0.60:0.05,pairing=best|lsh; `kvfuse
    /// methods` lists them [default: bff]
    #[arg(long, value_name = "CHAINS")]
    pub method: Option<String>,
    /// Tokens a block; a list runs the grid for each [default: 16]
    #[arg(long, value_delimiter = ',')]
    pub block_size: Option<Vec<usize>>,
    /// Cache that the first answer token comes from: `prefill` spares it, as the paper does; a list runs the grid for each
    /// [default: fused]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub first_token: Option<Vec<FirstToken>>,
    /// Requests fused and decoded together; a list runs the grid for each [default: 64]
    #[arg(long, value_delimiter = ',')]
    pub batch: Option<Vec<usize>>,
    /// Only one half of the requests; the halves share no passage, so that what is measured on one can be tested on the other
    #[arg(long, value_enum)]
    pub half: Option<Half>,
    /// Longest answer in tokens [default: what the data's authors allow, else 32]
    #[arg(long)]
    pub max_new_tokens: Option<usize>,
    /// Bootstrap resamples of an interval [default: 2000]
    #[arg(long)]
    pub resamples: Option<usize>,
    /// Seed of the bootstrap [default: 0]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Memory to stay within, as 3GiB: a batch that does not fit is refused before anything runs, with one that does. It changes no
    /// number [default: no limit]
    #[arg(long, value_name = "BYTES")]
    pub memory: Option<Bytes>,
    /// File format of the long tables, requests and layers [default: csv]
    #[arg(long, value_enum)]
    pub long_tables: Option<Format>,
    /// Model to decode with, if it lies elsewhere than when dumped
    #[arg(long)]
    pub model: Option<String>,
}

/// What to sweep.
#[derive(Debug, Clone)]
pub struct SweepOptions {
    pub dump: PathBuf,
    pub out: PathBuf,
    /// Model to decode with, if not the one the manifest names. It must be the same model.
    pub model: Option<String>,
    pub chains: Vec<Chain>,
    pub block_sizes: Vec<usize>,
    pub first_tokens: Vec<FirstToken>,
    /// Requests to sweep: a half of them, or all.
    pub half: Option<Half>,
    /// Requests fused and decoded together.
    pub batches: Vec<usize>,
    /// Longest answer; what the data says, else 32, if not given.
    pub max_new_tokens: Option<usize>,
    pub resamples: usize,
    pub seed: u64,
    pub memory: Option<Bytes>,
    pub long_tables: Format,
    /// The settings as they were given, for the manifest.
    pub given: Settings,
    /// Arguments to record in the manifest.
    pub command: Vec<String>,
    /// Only some of the arms, into a folder of their own.
    pub shard: Option<Shard>,
}

/// Tokens of an answer, at most, where neither the data nor the user says.
pub const ANSWER_TOKENS: usize = 32;
/// More than anyone means of anything that is counted here.
const MOST: usize = 1_000_000;

impl Settings {
    pub fn read(path: &Path) -> Result<Self> {
        let text = files::read_text(path)?;
        toml::from_str(&text).map_err(|e| {
            let line = e.span().map_or(1, |s| text[..s.start].matches('\n').count() + 1);
            Error::file(path, format!("line {line}: {}", e.message().replace('\n', " ")))
        })
    }

    /// These settings where they are given, `other`'s where they are not.
    pub fn or(self, other: Settings) -> Result<Settings> {
        let object = |s: Settings| serde_json::to_value(s).map_err(|e| Error::argument(e.to_string()));
        let (mut merged, mine) = (object(other)?, object(self)?);
        if let (Value::Object(merged), Value::Object(mine)) = (&mut merged, mine) {
            merged.extend(mine.into_iter().filter(|(_, value)| !value.is_null()));
        }
        serde_json::from_value(merged).map_err(|e| Error::argument(e.to_string()))
    }

    /// Fills in defaults, reads the thresholds files, and checks what can be checked without a dump.
    pub fn options(self, command: Vec<String>) -> Result<SweepOptions> {
        let given = self.clone();
        let named = self.dump.ok_or_else(|| Error::argument("name the dump to sweep: kvfuse sweep DIR"));
        let dump = named?;
        let chains = Chain::parse(self.method.as_deref().unwrap_or(DEFAULT_METHOD))?;
        let options = SweepOptions {
            out: self.out.unwrap_or_else(|| dump.join("sweep")),
            model: self.model,
            chains,
            block_sizes: self.block_size.unwrap_or_else(|| vec![16]),
            first_tokens: self.first_token.unwrap_or_else(|| vec![FirstToken::Fused]),
            half: self.half,
            batches: self.batch.unwrap_or_else(|| vec![64]),
            max_new_tokens: self.max_new_tokens,
            resamples: self.resamples.unwrap_or(2000),
            seed: self.seed.unwrap_or(0),
            memory: self.memory,
            long_tables: self.long_tables.unwrap_or_default(),
            dump,
            given,
            command,
            shard: None,
        };
        options.check()?;
        Ok(options)
    }
}

impl SweepOptions {
    /// Where rows go: the output, or this shard's folder in it.
    pub fn folder(&self) -> PathBuf {
        self.shard.map_or_else(|| self.out.clone(), |shard| shard.folder(&self.out))
    }

    /// Every block size with every batch and every cache of the first token.
    pub fn packings(&self) -> Vec<Packing> {
        let mut all = Vec::new();
        for &block_size in &self.block_sizes {
            for &batch in &self.batches {
                let of = |&first_token: &FirstToken| Packing { block_size, batch, first_token };
                all.extend(self.first_tokens.iter().map(of));
            }
        }
        all
    }

    /// All arms, packing by packing.
    pub fn arms(&self) -> Result<Vec<Arm>> {
        let mut all = Vec::new();
        for packing in self.packings() {
            all.extend(arms(&self.chains, packing)?);
        }
        Ok(all)
    }

    /// The calibrations that its chains follow.
    pub fn thresholds(&self) -> impl Iterator<Item = &Thresholds> {
        self.chains.iter().filter_map(|c| c.fusion()?.rule().thresholds()).map(|t| &**t)
    }

    /// The longest answer that any request of a dump is given, in tokens.
    pub fn longest_answer(&self, manifest: &Manifest) -> usize {
        self.max_new_tokens.or(manifest.answer_tokens).unwrap_or(ANSWER_TOKENS)
    }

    /// The longest answer that one request is given, in tokens: files may hold several tasks.
    pub fn answer_limit(&self, manifest: &Manifest, request: usize) -> usize {
        let own = manifest.requests[request].request.answer_tokens;
        self.max_new_tokens.or(own).unwrap_or_else(|| self.longest_answer(manifest))
    }

    fn check(&self) -> Result<()> {
        let mut counts = vec![
            ("--max-new-tokens", self.max_new_tokens.unwrap_or(ANSWER_TOKENS)),
            ("--resamples", self.resamples),
        ];
        counts.extend(self.block_sizes.iter().map(|&n| ("--block-size", n)));
        counts.extend(self.batches.iter().map(|&n| ("--batch", n)));
        if let Some((name, n)) = counts.iter().find(|(_, n)| !(1..=MOST).contains(n)) {
            return Err(Error::argument(format!("{name} {n}: must be from 1 to {MOST}")));
        }
        let sizes: HashSet<usize> = self.block_sizes.iter().copied().collect();
        let batches: HashSet<usize> = self.batches.iter().copied().collect();
        if sizes.len() < self.block_sizes.len() || batches.len() < self.batches.len() {
            return Err(Error::argument("--block-size or --batch lists a size twice"));
        }
        if matches!(self.first_tokens[..], [a, b, ..] if a == b)
            || !(1..=2).contains(&self.first_tokens.len())
        {
            return Err(Error::argument("--first-token lists a cache twice"));
        }
        if self.first_tokens.contains(&FirstToken::Prefill)
            && self.chains.iter().any(|c| c.chunks().is_some())
        {
            let message = "--first-token prefill spares the first answer token what happens after prefill; \
                           a chain that fuses during prefill is swept with --first-token fused";
            return Err(Error::argument(message));
        }
        for file in self.thresholds() {
            if !sizes.contains(&file.block_size) {
                let message = format!(
                    "the thresholds {} are for blocks of {} tokens: pass --block-size {}",
                    file.name, file.block_size, file.block_size
                );
                return Err(Error::argument(message));
            }
        }
        let chunked = self.chains.iter().filter_map(Chain::chunks);
        chunked.flat_map(|c| sizes.iter().map(move |s| (c, *s))).try_for_each(|(c, size)| c.check(size))
    }
}
