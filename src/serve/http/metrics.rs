//! `/metrics`, with vLLM's names.

use crate::serve::engine::Engine;
use crate::serve::job::Counts;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    finished_reason: String,
}

pub struct Metrics {
    registry: Registry,
    running: Gauge,
    waiting: Gauge,
    usage: Gauge<f64, AtomicU64>,
    queries: Counter,
    hits: Counter,
    preemptions: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    success: Family<Reason, Counter>,
    ttft: Histogram,
    itl: Histogram,
    e2el: Histogram,
    budget: f64,
    known: Mutex<Counts>,
}

impl Metrics {
    pub fn new(budget_bytes: usize) -> Self {
        let histogram = || Histogram::new(exponential_buckets(0.001, 2.0, 18));
        let metrics = Metrics {
            registry: Registry::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            usage: Gauge::default(),
            queries: Counter::default(),
            hits: Counter::default(),
            preemptions: Counter::default(),
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            success: Family::default(),
            ttft: histogram(),
            itl: histogram(),
            e2el: histogram(),
            budget: budget_bytes as f64,
            known: Mutex::new(Counts::default()),
        };
        let mut registry = Registry::default();
        let r = &mut registry;
        r.register("vllm:num_requests_running", "Requests that run", metrics.running.clone());
        r.register("vllm:num_requests_waiting", "Requests that wait", metrics.waiting.clone());
        r.register("vllm:kv_cache_usage_perc", "Share of the budget in use, 0 to 1", metrics.usage.clone());
        r.register("vllm:prefix_cache_queries", "Prompt tokens looked up", metrics.queries.clone());
        r.register("vllm:prefix_cache_hits", "Prompt tokens found", metrics.hits.clone());
        r.register("vllm:num_preemptions", "Requests that were preempted", metrics.preemptions.clone());
        r.register("vllm:prompt_tokens", "Prompt tokens of ended requests", metrics.prompt_tokens.clone());
        r.register("vllm:generation_tokens", "Tokens generated", metrics.generation_tokens.clone());
        r.register("vllm:request_success", "Requests that ended, by why", metrics.success.clone());
        r.register("vllm:time_to_first_token_seconds", "Time to the first token", metrics.ttft.clone());
        r.register("vllm:inter_token_latency_seconds", "Time between two tokens", metrics.itl.clone());
        r.register("vllm:e2e_request_latency_seconds", "Time of a whole request", metrics.e2el.clone());
        Metrics { registry, ..metrics }
    }

    /// Takes over how the engine stands.
    pub fn engine(&self, engine: &Engine) {
        self.running.set(engine.running() as i64);
        self.waiting.set(engine.waiting() as i64);
        self.usage.set(engine.bytes() as f64 / self.budget);
        let now = engine.counts();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        self.queries.inc_by(now.prefix_queries - known.prefix_queries);
        self.hits.inc_by(now.prefix_hits - known.prefix_hits);
        self.preemptions.inc_by(now.preemptions - known.preemptions);
        *known = now;
    }

    /// A token that came so long after the one before, or after its request.
    pub fn token(&self, after: Duration, is_first: bool) {
        self.generation_tokens.inc();
        (if is_first { &self.ttft } else { &self.itl }).observe(after.as_secs_f64());
    }

    pub fn finished(&self, reason: &str, prompt_tokens: usize, took: Duration) {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
        self.success.get_or_create(&Reason { finished_reason: reason.to_owned() }).inc();
        self.e2el.observe(took.as_secs_f64());
    }

    /// In Prometheus' text format.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut out, &self.registry);
        out
    }
}
