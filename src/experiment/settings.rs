//! The settings of a sweep: the command line and TOML files share one list of them.

use super::arms::{Arm, Grid, Method, Packing};
use super::evaluate::FirstToken;
use super::grid::parse_taus;
use crate::codec::fusion::{Pairing, Positions, Representative, RopeMode, ScaleRule, Similarity, Thresholds};
use crate::dump::{Half, Manifest};
use crate::error::{Error, Result};
use crate::files;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Thresholds of a sweep that names none.
const DEFAULT_TAUS: &str = "0.95:0.60:0.05";

/// Every field is optional; where a list is taken, the sweep runs every combination.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Folder that `kvfuse dump` wrote
    pub dump: Option<PathBuf>,
    /// Folder to write [default: sweep/ inside of the dump]
    #[arg(short, long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Methods to run besides the controls `none` and `prefix` [default: bff]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub method: Option<Vec<Method>>,
    /// Thresholds on similarity in (-1, 1]: numbers and high:low:step ranges [default: 0.95:0.60:0.05]
    #[arg(long, allow_hyphen_values = true, help_heading = "When blocks fuse")]
    pub tau: Option<String>,
    /// Instead of --tau: fuse a block only if its relative squared error, of keys and of values, stays below this
    #[arg(long, value_name = "E", value_delimiter = ',', value_parser = finite, help_heading = "When blocks fuse")]
    pub max_error: Option<Vec<f64>>,
    /// Instead of --tau: thresholds of single layers from `kvfuse calibrate`, with the choices they were made for; the
    /// questions it saw are left out of the sweep
    #[arg(long, value_name = "FILE", value_delimiter = ',', help_heading = "When blocks fuse")]
    pub thresholds: Option<Vec<PathBuf>>,
    /// Which blocks fuse with which [default: tree]
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "How blocks fuse")]
    pub pairing: Option<Vec<Pairing>>,
    /// What is compared [default: keys]
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "How blocks fuse")]
    pub similarity: Option<Vec<Similarity>>,
    /// Compare and share keys as cached, or without their positions [default: keep]
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "How blocks fuse")]
    pub rope: Option<Vec<RopeMode>>,
    /// Positions that two blocks may have [default: any]
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "How blocks fuse")]
    pub positions: Option<Vec<Positions>>,
    /// Layers left alone at either end of the model [default: 2]
    #[arg(long, value_name = "N", value_delimiter = ',', help_heading = "How blocks fuse")]
    pub spare_layers: Option<Vec<usize>>,
    /// Layers that are compared as one and share one block table [default: 1]
    #[arg(long, value_name = "G", value_delimiter = ',', help_heading = "How blocks fuse")]
    pub group_layers: Option<Vec<usize>>,
    /// What a cluster stores [default: mean for tree, first for best and lsh, medoid for components]
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "How blocks fuse")]
    pub representative: Option<Vec<Representative>>,
    /// Factors that restore a block from its representative [default: norm]
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "How blocks fuse")]
    pub scale: Option<Vec<ScaleRule>>,
    /// Never share a block between tenants; `=false,true` runs both
    #[arg(
        long, value_delimiter = ',', num_args = 0..=1, require_equals = true, default_missing_value = "true",
        value_name = "BOOL", help_heading = "How blocks fuse"
    )]
    pub within_tenant: Option<Vec<bool>>,
    /// Tokens of a chunk of cff [default: 512]
    #[arg(long, value_name = "TOKENS", help_heading = "How blocks fuse")]
    pub chunk: Option<usize>,
    /// Chunks that cff fuses at a time [default: 4]
    #[arg(long, value_name = "N", value_delimiter = ',', help_heading = "How blocks fuse")]
    pub fuse_chunks: Option<Vec<usize>>,
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
    /// Model to decode with, if it lies elsewhere than when dumped
    #[arg(long)]
    pub model: Option<String>,
}

/// A number of the command line that can be written to a manifest.
fn finite(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite()).ok_or_else(|| "is not a finite number".to_owned())
}

/// What to sweep.
#[derive(Debug, Clone)]
pub struct SweepOptions {
    pub dump: PathBuf,
    pub out: PathBuf,
    /// Model to decode with, if not the one the manifest names. It must be the same model.
    pub model: Option<String>,
    pub grid: Grid,
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
    /// The settings as they were given, for the manifest.
    pub given: Settings,
    /// Arguments to record in the manifest.
    pub command: Vec<String>,
}

/// Tokens of an answer, at most, where neither the data nor the user says.
const ANSWER_TOKENS: usize = 32;
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
        let thresholds = self.thresholds.unwrap_or_default();
        let thresholds: Vec<Arc<Thresholds>> =
            thresholds.iter().map(|p| Thresholds::read(p).map(Arc::new)).collect::<Result<_>>()?;
        let max_errors = self.max_error.unwrap_or_default();
        let instead = !thresholds.is_empty() || !max_errors.is_empty();
        let taus = match self.tau.as_deref() {
            Some(taus) => parse_taus(taus)?,
            None if instead => Vec::new(),
            None => parse_taus(DEFAULT_TAUS)?,
        };
        if let Some(error) = max_errors.iter().find(|e| !(**e > 0.0 && **e < 2.0)) {
            return Err(Error::argument(format!("--max-error {error} lies outside of (0, 2)")));
        }
        let options = SweepOptions {
            out: self.out.unwrap_or_else(|| dump.join("sweep")),
            model: self.model,
            grid: Grid {
                methods: self.method.unwrap_or_else(|| vec![Method::Bff]),
                taus,
                max_errors,
                thresholds,
                pairings: self.pairing.unwrap_or_else(|| vec![Pairing::Tree]),
                similarities: self.similarity.unwrap_or_else(|| vec![Similarity::Keys]),
                ropes: self.rope.unwrap_or_else(|| vec![RopeMode::Keep]),
                positions: self.positions.unwrap_or_else(|| vec![Positions::Any]),
                spare_layers: self.spare_layers.unwrap_or_else(|| vec![2]),
                group_layers: self.group_layers.unwrap_or_else(|| vec![1]),
                representatives: self.representative.unwrap_or_default(),
                scales: self.scale.unwrap_or_else(|| vec![ScaleRule::Norm]),
                within_tenant: self.within_tenant.unwrap_or_else(|| vec![false]),
                chunk_tokens: self.chunk.unwrap_or(512),
                fuse_chunks: self.fuse_chunks.unwrap_or_else(|| vec![4]),
            },
            block_sizes: self.block_size.unwrap_or_else(|| vec![16]),
            first_tokens: self.first_token.unwrap_or_else(|| vec![FirstToken::Fused]),
            half: self.half,
            batches: self.batch.unwrap_or_else(|| vec![64]),
            max_new_tokens: self.max_new_tokens,
            resamples: self.resamples.unwrap_or(2000),
            seed: self.seed.unwrap_or(0),
            dump,
            given,
            command,
        };
        options.check()?;
        Ok(options)
    }
}

impl SweepOptions {
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
    pub fn arms(&self) -> Vec<Arm> {
        self.packings().into_iter().flat_map(|p| self.grid.arms(p)).collect()
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
        counts.extend(self.grid.group_layers.iter().map(|&n| ("--group-layers", n)));
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
        if self.first_tokens.contains(&FirstToken::Prefill) && self.grid.methods.contains(&Method::Cff) {
            let message = "--first-token prefill spares the first answer token what happens after prefill; \
                           cff fuses during prefill: sweep it with --first-token fused";
            return Err(Error::argument(message));
        }
        for file in &self.grid.thresholds {
            if !sizes.contains(&file.block_size) {
                let message = format!(
                    "the thresholds {} are for blocks of {} tokens: pass --block-size {}",
                    file.name, file.block_size, file.block_size
                );
                return Err(Error::argument(message));
            }
        }
        // Every arm must name a codec that can be built, before a model is loaded for it.
        self.arms().iter().try_for_each(|arm| arm.encoder().map(|_| ()))
    }
}
