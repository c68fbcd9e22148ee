//! `kvfuse sweep`: every arm of the grid over one dump, resumable.

use super::arms::{Arm, Method, arms};
use super::evaluate::{Base, FirstToken, Prompt, Reference, answer_text, answers};
use super::rows::{Measured, RequestScore, Row, Setting, Timings};
use super::runs::{RunRecord, Runs, run_id};
use super::table::write_csv;
use crate::block::{BlockTable, RequestCache, Storage};
use crate::codec::{CacheBatch, Codec, Distortion, Ledger, Prefix, distortion};
use crate::dump::{Manifest, open_request};
use crate::error::{Error, IoAt, Result};
use crate::model::Model;
use crate::progress::{Progress, Unit};
use crate::task::{exact_match, token_f1};
use crate::{files, interrupt};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub const SWEEP_CSV: &str = "sweep.csv";
pub const TIMINGS_CSV: &str = "timings.csv";

/// What to sweep.
#[derive(Debug, Clone, Serialize)]
pub struct SweepOptions {
    pub dump: PathBuf,
    /// Model to decode with, if not the one the manifest names. It must be the same model.
    pub model: Option<String>,
    pub methods: Vec<Method>,
    pub taus: Vec<f64>,
    pub block_sizes: Vec<usize>,
    pub first_token: FirstToken,
    /// Requests fused and decoded together.
    pub batch: usize,
    pub max_new_tokens: usize,
    pub resamples: usize,
    pub seed: u64,
    /// Arguments to record in the manifest.
    pub command: Vec<String>,
}

impl SweepOptions {
    fn check(&self) -> Result<()> {
        let counts = [
            ("--batch", self.batch),
            ("--max-new-tokens", self.max_new_tokens),
            ("--resamples", self.resamples),
            ("--block-size", self.block_sizes.iter().copied().min().unwrap_or(0)),
            ("--block-size", self.block_sizes.iter().copied().max().unwrap_or(0)),
        ];
        let sizes: HashSet<usize> = self.block_sizes.iter().copied().collect();
        let repeated = sizes.len() < self.block_sizes.len();
        match counts.iter().find(|(_, n)| !(1..=MOST).contains(n)) {
            Some((name, n)) => Err(Error::argument(format!("{name} {n}: must be from 1 to {MOST}"))),
            None if repeated => Err(Error::argument("--block-size lists a size twice")),
            None if self.methods.contains(&Method::Bff) && self.taus.is_empty() => {
                Err(Error::argument("method bff needs --tau"))
            }
            None => Ok(()),
        }
    }
}

/// More than anyone means of anything that is counted here.
const MOST: usize = 1_000_000;

/// Target tokens of a request beyond this many are not scored.
const MOST_TARGETS: usize = 64;

/// Runs all arms that are not in `out` yet; returns the rows in grid order, as sweep.csv has them.
pub fn sweep(out: &Path, options: &SweepOptions) -> Result<Vec<Row>> {
    options.check()?;
    let manifest = Manifest::read(&options.dump)?;
    files::writable_folder(out)?;
    refuse_foreign(out)?;
    let runs = Runs::open(out)?;
    let setting = Setting {
        model: manifest.model.name.clone(),
        data: manifest.data.name.clone(),
        dump: manifest.identity()?,
        seed: options.seed,
        batch: options.batch,
        first_token: options.first_token,
        max_new_tokens: options.max_new_tokens,
        resamples: options.resamples,
    };
    let grid: Vec<Arm> =
        options.block_sizes.iter().flat_map(|&size| arms(&options.methods, &options.taus, size)).collect();
    let ids: Vec<String> = grid.iter().map(|arm| run_id(&setting, arm)).collect::<Result<_>>()?;
    let whole = |r: &RunRecord| r.requests.len() == manifest.requests.len();
    let mut records: Vec<Option<RunRecord>> = ids.iter().map(|id| runs.load(id).filter(whole)).collect();
    let progress = Progress::new("sweeping", grid.len() as u64, Unit::Items("arms"));
    progress.set(records.iter().flatten().count() as u64);
    if records.iter().any(Option::is_none) {
        let model = open_model(options, &manifest)?;
        for &size in &options.block_sizes {
            let here: Vec<usize> = (0..grid.len()).filter(|&i| grid[i].block_size == size).collect();
            if here.iter().all(|&i| records[i].is_some()) {
                continue;
            }
            let mut stage = Stage::new(&model, options, &manifest, size, records[here[0]].as_ref())?;
            // Only now is it certain that this sweep can run; until then an older one's files stay as they are.
            begin(out, options, &manifest, &setting, &records)?;
            for i in here {
                if records[i].is_none() {
                    let record = stage.run(&ids[i], &setting, &grid[i])?;
                    runs.store(&record)?;
                    records[i] = Some(record);
                    progress.increment();
                    write_tables(out, &records)?;
                }
            }
        }
    } else {
        begin(out, options, &manifest, &setting, &records)?;
    }
    progress.finish();
    Ok(records.into_iter().flatten().map(|r| r.row).collect())
}

/// A folder whose manifest.json is not a sweep's (a dump's, say) must not be written into.
fn refuse_foreign(out: &Path) -> Result<()> {
    let path = out.join("manifest.json");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
    let manifest: Value = serde_json::from_str(&text).unwrap_or_default();
    match manifest.get("options") {
        Some(_) => Ok(()),
        None => Err(Error::file(out, "holds something that is not a sweep; choose another -o")),
    }
}

/// Writes the manifest, and tables of the rows there are; tables of another sweep go.
fn begin(
    out: &Path,
    options: &SweepOptions,
    manifest: &Manifest,
    setting: &Setting,
    records: &[Option<RunRecord>],
) -> Result<()> {
    if records.iter().any(Option::is_some) {
        write_tables(out, records)?;
    } else {
        for table in [SWEEP_CSV, TIMINGS_CSV].map(|name| out.join(name)) {
            if table.exists() {
                std::fs::remove_file(&table).at(&table)?;
            }
        }
    }
    write_manifest(out, options, manifest, setting)
}

/// The model that made the dump, and no other.
fn open_model(options: &SweepOptions, manifest: &Manifest) -> Result<Model> {
    let name = options.model.as_ref().unwrap_or(&manifest.model.name);
    let model = Model::load(name)?;
    if model.sha256 != manifest.model.sha256 || *model.decoder.config() != manifest.model.config {
        let problem = format!(
            "was made with another model ({}, sha256 {}...) than {name} (sha256 {}...); pass that one as --model",
            manifest.model.name,
            &manifest.model.sha256[..12.min(manifest.model.sha256.len())],
            &model.sha256[..12]
        );
        return Err(Error::file(&options.dump, problem));
    }
    Ok(model)
}

fn write_manifest(out: &Path, options: &SweepOptions, manifest: &Manifest, setting: &Setting) -> Result<()> {
    let value = serde_json::json!({
        "kvfuse_version": env!("CARGO_PKG_VERSION"),
        "command": options.command,
        "options": options,
        "dump": {
            "identity": setting.dump,
            "command": manifest.command,
            "model": manifest.model,
            "data": manifest.data,
            "seed": manifest.seed,
            "requests": manifest.requests.len(),
            "dtype": manifest.dtype,
        },
    });
    files::write_json(&out.join("manifest.json"), &value)
}

/// Rewrites both tables with the rows there are, in grid order.
fn write_tables(out: &Path, records: &[Option<RunRecord>]) -> Result<()> {
    #[derive(Serialize)]
    struct TimingRow<'a> {
        run: &'a str,
        method: &'a str,
        tau: Option<f64>,
        block_size: usize,
        #[serde(flatten)]
        timings: &'a Timings,
        tokens_per_second: f64,
    }
    let done: Vec<&RunRecord> = records.iter().flatten().collect();
    let rows: Vec<&Row> = done.iter().map(|r| &r.row).collect();
    write_csv(&out.join(SWEEP_CSV), &rows)?;
    let timings: Vec<TimingRow> = done
        .iter()
        .map(|r| TimingRow {
            run: &r.row.run,
            method: &r.row.method,
            tau: r.row.tau,
            block_size: r.row.block_size,
            timings: &r.timings,
            tokens_per_second: r.timings.generated_tokens as f64 / r.timings.decode_seconds,
        })
        .collect();
    write_csv(&out.join(TIMINGS_CSV), &timings)
}

/// Requests fused and decoded together, ready for any arm.
struct Lot {
    base: Base,
    prompts: Vec<Prompt>,
    reference: Reference,
    /// Index of the first request in the dump.
    first: usize,
}

/// Everything the arms of one block size share.
struct Stage<'a> {
    model: &'a Model,
    manifest: &'a Manifest,
    max_new_tokens: usize,
    lots: Vec<Lot>,
    baseline: Option<Vec<RequestScore>>,
    cr_prefix: f64,
}

impl<'a> Stage<'a> {
    fn new(
        model: &'a Model,
        options: &SweepOptions,
        manifest: &'a Manifest,
        block_size: usize,
        baseline: Option<&RunRecord>,
    ) -> Result<Self> {
        let mut stage = Stage {
            model,
            manifest,
            max_new_tokens: options.max_new_tokens,
            lots: Vec::new(),
            baseline: baseline.map(|r| r.requests.clone()),
            cr_prefix: 1.0,
        };
        let mut prefix = Ledger::default();
        let all = manifest.requests.len();
        for first in (0..all).step_by(options.batch) {
            interrupt::check()?;
            let range = first..all.min(first.saturating_add(options.batch));
            let (batch, mut prompts) = load(options, model, manifest, range.clone(), block_size)?;
            let mut base = Base::new(model, batch, &prompts, options.first_token);
            let mut shared = base.batch.clone();
            Prefix.encode(&mut shared);
            prefix += &Ledger::of(&shared, &Prefix.layers(model.decoder.config().layers));
            drop(shared);
            let unasked = |i: usize| manifest.requests[i].request.references.is_empty();
            let own: Vec<Vec<u32>> = match baseline {
                Some(done) => range.clone().map(|i| done.requests[i].answer_tokens.clone()).collect(),
                None if range.clone().any(unasked) => {
                    let (stop, most) = (manifest.stop.as_deref(), options.max_new_tokens);
                    answers(model, &base.spared, &mut base.batch, &prompts, stop, most)?
                }
                None => vec![Vec::new(); range.len()],
            };
            for ((i, prompt), own) in range.zip(&mut prompts).zip(&own) {
                prompt.targets = targets(model, manifest, i, own)?;
            }
            let reference = Reference::of(model, &mut base, &prompts);
            stage.lots.push(Lot { base, prompts, reference, first });
        }
        stage.cr_prefix = prefix.cr_audited();
        Ok(stage)
    }

    fn run(&mut self, run: &str, setting: &Setting, arm: &Arm) -> Result<RunRecord> {
        let codec = arm.codec()?;
        let layers = codec.layers(self.model.decoder.config().layers);
        let mut ledger = Ledger::default();
        let mut error = Distortion::default();
        let mut attention = (0.0, 0.0);
        let mut scores = Vec::new();
        let mut timings = Timings::default();
        let stop = self.manifest.stop.as_deref();
        for lot in &self.lots {
            interrupt::check()?;
            let mut batch = lot.base.batch.clone();
            let started = Instant::now();
            codec.encode(&mut batch);
            timings.fuse_seconds += started.elapsed().as_secs_f64();
            ledger += &Ledger::of(&batch, &layers);
            error += distortion(&lot.base.batch, &batch);

            let started = Instant::now();
            let (divergences, sums) =
                lot.reference.compare(self.model, &lot.base.spared, &mut batch, &lot.prompts);
            timings.score_seconds += started.elapsed().as_secs_f64();
            attention = (attention.0 + sums.0, attention.1 + sums.1);

            let started = Instant::now();
            let tokens =
                answers(self.model, &lot.base.spared, &mut batch, &lot.prompts, stop, self.max_new_tokens)?;
            timings.decode_seconds += started.elapsed().as_secs_f64();
            timings.generated_tokens += tokens.iter().map(Vec::len).sum::<usize>();
            for (i, (answer_tokens, d)) in tokens.into_iter().zip(divergences).enumerate() {
                let request = &self.manifest.requests[lot.first + i].request;
                let answer = answer_text(self.model, &answer_tokens, stop)?;
                let asked = !request.references.is_empty();
                scores.push(RequestScore {
                    id: request.id.clone(),
                    f1: asked.then(|| token_f1(&answer, &request.references)),
                    em: asked.then(|| exact_match(&answer, &request.references)),
                    answer,
                    answer_tokens,
                    nll: d.nll,
                    kl: d.kl,
                    top1: d.top1,
                });
            }
        }
        // The grid begins with the no-fusion arm, so this is it where there is no baseline yet.
        let baseline = self.baseline.get_or_insert_with(|| scores.clone());
        let measured = Measured {
            ledger: &ledger,
            distortion: error,
            attention,
            scores: &scores,
            baseline,
            cr_prefix: self.cr_prefix,
        };
        let row = Row::new(run, setting, arm, &measured);
        Ok(RunRecord { row, requests: scores, timings })
    }
}

/// Caches of a range of requests, all prompt tokens but the last, in blocks of f16 numbers.
fn load(
    options: &SweepOptions,
    model: &Model,
    manifest: &Manifest,
    range: std::ops::Range<usize>,
    block_size: usize,
) -> Result<(CacheBatch, Vec<Prompt>)> {
    let mut batch = CacheBatch::empty(model.decoder.block_shape(block_size), Storage::F16);
    let width = batch.pool.shape().block_width();
    let mut prompts = Vec::new();
    for i in range {
        let shard = open_request(&options.dump, manifest, i)?;
        let tokens = shard.tokens().to_vec();
        let room = model.decoder.context();
        if tokens.len() + options.max_new_tokens.max(MOST_TARGETS) > room {
            let message = format!(
                "request {} has {} tokens: with --max-new-tokens {} it exceeds the model's context of {room}",
                manifest.requests[i].request.id,
                tokens.len(),
                options.max_new_tokens
            );
            return Err(Error::argument(message));
        }
        let cached = tokens.len() - 1;
        let numbers = cached * batch.pool.shape().token_width();
        let layers: Vec<(Vec<f32>, Vec<f32>)> =
            (0..shard.layers()).into_par_iter().map(|n| shard.layer(n)).collect::<Result<_>>()?;
        let mut cache = RequestCache { layers: Vec::new(), tokens: cached };
        for (keys, values) in &layers {
            let mut table = BlockTable::default();
            for (k, v) in keys[..numbers].chunks(width).zip(values[..numbers].chunks(width)) {
                table.push(batch.pool.allocate(k, v));
            }
            cache.layers.push(table);
        }
        batch.caches.push(cache);
        batch.tokens.push(tokens[..cached].to_vec());
        prompts.push(Prompt { tokens, targets: Vec::new() });
    }
    Ok((batch, prompts))
}

/// The tokens a request's distributions are compared on: its first reference answer, or the no-fusion arm's own answer
/// where there is none.
fn targets(model: &Model, manifest: &Manifest, i: usize, answer: &[u32]) -> Result<Vec<u32>> {
    let request = &manifest.requests[i].request;
    let mut targets = match request.references.first() {
        Some(reference) => {
            let space = if request.prompt.ends_with(char::is_whitespace) { "" } else { " " };
            model.tokenizer.encode(&format!("{space}{reference}"))?
        }
        None => answer.to_vec(),
    };
    targets.truncate(MOST_TARGETS);
    if targets.is_empty() {
        // The answer is that there is none.
        targets.push(model.tokenizer.end());
    }
    Ok(targets)
}
