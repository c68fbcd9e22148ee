//! `kvfuse serve-bench`: arms of chains over the same requests, interleaved and repeated, with what they took and what they did.

use super::arrivals::Arrivals;
use super::job::{Job, Limits};
use super::metrics::{Goal, fields};
use super::policy::Policy;
use super::quality::{Witness, divergences};
use super::record::{RequestRow, Run, ServeRow, write_tables};
use super::run::{Arrival, Moment, Outcome, serve};
use super::trace::{Replayed, TraceOptions};
use crate::codec::Chain;
use crate::error::{Error, Result};
use crate::files;
use crate::lock::FolderLock;
use crate::memory::{give_back, resident};
use crate::model::Model;
use crate::model::kernels::instructions;
use crate::progress::{Progress, Unit};
use crate::stats::{bootstrap_mean, mean, rounded};
use crate::sweep::answer_text;
use crate::task::{self, PromptSet};
use serde_json::{Map, Value};
use std::path::PathBuf;

/// What to serve.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    pub model: String,
    pub draw: task::Draw,
    /// Arrivals, lengths and shared blocks of a trace, with text of the data.
    pub trace: Option<TraceOptions>,
    pub chains: Vec<Chain>,
    /// The chains as they were written, with the paths of their files.
    pub method: String,
    /// But for the budget.
    pub limits: Limits,
    /// Budgets that are given one after the other.
    pub budgets: Vec<Budget>,
    /// Loads that are offered one after the other.
    pub rates: Vec<f64>,
    pub burstiness: f64,
    pub concurrency: usize,
    pub output_tokens: Option<usize>,
    pub ignore_end: bool,
    pub repeats: usize,
    pub goal: Goal,
    pub percentiles: Vec<f64>,
    /// Requests whose answers are compared with those of exact caches, and of how many of their tokens.
    pub quality_requests: usize,
    pub quality_tokens: usize,
    pub out: PathBuf,
    pub command: Vec<String>,
}

/// What keys and values may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Budget {
    Bytes(usize),
    /// What so many requests of the load take uncompressed.
    Requests(f64),
}

/// The requests, encoded.
struct Load {
    set: PromptSet,
    jobs: Vec<Job>,
    /// When requests come, if a trace says it.
    seconds: Option<Vec<f64>>,
}

/// Runs all arms; writes the tables and returns the rows, arm by arm.
pub fn bench(options: &BenchOptions) -> Result<Vec<ServeRow>> {
    options.draw.check()?;
    options.trace.as_ref().map_or(Ok(()), |trace| trace.check(&options.draw))?;
    let model = Model::load(&options.model)?;
    let shape = model.decoder.block_shape(options.limits.block_size);
    let policies = options.chains.iter().map(|c| Policy::of(c, shape)).collect::<Result<Vec<_>>>()?;
    let load = load(&model, options)?;
    let usual = usual_bytes(&model, options, &load.jobs);
    let rates = load.rate().map_or(options.rates.clone(), |rate| vec![rate]);
    let under = |budget: &Budget| {
        let limits = limits(options, *budget, usual);
        rates.iter().map(move |&rate| Setting { rate, limits })
    };
    let settings: Vec<Setting> = options.budgets.iter().flat_map(under).collect();
    let _lock = FolderLock::take(&options.out)?;
    files::writable_folder(&options.out)?;
    let asked = manifest(options, &model, &load.set)?;
    let progress = Progress::new(
        "serving",
        (options.repeats * settings.len() * policies.len()) as u64,
        Unit::Items("runs"),
    );
    let server = Server { options, model: &model, load: &load };
    let mut runs: Vec<Run> = Vec::new();
    for repeat in 0..options.repeats {
        for &setting in &settings {
            // Each begins another repeat, so that none always runs in the other's wake.
            for turn in 0..policies.len() {
                let arm = (turn + repeat) % policies.len();
                let key = key(&asked, &options.chains[arm], repeat, setting);
                if let Some(run) = Run::load(&options.out, &key) {
                    runs.push(run);
                } else {
                    let run = server.run(&key, &policies[arm], repeat, setting)?;
                    run.store(&options.out)?;
                    runs.push(run);
                    write_tables(&options.out, &runs)?;
                }
                progress.increment();
            }
        }
    }
    progress.finish();
    // Those that were there already may be of a bench that was cut off before it wrote its tables.
    write_tables(&options.out, &runs)?;
    files::write_json(&options.out.join("manifest.json"), &asked)?;
    Ok(runs.into_iter().map(|run| run.row).collect())
}

/// Names a run by all that was asked of it.
fn key(asked: &Value, chain: &Chain, repeat: usize, setting: Setting) -> String {
    let trained: Vec<&str> =
        chain.stages().iter().filter_map(|s| s.codec.trained_file()).map(|(_, sum)| sum).collect();
    let mut asked = asked.clone();
    // However it was typed, and beside whatever other arms.
    if let Some(fields) = asked.as_object_mut() {
        fields.remove("command");
        fields.remove("method");
    }
    let key =
        serde_json::json!([asked, chain.name(), trained, repeat, setting.rate.to_string(), setting.limits]);
    files::sha256_bytes(key.to_string().as_bytes())
}

/// A load under a budget.
#[derive(Clone, Copy)]
struct Setting {
    /// Requests a second.
    rate: f64,
    limits: Limits,
}

/// What all runs of a bench have in common.
struct Server<'a> {
    options: &'a BenchOptions,
    model: &'a Model,
    load: &'a Load,
}

impl Server<'_> {
    /// Serves all requests once.
    fn run(&self, key: &str, policy: &Policy, repeat: usize, setting: Setting) -> Result<Run> {
        let Server { options, model, load } = *self;
        let Setting { rate, limits } = setting;
        // All arms of a repeat meet the same arrivals.
        let arrivals = Arrivals { rate, burstiness: options.burstiness };
        let times = match &load.seconds {
            Some(seconds) => seconds.clone(),
            None => arrivals.times(load.jobs.len(), options.draw.seed + repeat as u64),
        };
        give_back();
        let rss_before = resident().0;
        let arrival = |((job, &seconds), after): ((&Job, &f64), Option<usize>)| Arrival {
            seconds,
            after,
            job: job.clone(),
        };
        let arrivals: Vec<Arrival> =
            load.jobs.iter().zip(&times).zip(load.set.followed()).map(arrival).collect();
        let outcome = serve(model, limits, policy.clone(), &arrivals, options.concurrency)?;
        let mut fields = fields(&outcome.served, outcome.duration, options.goal, &options.percentiles);
        engine_fields(&mut fields, &outcome, rss_before);
        let requests = request_rows(model, load, &outcome, (&policy.name, repeat, setting))?;
        let scores: Vec<f64> = requests.iter().filter_map(|r| r.score).collect();
        quality_fields(&mut fields, model, options, load, &outcome, &scores)?;
        let row = ServeRow {
            method: policy.name.clone(),
            repeat,
            request_rate: rate.to_string(),
            burstiness: options.burstiness,
            max_concurrency: Some(options.concurrency).filter(|n| *n < usize::MAX),
            budget_bytes: limits.budget_bytes,
            fields,
        };
        Ok(Run::new(key, row, requests, outcome.moments))
    }
}

impl Load {
    /// Requests a second over a trace.
    fn rate(&self) -> Option<f64> {
        let last = self.seconds.as_ref()?.iter().copied().fold(0.0, f64::max);
        Some(if last > 0.0 { rounded(self.jobs.len() as f64 / last) } else { f64::INFINITY })
    }
}

fn load(model: &Model, options: &BenchOptions) -> Result<Load> {
    // The `i`th of `all` requests whose quality can be measured.
    let watched = |i: usize, all: usize| {
        let spread = (all / options.quality_requests.max(1)).max(1);
        let watched = i.is_multiple_of(spread) && i / spread < options.quality_requests;
        if watched { options.quality_tokens } else { 0 }
    };
    if let Some(trace) = &options.trace {
        let Replayed { requests, mut jobs, seconds, sha256 } = trace.replay(&options.draw, model)?;
        let all = jobs.len();
        for (i, job) in jobs.iter_mut().enumerate() {
            job.keep_logits = watched(i, all);
            job.max_tokens = job.max_tokens.min(options.output_tokens.unwrap_or(usize::MAX));
        }
        let set = PromptSet {
            requests,
            template: String::new(),
            shots: Vec::new(),
            stop: None,
            sha256,
            answer_tokens: None,
        };
        let load = Load { set, jobs, seconds: Some(seconds) };
        return fits(model, load);
    }
    let set = task::load(&options.draw, &|text| Ok(model.tokenizer.encode(text)?.len()))?;
    // Of conversations later turns: first ones find the preamble alone.
    let first = set.requests.iter().take_while(|r| r.follows.is_empty()).count();
    let skipped = if first < set.requests.len() { first } else { 0 };
    let job = |(i, request): (usize, &task::Request)| -> Result<Job> {
        let prompt = model.tokenizer.encode_prompt(&request.prompt)?;
        let usual = request.answer_tokens.or(set.answer_tokens).unwrap_or(crate::sweep::ANSWER_TOKENS);
        Ok(Job {
            id: i as u64,
            tenant: request.tenant.clone(),
            prompt,
            max_tokens: options.output_tokens.unwrap_or(usual),
            stop: if options.ignore_end { Vec::new() } else { set.stop.iter().cloned().collect() },
            ignore_end: options.ignore_end,
            keep_logits: i.checked_sub(skipped).map_or(0, |i| watched(i, set.requests.len() - skipped)),
        })
    };
    let jobs: Vec<Job> = set.requests.iter().enumerate().map(job).collect::<Result<_>>()?;
    fits(model, Load { set, jobs, seconds: None })
}

/// A load whose requests the model can take.
fn fits(model: &Model, load: Load) -> Result<Load> {
    let Load { set, jobs, .. } = &load;
    if let Some(job) = jobs.iter().find(|j| j.prompt.len() + j.max_tokens > model.decoder.context()) {
        return Err(Error::argument(format!(
            "request {} has {} tokens: with an answer of {} it exceeds the model's context of {}",
            set.requests[job.id as usize].id,
            job.prompt.len(),
            job.max_tokens,
            model.decoder.context()
        )));
    }
    Ok(load)
}

/// Blocks that a request of the load takes uncompressed, and the bytes of one.
fn usual_bytes(model: &Model, options: &BenchOptions, jobs: &[Job]) -> (f64, usize) {
    let size = options.limits.block_size;
    let blocks = jobs.iter().map(|j| (j.prompt.len() + j.max_tokens).div_ceil(size) as f64);
    (mean(&blocks.collect::<Vec<_>>()), model.decoder.column_bytes(size))
}

fn limits(options: &BenchOptions, budget: Budget, (blocks, bytes): (f64, usize)) -> Limits {
    let budget_bytes = match budget {
        Budget::Bytes(bytes) => bytes,
        Budget::Requests(requests) => (requests * blocks).ceil() as usize * bytes,
    };
    Limits { budget_bytes, ..options.limits }
}

/// A run request by request.
fn request_rows(
    model: &Model,
    load: &Load,
    outcome: &Outcome,
    (method, repeat, setting): (&str, usize, Setting),
) -> Result<Vec<RequestRow>> {
    let all = load.set.requests.iter().zip(&outcome.answers).zip(&outcome.served);
    all.map(|((request, answer), served)| {
        let text = answer_text(model, answer, load.set.stop.as_deref())?;
        let known = !request.references.is_empty();
        let score = known.then(|| request.metric.score(&text, &request.references, &request.classes));
        Ok(RequestRow {
            method: method.to_owned(),
            repeat,
            request_rate: setting.rate.to_string(),
            budget_bytes: setting.limits.budget_bytes,
            id: request.id.clone(),
            tenant: request.tenant.clone(),
            input_tokens: served.input_tokens,
            output_tokens: answer.len(),
            arrival_seconds: rounded(served.arrival),
            first_token_seconds: served.tokens.first().map(|t| rounded(*t)),
            end_seconds: rounded(served.end),
            failed: served.failed,
            score: score.flatten(),
            answer: text.trim().to_owned(),
        })
    })
    .collect()
}

/// What the engine says of a run.
fn engine_fields(fields: &mut Map<String, Value>, outcome: &Outcome, rss_before: usize) {
    let mut put = |name: &str, value: f64| {
        fields.insert(name.to_owned(), Value::from(rounded(value)));
    };
    let c = outcome.counts;
    let most = |of: fn(&Moment) -> usize| outcome.moments.iter().map(of).max().unwrap_or(0) as f64;
    let usual = |of: fn(&Moment) -> usize| {
        let all: Vec<f64> = outcome.moments.iter().map(|m| of(m) as f64).collect();
        if all.is_empty() { 0.0 } else { mean(&all) }
    };
    put("max_concurrent_requests", outcome.max_concurrent as f64);
    put("mean_concurrent_requests", usual(|m| m.running));
    put("peak_pool_bytes", most(|m| m.bytes));
    put("mean_pool_bytes", usual(|m| m.bytes));
    put("peak_pages", most(|m| m.pages));
    put("rss_before_bytes", rss_before as f64);
    put("peak_rss_bytes", most(|m| m.rss_bytes));
    put("steps", c.steps as f64);
    put("preemptions", c.preemptions as f64);
    put("prefix_query_tokens", c.prefix_queries as f64);
    put("prefix_hit_tokens", c.prefix_hits as f64);
    put("preempted_query_tokens", c.preempted_queries as f64);
    put("preempted_hit_tokens", c.preempted_hits as f64);
    put("decoded_tokens", c.decoded_tokens as f64);
    put("dropped_columns", c.dropped_columns as f64);
    put("encoded_columns", c.encoded_columns as f64);
    put("fused_pages", c.fused_pages as f64);
    put("prefill_tokens", c.prefill_tokens as f64);
    put("decode_tokens", c.decode_tokens as f64);
    put("forward_seconds", c.forward_seconds);
    put("fuse_seconds", c.fuse_seconds);
    put("code_seconds", c.code_seconds);
    put("encode_seconds", c.encode_seconds);
    put("decode_seconds", c.decode_seconds);
    let own = c.fuse_seconds + c.code_seconds + c.encode_seconds + c.decode_seconds;
    put("compression_share", own / outcome.duration);
}

/// Scores of answers, and KL of the requests whose logits were kept.
fn quality_fields(
    fields: &mut Map<String, Value>,
    model: &Model,
    options: &BenchOptions,
    load: &Load,
    outcome: &Outcome,
    scores: &[f64],
) -> Result<()> {
    let all = load.jobs.iter().zip(&outcome.answers).zip(&outcome.logits);
    let witnesses: Vec<Witness> = all
        .filter(|(_, logits)| !logits.is_empty())
        .map(|((job, answer), logits)| Witness { job, answer, logits })
        .collect();
    let kl = divergences(model, options.limits.block_size, &witnesses)?;
    for (name, numbers) in [("score", scores), ("kl", &kl[..])] {
        let interval = bootstrap_mean(numbers, 1000, options.draw.seed);
        let of = |f: fn(&crate::stats::Interval) -> f64| {
            interval.as_ref().map_or(Value::Null, |i| Value::from(rounded(f(i))))
        };
        fields.insert(name.to_owned(), of(|i| i.mean));
        fields.insert(format!("{name}_low"), of(|i| i.low));
        fields.insert(format!("{name}_high"), of(|i| i.high));
    }
    fields.insert("kl_requests".to_owned(), Value::from(kl.len()));
    Ok(())
}

/// All that was asked: the manifest, and what names a run.
fn manifest(options: &BenchOptions, model: &Model, set: &PromptSet) -> Result<Value> {
    let unusable = |e: serde_json::Error| Error::argument(e.to_string());
    Ok(serde_json::json!({
        "kvfuse_version": env!("CARGO_PKG_VERSION"),
        "kernels": [instructions()],
        "command": options.command,
        "method": options.method,
        "model": options.model,
        "model_sha256": model.sha256,
        "data": serde_json::to_value(&options.draw).map_err(unusable)?,
        "trace": options.trace,
        "data_sha256": set.sha256,
        "block_size": options.limits.block_size,
        "max_num_seqs": options.limits.running,
        "max_num_batched_tokens": options.limits.step_tokens,
        "burstiness": options.burstiness,
        "max_concurrency": Some(options.concurrency).filter(|n| *n < usize::MAX),
        "output_tokens": options.output_tokens,
        "ignore_eos": options.ignore_end,
        "goodput": options.goal,
        "percentiles": options.percentiles,
        "quality": [options.quality_requests, options.quality_tokens],
        "threads": rayon::current_num_threads(),
    }))
}
