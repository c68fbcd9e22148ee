//! What a run of an arm left: rows of the tables, kept in `runs/` so that a bench that was cut off goes on where it was.

use super::run::Moment;
use crate::error::{IoAt, Result};
use crate::files;
use crate::stats::{quantile, rounded};
use crate::tables::write_table;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// A run of an arm a row.
pub const SERVE_CSV: &str = "serve.csv";
/// An arm a row: medians over its runs.
pub const SERVE_SUMMARY_CSV: &str = "serve_summary.csv";
/// A request of a run a row.
pub const SERVE_REQUESTS_CSV: &str = "serve_requests.csv";
/// How the engine stood, a moment a row.
pub const SERVE_TIMELINE_CSV: &str = "serve_timeline.csv";

/// One run of one arm.
#[derive(Debug, Clone, Serialize, Deserialize)]
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
    budget_bytes: usize,
    seconds: f64,
    running: usize,
    waiting: usize,
    pages: usize,
    pool_bytes: usize,
    rss_bytes: usize,
}

#[derive(Serialize, Deserialize)]
pub(super) struct RequestRow {
    pub method: String,
    pub repeat: usize,
    pub request_rate: String,
    pub budget_bytes: usize,
    pub id: String,
    pub tenant: String,
    pub input_tokens: usize,
    pub output_tokens: usize,
    pub arrival_seconds: f64,
    pub first_token_seconds: Option<f64>,
    pub end_seconds: f64,
    pub failed: bool,
    pub score: Option<f64>,
    pub answer: String,
}

/// One run of one arm with all that the tables say of it.
#[derive(Serialize, Deserialize)]
pub(super) struct Run {
    /// SHA-256 of everything that was asked of it.
    key: String,
    pub row: ServeRow,
    pub requests: Vec<RequestRow>,
    pub moments: Vec<Moment>,
}

impl Run {
    pub fn new(key: &str, row: ServeRow, requests: Vec<RequestRow>, moments: Vec<Moment>) -> Self {
        Run { key: key.to_owned(), row, requests, moments }
    }

    fn path(out: &Path, key: &str) -> PathBuf {
        out.join("runs").join(format!("{}.json", &key[..12]))
    }

    /// The run that was asked for just so, if it is there and readable; anything else is measured again.
    pub fn load(out: &Path, key: &str) -> Option<Run> {
        let text = fs::read_to_string(Self::path(out, key)).ok()?;
        serde_json::from_str(&text).ok().filter(|run: &Run| run.key == key)
    }

    pub fn store(&self, out: &Path) -> Result<()> {
        let folder = out.join("runs");
        fs::create_dir_all(&folder).at(&folder)?;
        files::write_json(&Self::path(out, &self.key), self)
    }
}

/// An arm's runs at one load and budget as one row: medians, and the least and the most of throughput.
pub fn summary(rows: &[&ServeRow]) -> Vec<ServeRow> {
    let key = |row: &ServeRow| (row.method.clone(), row.request_rate.clone(), row.budget_bytes);
    let mut arms: Vec<(String, String, usize)> = Vec::new();
    for row in rows.iter().map(|row| key(row)) {
        if !arms.contains(&row) {
            arms.push(row);
        }
    }
    let one = |arm: (String, String, usize)| {
        let own: Vec<&ServeRow> = rows.iter().copied().filter(|r| key(r) == arm).collect();
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
        ServeRow { repeat: own.len(), fields, ..own[0].clone() }
    };
    arms.into_iter().map(one).collect()
}

/// Writes all tables, with the runs there are.
pub(super) fn write_tables<'a>(out: &Path, runs: &'a [Run]) -> Result<()> {
    let rows: Vec<&ServeRow> = runs.iter().map(|r| &r.row).collect();
    write_table(&out.join(SERVE_CSV), &rows)?;
    write_table(&out.join(SERVE_SUMMARY_CSV), &summary(&rows))?;
    let requests: Vec<&RequestRow> = runs.iter().flat_map(|r| &r.requests).collect();
    write_table(&out.join(SERVE_REQUESTS_CSV), &requests)?;
    let moment = |row: &'a ServeRow, m: &Moment| TimelineRow {
        method: &row.method,
        repeat: row.repeat,
        request_rate: &row.request_rate,
        budget_bytes: row.budget_bytes,
        seconds: rounded(m.seconds),
        running: m.running,
        waiting: m.waiting,
        pages: m.pages,
        pool_bytes: m.bytes,
        rss_bytes: m.rss_bytes,
    };
    let timeline: Vec<TimelineRow> =
        runs.iter().flat_map(|run| run.moments.iter().map(|m| moment(&run.row, m))).collect();
    write_table(&out.join(SERVE_TIMELINE_CSV), &timeline)
}
