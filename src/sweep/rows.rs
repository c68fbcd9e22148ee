//! One row of sweep.csv: what was stored, what it cost, against the no-fusion arm on the same requests.

use super::arms::{Arm, ArmColumns};
use crate::codec::{Distortion, LayerRate, Ledger, relative};
use crate::stats::{Interval, bootstrap_mean, mean, rounded};
use serde::{Deserialize, Serialize};

/// One request in one arm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestScore {
    pub id: String,
    pub tenant: String,
    pub answer: String,
    pub answer_tokens: Vec<u32>,
    /// Token F1 and exact match; absent for requests without references.
    pub f1: Option<f64>,
    pub em: Option<f64>,
    /// The task's own metric.
    pub score: Option<f64>,
    /// Mean over the reference answer's tokens, nats per token.
    pub nll: f64,
    /// Means over the target tokens, which are these and the one that ends them.
    pub kl: f64,
    pub top1: f64,
    /// KL of every target token, nats.
    pub token_kl: Vec<f64>,
    /// The first token of the greedy answer that differs from the no-fusion arm's, counted from 0; absent if none does.
    pub first_divergence: Option<usize>,
    pub fused_blocks: u64,
    pub worst_block_error: f64,
}

/// One request in one arm, as requests.csv has it.
#[derive(Debug, Serialize)]
pub struct RequestRow<'a> {
    pub run: &'a str,
    #[serde(flatten)]
    pub arm: &'a ArmColumns,
    pub id: &'a str,
    pub tenant: &'a str,
    pub f1: Option<f64>,
    pub f1_none: Option<f64>,
    pub score: Option<f64>,
    pub score_none: Option<f64>,
    pub kl: f64,
    pub nll: f64,
    pub top1: f64,
    pub first_divergence: Option<usize>,
    pub fused_blocks: u64,
    pub worst_block_error: f64,
    pub answer: &'a str,
    pub answer_none: &'a str,
}

impl<'a> RequestRow<'a> {
    /// `baseline` is the same request in the no-fusion arm.
    pub fn new(row: &'a Row, score: &'a RequestScore, baseline: &'a RequestScore) -> Self {
        RequestRow {
            run: &row.run,
            arm: &row.arm,
            id: &score.id,
            tenant: &score.tenant,
            f1: score.f1.map(rounded),
            f1_none: baseline.f1.map(rounded),
            score: score.score.map(rounded),
            score_none: baseline.score.map(rounded),
            kl: rounded(score.kl),
            nll: rounded(score.nll),
            top1: rounded(score.top1),
            first_divergence: score.first_divergence,
            fused_blocks: score.fused_blocks,
            worst_block_error: rounded(score.worst_block_error),
            answer: &score.answer,
            answer_none: &baseline.answer,
        }
    }
}

/// One layer in one arm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerScore {
    pub cr_audited: f64,
    /// Full blocks that the tables list, and physical blocks behind them.
    pub full_blocks: u64,
    pub physical_blocks: u64,
    /// Relative squared errors.
    pub key_error: f64,
    pub value_error: f64,
}

impl LayerScore {
    pub fn new(rate: &LayerRate, error: &Distortion) -> Self {
        LayerScore {
            cr_audited: rounded(rate.cr()),
            full_blocks: rate.logical_blocks,
            physical_blocks: rate.physical_blocks,
            key_error: rounded(error.keys()),
            value_error: rounded(error.values()),
        }
    }
}

/// One layer in one arm, as layers.csv has it.
#[derive(Debug, Serialize)]
pub struct LayerRow<'a> {
    pub run: &'a str,
    #[serde(flatten)]
    pub arm: &'a ArmColumns,
    pub layer: usize,
    #[serde(flatten)]
    pub score: &'a LayerScore,
}

/// Wall-clock times of one arm, kept out of sweep.csv so that it is the same bytes on every run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    pub fuse_seconds: f64,
    pub score_seconds: f64,
    pub decode_seconds: f64,
    pub generated_tokens: usize,
}

/// What all arms of a sweep have in common.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    pub model: String,
    pub data: String,
    /// Name of the requests' metric.
    pub metric: String,
    pub dump: String,
    /// Checksum of the ids of the requests swept, if not all of the dump's.
    pub questions: Option<String>,
    pub seed: u64,
    /// The longest answer any request is given, in tokens.
    pub max_new_tokens: usize,
    /// Checksum of the longest answers of single requests, if they are not all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_limits: Option<String>,
    pub resamples: usize,
}

/// Columns are documented in docs/sweep-columns.md. Numbers are rounded to six significant digits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub run: String,
    pub model: String,
    pub data: String,
    #[serde(flatten)]
    pub arm: ArmColumns,
    pub seed: u64,
    pub requests: usize,
    pub elements: u64,
    pub block_bits: u64,
    pub partial_bits: u64,
    pub untouched_bits: u64,
    pub scale_bits: u64,
    pub table_bits: u64,
    pub codebook_bits: u64,
    pub bits_per_element: f64,
    pub cr_audited: f64,
    pub cr_paper: f64,
    pub cr_prefix: f64,
    pub cr_beyond_prefix: f64,
    pub key_error: f64,
    pub value_error: f64,
    pub attention_error: f64,
    pub kl: f64,
    pub kl_low: f64,
    pub kl_high: f64,
    /// Of the first answer token alone, and of all others.
    pub kl_first: f64,
    pub kl_first_low: f64,
    pub kl_first_high: f64,
    pub kl_later: Option<f64>,
    pub kl_later_low: Option<f64>,
    pub kl_later_high: Option<f64>,
    /// Over all target tokens of all requests.
    pub kl_p95: f64,
    pub kl_p99: f64,
    pub kl_max: f64,
    pub top1: f64,
    pub top1_low: f64,
    pub top1_high: f64,
    pub nll: f64,
    pub nll_low: f64,
    pub nll_high: f64,
    pub nll_diff: f64,
    pub nll_diff_low: f64,
    pub nll_diff_high: f64,
    pub f1: Option<f64>,
    pub f1_low: Option<f64>,
    pub f1_high: Option<f64>,
    pub f1_diff: Option<f64>,
    pub f1_diff_low: Option<f64>,
    pub f1_diff_high: Option<f64>,
    pub em: Option<f64>,
    pub em_low: Option<f64>,
    pub em_high: Option<f64>,
    pub em_diff: Option<f64>,
    pub em_diff_low: Option<f64>,
    pub em_diff_high: Option<f64>,
    /// Of `score`: the task's own metric ("mixed" if requests have several).
    pub metric: String,
    pub score: Option<f64>,
    pub score_low: Option<f64>,
    pub score_high: Option<f64>,
    pub score_diff: Option<f64>,
    pub score_diff_low: Option<f64>,
    pub score_diff_high: Option<f64>,
    pub worst_request: String,
    pub worst_kl: f64,
    /// The highest relative squared error of one block of one layer, of its keys or of its values.
    pub worst_block_error: f64,
    /// Audited ratio of every layer, `;`-separated.
    pub layer_cr: String,
}

/// What was measured of one arm.
pub struct Measured<'a> {
    pub ledger: &'a Ledger,
    pub distortion: Distortion,
    /// Squared error and energy of attention outputs.
    pub attention: (f64, f64),
    pub scores: &'a [RequestScore],
    /// The no-fusion arm's scores of the same requests.
    pub baseline: &'a [RequestScore],
    /// Audited ratio of exact prefix sharing on the same requests and block size.
    pub cr_prefix: f64,
}

/// The number below which a share `q` of a sorted list lies (nearest rank); 0 of none.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
}

impl Row {
    pub fn new(run: &str, setting: &Setting, arm: &Arm, measured: &Measured) -> Self {
        let Measured { ledger, distortion, attention, scores, baseline, cr_prefix } = measured;
        // One seed for all arms: their intervals come from the same resamples of requests.
        let interval = |x: &[f64]| bootstrap_mean(x, setting.resamples, setting.seed);
        let all = |f: fn(&RequestScore) -> f64| -> Vec<f64> { scores.iter().map(f).collect() };
        let some =
            |f: fn(&RequestScore) -> Option<f64>| interval(&scores.iter().filter_map(f).collect::<Vec<_>>());
        let paired = |f: fn(&RequestScore) -> Option<f64>| {
            let pairs = scores.iter().zip(*baseline).filter_map(|(s, b)| Some(f(s)? - f(b)?));
            interval(&pairs.collect::<Vec<_>>())
        };
        let of = |i: Option<Interval>, part: fn(Interval) -> f64| i.map(|i| rounded(part(i)));
        let must = |i: Option<Interval>, part: fn(Interval) -> f64| of(i, part).unwrap_or(f64::NAN);
        let (middle, low, high) = (|i: Interval| i.mean, |i: Interval| i.low, |i: Interval| i.high);
        let (kl, top1, nll) =
            (interval(&all(|s| s.kl)), interval(&all(|s| s.top1)), interval(&all(|s| s.nll)));
        let kl_first = interval(&all(|s| s.token_kl.first().copied().unwrap_or(0.0)));
        let kl_later = some(|s| s.token_kl.get(1..).filter(|k| !k.is_empty()).map(mean));
        let mut tokens: Vec<f64> = scores.iter().flat_map(|s| s.token_kl.iter().copied()).collect();
        tokens.sort_by(f64::total_cmp);
        let nll_diff = paired(|s| Some(s.nll));
        let (f1, f1_diff, em, em_diff) = (some(|s| s.f1), paired(|s| s.f1), some(|s| s.em), paired(|s| s.em));
        let (score, score_diff) = (some(|s| s.score), paired(|s| s.score));
        let worst = scores.iter().max_by(|a, b| a.kl.total_cmp(&b.kl));
        let layer_cr: Vec<String> = ledger.layers.iter().map(|l| format!("{:.4}", l.cr())).collect();
        let cr = ledger.cr_audited();
        Row {
            run: run.to_owned(),
            model: setting.model.clone(),
            data: setting.data.clone(),
            arm: arm.columns(),
            seed: setting.seed,
            requests: scores.len(),
            elements: ledger.elements,
            block_bits: ledger.block_bits,
            partial_bits: ledger.partial_bits,
            untouched_bits: ledger.untouched_bits,
            scale_bits: ledger.scale_bits,
            table_bits: ledger.table_bits,
            codebook_bits: ledger.codebook_bits + ledger.trained_bits,
            bits_per_element: rounded(ledger.bits_per_element()),
            cr_audited: rounded(cr),
            cr_paper: rounded(ledger.cr_paper()),
            cr_prefix: rounded(*cr_prefix),
            cr_beyond_prefix: rounded(cr / cr_prefix),
            key_error: rounded(distortion.keys()),
            value_error: rounded(distortion.values()),
            attention_error: rounded(relative(attention.0, attention.1)),
            kl: must(kl, middle),
            kl_low: must(kl, low),
            kl_high: must(kl, high),
            kl_first: must(kl_first, middle),
            kl_first_low: must(kl_first, low),
            kl_first_high: must(kl_first, high),
            kl_later: of(kl_later, middle),
            kl_later_low: of(kl_later, low),
            kl_later_high: of(kl_later, high),
            kl_p95: quantile(&tokens, 0.95),
            kl_p99: quantile(&tokens, 0.99),
            kl_max: quantile(&tokens, 1.0),
            top1: must(top1, middle),
            top1_low: must(top1, low),
            top1_high: must(top1, high),
            nll: must(nll, middle),
            nll_low: must(nll, low),
            nll_high: must(nll, high),
            nll_diff: must(nll_diff, middle),
            nll_diff_low: must(nll_diff, low),
            nll_diff_high: must(nll_diff, high),
            f1: of(f1, middle),
            f1_low: of(f1, low),
            f1_high: of(f1, high),
            f1_diff: of(f1_diff, middle),
            f1_diff_low: of(f1_diff, low),
            f1_diff_high: of(f1_diff, high),
            em: of(em, middle),
            em_low: of(em, low),
            em_high: of(em, high),
            em_diff: of(em_diff, middle),
            em_diff_low: of(em_diff, low),
            em_diff_high: of(em_diff, high),
            metric: setting.metric.clone(),
            score: of(score, middle),
            score_low: of(score, low),
            score_high: of(score, high),
            score_diff: of(score_diff, middle),
            score_diff_low: of(score_diff, low),
            score_diff_high: of(score_diff, high),
            worst_request: worst.map_or(String::new(), |w| w.id.clone()),
            worst_kl: rounded(worst.map_or(f64::NAN, |w| w.kl)),
            worst_block_error: rounded(scores.iter().map(|s| s.worst_block_error).fold(0.0, f64::max)),
            layer_cr: layer_cr.join(";"),
        }
    }
}
