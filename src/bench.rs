//! What this machine does with the work that kvfuse gives it, as shares of its matrix-product rate in the same run.

use crate::block::{BlockPool, RequestCache, Storage};
use crate::codec::fusion::{Choices, Fusion, Pairing, Rule, gram};
use crate::codec::{CacheBatch, Codec, Memo};
use crate::dump::shared_prefix;
use crate::error::{Error, Result};
use crate::model::gemm::{Linear, View, product};
use crate::model::kernels::FMA_CHAINS;
use crate::model::{Decoder, Model, Segment, argmax};
use crate::progress::{Progress, Unit};
use crate::task::Draw;
use crate::{interrupt, task};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::Instant;

/// One line of the report.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    pub what: String,
    pub seconds: f64,
    /// Tokens a second, where tokens are made.
    pub tokens_per_second: Option<f64>,
    /// 2 x non-embedding parameters x tokens, or the product's own operations.
    pub gflops: Option<f64>,
    /// `gflops` as a share of the machine's f32 matrix product in this run.
    pub share_of_gemm: Option<f64>,
    /// `gflops` as a share of one core's fused multiply-adds in this run, where one core did the work.
    pub share_of_core: Option<f64>,
}

/// Side of the square product that stands for the machine: larger than any cache of one core.
const GEMM_SIDE: usize = 2048;
const PREFILL_TOKENS: usize = 512;
const DECODE_BATCHES: [usize; 3] = [1, 8, 32];
/// Tokens in each cache when decoding begins, and tokens then made.
const DECODE_CONTEXT: usize = 256;
const DECODE_STEPS: usize = 8;
/// A batch for fusion: few-shot questions of `builtin:qa`.
const FUSION_REQUESTS: usize = 64;
const FUSION_SHOTS: usize = 3;
const FUSION_TAU: f64 = 0.9;
/// A layer's blocks for the similarities alone.
const GRAM_BLOCKS: usize = 2048;
const GRAM_WIDTH: usize = 16_384;
/// Enough to take milliseconds.
const FMA_ROUNDS: usize = 200_000;
const BLOCK_SIZE: usize = 16;
/// Each measurement is the best of so many: the others were disturbed.
const REPEATS: usize = 5;

/// Measures the FMA peak, GEMM, similarities, prefill, batched decode and fusion with one model.
pub fn bench(model: &str) -> Result<Vec<Measurement>> {
    let model = Model::load(model)?;
    let decoder = &model.decoder;
    let progress = Progress::new("measuring", 5 + DECODE_BATCHES.len() as u64, Unit::Items("parts"));
    let (peak, similarities) = on_one_thread(|| Ok((fma_gflops()?, gram_seconds()?)))?;
    progress.increment();
    let gemm = gemm_gflops()?;
    progress.increment();
    let line = |what: String, seconds: f64, gflops: Option<f64>| Measurement {
        what,
        seconds,
        tokens_per_second: None,
        gflops,
        share_of_gemm: gflops.map(|g| g / gemm),
        share_of_core: None,
    };
    let side = GEMM_SIDE as f64;
    let mut out = vec![
        Measurement {
            share_of_core: Some(1.0),
            ..line("fused multiply-adds, one core".to_owned(), 0.0, Some(peak))
        },
        line(
            format!("f32 matrix product, {GEMM_SIDE} cubed, {} threads", rayon::current_num_threads()),
            2e-9 * side.powi(3) / gemm,
            Some(gemm),
        ),
    ];
    for (what, seconds, rows) in [
        ("matrix product of the same size, one core", similarities.0, 2 * GRAM_BLOCKS),
        // A symmetric product has half the operations: only those are counted.
        ("similarities of a layer, one core", similarities.1, GRAM_BLOCKS + 1),
    ] {
        let gflops = 1e-9 * (rows * GRAM_BLOCKS * GRAM_WIDTH) as f64 / seconds;
        let what = format!("{what}, {GRAM_BLOCKS} x {GRAM_WIDTH}");
        out.push(Measurement { share_of_core: Some(gflops / peak), ..line(what, seconds, Some(gflops)) });
    }
    let tokens_line = |what: String, tokens: usize, seconds: f64| {
        let gflops = 2e-9 * decoder.config().non_embedding_parameters() as f64 * tokens as f64 / seconds;
        Measurement { tokens_per_second: Some(tokens as f64 / seconds), ..line(what, seconds, Some(gflops)) }
    };
    let seconds = prefill_seconds(decoder, &tokens(PREFILL_TOKENS, decoder))?;
    out.push(tokens_line(format!("prefill of {PREFILL_TOKENS} tokens"), PREFILL_TOKENS, seconds));
    progress.increment();
    for sequences in DECODE_BATCHES {
        let seconds = decode_seconds(decoder, sequences)?;
        let what = format!("decode, {sequences} sequences at {DECODE_CONTEXT} tokens, output head included");
        out.push(tokens_line(what, sequences * DECODE_STEPS, seconds));
        progress.increment();
    }
    let batch = real_batch(&model)?;
    progress.increment();
    let request = &batch.tokens[0];
    let seconds = prefill_seconds(decoder, request)?;
    let what = format!("prefill of one of the {FUSION_REQUESTS} requests below, {} tokens", request.len());
    out.push(tokens_line(what, request.len(), seconds));
    for pairing in [Pairing::Tree, Pairing::Best, Pairing::Components, Pairing::Lsh] {
        let representative = pairing.usual_representative();
        let codec =
            Fusion::new(Choices { pairing, representative, ..Choices::default() }, Rule::Tau(FUSION_TAU))?;
        let name = format!("{pairing:?}").to_lowercase();
        let what = format!("{name} fusion of {FUSION_REQUESTS} requests, all layers, tau {FUSION_TAU}");
        let first = best(|| codec.encode(&mut batch.clone(), &Memo::default()))?;
        let memo = Memo::default();
        codec.encode(&mut batch.clone(), &memo)?;
        let further = best(|| codec.encode(&mut batch.clone(), &memo))?;
        out.push(line(format!("{what}, similarities included"), first, None));
        out.push(line(format!("{what}, similarities known"), further, None));
    }
    progress.increment();
    progress.finish();
    Ok(out)
}

/// Least wall-clock time of several runs.
fn best<T>(mut run: impl FnMut() -> Result<T>) -> Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..REPEATS {
        interrupt::check()?;
        let started = Instant::now();
        std::hint::black_box(run()?);
        least = least.min(started.elapsed().as_secs_f64());
    }
    Ok(least)
}

/// Runs `f` where parallel work has one thread.
fn on_one_thread<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    pool.map_err(|e| Error::argument(e.to_string()))?.install(f)
}

fn fma_gflops() -> Result<f64> {
    let mut most = 0.0f64;
    for chains in FMA_CHAINS {
        let (operations, _) = chains(FMA_ROUNDS, 0.999, 0.001);
        let seconds =
            best(|| Ok(chains(FMA_ROUNDS, std::hint::black_box(0.999), std::hint::black_box(0.001))))?;
        most = most.max(1e-9 * operations as f64 / seconds);
    }
    Ok(most)
}

/// Seconds of a general product of a layer's blocks with themselves, and of the symmetric one that fusion uses.
fn gram_seconds() -> Result<(f64, f64)> {
    let rows = random(GRAM_BLOCKS * GRAM_WIDTH, &mut ChaCha8Rng::seed_from_u64(2));
    let view = View::row_major(&rows, GRAM_BLOCKS, GRAM_WIDTH);
    let mut out = vec![0.0; GRAM_BLOCKS * GRAM_BLOCKS];
    let general = best(|| {
        product(view, view.transposed(), &mut out);
        Ok(())
    })?;
    Ok((general, best(|| Ok(gram(&rows, GRAM_WIDTH)))?))
}

/// Caches of the built-in questions.
fn real_batch(model: &Model) -> Result<CacheBatch> {
    let decoder = &model.decoder;
    let set = task::load(&Draw::plain("builtin:qa", FUSION_REQUESTS, FUSION_SHOTS, 0), &|_| Ok(0))?;
    let prompts: Vec<Vec<u32>> =
        set.requests.iter().map(|r| model.tokenizer.encode_prompt(&r.prompt)).collect::<Result<_>>()?;
    let common = shared_prefix(&prompts);
    let mut batch = CacheBatch::empty(decoder.block_shape(BLOCK_SIZE), Storage::F16, decoder.ropes());
    let mut prefix = decoder.new_cache();
    feed(decoder, &mut batch.pool, &mut [Segment { cache: &mut prefix, tokens: &prompts[0][..common] }])?;
    for prompt in prompts {
        interrupt::check()?;
        let mut cache = prefix.fork(&mut batch.pool);
        let tokens = &prompt[common..];
        feed(decoder, &mut batch.pool, &mut [Segment { cache: &mut cache, tokens }])?;
        // Every request owns its blocks, as it does when it comes from a dump.
        for table in &mut cache.layers {
            for entry in &mut table.entries {
                let (keys, values) =
                    (batch.pool.keys(entry.block).into_owned(), batch.pool.values(entry.block).into_owned());
                batch.pool.release(entry.block);
                entry.block = batch.pool.allocate(&keys, &values);
            }
        }
        batch.push(cache, prompt, "");
    }
    prefix.release(&mut batch.pool);
    Ok(batch)
}

fn random(n: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn gemm_gflops() -> Result<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let square = GEMM_SIDE * GEMM_SIDE;
    let (a, b) = (random(square, &mut rng), random(square, &mut rng));
    let linear = Linear::from_rows(&[&b], GEMM_SIDE);
    let seconds = best(|| Ok(linear.apply(&a)))?;
    Ok(2e-9 * (GEMM_SIDE as f64).powi(3) / seconds)
}

/// Tokens that mean nothing: time does not depend on them.
fn tokens(n: usize, decoder: &Decoder) -> Vec<u32> {
    (0..n).map(|i| (i * 7919 % decoder.config().vocab) as u32).collect()
}

/// Final hidden states of the segments' tokens.
fn feed(decoder: &Decoder, pool: &mut BlockPool, segments: &mut [Segment]) -> Result<Vec<f32>> {
    decoder.forward(pool, segments, None).map_err(|f| f.of(|_| const { &String::new() }))
}

fn prefill_seconds(decoder: &Decoder, tokens: &[u32]) -> Result<f64> {
    best(|| {
        let mut pool = BlockPool::new(decoder.block_shape(BLOCK_SIZE), Storage::F32);
        let mut cache = decoder.new_cache();
        feed(decoder, &mut pool, &mut [Segment { cache: &mut cache, tokens }]).map(|_| ())
    })
}

fn decode_seconds(decoder: &Decoder, sequences: usize) -> Result<f64> {
    let context = tokens(DECODE_CONTEXT, decoder);
    let mut pool = BlockPool::new(decoder.block_shape(BLOCK_SIZE), Storage::F32);
    let mut caches: Vec<RequestCache> = (0..sequences).map(|_| decoder.new_cache()).collect();
    for cache in &mut caches {
        feed(decoder, &mut pool, &mut [Segment { cache, tokens: &context }])?;
    }
    best(|| {
        let mut forks: Vec<RequestCache> = caches.iter().map(|c| c.fork(&mut pool)).collect();
        let mut next = vec![[1u32]; sequences];
        for _ in 0..DECODE_STEPS {
            let mut segments: Vec<Segment> =
                forks.iter_mut().zip(&next).map(|(cache, tokens)| Segment { cache, tokens }).collect();
            let hidden = feed(decoder, &mut pool, &mut segments)?;
            let logits = decoder.logits(&hidden);
            next = logits.chunks_exact(decoder.config().vocab).map(|row| [argmax(row)]).collect();
        }
        for fork in forks {
            fork.release(&mut pool);
        }
        Ok(())
    })
}
