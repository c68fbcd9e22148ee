//! What an encoded batch does to next-token distributions and to answers.

use crate::block::RequestCache;
use crate::codec::CacheBatch;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::{Model, Segment, Tapped, argmax, log_sum_exp};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Which cache the first answer token is computed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FirstToken {
    /// The fused one: every answer token pays for fusion.
    Fused,
    /// The unfused one of prefill, as in the paper: the first token is spared.
    Prefill,
}

/// One request as the evaluation sees it.
pub struct Prompt {
    /// All prompt tokens; the batch's cache holds all but the last.
    pub tokens: Vec<u32>,
    /// Tokens whose distributions are compared; empty until they are known.
    pub targets: Vec<u32>,
    /// How many of the targets are the answer's own; what is left is the token that ends it.
    pub answer: usize,
    /// The request's id, for errors.
    pub id: String,
}

/// Next-token logits of the no-fusion arm on every target, and what attention put out on the way.
pub struct Reference {
    /// `[targets, vocab]` of each request.
    logits: Vec<Vec<f32>>,
    /// Attention outputs, all layers and computed rows.
    attention: Vec<f32>,
}

/// The no-fusion batch and, when the first token comes from prefill, its logits.
pub struct Base {
    pub batch: CacheBatch,
    pub spared: Spared,
}

/// Logits of the first answer token from unfused caches (`[vocab]` of each request), if the first token is spared.
pub struct Spared(Option<Vec<Vec<f32>>>);

impl Base {
    /// Takes caches of all prompt tokens but the last. With [`FirstToken::Prefill`] the last token is run here, before
    /// anything is fused; else it is left for the answer.
    pub fn new(model: &Model, mut batch: CacheBatch, prompts: &[Prompt], first: FirstToken) -> Result<Self> {
        let mut run = || -> Result<Vec<Vec<f32>>> {
            let last: Vec<&[u32]> = prompts.iter().map(|p| &p.tokens[p.tokens.len() - 1..]).collect();
            let CacheBatch { pool, caches, tokens, .. } = &mut batch;
            let mut segments: Vec<Segment> =
                caches.iter_mut().zip(&last).map(|(cache, tokens)| Segment { cache, tokens }).collect();
            let hidden =
                model.decoder.forward(pool, &mut segments, None).map_err(|f| f.of(|i| &prompts[i].id))?;
            for (all, last) in tokens.iter_mut().zip(&last) {
                all.extend_from_slice(last);
            }
            let vocab = model.decoder.config().vocab;
            Ok(model.decoder.logits(&hidden).chunks_exact(vocab).map(<[f32]>::to_vec).collect())
        };
        let first_logits = if first == FirstToken::Prefill { Some(run()?) } else { None };
        Ok(Base { batch, spared: Spared(first_logits) })
    }
}

/// Divergence from the no-fusion arm on one target token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Divergence {
    /// Negative log-likelihood of the target, nats.
    pub nll: f64,
    /// KL(no fusion || this arm), nats.
    pub kl: f64,
    /// Whether the most likely next token is that of the no-fusion arm.
    pub top1: bool,
}

/// An arm beside the no-fusion arm.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Each target of each request.
    pub targets: Vec<Vec<Divergence>>,
    /// Sums over attention outputs: squared error, and energy of the no-fusion arm's.
    pub attention: (f64, f64),
}

/// Target rows whose logits are held at a time: enough for an efficient product, little enough to stay small.
const LOGIT_ROWS: usize = 128;

/// Teacher-forced targets through a batch's caches: per request `[targets, vocab]` logits go to `visit`, in order.
/// Returns the attention outputs.
fn teacher_force(
    model: &Model,
    spared: &Spared,
    batch: &mut CacheBatch,
    prompts: &[Prompt],
    mut visit: impl FnMut(usize, &[f32]) -> Result<()>,
) -> Result<Vec<f32>> {
    let inputs: Vec<Vec<u32>> = prompts
        .iter()
        .map(|p| {
            let fed = &p.targets[..p.targets.len() - 1];
            let last = p.tokens[p.tokens.len() - 1];
            if spared.0.is_some() { fed.to_vec() } else { [&[last], fed].concat() }
        })
        .collect();
    let mut attention = Vec::new();
    let hidden = on_forks(batch, |batch, forks| {
        let mut segments: Vec<Segment> =
            forks.iter_mut().zip(&inputs).map(|(cache, tokens)| Segment { cache, tokens }).collect();
        let mut keep = |tapped: &Tapped| attention.extend_from_slice(tapped.attended);
        model.decoder.forward(&mut batch.pool, &mut segments, Some(&mut keep))
    })
    .map_err(|f| f.of(|i| &prompts[i].id))?;
    let (width, vocab) = (model.decoder.config().hidden, model.decoder.config().vocab);
    let (mut first, mut row) = (0, 0);
    while first < prompts.len() {
        let mut end = first;
        let mut rows = 0;
        while end < prompts.len() && (rows < LOGIT_ROWS || end == first) {
            rows += inputs[end].len();
            end += 1;
        }
        let logits = model.decoder.logits(&hidden[row * width..(row + rows) * width]);
        let mut at = 0;
        for (i, input) in inputs.iter().enumerate().take(end).skip(first) {
            let own = &logits[at * vocab..(at + input.len()) * vocab];
            match &spared.0 {
                Some(first) => visit(i, &[&first[i][..], own].concat())?,
                None => visit(i, own)?,
            }
            at += input.len();
        }
        (first, row) = (end, row + rows);
    }
    Ok(attention)
}

/// Runs `f` on copies of the caches, which it may extend, and gives their blocks back.
fn on_forks<T>(batch: &mut CacheBatch, f: impl FnOnce(&mut CacheBatch, &mut [RequestCache]) -> T) -> T {
    let pool = &mut batch.pool;
    let mut forks: Vec<RequestCache> = batch.caches.iter().map(|c| c.fork(pool)).collect();
    let result = f(batch, &mut forks);
    for fork in forks {
        fork.release(&mut batch.pool);
    }
    result
}

impl Reference {
    /// Runs the no-fusion arm over the targets.
    pub fn of(model: &Model, base: &mut Base, prompts: &[Prompt]) -> Result<Self> {
        let mut logits = Vec::with_capacity(prompts.len());
        let visit = |_, request: &[f32]| {
            logits.push(request.to_vec());
            Ok(())
        };
        let attention = teacher_force(model, &base.spared, &mut base.batch, prompts, visit)?;
        Ok(Reference { logits, attention })
    }

    /// How far an encoded batch strays.
    ///
    /// # Errors
    /// If a number on the way is not finite; the message names the request.
    pub fn compare(
        &self,
        model: &Model,
        spared: &Spared,
        batch: &mut CacheBatch,
        prompts: &[Prompt],
    ) -> Result<Comparison> {
        let vocab = model.decoder.config().vocab;
        let mut targets = Vec::with_capacity(prompts.len());
        let attention = teacher_force(model, spared, batch, prompts, |i, logits| {
            let rows: Vec<(&[f32], &[f32], u32)> = self.logits[i]
                .chunks_exact(vocab)
                .zip(logits.chunks_exact(vocab))
                .zip(&prompts[i].targets)
                .map(|((p, q), &target)| (p, q, target))
                .collect();
            let tokens: Option<Vec<Divergence>> =
                rows.par_iter().map(|&(p, q, t)| divergence(p, q, t)).collect();
            targets.push(tokens.ok_or_else(|| {
                let id = &prompts[i].id;
                Error::Number(format!(
                    "request {id}: its next-token logits are not finite; use another model"
                ))
            })?);
            Ok(())
        })?;
        let error = self.attention.iter().zip(&attention).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let energy = self.attention.iter().map(|&a| f64::from(a).powi(2)).sum();
        Ok(Comparison { targets, attention: (error, energy) })
    }
}

/// One target token: reference logits `p`, this arm's logits `q`. `None` where a number is not finite.
pub fn divergence(p: &[f32], q: &[f32], target: u32) -> Option<Divergence> {
    let (p_norm, q_norm) = (log_sum_exp(p), log_sum_exp(q));
    let shift = p_norm - q_norm;
    let kl: f64 =
        p.iter().zip(q).map(|(&p, &q)| (f64::from(p) - p_norm).exp() * (f64::from(p - q) - shift)).sum();
    let nll = q_norm - f64::from(q[target as usize]);
    (kl.is_finite() && nll.is_finite()).then(|| Divergence {
        nll,
        // Rounding can leave a KL of two equal distributions a hair below zero.
        kl: kl.max(0.0),
        top1: argmax(p) == argmax(q),
    })
}

/// Greedy answers of all requests, decoded together; an answer ends at `stop`, an end-of-text token or its
/// request's `max_tokens`.
pub fn answers(
    model: &Model,
    spared: &Spared,
    batch: &mut CacheBatch,
    prompts: &[Prompt],
    stop: Option<&str>,
    max_tokens: &[usize],
) -> Result<Vec<Vec<u32>>> {
    on_forks(batch, |batch, forks| {
        let mut answers: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
        let mut next: Vec<u32> = prompts.iter().map(|p| p.tokens[p.tokens.len() - 1]).collect();
        let mut open: Vec<bool> = vec![true; prompts.len()];
        if let Some(first) = &spared.0 {
            for i in 0..prompts.len() {
                next[i] = model.generation.next(&first[i], &prompts[i].tokens, &[]);
                open[i] = extend(model, &mut answers[i], next[i], stop, max_tokens[i])?;
            }
        }
        while open.contains(&true) {
            interrupt::check()?;
            let active: Vec<usize> = (0..prompts.len()).filter(|&i| open[i]).collect();
            let tokens: Vec<[u32; 1]> = next.iter().map(|&t| [t]).collect();
            let mut segments: Vec<Segment> = forks
                .iter_mut()
                .zip(&tokens)
                .zip(&open)
                .filter(|(_, open)| **open)
                .map(|((cache, tokens), _)| Segment { cache, tokens })
                .collect();
            let hidden = model.decoder.forward(&mut batch.pool, &mut segments, None);
            let hidden = hidden.map_err(|f| f.of(|i| &prompts[active[i]].id))?;
            let logits = model.decoder.logits(&hidden);
            for (&i, row) in active.iter().zip(logits.chunks_exact(model.decoder.config().vocab)) {
                next[i] = model.generation.next(row, &prompts[i].tokens, &answers[i]);
                open[i] = extend(model, &mut answers[i], next[i], stop, max_tokens[i])?;
            }
        }
        Ok(answers)
    })
}

/// Adds a token to an answer; false when the answer is complete. An end-of-text token is not added.
fn extend(
    model: &Model,
    answer: &mut Vec<u32>,
    token: u32,
    stop: Option<&str>,
    max_tokens: usize,
) -> Result<bool> {
    if model.tokenizer.is_end(token) {
        return Ok(false);
    }
    answer.push(token);
    let stopped = match stop {
        Some(stop) => model.tokenizer.decode(answer)?.contains(stop),
        None => false,
    };
    Ok(!stopped && answer.len() < max_tokens)
}

/// Text of an answer up to `stop`, with the white space around it, which some metrics count.
pub fn answer_text(model: &Model, tokens: &[u32], stop: Option<&str>) -> Result<String> {
    let text = model.tokenizer.decode(tokens)?;
    Ok(stop.map_or(text.as_str(), |stop| text.split(stop).next().unwrap_or_default()).to_owned())
}
