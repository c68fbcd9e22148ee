//! Requests encoded and decoded together, ready for any arm: what all arms share of them, and what one arm does to them.

use super::arms::Packing;
use super::evaluate::{Base, Divergence, Prompt, Reference, answer_text, answers};
use super::rows::{RequestScore, Timings};
use super::settings::SweepOptions;
use crate::block::{CodedPages, Storage};
use crate::codec::evict::{observe, show_attention};
use crate::codec::{
    CacheBatch, Chain, Codec, Distortion, Ledger, Memo, Prefix, distortion_by_layer, distortion_in,
};
use crate::dump::Manifest;
use crate::encoded::load_caches;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::Model;
use crate::stats::rounded;
use crate::task::{Metric, exact_match, token_f1};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Instant;

/// Target tokens of an answer beyond this many are not scored; a text is scored as far as the data says.
pub(super) const MOST_TARGETS: usize = 64;

/// What is swept, and by what it is decoded.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub model: &'a Model,
    pub options: &'a SweepOptions,
    pub manifest: &'a Manifest,
}

/// Requests encoded and decoded together, ready for any arm.
pub struct Lot<'a> {
    source: Source<'a>,
    base: Base,
    prompts: Vec<Prompt>,
    /// Longest answer of each request, in tokens.
    answer_limits: Vec<usize>,
    reference: Reference,
    /// Blocks and similarities of the unfused caches.
    memo: Memo,
    /// Indices of the requests in the dump.
    requests: Vec<usize>,
    /// Exact prefix sharing: between all requests, and within tenants.
    prefix: [Ledger; 2],
}

/// What one arm did to one lot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Piece {
    /// The arm's id.
    pub run: String,
    pub ledger: Ledger,
    /// Exact prefix sharing of the same requests: between all, and within tenants.
    pub prefix: [Ledger; 2],
    /// Layer by layer.
    pub errors: Vec<Distortion>,
    /// Squared error and energy of attention outputs.
    pub attention: (f64, f64),
    pub requests: Vec<RequestScore>,
    pub timings: Timings,
}

impl Piece {
    /// Puts the next lot's piece behind this one.
    pub fn join(&mut self, next: Piece) {
        self.ledger += &next.ledger;
        self.prefix.iter_mut().zip(&next.prefix).for_each(|(mine, theirs)| *mine += theirs);
        self.errors.iter_mut().zip(next.errors).for_each(|(error, sum)| *error += sum);
        self.attention = (self.attention.0 + next.attention.0, self.attention.1 + next.attention.1);
        self.requests.extend(next.requests);
        self.timings.fuse_seconds += next.timings.fuse_seconds;
        self.timings.score_seconds += next.timings.score_seconds;
        self.timings.decode_seconds += next.timings.decode_seconds;
        self.timings.generated_tokens += next.timings.generated_tokens;
    }
}

impl<'a> Lot<'a> {
    /// `requests`: indices in the dump. `plain`: what the no-fusion arm made of them, if it has run already.
    pub fn new(
        source: Source<'a>,
        requests: &[usize],
        packing: Packing,
        plain: Option<&[RequestScore]>,
    ) -> Result<Self> {
        interrupt::check()?;
        let Source { model, options, manifest } = source;
        let answer_limits: Vec<usize> = requests.iter().map(|&i| options.answer_limit(manifest, i)).collect();
        let (batch, mut prompts) = load(&options.dump, model, manifest, requests, packing.block_size)?;
        let mut base = Base::new(model, batch, &prompts, packing.first_token)?;
        if options.memory.is_some() {
            // Packing must not change a sweep.
            base.batch.pool.hold_coded(CodedPages::Packed);
        }
        let shared = |within_tenant| {
            let codec = Prefix { within_tenant };
            let mut shared = base.batch.clone();
            codec.encode(&mut shared, &Memo::default())?;
            Ok(Ledger::of(&shared, &codec.coverage(model.decoder.config().layers)))
        };
        let prefix = [shared(false)?, shared(true)?];
        let unasked = |&i: &usize| manifest.requests[i].request.references.is_empty();
        let own: Vec<Vec<u32>> = match plain {
            Some(scores) => scores.iter().map(|r| r.answer_tokens.clone()).collect(),
            None if requests.iter().any(unasked) => {
                let stop = manifest.stop.as_deref();
                answers(model, &base.spared, &mut base.batch, &prompts, stop, &answer_limits)?
            }
            None => vec![Vec::new(); requests.len()],
        };
        for ((&i, prompt), own) in requests.iter().zip(&mut prompts).zip(&own) {
            (prompt.targets, prompt.answer) = targets(model, manifest, i, own)?;
        }
        let reference = Reference::of(model, &mut base, &prompts)?;
        let memo = Memo::default();
        let requests = requests.to_vec();
        Ok(Lot { source, base, prompts, answer_limits, reference, memo, requests, prefix })
    }

    /// Requests in it.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// The unfused caches.
    pub fn batch(&self) -> &CacheBatch {
        &self.base.batch
    }

    /// Encodes, compares and answers by one arm. `plain`: what the no-fusion arm made of the same requests, if this is not it.
    pub fn measure(&self, run: &str, chain: &Chain, plain: Option<&[RequestScore]>) -> Result<Piece> {
        interrupt::check()?;
        let Source { model, manifest, .. } = self.source;
        let layers = model.decoder.config().layers;
        let stop = manifest.stop.as_deref();
        let mut timings = Timings::default();
        let started = Instant::now();
        let mut batch = encode_batch(model, &self.base.batch, &self.memo, chain)?;
        timings.fuse_seconds = started.elapsed().as_secs_f64();
        let ledger = Ledger::of(&batch, &chain.coverage(layers));
        let (errors, drifts) = distortion_by_layer(&self.base.batch, &batch, 0..layers);

        let started = Instant::now();
        let compared = self.reference.compare(model, &self.base.spared, &mut batch, &self.prompts)?;
        let divergences = compared.targets;
        timings.score_seconds = started.elapsed().as_secs_f64();

        let started = Instant::now();
        let tokens = answers(model, &self.base.spared, &mut batch, &self.prompts, stop, &self.answer_limits)?;
        timings.decode_seconds = started.elapsed().as_secs_f64();
        timings.generated_tokens = tokens.iter().map(Vec::len).sum();
        let mut scores = Vec::with_capacity(tokens.len());
        for (i, answer_tokens) in tokens.into_iter().enumerate() {
            let request = &manifest.requests[self.requests[i]].request;
            let answer = answer_text(model, &answer_tokens, stop)?;
            let asked = !request.references.is_empty() && request.metric != Metric::Likelihood;
            let plain = plain.map_or(&answer_tokens, |scores| &scores[i].answer_tokens);
            scores.push(RequestScore {
                id: request.id.clone(),
                tenant: request.tenant.clone(),
                f1: asked.then(|| token_f1(&answer, &request.references)),
                em: asked.then(|| exact_match(&answer, &request.references)),
                score: request.metric.score(&answer, &request.references, &request.classes),
                answer: answer.trim().to_owned(),
                nll: mean_of(&divergences[i][..self.prompts[i].answer.max(1)], |d| d.nll),
                kl: mean_of(&divergences[i], |d| d.kl),
                top1: mean_of(&divergences[i], |d| f64::from(u8::from(d.top1))),
                token_kl: divergences[i].iter().map(|d| rounded(d.kl)).collect(),
                first_divergence: first_divergence(plain, &answer_tokens),
                fused_blocks: drifts[i].fused_blocks,
                worst_block_error: drifts[i].worst_block_error,
                answer_tokens,
            });
        }
        Ok(Piece {
            run: run.to_owned(),
            ledger,
            prefix: self.prefix.clone(),
            errors,
            attention: compared.attention,
            requests: scores,
            timings,
        })
    }

    /// Rate of a codec and the KL of every request (nats a token), without answers.
    pub fn rate_and_kl(&self, codec: &dyn Codec) -> Result<(Ledger, Vec<f64>)> {
        interrupt::check()?;
        let model = self.source.model;
        let mut batch = self.base.batch.clone();
        show_attention(&mut batch, codec, &self.memo, |b, needs| observe(model, b, needs))?;
        codec.encode(&mut batch, &self.memo)?;
        let ledger = Ledger::of(&batch, &codec.coverage(model.decoder.config().layers));
        let compared = self.reference.compare(model, &self.base.spared, &mut batch, &self.prompts)?;
        Ok((ledger, compared.targets.iter().map(|d| mean_of(d, |d| d.kl)).collect()))
    }

    /// Rate of a codec, and its distortion of the layers it touches.
    pub fn rate_and_distortion(&self, codec: &dyn Codec) -> Result<(Ledger, Distortion)> {
        interrupt::check()?;
        let coverage = codec.coverage(self.source.model.decoder.config().layers);
        let mut batch = self.base.batch.clone();
        codec.encode(&mut batch, &self.memo)?;
        let error = distortion_in(&self.base.batch, &batch, coverage.layers.clone()).0;
        Ok((Ledger::of(&batch, &coverage), error))
    }
}

/// Unfused caches as an arm stores them.
pub fn encode_batch(model: &Model, base: &CacheBatch, memo: &Memo, chain: &Chain) -> Result<CacheBatch> {
    match chain.chunks() {
        None => {
            let mut batch = base.clone();
            show_attention(&mut batch, chain, memo, |b, needs| observe(model, b, needs))?;
            chain.encode(&mut batch, memo)?;
            Ok(batch)
        }
        Some(chunks) => {
            let mut batch = CacheBatch::empty(base.pool.shape(), Storage::F16, base.ropes.clone());
            for (tokens, tenant) in base.tokens.iter().zip(&base.tenants) {
                batch.push(model.decoder.new_cache(), tokens.clone(), tenant);
                chunks.prefill(&model.decoder, &mut batch)?;
            }
            chain.encode_rest(&mut batch)?;
            Ok(batch)
        }
    }
}

/// Mean of a number over a request's target tokens.
fn mean_of(tokens: &[Divergence], f: impl Fn(&Divergence) -> f64) -> f64 {
    tokens.iter().map(f).sum::<f64>() / tokens.len() as f64
}

/// The first token in which two answers differ; none if they are equal.
fn first_divergence(a: &[u32], b: &[u32]) -> Option<usize> {
    let common = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    (common < a.len().max(b.len())).then_some(common)
}

/// Caches of some requests, all prompt tokens but the last, in blocks of f16 numbers.
pub fn load(
    dump: &Path,
    model: &Model,
    manifest: &Manifest,
    requests: &[usize],
    block_size: usize,
) -> Result<(CacheBatch, Vec<Prompt>)> {
    let (batch, tokens) = load_caches(dump, manifest, requests, block_size, model.decoder.ropes(), 1)?;
    let prompt = |(&i, tokens): (&usize, Vec<u32>)| Prompt {
        tokens,
        targets: Vec::new(),
        answer: 0,
        id: manifest.requests[i].request.id.clone(),
    };
    Ok((batch, requests.iter().zip(tokens).map(prompt).collect()))
}

/// The tokens a request's distributions are compared on, and how many of them are an answer's own: its first reference
/// answer as it continues the prompt, or the no-fusion arm's own answer where there is none; then what ends it, the stop text
/// of the data or the model's own token.
pub fn targets(model: &Model, manifest: &Manifest, i: usize, answer: &[u32]) -> Result<(Vec<u32>, usize)> {
    let request = &manifest.requests[i].request;
    let tokenizer = &model.tokenizer;
    let follow = |text: &str| match manifest.chat {
        true => tokenizer.chat_continuation(&request.prompt, text),
        false => tokenizer.continuation(&request.prompt, text),
    };
    let mut targets = match request.references.first() {
        Some(reference) => {
            let before =
                if manifest.chat { tokenizer.render(&request.prompt)? } else { request.prompt.clone() };
            let ends = before.is_empty() || before.ends_with(char::is_whitespace);
            let space = if ends || request.metric == Metric::Likelihood { "" } else { " " };
            follow(&format!("{space}{reference}"))?
        }
        None => answer.to_vec(),
    };
    let most = if request.metric == Metric::Likelihood { usize::MAX } else { MOST_TARGETS };
    let whole = targets.len() <= most;
    targets.truncate(most);
    let own = targets.len();
    if own == 0 || whole && request.metric != Metric::Likelihood {
        let end = match manifest.stop.as_deref().filter(|_| own > 0) {
            Some(stop) => tokenizer.encode(stop)?.last().copied(),
            None => tokenizer.end(manifest.chat),
        };
        targets.extend(end);
    }
    if targets.is_empty() {
        let message =
            format!("request {}: the model answers nothing and names no token that ends a text", request.id);
        return Err(Error::argument(message));
    }
    Ok((targets, own))
}
