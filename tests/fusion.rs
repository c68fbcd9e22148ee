//! The paper's fusion against reference numbers made outside this project (shared/golden/fusion.*), and what must hold
//! for any input.

use kvfuse::block::{BlockPool, BlockShape, RequestCache, Storage};
use kvfuse::codec::fusion::BatchFusion;
use kvfuse::codec::{CacheBatch, Codec, Ledger, Prefix, Unfused, distortion};
use kvfuse::model::to_f32;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use safetensors::SafeTensors;
use serde_json::Value;

/// Appends whole layers (`[tokens, kv_heads * head_dim]` keys and values) to a new cache.
fn cache(pool: &mut BlockPool, layers: &[(Vec<f32>, Vec<f32>)]) -> RequestCache {
    let width = pool.shape().token_width();
    let mut cache = RequestCache::new(layers.len());
    for (table, (keys, values)) in cache.layers.iter_mut().zip(layers) {
        for (key, value) in keys.chunks(width).zip(values.chunks(width)) {
            table.append(pool, key, value);
        }
    }
    cache.tokens = layers[0].0.len() / width;
    cache
}

/// Keys and values of one layer of one request as attention sees them.
fn restored(batch: &CacheBatch, request: usize, layer: usize) -> (Vec<f32>, Vec<f32>) {
    let mut out = (Vec::new(), Vec::new());
    for entry in &batch.caches[request].layers[layer].entries {
        out.0.extend(batch.pool.keys(entry.block).iter().map(|x| x * entry.key_scale()));
        out.1.extend(batch.pool.values(entry.block).iter().map(|x| x * entry.value_scale()));
    }
    out
}

#[test]
fn bff_equals_the_reference() {
    let bytes = include_bytes!("fixtures/golden_fusion.safetensors");
    let tensors = SafeTensors::deserialize(bytes).unwrap();
    let floats = |name: &str| {
        let t = tensors.tensor(name).unwrap();
        to_f32(t.dtype(), t.data()).unwrap()
    };
    let golden: Value = serde_json::from_str(include_str!("fixtures/golden_fusion.json")).unwrap();
    let bff = &golden["bff"];
    let shape = BlockShape { block_size: 4, kv_heads: 2, head_dim: 4 };
    let (layers, width) = (6, shape.block_width());
    let counts: Vec<usize> =
        bff["blocks_per_request"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
    let all: usize = counts.iter().sum();
    let slice = |x: &[f32], layer: usize, first: usize, blocks: usize| {
        x[(layer * all + first) * width..][..blocks * width].to_vec()
    };
    let (keys, values) = (floats("bff.k"), floats("bff.v"));
    for result in bff["results"].as_array().unwrap() {
        let tau = result["tau"].as_f64().unwrap();
        let mut batch = CacheBatch::empty(shape, Storage::F32);
        let mut first = 0;
        for &n in &counts {
            let layers: Vec<_> =
                (0..layers).map(|l| (slice(&keys, l, first, n), slice(&values, l, first, n))).collect();
            batch.caches.push(cache(&mut batch.pool, &layers));
            first += n;
        }
        let codec = BatchFusion::new(tau).unwrap();
        assert_eq!(codec.layers(layers), 2..4);
        codec.encode(&mut batch);
        let ledger = Ledger::of(&batch, &codec.layers(layers));
        assert!((ledger.cr_paper() - result["cr_paper"].as_f64().unwrap()).abs() < 1e-12, "tau {tau}");
        for (i, layer) in ledger.layers[2..4].iter().enumerate() {
            assert_eq!(layer.logical_blocks, result["leaf_blocks"][i].as_u64().unwrap(), "tau {tau}");
            assert_eq!(layer.physical_blocks, result["root_blocks"][i].as_u64().unwrap(), "tau {tau}");
        }
        let (k, v) = (floats(&format!("bff.tau{tau}.k")), floats(&format!("bff.tau{tau}.v")));
        let mut first = 0;
        for (request, &n) in counts.iter().enumerate() {
            for l in 0..layers {
                let (got_k, got_v) = restored(&batch, request, l);
                for (got, want) in [(got_k, slice(&k, l, first, n)), (got_v, slice(&v, l, first, n))] {
                    assert_eq!(got.len(), want.len());
                    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                    assert!(worst < 1e-5, "tau {tau}, request {request}, layer {l}: off by {worst}");
                }
            }
            first += n;
        }
    }
}

/// Random requests with some shared prompt prefix, and blocks that resemble each other across requests.
fn random_batch(seed: u64, requests: usize, storage: Storage) -> CacheBatch {
    let shape = BlockShape { block_size: 4, kv_heads: 1, head_dim: 4 };
    let (layers, width) = (6, shape.token_width());
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut pool = BlockPool::new(shape, storage);
    let longest = 30;
    let common: Vec<f32> = (0..2 * layers * longest * width).map(|_| rng.random_range(-1.0..1.0)).collect();
    let mut batch_caches = Vec::new();
    let mut tokens = Vec::new();
    for request in 0..requests {
        let n = rng.random_range(1..longest);
        let shared = rng.random_range(0..=n);
        let noise = rng.random_range(0.0..1.5f32);
        let mut part = |index: usize| -> Vec<f32> {
            let base = &common[index * longest * width..][..n * width];
            let own = |i: usize| if i < shared * width { 0.0 } else { noise };
            base.iter().enumerate().map(|(i, x)| x + own(i) * rng.random_range(-1.0..1.0)).collect()
        };
        let data: Vec<_> = (0..layers).map(|l| (part(2 * l), part(2 * l + 1))).collect();
        batch_caches.push(cache(&mut pool, &data));
        let id = |t: usize| if t < shared { t as u32 } else { (1000 * (request + 1) + t) as u32 };
        tokens.push((0..n).map(id).collect());
    }
    CacheBatch { pool, caches: batch_caches, tokens }
}

fn codecs(tau: f64) -> Vec<Box<dyn Codec>> {
    vec![Box::new(Unfused), Box::new(Prefix), Box::new(BatchFusion::new(tau).unwrap())]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// What the ledger counts is what the pool holds; releasing the requests empties the pool.
    #[test]
    fn ledger_and_pool_agree(seed in 0u64..1000, requests in 1usize..9, tau in -0.9f64..1.0) {
        for codec in codecs(tau) {
            let mut batch = random_batch(seed, requests, Storage::F16);
            let elements = batch.pool.elements();
            codec.encode(&mut batch);
            let ledger = Ledger::of(&batch, &codec.layers(6));
            prop_assert_eq!(ledger.elements, elements);
            prop_assert_eq!(ledger.stored_element_bits(), 16 * batch.pool.elements());
            let by_layer: u64 = ledger.layers.iter().map(|l| l.bits).sum();
            prop_assert_eq!(by_layer, ledger.total_bits());
            // The paper leaves out what does not shrink, so it can only be higher.
            prop_assert!(ledger.cr_audited() <= ledger.cr_paper());
            for cache in batch.caches {
                cache.release(&mut batch.pool);
            }
            prop_assert_eq!(batch.pool.live_blocks(), 0);
        }
    }

    /// Nothing lies above tau = 1, and prefix sharing never changes a number.
    #[test]
    fn lossless_settings_lose_nothing(seed in 0u64..1000, requests in 1usize..9) {
        let original = random_batch(seed, requests, Storage::F16);
        let mut encoded = original.clone();
        Prefix.encode(&mut encoded);
        let d = distortion(&original, &encoded);
        prop_assert_eq!((d.key_error, d.value_error), (0.0, 0.0));

        let mut encoded = original.clone();
        BatchFusion::new(1.0).unwrap().encode(&mut encoded);
        // Only exact duplicates can reach 1 (by rounding), and they are restored to f16 precision.
        let d = distortion(&original, &encoded);
        prop_assert!(d.keys() < 1e-6 && d.values() < 1e-6);
    }

    /// Distortion is what the restored caches say, and a fused block keeps its norm.
    #[test]
    fn restored_blocks_keep_their_norms(seed in 0u64..1000, requests in 2usize..9, tau in 0.0f64..1.0) {
        let original = random_batch(seed, requests, Storage::F32);
        let mut encoded = original.clone();
        BatchFusion::new(tau).unwrap().encode(&mut encoded);
        let (mut error, mut energy) = (0.0, 0.0);
        for request in 0..requests {
            for layer in 0..6 {
                let before = restored(&original, request, layer).0;
                let after = restored(&encoded, request, layer).0;
                for (x, y) in before.chunks(16).zip(after.chunks(16)) {
                    let norm = |b: &[f32]| b.iter().map(|x| f64::from(x * x)).sum::<f64>();
                    prop_assert!((norm(x) - norm(y)).abs() < 1e-4 * norm(x));
                    energy += norm(x);
                    error += x.iter().zip(y).map(|(a, b)| f64::from((a - b) * (a - b))).sum::<f64>();
                }
            }
        }
        prop_assert!((distortion(&original, &encoded).keys() - error / energy).abs() < 1e-5);
    }
}

#[test]
fn exact_duplicates_always_fuse() {
    let shape = BlockShape { block_size: 4, kv_heads: 1, head_dim: 4 };
    let mut pool = BlockPool::new(shape, Storage::F16);
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let data: Vec<(Vec<f32>, Vec<f32>)> = (0..5)
        .map(|_| {
            let mut random = || (0..32).map(|_| rng.random_range(-1.0..1.0)).collect();
            (random(), random())
        })
        .collect();
    let caches = (0..4).map(|_| cache(&mut pool, &data)).collect();
    let mut batch = CacheBatch { pool, caches, tokens: vec![vec![0; 8]; 4] };
    let codec = BatchFusion::new(0.999).unwrap();
    codec.encode(&mut batch);
    let ledger = Ledger::of(&batch, &codec.layers(5));
    assert_eq!((ledger.layers[2].logical_blocks, ledger.layers[2].physical_blocks), (8, 2));
    assert_eq!(ledger.layers[1].physical_blocks, 8, "the first two layers are left alone");
    assert_eq!(ledger.cr_paper(), 4.0);
    // The pool has let go of the originals: 4 requests x 2 blocks in four spared layers, 2 blocks in the fused one.
    assert_eq!(batch.pool.live_blocks(), 4 * 8 + 2);
}
