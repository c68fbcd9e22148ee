//! `kvfuse serve-bench`.

use super::draw::DrawArgs;
use super::engine::{EngineArgs, above_zero, at_least_one};
use super::say;
use super::table::table;
use crate::codec::Chain;
use crate::memory::Bytes;
use crate::model::registry::DEFAULT_MODEL;
use crate::serve::{BenchOptions, Budget, Goal, SERVE_SUMMARY_CSV, ServeRow, TraceOptions, bench, summary};
use anyhow::{Result, anyhow};
use std::path::PathBuf;

/// Serve requests by a paged engine under a budget of bytes, by every chain of methods, and measure speed and quality in
/// the same run.
///
/// Every chain is an arm; arms are interleaved and repeated. Options and fields are named as in vLLM's `bench serve`.
/// Writes serve.csv (a run a row), serve_summary.csv (medians), serve_requests.csv, serve_timeline.csv and manifest.json (docs/serving.md).
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    kvfuse serve-bench --method 'none,prefix,prefix+kivi:bits=4' --budget-requests 8 -o results/serve\n  \
    kvfuse serve-bench --passages 4 --pool 16 --request-rate 2,4 --goodput ttft:2000 -o results/serve-rag")]
pub struct Args {
    /// Built-in name, GGUF file, Hugging Face folder or hf:ORG/NAME[@REVISION]
    #[arg(long, default_value = DEFAULT_MODEL)]
    model: String,
    #[command(flatten)]
    draw: DrawArgs,
    /// Arrivals, lengths and shared blocks of a trace: mooncake:FILE (JSON lines), azure:FILE or burstgpt:FILE (CSV); text comes from
    /// --data (builtin:qa, squad:FILE or text:FILE)
    #[arg(long, value_name = "KIND:FILE", conflicts_with = "request_rate")]
    trace: Option<String>,
    /// What the trace's lengths are multiplied by, so that they fit the model
    #[arg(long, value_name = "FACTOR", requires = "trace", default_value_t = 1.0)]
    trace_scale: f64,
    /// Speed-up of the trace's arrivals
    #[arg(long, value_name = "FACTOR", requires = "trace", default_value_t = 1.0)]
    trace_speed: f64,
    /// Chains to serve with (see `kvfuse methods`)
    #[arg(long, default_value = "none,prefix", value_name = "CHAINS")]
    method: String,
    /// Requests a second, one load after the other; inf: all at once
    #[arg(long, value_name = "RATES", value_delimiter = ',', default_value = "inf")]
    request_rate: Vec<f64>,
    /// Shape of the gaps between arrivals: 1 is Poisson, less bursts
    #[arg(long, default_value_t = 1.0, conflicts_with = "trace")]
    burstiness: f64,
    /// Requests in the engine at once; a client sends its next when its last has ended [default: no limit]
    #[arg(long, value_name = "N")]
    max_concurrency: Option<usize>,
    /// Bytes of keys and values, e.g. 256MiB; a list is run one value after another [default: what 8 uncompressed requests take]
    #[arg(long, value_name = "BYTES", value_delimiter = ',', conflicts_with = "budget_requests")]
    kv_cache_memory_bytes: Vec<Bytes>,
    /// Instead: what so many uncompressed requests of this load take; a list is run one value after another
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "8")]
    budget_requests: Vec<f64>,
    #[command(flatten)]
    engine: EngineArgs,
    /// Tokens of an answer, at most [default: what the data says]
    #[arg(long, value_name = "N")]
    output_len: Option<usize>,
    /// Go on behind the ends of answers, up to --output-len
    #[arg(long)]
    ignore_eos: bool,
    /// Runs of every arm
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Latencies in milliseconds below which a request is good: ttft:MS, tpot:MS, e2el:MS
    #[arg(long, value_name = "NAME:MS", num_args = 1..)]
    goodput: Vec<String>,
    /// Percentiles of latencies
    #[arg(long, value_name = "P", value_delimiter = ',', default_value = "50,95,99")]
    metric_percentiles: Vec<f64>,
    /// Requests whose answers are compared with exact caches (KL)
    #[arg(long, value_name = "N", default_value_t = 16)]
    quality_requests: usize,
    /// First tokens of these that are compared
    #[arg(long, value_name = "N", default_value_t = 16)]
    quality_tokens: usize,
    /// Folder to write
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Print the medians as JSON lines instead of a table
    #[arg(long)]
    json: bool,
}

impl Args {
    fn options(self, typed: Vec<String>) -> Result<BenchOptions> {
        let chains = Chain::parse_served(&self.method)?;
        if let Some(rate) = self.request_rate.iter().find(|r| r.is_nan() || **r <= 0.0) {
            return Err(anyhow!("--request-rate {rate}: rates are above 0, or inf"));
        }
        above_zero("--burstiness", self.burstiness)?;
        self.budget_requests.iter().try_for_each(|n| above_zero("--budget-requests", *n).map(|_| ()))?;
        let budgets = match self.kv_cache_memory_bytes.is_empty() {
            true => self.budget_requests.iter().map(|n| Budget::Requests(*n)).collect(),
            false => self.kv_cache_memory_bytes.iter().map(|b| Budget::Bytes(b.0)).collect(),
        };
        if let Some(p) = self.metric_percentiles.iter().find(|p| !(0.0..=100.0).contains(*p)) {
            return Err(anyhow!("--metric-percentiles {p}: percentiles are from 0 to 100"));
        }
        let (scale, speed) = (self.trace_scale, self.trace_speed);
        Ok(BenchOptions {
            model: self.model,
            trace: self.trace.map(|spec| TraceOptions { spec, scale, speed }),
            draw: self.draw.draw(),
            chains,
            method: self.method,
            limits: self.engine.limits(0)?,
            budgets,
            rates: self.request_rate,
            burstiness: self.burstiness,
            concurrency: at_least_one("--max-concurrency", self.max_concurrency.unwrap_or(usize::MAX))?,
            output_tokens: self.output_len.map(|n| at_least_one("--output-len", n)).transpose()?,
            ignore_end: self.ignore_eos,
            repeats: at_least_one("--repeats", self.repeats)?,
            goal: Goal::read(&self.goodput).map_err(|e| anyhow!("--goodput {e}"))?,
            percentiles: self.metric_percentiles,
            quality_requests: self.quality_requests,
            quality_tokens: self.quality_tokens,
            out: self.out,
            command: typed,
        })
    }
}

pub fn run(args: Args, typed: Vec<String>) -> Result<()> {
    let json = args.json;
    let options = args.options(typed)?;
    let runs = bench(&options)?;
    let rows = summary(&runs.iter().collect::<Vec<_>>());
    if json {
        return super::say_rows(&rows);
    }
    say(shown(&rows))?;
    say(format!("\n{}", options.out.join(SERVE_SUMMARY_CSV).display()))
}

/// The medians in short, for people.
fn shown(rows: &[ServeRow]) -> String {
    let header = [
        "method",
        "req/s in",
        "budget MB",
        "out tok/s",
        "[least, most]",
        "goodput",
        "TTFT ms",
        "P95",
        "TPOT ms",
        "P95",
        "at once",
        "preempted",
        "hit %",
        "MB",
        "own %",
        "KL",
        "score",
    ];
    let line = |row: &ServeRow| -> Vec<String> {
        let number = |name: &str| row.fields.get(name).and_then(serde_json::Value::as_f64);
        let text =
            |name: &str, digits: usize| number(name).map_or("-".to_owned(), |x| format!("{x:.digits$}"));
        let hits = 100.0 * number("prefix_hit_tokens").unwrap_or(0.0)
            / number("prefix_query_tokens").unwrap_or(0.0).max(1.0);
        vec![
            row.method.clone(),
            row.request_rate.clone(),
            format!("{:.1}", row.budget_bytes as f64 / 1e6),
            text("output_throughput", 1),
            format!("[{}, {}]", text("output_throughput_low", 1), text("output_throughput_high", 1)),
            text("request_goodput", 2),
            text("median_ttft_ms", 0),
            text("p95_ttft_ms", 0),
            text("median_tpot_ms", 1),
            text("p95_tpot_ms", 1),
            text("mean_concurrent_requests", 1),
            text("preemptions", 0),
            format!("{hits:.0}"),
            format!("{:.1}", number("peak_pool_bytes").unwrap_or(0.0) / 1e6),
            format!("{:.1}", 100.0 * number("compression_share").unwrap_or(0.0)),
            text("kl", 4),
            text("score", 3),
        ]
    };
    table(&header, &rows.iter().map(line).collect::<Vec<_>>())
}
