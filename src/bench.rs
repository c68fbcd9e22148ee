//! What this machine does with the work that kvfuse gives it, as shares of its matrix-product rate in the same run.

use crate::block::{BlockPool, BlockTable, RequestCache, Storage};
use crate::codec::fusion::Fusion;
use crate::codec::{CacheBatch, Codec, Memo};
use crate::error::Result;
use crate::interrupt;
use crate::model::gemm::Linear;
use crate::model::{Decoder, Model, Segment, argmax};
use crate::progress::{Progress, Unit};
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
}

/// Side of the square product that stands for the machine: larger than any cache of one core.
const GEMM_SIDE: usize = 2048;
const PREFILL_TOKENS: usize = 512;
const DECODE_BATCHES: [usize; 3] = [1, 8, 32];
/// Tokens in each cache when decoding begins, and tokens then made.
const DECODE_CONTEXT: usize = 256;
const DECODE_STEPS: usize = 8;
/// A batch for fusion: requests and full blocks each.
const FUSION_REQUESTS: usize = 64;
const FUSION_BLOCKS: usize = 25;
const BLOCK_SIZE: usize = 16;
/// Each measurement is the best of so many: the others were disturbed.
const REPEATS: usize = 5;

/// Measures GEMM, prefill, batched decode and fusion with one model.
pub fn bench(model: &str) -> Result<Vec<Measurement>> {
    let model = Model::load(model)?;
    let decoder = &model.decoder;
    let progress = Progress::new("measuring", 3 + DECODE_BATCHES.len() as u64, Unit::Items("parts"));
    let gemm = gemm_gflops()?;
    progress.increment();
    let side = GEMM_SIDE as f64;
    let mut out = vec![Measurement {
        what: format!("f32 matrix product, {GEMM_SIDE} cubed, {} threads", rayon::current_num_threads()),
        seconds: 2e-9 * side.powi(3) / gemm,
        tokens_per_second: None,
        gflops: Some(gemm),
        share_of_gemm: Some(1.0),
    }];
    let tokens_line = |what: String, tokens: usize, seconds: f64| {
        let gflops = 2e-9 * decoder.config().non_embedding_parameters() as f64 * tokens as f64 / seconds;
        Measurement {
            what,
            seconds,
            tokens_per_second: Some(tokens as f64 / seconds),
            gflops: Some(gflops),
            share_of_gemm: Some(gflops / gemm),
        }
    };
    let seconds = prefill_seconds(decoder)?;
    out.push(tokens_line(format!("prefill of {PREFILL_TOKENS} tokens"), PREFILL_TOKENS, seconds));
    progress.increment();
    for sequences in DECODE_BATCHES {
        let seconds = decode_seconds(decoder, sequences)?;
        let what = format!("decode, {sequences} sequences at {DECODE_CONTEXT} tokens, output head included");
        out.push(tokens_line(what, sequences * DECODE_STEPS, seconds));
        progress.increment();
    }
    let seconds = fusion_seconds(decoder)?;
    out.push(Measurement {
        what: format!(
            "tree fusion of {FUSION_REQUESTS} requests x {FUSION_BLOCKS} blocks, all layers, nothing alike (worst case)"
        ),
        seconds,
        tokens_per_second: None,
        gflops: None,
        share_of_gemm: None,
    });
    progress.increment();
    progress.finish();
    Ok(out)
}

/// Least wall-clock time of several runs.
fn best(mut run: impl FnMut()) -> Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..REPEATS {
        interrupt::check()?;
        let started = Instant::now();
        run();
        least = least.min(started.elapsed().as_secs_f64());
    }
    Ok(least)
}

fn random(n: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn gemm_gflops() -> Result<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let square = GEMM_SIDE * GEMM_SIDE;
    let (a, b) = (random(square, &mut rng), random(square, &mut rng));
    let linear = Linear::from_rows(&[&b], GEMM_SIDE);
    let seconds = best(|| {
        std::hint::black_box(linear.apply(&a));
    })?;
    Ok(2e-9 * (GEMM_SIDE as f64).powi(3) / seconds)
}

/// Tokens that mean nothing: time does not depend on them.
fn tokens(n: usize, decoder: &Decoder) -> Vec<u32> {
    (0..n).map(|i| (i * 7919 % decoder.config().vocab) as u32).collect()
}

fn prefill_seconds(decoder: &Decoder) -> Result<f64> {
    let tokens = tokens(PREFILL_TOKENS, decoder);
    best(|| {
        let mut pool = BlockPool::new(decoder.block_shape(BLOCK_SIZE), Storage::F32);
        let mut cache = decoder.new_cache();
        decoder.forward(&mut pool, &mut [Segment { cache: &mut cache, tokens: &tokens }], None);
    })
}

fn decode_seconds(decoder: &Decoder, sequences: usize) -> Result<f64> {
    let context = tokens(DECODE_CONTEXT, decoder);
    let mut pool = BlockPool::new(decoder.block_shape(BLOCK_SIZE), Storage::F32);
    let mut caches: Vec<RequestCache> = (0..sequences).map(|_| decoder.new_cache()).collect();
    for cache in &mut caches {
        decoder.forward(&mut pool, &mut [Segment { cache, tokens: &context }], None);
    }
    best(|| {
        let mut forks: Vec<RequestCache> = caches.iter().map(|c| c.fork(&mut pool)).collect();
        let mut next = vec![[1u32]; sequences];
        for _ in 0..DECODE_STEPS {
            let mut segments: Vec<Segment> =
                forks.iter_mut().zip(&next).map(|(cache, tokens)| Segment { cache, tokens }).collect();
            let hidden = decoder.forward(&mut pool, &mut segments, None);
            let logits = decoder.logits(&hidden);
            next = logits.chunks_exact(decoder.config().vocab).map(|row| [argmax(row)]).collect();
        }
        for fork in forks {
            fork.release(&mut pool);
        }
    })
}

fn fusion_seconds(decoder: &Decoder) -> Result<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let shape = decoder.block_shape(BLOCK_SIZE);
    let layers = decoder.config().layers;
    let mut batch = CacheBatch::empty(shape, Storage::F16, decoder.rope());
    for _ in 0..FUSION_REQUESTS {
        // All layers of a request hold the same blocks: the layers are fused one by one and do not see each other.
        let mut table = BlockTable::default();
        for _ in 0..FUSION_BLOCKS {
            let (keys, values) =
                (random(shape.block_width(), &mut rng), random(shape.block_width(), &mut rng));
            table.push(batch.pool.allocate(&keys, &values));
        }
        let mut cache = RequestCache { layers: Vec::new(), tokens: FUSION_BLOCKS * BLOCK_SIZE };
        for _ in 1..layers {
            cache.layers.push(table.fork(&mut batch.pool));
        }
        cache.layers.push(table);
        batch.push(cache, Vec::new(), "");
    }
    let codec = Fusion::paper(0.9)?;
    let mut failed = Ok(());
    let seconds = best(|| failed = codec.encode(&mut batch.clone(), &Memo::default()))?;
    failed.map(|()| seconds)
}
