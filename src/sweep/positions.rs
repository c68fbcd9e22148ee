//! KL by the place of a token in what is generated: whether errors build up.

use super::arms::ArmColumns;
use super::rows::{RequestScore, Setting};
use crate::stats::{bootstrap_mean, mean, rounded};
use serde::{Deserialize, Serialize};

/// Target tokens from `first` to `last`, counted from 1, in one arm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionScore {
    pub first: usize,
    pub last: usize,
    /// Requests with so many tokens, and their tokens in this band.
    pub requests: usize,
    pub tokens: usize,
    /// Mean over these requests of the mean over their tokens here, nats a token, with its 95 % interval.
    pub kl: f64,
    pub kl_low: f64,
    pub kl_high: f64,
}

/// One band of places of one arm, as positions.csv has it.
#[derive(Debug, Serialize)]
pub struct PositionRow<'a> {
    pub run: &'a str,
    #[serde(flatten)]
    pub arm: &'a ArmColumns,
    #[serde(flatten)]
    pub score: &'a PositionScore,
}

/// Bands that double: 1, 2, 3 to 4, 5 to 8, and so on; the last ends with the longest request, and takes a few more than twice as many
/// rather than leave them to a band of their own.
pub fn positions(scores: &[RequestScore], setting: &Setting) -> Vec<PositionScore> {
    let longest = scores.iter().map(|s| s.token_kl.len()).max().unwrap_or(0);
    let end = |end: usize| if longest <= end + end / 8 { end.max(longest) } else { end };
    let bands = std::iter::successors(Some((0, 1)), |(_, last)| Some((*last, end(2 * last))));
    bands
        .take_while(|(start, _)| *start < longest)
        .filter_map(|(start, end)| {
            let own =
                |s: &RequestScore| s.token_kl.get(start..end.min(s.token_kl.len())).map(<[f64]>::to_vec);
            let here: Vec<Vec<f64>> = scores.iter().filter_map(own).filter(|k| !k.is_empty()).collect();
            let means: Vec<f64> = here.iter().map(|k| mean(k)).collect();
            let kl = bootstrap_mean(&means, setting.resamples, setting.seed)?;
            Some(PositionScore {
                first: start + 1,
                last: end.min(longest),
                requests: here.len(),
                tokens: here.iter().map(Vec::len).sum(),
                kl: rounded(kl.mean),
                kl_low: rounded(kl.low),
                kl_high: rounded(kl.high),
            })
        })
        .collect()
}
