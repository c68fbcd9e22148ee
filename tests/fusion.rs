//! Fusion against reference numbers made outside this project (shared/golden/fusion.*), and what must hold for any input.

mod common;

use kvfuse::block::{BlockPool, BlockShape, RequestCache, Scale, Storage};
use kvfuse::codec::fusion::{
    Choices, ChunkFusion, Fusion, Pairing, Positions, Representative, RopeMode, Rule, ScaleRule, Similarity,
};
use kvfuse::codec::{CacheBatch, Chain, Codec, Ledger, Memo, Prefix, Unfused, distortion};
use kvfuse::model::{Rope, RopeConfig, Ropes, to_f32};
use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Position embedding for heads of this size.
fn rope(head_dim: usize) -> Arc<Ropes> {
    Arc::new(Ropes::same(Rope::new(&RopeConfig::plain(100.0, head_dim), 256)))
}

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
    for block in 0..batch.caches[request].layers[layer].entries.len() {
        let (keys, values) = batch.read(request, layer, block);
        out.0.extend(keys);
        out.1.extend(values);
    }
    out
}

fn encoded(batch: &CacheBatch, codec: &dyn Codec) -> CacheBatch {
    let mut encoded = batch.clone();
    codec.encode(&mut encoded, &Memo::default()).unwrap();
    encoded
}

struct Golden {
    tensors: SafeTensors<'static>,
    json: Value,
}

impl Golden {
    fn open() -> Self {
        let bytes: &'static [u8] = include_bytes!("fixtures/golden_fusion.safetensors");
        let json = serde_json::from_str(include_str!("fixtures/golden_fusion.json")).unwrap();
        Golden { tensors: SafeTensors::deserialize(bytes).unwrap(), json }
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let t = self.tensors.tensor(name).unwrap();
        to_f32(t.dtype(), t.data()).unwrap()
    }
}

const GOLDEN_SHAPE: BlockShape = BlockShape { block_size: 4, kv_heads: 2, head_dim: 4 };
const GOLDEN_LAYERS: usize = 6;

/// Blocks at leaves and root, and the paper's ratio.
fn assert_counts(ledger: &Ledger, result: &Value) {
    let tau = &result["tau"];
    assert!((ledger.cr_paper() - result["cr_paper"].as_f64().unwrap()).abs() < 1e-12, "tau {tau}");
    for (i, layer) in ledger.layers[2..4].iter().enumerate() {
        assert_eq!(layer.logical_blocks, result["leaf_blocks"][i].as_f64().unwrap() as u64, "tau {tau}");
        assert_eq!(layer.physical_blocks, result["root_blocks"][i].as_u64().unwrap(), "tau {tau}");
    }
}

fn assert_close(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len());
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-5, "{what}: off by {worst}");
}

#[test]
fn bff_equals_the_reference() {
    let golden = Golden::open();
    let bff = &golden.json["bff"];
    let width = GOLDEN_SHAPE.block_width();
    let counts: Vec<usize> =
        bff["blocks_per_request"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
    let all: usize = counts.iter().sum();
    let slice = |x: &[f32], layer: usize, first: usize, blocks: usize| {
        x[(layer * all + first) * width..][..blocks * width].to_vec()
    };
    let (keys, values) = (golden.floats("bff.k"), golden.floats("bff.v"));
    for result in bff["results"].as_array().unwrap() {
        let tau = result["tau"].as_f64().unwrap();
        let mut batch = CacheBatch::empty(GOLDEN_SHAPE, Storage::F32, rope(4));
        let mut first = 0;
        for &n in &counts {
            let layers: Vec<_> = (0..GOLDEN_LAYERS)
                .map(|l| (slice(&keys, l, first, n), slice(&values, l, first, n)))
                .collect();
            let cache = cache(&mut batch.pool, &layers);
            batch.push(cache, Vec::new(), "");
            first += n;
        }
        let codec = Fusion::paper(tau).unwrap();
        assert_eq!(codec.coverage(GOLDEN_LAYERS).layers, 2..4);
        let batch = encoded(&batch, &codec);
        assert_counts(&Ledger::of(&batch, &codec.coverage(GOLDEN_LAYERS)), result);
        let (k, v) = (golden.floats(&format!("bff.tau{tau}.k")), golden.floats(&format!("bff.tau{tau}.v")));
        let mut first = 0;
        for (request, &n) in counts.iter().enumerate() {
            for l in 0..GOLDEN_LAYERS {
                let (got_k, got_v) = restored(&batch, request, l);
                let what = format!("tau {tau}, request {request}, layer {l}");
                assert_close(&got_k, &slice(&k, l, first, n), &what);
                assert_close(&got_v, &slice(&v, l, first, n), &what);
            }
            first += n;
        }
    }
}

/// One request of eight chunks, the last four fused.
#[test]
fn cff_equals_the_reference() {
    let golden = Golden::open();
    let cff = &golden.json["cff"];
    let (keys, values) = (golden.floats("cff.k"), golden.floats("cff.v"));
    let layer_numbers = keys.len() / GOLDEN_LAYERS;
    let layer = |x: &[f32], l: usize| x[l * layer_numbers..][..layer_numbers].to_vec();
    for result in cff["results"].as_array().unwrap() {
        let tau = result["tau"].as_f64().unwrap();
        let mut batch = CacheBatch::empty(GOLDEN_SHAPE, Storage::F32, rope(4));
        let layers: Vec<_> = (0..GOLDEN_LAYERS).map(|l| (layer(&keys, l), layer(&values, l))).collect();
        let cache = cache(&mut batch.pool, &layers);
        assert_eq!(cache.tokens, 8 * 16);
        batch.push(cache, Vec::new(), "");
        let codec = ChunkFusion::new(Fusion::paper(tau).unwrap(), 16, 4).unwrap();
        codec.fuse(&mut batch, 0, 4).unwrap();
        // The reference counts the fused chunks only: half of the request's blocks.
        let mut ledger = Ledger::of(&batch, &codec.coverage(GOLDEN_LAYERS));
        for layer in &mut ledger.layers {
            layer.logical_blocks -= 16;
            layer.physical_blocks -= 16;
            layer.leaf_blocks -= 16;
            layer.root_blocks -= 16;
        }
        assert_counts(&ledger, result);
        let (k, v) = (golden.floats(&format!("cff.tau{tau}.k")), golden.floats(&format!("cff.tau{tau}.v")));
        for l in 0..GOLDEN_LAYERS {
            let (got_k, got_v) = restored(&batch, 0, l);
            assert_close(&got_k, &layer(&k, l), &format!("tau {tau}, layer {l}"));
            assert_close(&got_v, &layer(&v, l), &format!("tau {tau}, layer {l}"));
        }
    }
}

const SHAPE: BlockShape = BlockShape { block_size: 4, kv_heads: 1, head_dim: 4 };
const LAYERS: usize = 6;

/// Random requests with some shared prompt prefix, and blocks that resemble each other across requests.
fn random_batch(seed: u64, requests: usize, storage: Storage) -> CacheBatch {
    let width = SHAPE.token_width();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut batch = CacheBatch::empty(SHAPE, storage, rope(4));
    let longest = 30;
    let common: Vec<f32> = (0..2 * LAYERS * longest * width).map(|_| rng.random_range(-1.0..1.0)).collect();
    for request in 0..requests {
        let n = rng.random_range(1..longest);
        let shared = rng.random_range(0..=n);
        let noise = rng.random_range(0.0..1.5f32);
        let mut part = |index: usize| -> Vec<f32> {
            let base = &common[index * longest * width..][..n * width];
            let own = |i: usize| if i < shared * width { 0.0 } else { noise };
            base.iter().enumerate().map(|(i, x)| x + own(i) * rng.random_range(-1.0..1.0)).collect()
        };
        let data: Vec<_> = (0..LAYERS).map(|l| (part(2 * l), part(2 * l + 1))).collect();
        let id = |t: usize| if t < shared { t as u32 } else { (1000 * (request + 1) + t) as u32 };
        let cache = cache(&mut batch.pool, &data);
        batch.push(cache, (0..n).map(id).collect(), ["a", "b", "c"][request % 3]);
    }
    batch
}

/// Any combination of choices.
fn any_choices() -> impl Strategy<Value = Choices> {
    use {Pairing::*, Representative::*, ScaleRule::*};
    let first = (
        prop::sample::select(vec![Tree, Best, Components, Lsh]),
        prop::sample::select(vec![Similarity::Keys, Similarity::Values, Similarity::Lower, Similarity::Mean]),
        prop::sample::select(vec![RopeMode::Keep, RopeMode::Strip]),
        prop::sample::select(vec![Positions::Any, Positions::Same]),
    );
    let second = (
        1usize..4,
        prop::sample::select(vec![Mean, Weighted, Medoid, First]),
        prop::sample::select(vec![Norm, LeastSquares, ScaleRule::None]),
        any::<bool>(),
    );
    (first, second).prop_map(
        |((pairing, similarity, rope, positions), (group, representative, scale, tenant))| Choices {
            pairing,
            similarity,
            rope,
            positions,
            spare_layers: 2,
            group_layers: group,
            representative,
            scale,
            within_tenant: tenant,
        },
    )
}

/// The blocks that share storage, as sets of (request, block), in one layer.
fn partition(batch: &CacheBatch, layer: usize) -> BTreeSet<BTreeSet<(usize, usize)>> {
    let mut by_block: BTreeMap<_, BTreeSet<(usize, usize)>> = BTreeMap::new();
    for (request, cache) in batch.caches.iter().enumerate() {
        for (block, entry) in cache.layers[layer].entries.iter().enumerate() {
            by_block.entry(entry.block).or_default().insert((request, block));
        }
    }
    by_block.into_values().collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn relative_error(x: &[f32], y: &[f32]) -> f64 {
    let energy: f64 = x.iter().map(|a| f64::from(a * a)).sum();
    x.iter().zip(y).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / energy
}

/// A joint codec for these batches; trained once.
fn joint_codec() -> &'static str {
    static CODEC: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    CODEC.get_or_init(|| {
        let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("fusion-joint.safetensors");
        common::joint_codec(&path, &random_batch(77, 8, Storage::F16));
        path.to_str().unwrap().to_owned()
    })
}

/// Every method that encodes finished caches, alone, after prefix sharing and after fusion, between tenants and within them.
fn all_chains() -> Vec<Chain> {
    let mut chains = Vec::new();
    for method in kvfuse::codec::registry::methods() {
        let dial = if method.dials.contains(&"tau") { ":tau=0.6,spare-layers=1" } else { "" };
        let own = match method.name {
            "joint" => format!("joint:codec={}", joint_codec()),
            "kvtc" => {
                format!(
                    "kvtc:residual=8,codec={}",
                    joint_codec().replace(".safetensors", "-kvtc.safetensors")
                )
            }
            name => format!("{name}{dial}"),
        };
        let fused = "bff:tau=0.6,spare-layers=1,within-tenant=";
        for text in [
            own.clone(),
            format!("prefix+{own}"),
            format!("prefix:within-tenant=true+{own}"),
            format!("{fused}true+{own}"),
            format!("prefix+{fused}false+{own}"),
            format!("prefix+snapkv:keep=0.6+{own}"),
        ] {
            // Not every chain means something: sharing twice, or prefilling after it.
            chains
                .extend(Chain::parse(&text).unwrap_or_default().into_iter().filter(|c| c.chunks().is_none()));
        }
    }
    assert!(chains.len() > 20, "{}", chains.len());
    chains
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    /// What the ledger counts is what the pool holds; the audited ratio never exceeds the paper's; releasing the requests
    /// empties the pool. Of any choices.
    #[test]
    fn ledger_and_pool_agree(
        seed in 0u64..1000, requests in 1usize..9, tau in -0.9f64..1.0, choices in any_choices(), budget in 0.01f64..1.0
    ) {
        let codecs: Vec<Box<dyn Codec>> = vec![
            Box::new(Unfused {}),
            Box::new(Prefix::default()),
            Box::new(Prefix { within_tenant: true }),
            Box::new(Fusion::paper(tau).unwrap()),
            Box::new(Fusion::new(choices, Rule::Tau(tau)).unwrap()),
            Box::new(Fusion::new(choices, Rule::MaxError(budget)).unwrap()),
        ];
        let original = random_batch(seed, requests, Storage::F16);
        let elements = original.pool.elements();
        for codec in codecs {
            let mut batch = encoded(&original, &*codec);
            let ledger = Ledger::of(&batch, &codec.coverage(LAYERS));
            prop_assert_eq!(ledger.elements, elements);
            prop_assert_eq!(ledger.stored_element_bits(), 16 * batch.pool.elements());
            let by_layer: u64 = ledger.layers.iter().map(|l| l.bits).sum();
            prop_assert_eq!(by_layer, ledger.total_bits());
            prop_assert!(ledger.cr_audited() <= ledger.cr_paper());
            for cache in batch.caches {
                cache.release(&mut batch.pool);
            }
            prop_assert_eq!(batch.pool.live_blocks(), 0);
        }
    }

    /// Every method of the registry, alone and in chains: the ledger counts what the pages hold, by layer and in all; what
    /// is stored is what bits give back; tenants share nothing with each other where they must not; nothing leaks; and
    /// encoding again gives the same.
    #[test]
    fn every_chain_of_the_registry_is_accounted_for(seed in 0u64..1000, requests in 1usize..6, pick in 0usize..1000) {
        let chains = all_chains();
        let chain = &chains[pick % chains.len()];
        let mut original = random_batch(seed, requests, Storage::F16);
        original.observed = Some(common::made_up_attention(&original, seed + 1));
        let mut batch = encoded(&original, chain);
        let ledger = Ledger::of(&batch, &chain.coverage(LAYERS));
        prop_assert_eq!(ledger.elements, original.pool.elements(), "{}", chain.name());
        let by_layer: u64 = ledger.layers.iter().map(|l| l.bits).sum();
        prop_assert_eq!(by_layer, ledger.file_bits(), "{}", chain.name());
        let mut pages = std::collections::BTreeSet::new();
        for table in batch.caches.iter().flat_map(|c| &c.layers) {
            pages.extend(table.entries.iter().map(|e| e.block));
        }
        let (mut bits, mut bytes) = (0, 0);
        for &page in &pages {
            bits += match batch.pool.payload(page) {
                None => 32 * batch.pool.keys(page).len() as u64,
                Some(payload) => payload.code_bits + payload.side_bits,
            };
            bytes += batch.pool.payload(page).map_or(4 * batch.pool.keys(page).len(), |p| p.bytes.len());
        }
        // Pages end on whole bytes; a page's bits may be kept with those of its column.
        prop_assert!((bits..bits + 8 * pages.len() as u64 + 1).contains(&(8 * bytes as u64)), "{}", chain.name());
        prop_assert_eq!(bits, ledger.stored_element_bits() + ledger.codebook_bits, "{}", chain.name());
        prop_assert_eq!(pages.len(), batch.pool.live_blocks());
        let again = encoded(&original, chain);
        for (request, cache) in batch.caches.iter().enumerate() {
            for layer in 0..LAYERS {
                for block in 0..cache.layers[layer].entries.len() {
                    prop_assert_eq!(again.read(request, layer, block), batch.read(request, layer, block));
                }
            }
        }
        if chain.within_tenant() {
            let tenants = batch.tenants.clone();
            let owners = batch.caches.iter().zip(&tenants).flat_map(|(c, t)| {
                c.layers.iter().flat_map(move |table| table.entries.iter().map(move |e| (e.block, t)))
            });
            let mut first = std::collections::BTreeMap::new();
            for (page, tenant) in owners {
                prop_assert_eq!(*first.entry(page).or_insert(tenant), tenant, "{}", chain.name());
            }
        }
        for cache in std::mem::take(&mut batch.caches) {
            cache.release(&mut batch.pool);
        }
        prop_assert_eq!(batch.pool.live_blocks(), 0);
    }

    /// Layers that share one table really do: they share the same blocks between the same requests.
    #[test]
    fn layers_of_a_group_share_one_table(
        seed in 0u64..1000, requests in 2usize..9, tau in 0.2f64..1.0, choices in any_choices()
    ) {
        let choices = Choices { group_layers: 2, ..choices };
        let batch = encoded(&random_batch(seed, requests, Storage::F16), &Fusion::new(choices, Rule::Tau(tau)).unwrap());
        prop_assert_eq!(partition(&batch, 2), partition(&batch, 3));
        for cache in &batch.caches {
            for (a, b) in cache.layers[2].entries.iter().zip(&cache.layers[3].entries) {
                prop_assert_eq!((a.scale, a.stripped), (b.scale, b.stripped));
            }
        }
    }

    /// Nothing lies above tau = 1: blocks that are not exact duplicates stay what they are. And prefix sharing never
    /// changes a number.
    #[test]
    fn lossless_settings_lose_nothing(seed in 0u64..1000, requests in 1usize..9, choices in any_choices()) {
        let original = random_batch(seed, requests, Storage::F16);
        for within_tenant in [false, true] {
            let (d, _) = distortion(&original, &encoded(&original, &Prefix { within_tenant }));
            prop_assert_eq!((d.key_error, d.value_error), (0.0, 0.0));
        }
        let same = Choices { pairing: Pairing::Best, representative: Representative::First, ..choices };
        for choices in [choices, same] {
            let fused = encoded(&original, &Fusion::new(choices, Rule::Tau(1.0)).unwrap());
            // A cosine can round to a hair above 1 for exact duplicates, which are restored to f16 precision.
            let (d, _) = distortion(&original, &fused);
            prop_assert!(d.keys() < 1e-6 && d.values() < 1e-6);
        }
        // Distinct blocks: the identity.
        let mut distinct = CacheBatch::empty(SHAPE, Storage::F16, rope(4));
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        for _ in 0..requests {
            let mut part = || (0..48).map(|_| rng.random_range(-1.0..1.0)).collect();
            let mut data: Vec<(Vec<f32>, Vec<f32>)> = (0..LAYERS).map(|_| (part(), part())).collect();
            // And one that differs from it by about the least step of f16 in each block: its cosine rounds to 1 or above.
            for twin in 0..2 {
                let own = cache(&mut distinct.pool, &data);
                distinct.push(own, (0..12).collect(), "a");
                for numbers in data.iter_mut().filter(|_| twin == 0).flat_map(|(k, v)| [k, v]) {
                    for block in numbers.chunks_mut(16) {
                        block[0] *= 1.0 + 2.0 / 1024.0;
                    }
                }
            }
        }
        let fused = encoded(&distinct, &Fusion::new(choices, Rule::Tau(1.0)).unwrap());
        prop_assert_eq!(&fused.caches, &distinct.caches);
    }

    /// Distortion is what the restored caches say, and with the paper's choices a fused block keeps its norm.
    #[test]
    fn restored_blocks_keep_their_norms(seed in 0u64..1000, requests in 2usize..9, tau in 0.0f64..1.0) {
        let original = random_batch(seed, requests, Storage::F32);
        let encoded = encoded(&original, &Fusion::paper(tau).unwrap());
        let (mut error, mut energy) = (0.0, 0.0);
        for request in 0..requests {
            for layer in 0..LAYERS {
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
        prop_assert!((distortion(&original, &encoded).0.keys() - error / energy).abs() < 1e-5);
    }

    /// A block that was replaced by another lies within tau of it.
    #[test]
    fn verbatim_representatives_are_within_tau(
        seed in 0u64..1000, requests in 2usize..9, tau in 0.2f64..0.99, choices in any_choices(), first in any::<bool>()
    ) {
        let representative = if first { Representative::First } else { Representative::Medoid };
        let choices = Choices { representative, group_layers: 1, ..choices };
        let original = random_batch(seed, requests, Storage::F32);
        let fused = encoded(&original, &Fusion::new(choices, Rule::Tau(tau)).unwrap());
        for layer in 2..4 {
            for (request, cache) in original.caches.iter().enumerate() {
                for (block, _) in cache.layers[layer].entries.iter().enumerate() {
                    let entry = &fused.caches[request].layers[layer].entries[block];
                    if entry.scale.is_none() && fused.pool.references(entry.block) < 2 {
                        continue;
                    }
                    // Without its scale, and in the frame that was compared.
                    let (mut x, values) = original.read(request, layer, block);
                    if choices.rope == RopeMode::Strip {
                        original.ropes.layer(0).strip_tokens(&mut x, 4, 4 * block);
                    }
                    let mut rep = fused.pool.keys(entry.block).into_owned();
                    if choices.rope == RopeMode::Strip && !entry.stripped {
                        original.ropes.layer(0).strip_tokens(&mut rep, 4, 4 * block);
                    }
                    let (key, value) = (cosine(&x, &rep), cosine(&values, &fused.pool.values(entry.block)));
                    let similarity = match choices.similarity {
                        Similarity::Keys => key,
                        Similarity::Values => value,
                        Similarity::Lower => key.min(value),
                        Similarity::Mean => 0.5 * (key + value),
                    };
                    prop_assert!(similarity > tau - 1e-5, "{} {}", similarity, tau);
                }
            }
        }
    }

    /// No block of the reconstructed cache is further off than the budget, for keys or for values, whatever the choices.
    #[test]
    fn the_error_budget_is_never_exceeded(
        seed in 0u64..1000, requests in 2usize..9, budget in 0.01f64..1.5, choices in any_choices()
    ) {
        for storage in [Storage::F16, Storage::F32] {
            let original = random_batch(seed, requests, storage);
            let fused = encoded(&original, &Fusion::new(choices, Rule::MaxError(budget)).unwrap());
            for request in 0..requests {
                for layer in 0..LAYERS {
                    for block in 0..original.caches[request].layers[layer].entries.len() {
                        let (before, after) = (original.read(request, layer, block), fused.read(request, layer, block));
                        let error = relative_error(&before.0, &after.0).max(relative_error(&before.1, &after.1));
                        prop_assert!(error <= budget, "{} {}", error, budget);
                    }
                }
            }
            let (_, drifts) = distortion(&original, &fused);
            prop_assert!(drifts.iter().all(|d| d.worst_block_error <= budget));
        }
    }

    /// What fuses with what does not depend on the order of the requests.
    #[test]
    fn best_and_components_do_not_depend_on_request_order(
        seed in 0u64..1000, requests in 2usize..9, tau in 0.2f64..0.99, choices in any_choices(), best in any::<bool>()
    ) {
        let pairing = if best { Pairing::Best } else { Pairing::Components };
        let representative = pairing.usual_representative();
        let choices = Choices { pairing, representative, ..choices };
        let codec = Fusion::new(choices, Rule::Tau(tau)).unwrap();
        let original = random_batch(seed, requests, Storage::F32);
        let mut order: Vec<usize> = (0..requests).collect();
        order.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(seed + 1));
        let mut shuffled = original.clone();
        shuffled.caches = order.iter().map(|&i| original.caches[i].clone()).collect();
        shuffled.tokens = order.iter().map(|&i| original.tokens[i].clone()).collect();
        shuffled.tenants = order.iter().map(|&i| original.tenants[i].clone()).collect();
        let (a, b) = (encoded(&original, &codec), encoded(&shuffled, &codec));
        for layer in 2..4 {
            let renamed: BTreeSet<BTreeSet<(usize, usize)>> = partition(&b, layer)
                .into_iter()
                .map(|set| set.into_iter().map(|(request, block)| (order[request], block)).collect())
                .collect();
            prop_assert_eq!(partition(&a, layer), renamed);
        }
        let errors = |original: &CacheBatch, fused: &CacheBatch| distortion(original, fused).0;
        let (x, y) = (errors(&original, &a), errors(&shuffled, &b));
        prop_assert!((x.keys() - y.keys()).abs() < 1e-5 && (x.values() - y.values()).abs() < 1e-5);
    }

    /// Within tenants, no block table points at a block that another tenant's points at.
    #[test]
    fn no_block_is_shared_between_tenants(
        seed in 0u64..1000, requests in 2usize..9, tau in -0.9f64..1.0, choices in any_choices()
    ) {
        let choices = Choices { within_tenant: true, ..choices };
        let original = random_batch(seed, requests, Storage::F16);
        let codecs: [Box<dyn Codec>; 3] = [
            Box::new(Fusion::new(choices, Rule::Tau(tau)).unwrap()),
            Box::new(Fusion::new(choices, Rule::MaxError(0.9)).unwrap()),
            Box::new(Prefix { within_tenant: true }),
        ];
        for codec in codecs {
            let fused = encoded(&original, &*codec);
            for layer in 0..LAYERS {
                for set in partition(&fused, layer) {
                    let tenants: BTreeSet<&String> = set.iter().map(|(request, _)| &fused.tenants[*request]).collect();
                    prop_assert_eq!(tenants.len(), 1);
                }
            }
        }
    }

    /// One memo for many arms gives what a fresh one gives.
    #[test]
    fn a_memo_changes_nothing(seed in 0u64..1000, requests in 2usize..9, all in prop::collection::vec(any_choices(), 4)) {
        let original = random_batch(seed, requests, Storage::F16);
        let memo = Memo::default();
        for choices in all {
            let codec = Fusion::new(choices, Rule::Tau(0.6)).unwrap();
            let mut fused = original.clone();
            codec.encode(&mut fused, &memo).unwrap();
            let fresh = encoded(&original, &codec);
            for request in 0..requests {
                for layer in 2..4 {
                    prop_assert_eq!(restored(&fused, request, layer), restored(&fresh, request, layer));
                }
            }
        }
    }
}

#[test]
fn exact_duplicates_always_fuse() {
    use {Pairing::*, Representative::*};
    let mut pool = BlockPool::new(SHAPE, Storage::F16);
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let data: Vec<(Vec<f32>, Vec<f32>)> = (0..5)
        .map(|_| {
            let mut random = || (0..32).map(|_| rng.random_range(-1.0..1.0)).collect();
            (random(), random())
        })
        .collect();
    let mut batch = CacheBatch::empty(SHAPE, Storage::F16, rope(4));
    for _ in 0..4 {
        let cache = cache(&mut pool, &data);
        batch.push(cache, vec![0; 8], "");
    }
    batch.pool = pool;
    for pairing in [Tree, Best, Components, Lsh] {
        for representative in [Mean, Weighted, Medoid, First] {
            let taus: &[f64] = if pairing == Tree { &[0.999] } else { &[0.999, 1.0] };
            for &tau in taus {
                for rope in [RopeMode::Keep, RopeMode::Strip] {
                    let choices = Choices { pairing, representative, rope, ..Choices::default() };
                    let codec = Fusion::new(choices, Rule::Tau(tau)).unwrap();
                    let fused = encoded(&batch, &codec);
                    let ledger = Ledger::of(&fused, &codec.coverage(5));
                    let counts = (ledger.layers[2].logical_blocks, ledger.layers[2].physical_blocks);
                    assert_eq!(counts, (8, 2), "{choices:?}");
                    assert_eq!(ledger.layers[1].physical_blocks, 8, "the first two layers are left alone");
                    assert_eq!(ledger.cr_paper(), 4.0);
                    // The pool has let go of the originals: 4 requests x 2 blocks in four spared layers, 2 in the fused one.
                    assert_eq!(fused.pool.live_blocks(), 4 * 8 + 2);
                }
            }
        }
    }
}

/// Equal text at other positions: with RoPE taken off its blocks are the same again, as cached they are not.
#[test]
fn stripped_keys_match_at_other_positions() {
    let rope = rope(4);
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let (text_keys, text_values) = (random(4 * 16), random(4 * 16));
    let mut batch = CacheBatch::empty(SHAPE, Storage::F32, rope.clone());
    for shift in [0usize, 2] {
        // `shift` blocks of other text first; keys get the positions they come to stand at.
        let mut keys = [random(shift * 16), text_keys.clone()].concat();
        rope.layer(0).rotate_tokens(&mut keys, 4, 0);
        let values = [random(shift * 16), text_values.clone()].concat();
        let data = vec![(keys, values); 5];
        let cache = cache(&mut batch.pool, &data);
        batch.push(cache, Vec::new(), "");
    }
    let shared = |rope: RopeMode, positions: Positions| {
        let choices = Choices { pairing: Pairing::Best, rope, positions, ..Choices::default() };
        let fused = encoded(&batch, &Fusion::new(choices, Rule::Tau(0.9999)).unwrap());
        assert!(distortion(&batch, &fused).0.keys() < 1e-9, "{rope:?}");
        let ledger = Ledger::of(&fused, &Fusion::paper(0.9).unwrap().coverage(5));
        ledger.layers[2].logical_blocks - ledger.layers[2].physical_blocks
    };
    assert_eq!(shared(RopeMode::Strip, Positions::Any), 4);
    assert_eq!(shared(RopeMode::Keep, Positions::Any), 0);
    assert_eq!(shared(RopeMode::Strip, Positions::Same), 0);
}

/// Three blocks on a line, each near the next only: the pairings differ as they should.
#[test]
fn pairings_differ_on_a_chain() {
    let angle = |degrees: f32| vec![degrees.to_radians().cos(), degrees.to_radians().sin(), 0.0, 0.0];
    let mut batch =
        CacheBatch::empty(BlockShape { block_size: 1, kv_heads: 1, head_dim: 4 }, Storage::F32, rope(4));
    // Neighbours are 20, 21 and 22 degrees apart: cosines 0.940, 0.934, 0.927; two steps apart at most 0.755.
    for degrees in [0.0, 20.0, 41.0, 63.0] {
        let data = vec![(angle(degrees), angle(degrees)); 5];
        let cache = cache(&mut batch.pool, &data);
        batch.push(cache, Vec::new(), "");
    }
    let sets = |pairing: Pairing, representative: Representative, scale: ScaleRule| {
        let choices = Choices { pairing, representative, scale, ..Choices::default() };
        let fused = encoded(&batch, &Fusion::new(choices, Rule::Tau(0.92)).unwrap());
        let sets: Vec<Vec<usize>> = partition(&fused, 2)
            .into_iter()
            .map(|s| s.into_iter().map(|(request, _)| request).collect())
            .collect();
        (sets, fused)
    };
    let (best, _) = sets(Pairing::Best, Representative::First, ScaleRule::Norm);
    // 0 and 1 are nearest; 1, which has more partners, stays, and 2 joins it; 3 is near 2 only, which nothing can join.
    assert_eq!(best, [vec![0, 1, 2], vec![3]]);
    let (components, _) = sets(Pairing::Components, Representative::Mean, ScaleRule::Norm);
    assert_eq!(components, [vec![0, 1, 2, 3]]);
    // Verbatim, a component is split until everyone is within tau of a representative: 41 degrees is nearest to all.
    let (medoid, fused) = sets(Pairing::Components, Representative::Medoid, ScaleRule::LeastSquares);
    assert_eq!(medoid, [vec![0], vec![1, 2, 3]]);
    // Least squares scales a unit block by the cosine: 21 degrees.
    let scale = fused.caches[1].layers[2].entries[0].scale.unwrap();
    assert!((scale.key - 21f32.to_radians().cos()).abs() < 1e-5);
    assert_eq!(fused.caches[2].layers[2].entries[0].scale, Some(Scale { key: 1.0, value: 1.0 }));
}

/// A stage does what the registry says of its method.
#[test]
fn roles_are_those_of_the_codecs() {
    for chain in all_chains() {
        let stages = chain.stages();
        for stage in stages {
            let method = kvfuse::codec::registry::method(stage.name).unwrap();
            assert_eq!(method.role, stage.role, "{}", stage.name);
        }
    }
}
