//! `kvfuse serve-bench`: arms of chains over the same requests, interleaved and repeated, with what they took and what they did.

use super::arrivals::Arrivals;
use super::job::{Job, Limits};
use super::metrics::{Goal, fields};
use super::policy::Policy;
use super::quality::{Witness, divergences};
use super::run::{Arrival, Moment, Outcome, serve};
use crate::codec::Chain;
use crate::error::{Error, Result};
use crate::files;
use crate::lock::FolderLock;
use crate::memory::resident;
use crate::model::Model;
use crate::progress::{Progress, Unit};
use crate::stats::{bootstrap_mean, mean, quantile, rounded};
use crate::sweep::answer_text;
use crate::tables::write_csv;
use crate::task::{self, PromptSet};
use serde::Serialize;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// A run of an arm a row.
pub const SERVE_CSV: &str = "serve.csv";
/// An arm a row: medians over its runs.
pub const SERVE_SUMMARY_CSV: &str = "serve_summary.csv";
/// A request of a run a row.
pub const SERVE_REQUESTS_CSV: &str = "serve_requests.csv";
/// How the engine stood, a moment a row.
pub const SERVE_TIMELINE_CSV: &str = "serve_timeline.csv";

/// What to serve.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    pub model: String,
    pub draw: task::Draw,
    pub chains: Vec<Chain>,
    pub limits: Limits,
    /// Instead of a budget in bytes: one that holds so many requests uncompressed.
    pub budget_requests: Option<f64>,
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

/// One run of one arm.
#[derive(Debug, Clone, Serialize)]
pub struct ServeRow {
    pub method: String,
    pub repeat: usize,
    /// `inf`, or a number.
    pub request_rate: String,
    pub burstiness: f64,
    /// None for no limit.
    pub max_concurrency: Option<usize>,
    pub budget_bytes: usize,
    #[serde(flatten)]
    pub fields: Map<String, Value>,
}

#[derive(Serialize)]
struct TimelineRow<'a> {
    method: &'a str,
    repeat: usize,
    request_rate: &'a str,
    seconds: f64,
    running: usize,
    waiting: usize,
    pages: usize,
    pool_bytes: usize,
    rss_bytes: usize,
}

#[derive(Serialize)]
struct RequestRow {
    method: String,
    repeat: usize,
    request_rate: String,
    id: String,
    tenant: String,
    input_tokens: usize,
    output_tokens: usize,
    arrival_seconds: f64,
    first_token_seconds: Option<f64>,
    end_seconds: f64,
    failed: bool,
    score: Option<f64>,
    answer: String,
}

/// The requests, encoded.
struct Load {
    set: PromptSet,
    jobs: Vec<Job>,
}

/// Runs all arms; writes the tables and returns the rows, arm by arm.
pub fn bench(options: &BenchOptions) -> Result<Vec<ServeRow>> {
    options.draw.check()?;
    let model = Model::load(&options.model)?;
    let shape = model.decoder.block_shape(options.limits.block_size);
    let policies = options.chains.iter().map(|c| Policy::of(c, shape)).collect::<Result<Vec<_>>>()?;
    let load = load(&model, options)?;
    let limits = limits(&model, options, &load.jobs)?;
    let _lock = FolderLock::take(&options.out)?;
    files::writable_folder(&options.out)?;
    let runs = options.repeats * options.rates.len() * policies.len();
    let progress = Progress::new("serving", runs as u64, Unit::Items("runs"));
    let mut rows: Vec<ServeRow> = Vec::new();
    let mut moments: Vec<(usize, Moment)> = Vec::new();
    let mut requests: Vec<RequestRow> = Vec::new();
    for repeat in 0..options.repeats {
        for &rate in &options.rates {
            // All arms of a repeat meet the same arrivals.
            let arrivals = Arrivals { rate, burstiness: options.burstiness };
            let times = arrivals.times(load.jobs.len(), options.draw.seed + repeat as u64);
            // Each begins another repeat, so that none always runs in the other's wake.
            for turn in 0..policies.len() {
                let policy = &policies[(turn + repeat) % policies.len()];
                give_memory_back();
                let rss_before = resident().0;
                let jobs = load.jobs.iter().zip(&times);
                let arrivals: Vec<Arrival> =
                    jobs.map(|(job, &seconds)| Arrival { seconds, job: job.clone() }).collect();
                let outcome = serve(&model, limits, policy.clone(), &arrivals, options.concurrency)?;
                let mut fields =
                    fields(&outcome.served, outcome.duration, options.goal, &options.percentiles);
                engine_fields(&mut fields, &outcome, rss_before);
                let own = request_rows(&model, &load, &outcome, (&policy.name, repeat, rate))?;
                let scores: Vec<f64> = own.iter().filter_map(|r| r.score).collect();
                quality_fields(&mut fields, &model, options, &load, &outcome, &scores)?;
                requests.extend(own);
                moments.extend(outcome.moments.iter().map(|m| (rows.len(), *m)));
                rows.push(ServeRow {
                    method: policy.name.clone(),
                    repeat,
                    request_rate: rate.to_string(),
                    burstiness: options.burstiness,
                    max_concurrency: Some(options.concurrency).filter(|n| *n < usize::MAX),
                    budget_bytes: limits.budget_bytes,
                    fields,
                });
                progress.increment();
                write(options, &rows, &requests, &moments)?;
            }
        }
    }
    progress.finish();
    write_manifest(options, &model, limits)?;
    Ok(rows)
}

fn load(model: &Model, options: &BenchOptions) -> Result<Load> {
    let set = task::load(&options.draw, &|text| Ok(model.tokenizer.encode(text)?.len()))?;
    let spread = (set.requests.len() / options.quality_requests.max(1)).max(1);
    let job = |(i, request): (usize, &task::Request)| -> Result<Job> {
        let prompt = model.tokenizer.encode_prompt(&request.prompt)?;
        let usual = request.answer_tokens.or(set.answer_tokens).unwrap_or(crate::sweep::ANSWER_TOKENS);
        let watched = i % spread == 0 && i / spread < options.quality_requests;
        Ok(Job {
            id: i as u64,
            tenant: request.tenant.clone(),
            prompt,
            max_tokens: options.output_tokens.unwrap_or(usual),
            stop: if options.ignore_end { Vec::new() } else { set.stop.iter().cloned().collect() },
            ignore_end: options.ignore_end,
            keep_logits: if watched { options.quality_tokens } else { 0 },
        })
    };
    let jobs: Vec<Job> = set.requests.iter().enumerate().map(job).collect::<Result<_>>()?;
    if let Some(job) = jobs.iter().find(|j| j.prompt.len() + j.max_tokens > model.decoder.context()) {
        return Err(Error::argument(format!(
            "request {} has {} tokens: with an answer of {} it exceeds the model's context of {}",
            set.requests[job.id as usize].id,
            job.prompt.len(),
            job.max_tokens,
            model.decoder.context()
        )));
    }
    Ok(Load { set, jobs })
}

fn limits(model: &Model, options: &BenchOptions, jobs: &[Job]) -> Result<Limits> {
    let Some(requests) = options.budget_requests else { return Ok(options.limits) };
    let size = options.limits.block_size;
    let column = model.decoder.column_bytes(size);
    let blocks = jobs.iter().map(|j| (j.prompt.len() + j.max_tokens).div_ceil(size) as f64);
    let usual = mean(&blocks.collect::<Vec<_>>());
    Ok(Limits { budget_bytes: (requests * usual).ceil() as usize * column, ..options.limits })
}

/// A run request by request.
fn request_rows(
    model: &Model,
    load: &Load,
    outcome: &Outcome,
    (method, repeat, rate): (&str, usize, f64),
) -> Result<Vec<RequestRow>> {
    let all = load.set.requests.iter().zip(&outcome.answers).zip(&outcome.served);
    all.map(|((request, answer), served)| {
        let text = answer_text(model, answer, load.set.stop.as_deref())?;
        let known = !request.references.is_empty();
        let score = known.then(|| request.metric.score(&text, &request.references, &request.classes));
        Ok(RequestRow {
            method: method.to_owned(),
            repeat,
            request_rate: rate.to_string(),
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

/// An arm's runs at one load as one row: medians, and the least and the most of throughput.
pub fn summary(rows: &[ServeRow]) -> Vec<ServeRow> {
    let mut arms: Vec<(String, String)> = Vec::new();
    for row in rows {
        let key = (row.method.clone(), row.request_rate.clone());
        if !arms.contains(&key) {
            arms.push(key);
        }
    }
    let one = |(method, rate): (String, String)| {
        let own: Vec<&ServeRow> =
            rows.iter().filter(|r| r.method == method && r.request_rate == rate).collect();
        let mut fields = Map::new();
        for name in own[0].fields.keys() {
            let numbers: Vec<f64> = own.iter().filter_map(|r| r.fields.get(name)?.as_f64()).collect();
            let median = quantile(&numbers, 0.5);
            fields.insert(name.clone(), median.map_or(Value::Null, Value::from));
            if name == "output_throughput" {
                for (end, q) in [("low", 0.0), ("high", 1.0)] {
                    let value = quantile(&numbers, q).map_or(Value::Null, Value::from);
                    fields.insert(format!("{name}_{end}"), value);
                }
            }
        }
        ServeRow { method, repeat: own.len(), fields, ..own[0].clone() }
    };
    arms.into_iter().map(one).collect()
}

fn write(
    options: &BenchOptions,
    rows: &[ServeRow],
    requests: &[RequestRow],
    moments: &[(usize, Moment)],
) -> Result<()> {
    write_csv(&options.out.join(SERVE_CSV), rows)?;
    write_csv(&options.out.join(SERVE_SUMMARY_CSV), &summary(rows))?;
    write_csv(&options.out.join(SERVE_REQUESTS_CSV), requests)?;
    let timeline: Vec<TimelineRow> = moments
        .iter()
        .map(|(row, m)| TimelineRow {
            method: &rows[*row].method,
            repeat: rows[*row].repeat,
            request_rate: &rows[*row].request_rate,
            seconds: rounded(m.seconds),
            running: m.running,
            waiting: m.waiting,
            pages: m.pages,
            pool_bytes: m.bytes,
            rss_bytes: m.rss_bytes,
        })
        .collect();
    write_csv(&options.out.join(SERVE_TIMELINE_CSV), &timeline)
}

fn write_manifest(options: &BenchOptions, model: &Model, limits: Limits) -> Result<()> {
    let value = serde_json::json!({
        "kvfuse_version": env!("CARGO_PKG_VERSION"),
        "command": options.command,
        "model": options.model,
        "model_sha256": model.sha256,
        "data": options.draw.spec,
        "requests": options.draw.limit.unwrap_or(options.draw.requests),
        "budget_bytes": limits.budget_bytes,
        "block_size": limits.block_size,
        "threads": rayon::current_num_threads(),
    });
    files::write_json(&options.out.join("manifest.json"), &value)
}

/// Memory that the allocator keeps goes back to the system, so that what a run takes can be seen.
fn give_memory_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes no pointers; glibc documents it as safe to call at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
