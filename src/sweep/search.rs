//! `kvfuse search`: the cheapest setting of a chain that keeps to a KL, or to a loss of score.

use super::arms::{Arm, Packing};
use super::evaluate::FirstToken;
use super::lot::Source;
use super::run::setting;
use super::settings::{Settings, SweepOptions};
use super::stage::Stage;
use crate::codec::{Chain, Turnable};
use crate::dump::{Half, Manifest, open_model};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::progress::{Progress, Unit};
use crate::tables::Format;
use serde::Serialize;
use std::path::PathBuf;

/// What to search.
pub struct SearchOptions {
    pub dump: PathBuf,
    /// One chain whose dial is not turned.
    pub method: String,
    pub goal: Goal,
    pub block_size: usize,
    /// Requests encoded together.
    pub batch: usize,
    pub first_token: FirstToken,
    pub half: Option<Half>,
    /// Settings to try, at most.
    pub evaluations: usize,
}

/// What a setting must keep to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// KL from no encoding, nats a token, mean over requests, at most.
    Kl(f64),
    /// Difference of the score from no encoding, paired, mean over requests, at least.
    Score(f64),
}

impl Goal {
    fn met(self, tried: &Tried) -> bool {
        match self {
            Goal::Kl(most) => tried.kl <= most,
            Goal::Score(least) => tried.score_diff.is_some_and(|d| d >= least),
        }
    }
}

/// A setting that was tried.
#[derive(Debug, Clone, Serialize)]
pub struct Tried {
    pub method: String,
    pub cr_audited: f64,
    pub bits_per_element: f64,
    pub kl: f64,
    /// With [`Goal::Score`]: answers were decoded.
    pub score_diff: Option<f64>,
    /// Whether it keeps to the goal, and none that does stores less.
    pub best: bool,
}

/// As near to the bound as is worth another try.
const NEAR: f64 = 0.97;

/// Tries settings between the finest and the coarsest, where KL should meet the bound if its logarithm were straight between
/// those tried (in the middle for a score, which is no smooth curve); in the order tried.
///
/// # Errors
/// Chains without a dial, or with one turned; chains that prefill anew; bad dumps; no setting that keeps to the KL.
pub fn search(options: &SearchOptions) -> Result<Vec<Tried>> {
    let dial = Turnable::of(&options.method)?;
    let manifest = Manifest::read(&options.dump)?;
    let requests = manifest.half(options.half, &options.dump)?;
    let model = open_model(&options.dump, None, &manifest)?;
    let sweep = SweepOptions {
        shard: None,
        dump: options.dump.clone(),
        out: PathBuf::new(),
        model: None,
        chains: Vec::new(),
        block_sizes: vec![options.block_size],
        first_tokens: vec![options.first_token],
        half: options.half,
        batches: vec![options.batch],
        max_new_tokens: None,
        resamples: 0,
        seed: 0,
        memory: None,
        long_tables: Format::default(),
        given: Settings::default(),
        command: Vec::new(),
    };
    let packing =
        Packing { block_size: options.block_size, batch: options.batch, first_token: options.first_token };
    let mut stage =
        Stage::new(Source { model: &model, options: &sweep, manifest: &manifest }, &requests, packing)?;
    let setting = setting(&sweep, &manifest, &requests)?;
    if let Goal::Score(_) = options.goal {
        // Scores are paired with those of the arm that is run first.
        let none = Chain::controls(false)?.swap_remove(0);
        stage.run("", &setting, &Arm { chain: none, packing })?;
    }
    let progress = Progress::new("searching", options.evaluations as u64, Unit::Items("settings"));
    let mut tried: Vec<Tried> = Vec::new();
    // Place between fine and coarse, and KL there.
    let (mut fine, mut coarse): ((f64, Option<f64>), (f64, Option<f64>)) = ((0.0, None), (1.0, None));
    for _ in 0..options.evaluations {
        interrupt::check()?;
        let share = match options.goal {
            Goal::Kl(most) => share(fine.1, coarse.1, most),
            Goal::Score(_) => 0.5,
        };
        // Of whole numbers the place looked for may be one that was tried, with others left between.
        let mut places = [share, 0.5, 0.25, 0.75].into_iter().map(|share| {
            let at = fine.0 + (coarse.0 - fine.0) * share;
            Ok((at, dial.chain(at)?))
        });
        let untried = |found: &Result<(f64, Chain)>| match found {
            Ok((_, chain)) => tried.iter().all(|t| t.method != chain.name()),
            Err(_) => true,
        };
        let Some((at, chain)) = places.find(untried).transpose()? else { break };
        let own = match options.goal {
            Goal::Kl(_) => {
                let (ledger, kl) = stage.rate_and_kl(&chain)?;
                let (cr_audited, bits_per_element) = (ledger.cr_audited(), ledger.bits_per_element());
                Tried {
                    method: chain.name(),
                    cr_audited,
                    bits_per_element,
                    kl,
                    score_diff: None,
                    best: false,
                }
            }
            Goal::Score(_) => {
                let row = stage.run("", &setting, &Arm { chain, packing })?.row;
                Tried {
                    method: row.arm.method,
                    cr_audited: row.cr_audited,
                    bits_per_element: row.bits_per_element,
                    kl: row.kl,
                    score_diff: row.score_diff,
                    best: false,
                }
            }
        };
        progress.increment();
        let (met, kl) = (options.goal.met(&own), own.kl);
        tried.push(own);
        if met && matches!(options.goal, Goal::Kl(most) if kl >= NEAR * most) {
            break;
        }
        if met {
            fine = (at, Some(kl));
        } else {
            coarse = (at, Some(kl));
        }
    }
    progress.finish();
    let within = tried.iter_mut().filter(|t| options.goal.met(t));
    match within.max_by(|a, b| a.cr_audited.total_cmp(&b.cr_audited)) {
        Some(best) => best.best = true,
        None => {
            let problem = match options.goal {
                Goal::Kl(most) => {
                    let least = tried.iter().map(|t| t.kl).fold(f64::INFINITY, f64::min);
                    format!("keeps the KL below {most}; the least was {least:.4}")
                }
                Goal::Score(least) => {
                    let scores = tried.iter().filter_map(|t| t.score_diff);
                    let most = scores.fold(f64::NEG_INFINITY, f64::max);
                    format!("keeps the score's difference above {least}; the most was {most:.4}")
                }
            };
            return Err(Error::argument(format!("{}: no setting that was tried {problem}", options.method)));
        }
    }
    Ok(tried)
}

/// How far from fine to coarse the next try is: where the line between the logarithms of both KLs meets the bound, never close to
/// an end; in the middle while one is unknown.
fn share(fine: Option<f64>, coarse: Option<f64>, bound: f64) -> f64 {
    match (fine.filter(|kl| *kl > 0.0), coarse) {
        (Some(a), Some(b)) if b > a => ((bound / a).ln() / (b / a).ln()).clamp(0.1, 0.9),
        _ => 0.5,
    }
}
