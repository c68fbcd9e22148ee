//! What serving did to answers: the distributions that tokens were drawn from beside those of exact caches.

use super::job::Job;
use crate::block::{BlockPool, Storage};
use crate::dump::shared_prefix;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::{Model, Segment};
use crate::sweep::divergence;

/// A request whose logits were kept: its answer as served, and the logits (at least one row) each of the first tokens came from.
pub struct Witness<'a> {
    pub job: &'a Job,
    pub answer: &'a [u32],
    pub logits: &'a [Vec<f32>],
}

/// Mean KL (nats a token) of each request, exact caches || as served, over the tokens whose logits were kept.
///
/// # Errors
/// Logits that are no numbers.
pub fn divergences(model: &Model, block_size: usize, witnesses: &[Witness]) -> Result<Vec<f64>> {
    let decoder = &model.decoder;
    let mut pool = BlockPool::new(decoder.block_shape(block_size), Storage::F16);
    let prompts: Vec<Vec<u32>> = witnesses.iter().map(|w| w.job.prompt.clone()).collect();
    let common = if prompts.is_empty() { 0 } else { shared_prefix(&prompts) };
    let first = witnesses.first().map_or(String::new(), |w| w.job.id.to_string());
    let mut prefix = decoder.new_cache();
    if common > 0 {
        let mut segments = [Segment { cache: &mut prefix, tokens: &prompts[0][..common] }];
        decoder.forward(&mut pool, &mut segments, None).map_err(|f| f.of(|_| &first))?;
    }
    let mut kl = Vec::with_capacity(witnesses.len());
    for witness in witnesses {
        interrupt::check()?;
        let kept = witness.logits.len();
        let fed = kept.saturating_sub(1).min(witness.answer.len());
        let tokens = [&witness.job.prompt[common..], &witness.answer[..fed]].concat();
        let mut cache = prefix.fork(&mut pool);
        let mut segments = [Segment { cache: &mut cache, tokens: &tokens }];
        let id = witness.job.id.to_string();
        let hidden = decoder.forward(&mut pool, &mut segments, None).map_err(|f| f.of(|_| &id))?;
        let width = decoder.config().hidden;
        let exact = decoder.logits(&hidden[hidden.len() - (fed + 1) * width..]);
        let pairs = exact.chunks_exact(decoder.config().vocab).zip(witness.logits);
        let own: Option<Vec<f64>> = pairs.map(|(p, q)| Some(divergence(p, q, 0)?.kl)).collect();
        let own = own.ok_or_else(|| {
            Error::Number(format!("request {id}: its next-token logits are not finite; use another model"))
        })?;
        kl.push(crate::stats::mean(&own));
        cache.release(&mut pool);
    }
    Ok(kl)
}
