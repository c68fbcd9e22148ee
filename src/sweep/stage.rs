//! Requests loaded and ready for any arm: what all arms of one block size share, and how one is measured.

use super::arms::{Arm, Packing};
use super::evaluate::{Base, Divergence, Prompt, Reference, answer_text, answers};
use super::rows::{LayerScore, Measured, RequestScore, Row, Setting, Timings};
use super::runs::RunRecord;
use super::settings::SweepOptions;
use crate::block::Storage;
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
use std::path::Path;
use std::time::Instant;

/// Target tokens of a request beyond this many are not scored.
const MOST_TARGETS: usize = 64;

/// Requests fused and decoded together, ready for any arm.
struct Lot {
    base: Base,
    prompts: Vec<Prompt>,
    /// Longest answer of each request, in tokens.
    answer_limits: Vec<usize>,
    reference: Reference,
    /// Blocks and similarities of the unfused caches.
    memo: Memo,
    /// Indices of the requests in the dump.
    requests: Vec<usize>,
}

/// Everything the arms of one packing share.
pub struct Stage<'a> {
    model: &'a Model,
    manifest: &'a Manifest,
    lots: Vec<Lot>,
    baseline: Option<Vec<RequestScore>>,
    /// Audited ratio of exact prefix sharing: between all requests, and within tenants.
    cr_prefix: [f64; 2],
}

impl<'a> Stage<'a> {
    /// `requests`: indices in the dump. `baseline`: the no-fusion arm, if it has been measured already.
    pub fn new(
        model: &'a Model,
        options: &SweepOptions,
        manifest: &'a Manifest,
        requests: &[usize],
        packing: Packing,
        baseline: Option<&RunRecord>,
    ) -> Result<Self> {
        let mut stage = Stage {
            model,
            manifest,
            lots: Vec::new(),
            baseline: baseline.map(|r| r.requests.clone()),
            cr_prefix: [1.0; 2],
        };
        let mut prefix = [Ledger::default(), Ledger::default()];
        check_room(model, options, manifest, requests)?;
        let mut done = 0;
        for requests in requests.chunks(packing.batch) {
            interrupt::check()?;
            let answer_limits: Vec<usize> =
                requests.iter().map(|&i| options.answer_limit(manifest, i)).collect();
            let (batch, mut prompts) = load(&options.dump, model, manifest, requests, packing.block_size)?;
            let mut base = Base::new(model, batch, &prompts, packing.first_token)?;
            for (within_tenant, ledger) in [false, true].into_iter().zip(&mut prefix) {
                let codec = Prefix { within_tenant };
                let mut shared = base.batch.clone();
                codec.encode(&mut shared, &Memo::default())?;
                *ledger += &Ledger::of(&shared, &codec.coverage(model.decoder.config().layers));
            }
            let unasked = |&i: &usize| manifest.requests[i].request.references.is_empty();
            let own: Vec<Vec<u32>> = match baseline {
                Some(r) => {
                    r.requests[done..][..requests.len()].iter().map(|r| r.answer_tokens.clone()).collect()
                }
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
            done += requests.len();
            stage.lots.push(Lot {
                base,
                prompts,
                answer_limits,
                reference,
                memo: Memo::default(),
                requests: requests.to_vec(),
            });
        }
        stage.cr_prefix = prefix.map(|ledger| ledger.cr_audited());
        Ok(stage)
    }

    /// Encodes, compares and answers all requests by one arm.
    pub fn run(&mut self, run: &str, setting: &Setting, arm: &Arm) -> Result<RunRecord> {
        let layers = self.model.decoder.config().layers;
        let coverage = arm.chain.coverage(layers);
        let mut ledger = Ledger::default();
        let mut errors = vec![Distortion::default(); layers];
        let mut attention = (0.0, 0.0);
        let mut scores = Vec::new();
        let mut timings = Timings::default();
        let stop = self.manifest.stop.as_deref();
        for lot in &self.lots {
            interrupt::check()?;
            let started = Instant::now();
            let mut batch = encode_batch(self.model, &lot.base.batch, &lot.memo, &arm.chain)?;
            timings.fuse_seconds += started.elapsed().as_secs_f64();
            ledger += &Ledger::of(&batch, &coverage);
            let (sums, drifts) = distortion_by_layer(&lot.base.batch, &batch, 0..layers);
            errors.iter_mut().zip(sums).for_each(|(error, sum)| *error += sum);

            let started = Instant::now();
            let compared = lot.reference.compare(self.model, &lot.base.spared, &mut batch, &lot.prompts)?;
            let divergences = compared.targets;
            timings.score_seconds += started.elapsed().as_secs_f64();
            attention = (attention.0 + compared.attention.0, attention.1 + compared.attention.1);

            let started = Instant::now();
            let tokens =
                answers(self.model, &lot.base.spared, &mut batch, &lot.prompts, stop, &lot.answer_limits)?;
            timings.decode_seconds += started.elapsed().as_secs_f64();
            timings.generated_tokens += tokens.iter().map(Vec::len).sum::<usize>();
            for (i, answer_tokens) in tokens.into_iter().enumerate() {
                let request = &self.manifest.requests[lot.requests[i]].request;
                let answer = answer_text(self.model, &answer_tokens, stop)?;
                let asked = !request.references.is_empty() && request.metric != Metric::Likelihood;
                let plain = self.baseline.as_ref().map_or(&answer_tokens, |b| &b[scores.len()].answer_tokens);
                scores.push(RequestScore {
                    id: request.id.clone(),
                    tenant: request.tenant.clone(),
                    f1: asked.then(|| token_f1(&answer, &request.references)),
                    em: asked.then(|| exact_match(&answer, &request.references)),
                    score: request.metric.score(&answer, &request.references, &request.classes),
                    answer: answer.trim().to_owned(),
                    nll: mean_of(&divergences[i][..lot.prompts[i].answer.max(1)], |d| d.nll),
                    kl: mean_of(&divergences[i], |d| d.kl),
                    top1: mean_of(&divergences[i], |d| f64::from(u8::from(d.top1))),
                    token_kl: divergences[i].iter().map(|d| rounded(d.kl)).collect(),
                    first_divergence: first_divergence(plain, &answer_tokens),
                    fused_blocks: drifts[i].fused_blocks,
                    worst_block_error: drifts[i].worst_block_error,
                    answer_tokens,
                });
            }
        }
        // The grid begins with the no-fusion arm, so this is it where there is no baseline yet.
        let baseline = self.baseline.get_or_insert_with(|| scores.clone());
        let mut distortion = Distortion::default();
        errors.iter().for_each(|error| distortion += *error);
        let layers = ledger.layers.iter().zip(&errors).map(|(rate, error)| LayerScore::new(rate, error));
        let layers = layers.collect();
        let measured = Measured {
            ledger: &ledger,
            distortion,
            attention,
            scores: &scores,
            baseline,
            cr_prefix: self.cr_prefix[usize::from(arm.chain.within_tenant())],
        };
        let row = Row::new(run, setting, arm, &measured);
        Ok(RunRecord { row, layers, requests: scores, timings })
    }

    /// Rate and KL (nats a token, mean over requests) of a codec, without answers; for calibration.
    pub fn rate_and_kl(&mut self, codec: &dyn Codec) -> Result<(Ledger, f64)> {
        let coverage = codec.coverage(self.model.decoder.config().layers);
        let mut ledger = Ledger::default();
        let mut kl = Vec::new();
        for lot in &self.lots {
            interrupt::check()?;
            let mut batch = lot.base.batch.clone();
            show_attention(&mut batch, codec, &lot.memo, |b, needs| observe(self.model, b, needs))?;
            codec.encode(&mut batch, &lot.memo)?;
            ledger += &Ledger::of(&batch, &coverage);
            let compared = lot.reference.compare(self.model, &lot.base.spared, &mut batch, &lot.prompts)?;
            kl.extend(compared.targets.iter().map(|d| mean_of(d, |d| d.kl)));
        }
        Ok((ledger, crate::stats::mean(&kl)))
    }

    /// Rate of a codec, and its distortion of the layers it touches.
    pub fn rate_and_distortion(&self, codec: &dyn Codec) -> Result<(Ledger, Distortion)> {
        let coverage = codec.coverage(self.model.decoder.config().layers);
        let mut ledger = Ledger::default();
        let mut error = Distortion::default();
        for lot in &self.lots {
            interrupt::check()?;
            let mut batch = lot.base.batch.clone();
            codec.encode(&mut batch, &lot.memo)?;
            ledger += &Ledger::of(&batch, &coverage);
            error += distortion_in(&lot.base.batch, &batch, coverage.layers.clone()).0;
        }
        Ok((ledger, error))
    }

    /// The unfused caches of all requests, lot by lot.
    pub fn batches(&self) -> impl Iterator<Item = &CacheBatch> {
        self.lots.iter().map(|lot| &lot.base.batch)
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

/// Whether the model's context holds every prompt with its answer.
fn check_room(model: &Model, options: &SweepOptions, manifest: &Manifest, requests: &[usize]) -> Result<()> {
    let room = model.decoder.context();
    for &i in requests {
        let (tokens, answer) =
            (manifest.requests[i].tokens, options.answer_limit(manifest, i).max(MOST_TARGETS));
        if tokens + answer > room {
            let message = format!(
                "request {} has {tokens} tokens: with an answer of {answer} (--max-new-tokens) it exceeds the model's context of {room}",
                manifest.requests[i].request.id,
            );
            return Err(Error::argument(message));
        }
    }
    Ok(())
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
    let whole = targets.len() <= MOST_TARGETS;
    targets.truncate(MOST_TARGETS);
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
