//! `kvfuse model try`: what a model says of one prompt, for comparison with other implementations.

use super::Model;
use crate::block::{BlockPool, RequestCache, Storage};
use crate::error::{Error, Result};
use crate::model::Segment;
use serde::Serialize;

/// One prompt through a model.
#[derive(Debug, Serialize)]
pub struct Probe {
    pub ids: Vec<u32>,
    /// The ten highest next-token logits.
    pub top10: Vec<Candidate>,
    pub logsumexp: f64,
    /// Mean negative log-likelihood of the prompt's own tokens after the first, nats a token.
    pub nll_prompt: f64,
    pub greedy_ids: Vec<u32>,
    pub greedy_text: String,
    /// Keys and values of the prompt, for tests.
    #[serde(skip)]
    pub pool: BlockPool,
    #[serde(skip)]
    pub cache: RequestCache,
}

#[derive(Debug, Serialize)]
pub struct Candidate {
    pub id: u32,
    pub text: String,
    pub logit: f32,
}

/// ln sum exp of logits.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + logits.iter().map(|&x| f64::from(x - max).exp()).sum::<f64>().ln()
}

/// The id of the highest logit; the lowest id where several are equal.
pub fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().fold(
        (0, f32::NEG_INFINITY),
        |best, (i, &x)| {
            if x > best.1 { (i, x) } else { best }
        },
    );
    best.0 as u32
}

/// Feeds `prompt` and continues it greedily by `tokens` tokens, through end-of-text tokens.
pub fn probe(model: &Model, prompt: &str, tokens: usize) -> Result<Probe> {
    let decoder = &model.decoder;
    let ids = model.tokenizer.encode_prompt(prompt)?;
    if ids.is_empty() {
        return Err(Error::argument("the prompt is empty"));
    }
    if ids.len().saturating_add(tokens) > decoder.context() {
        let message = format!(
            "the prompt's {} tokens and {tokens} more exceed the model's context of {} tokens",
            ids.len(),
            decoder.context()
        );
        return Err(Error::argument(message));
    }
    let mut pool = BlockPool::new(decoder.block_shape(16), Storage::F32);
    let mut cache = decoder.new_cache();
    let hidden = decoder.forward(&mut pool, &mut [Segment { cache: &mut cache, tokens: &ids }], None);
    let own = "of this prompt".to_owned();
    let hidden = hidden.map_err(|f| f.of(|_| &own))?;
    let vocab = decoder.config().vocab;
    let logits = decoder.logits(&hidden);
    let rows: Vec<&[f32]> = logits.chunks_exact(vocab).collect();
    let nll = rows.iter().zip(&ids[1..]).map(|(row, &id)| log_sum_exp(row) - f64::from(row[id as usize]));
    let nll_prompt = nll.sum::<f64>() / (ids.len().max(2) - 1) as f64;
    let last = rows[rows.len() - 1];

    let mut order: Vec<u32> = (0..vocab as u32).collect();
    order.sort_by(|&a, &b| last[b as usize].total_cmp(&last[a as usize]));
    let candidate =
        |&id: &u32| Ok(Candidate { id, text: model.tokenizer.decode(&[id])?, logit: last[id as usize] });
    let top10 = order[..10.min(vocab)].iter().map(candidate).collect::<Result<_>>()?;

    let mut greedy_ids = vec![model.generation.next(last, &ids, &[])];
    let mut continued = cache.fork(&mut pool);
    while greedy_ids.len() < tokens {
        let last = [greedy_ids[greedy_ids.len() - 1]];
        let hidden =
            decoder.forward(&mut pool, &mut [Segment { cache: &mut continued, tokens: &last }], None);
        let hidden = hidden.map_err(|f| f.of(|_| &own))?;
        let next = model.generation.next(&decoder.logits(&hidden), &ids, &greedy_ids);
        greedy_ids.push(next);
    }
    continued.release(&mut pool);
    greedy_ids.truncate(tokens);
    Ok(Probe {
        logsumexp: log_sum_exp(last),
        nll_prompt,
        top10,
        greedy_text: model.tokenizer.decode(&greedy_ids)?,
        greedy_ids,
        ids,
        pool,
        cache,
    })
}
