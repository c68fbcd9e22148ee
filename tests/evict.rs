//! Evictions, on a tiny model: what defines each, and that what is dropped is never seen again. No download.

mod common;

use common::{made_up, made_up_attention, refuse, succeed, text, tiny};
use kvfuse::codec::evict::{Needs, Observed, Seen, observe};
use kvfuse::codec::{CacheBatch, Chain, Codec, Ledger, Memo};
use kvfuse::dump::{Manifest, open_model};
use kvfuse::encoded::load_caches;
use kvfuse::model::{Model, Segment};
use proptest::prelude::*;
use serde_json::json;
use std::fs;
use std::path::Path;
use std::sync::Arc;

fn chain(text: &str) -> Chain {
    Chain::parse(text).unwrap().swap_remove(0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// What is left are whole tokens of the original, at their positions, as many as were asked for; nothing else is in the pool.
    #[test]
    fn what_stays_is_what_was_there(
        seed in 0u64..500, block_size in 1usize..6, keep in 0.05f64..1.0,
        method in prop::sample::select(vec!["streaming", "h2o", "snapkv", "expected", "kvzip"]),
        before in prop::sample::select(vec!["", "prefix+"]),
    ) {
        let mut batch = made_up(seed, 4, 40, block_size, &["a"]);
        batch.observed = Some(made_up_attention(&batch, seed + 1));
        let mut original = batch.clone();
        // Requests of these caches do not have equal numbers where their tokens are equal.
        if before == "prefix+" {
            self::chain("prefix").encode(&mut original, &Memo::default()).unwrap();
        }
        let chain = chain(&format!("{before}{method}:keep={keep:.3}"));
        chain.encode(&mut batch, &Memo::default()).unwrap();
        let keep: f64 = format!("{keep:.3}").parse().unwrap();
        let width = batch.pool.shape().token_width();
        for (request, cache) in batch.caches.iter().enumerate() {
            let wanted = ((keep * cache.tokens as f64).ceil() as usize).max(1);
            for (n, table) in cache.layers.iter().enumerate() {
                let stored: usize = table.entries.iter().map(|e| batch.pool.tokens(e.block)).sum();
                prop_assert_eq!(stored, wanted);
                prop_assert_eq!(table.slots_before(cache.tokens), stored);
                let mut slot = 0;
                for block in 0..table.entries.len() {
                    let (keys, values) = batch.read(request, n, block);
                    for (k, v) in keys.chunks_exact(width).zip(values.chunks_exact(width)) {
                        let position = table.position(slot);
                        let (old_keys, old_values) = original.read(request, n, position / block_size);
                        let at = position % block_size * width;
                        prop_assert!(*k == old_keys[at..at + width] && *v == old_values[at..at + width]);
                        slot += 1;
                    }
                }
            }
        }
        let ledger = Ledger::of(&batch, &chain.coverage(3));
        prop_assert_eq!(ledger.stored_element_bits(), 16 * batch.pool.elements());
        let tokens: usize = batch.caches.iter().map(|c| c.tokens).sum();
        prop_assert_eq!(ledger.elements as usize, tokens * 3 * 2 * width);
        for cache in std::mem::take(&mut batch.caches) {
            cache.release(&mut batch.pool);
        }
        prop_assert_eq!(batch.pool.live_blocks(), 0);
    }
}

/// Two requests, the first of more than 150 tokens.
fn long() -> CacheBatch {
    (0..).map(|seed| made_up(seed, 2, 300, 8, &["a"])).find(|b| b.caches[0].tokens > 150).unwrap()
}

/// Positions that stay in the first layer of a long request.
fn kept(method: &str, seen: impl Fn(&mut Seen)) -> Vec<u32> {
    let mut batch = long();
    let tokens = batch.caches[0].tokens;
    let zero = || vec![0.0; tokens];
    let mut own = Seen { received: zero(), window: zero(), expected: zero(), repeated: zero() };
    seen(&mut own);
    let one = Observed { layers: vec![own; 3] };
    batch.observed = Some(Arc::new(vec![one, Observed { layers: vec![Seen::default(); 3] }]));
    chain(method).encode(&mut batch, &Memo::default()).unwrap();
    let table = &batch.caches[0].layers[0];
    (0..table.slots_before(tokens)).map(|slot| table.position(slot) as u32).collect()
}

#[test]
fn each_keeps_what_defines_it() {
    let tokens = long().caches[0].tokens as u32;
    let half = tokens.div_ceil(2);
    // Sinks and the latest.
    let streaming = kept("streaming:keep=0.5", |_| ());
    let latest = tokens - (half - 4)..tokens;
    assert_eq!(streaming, (0..4).chain(latest).collect::<Vec<u32>>());
    // A heavy hitter in the middle stays in h2o alone, with half of the budget for the latest.
    let heavy = kept("h2o:keep=0.5", |s| s.received[17] = 9.0);
    assert!(heavy.contains(&17) && heavy.contains(&(tokens - half / 2)), "{heavy:?}");
    // SnapKV keeps its window and the neighbours of what that looks at.
    let snap = kept("snapkv:keep=0.7", |s| s.window[20] = 1.0);
    assert!(
        (18..=22).all(|t| snap.contains(&t)) && (tokens - 64..tokens).all(|t| snap.contains(&t)),
        "{snap:?}"
    );
    for (method, looked) in [("expected:keep=0.1", 0), ("kvzip:keep=0.1", 1)] {
        let own = kept(method, |s| {
            [&mut s.expected, &mut s.repeated][looked][30..33].fill(1.0);
        });
        assert!((0..4).chain(30..33).all(|t| own.contains(&t)), "{method}: {own:?}");
    }
}

fn dump(dir: &Path, model: &Path) -> std::path::PathBuf {
    let line = json!({"prompt": "Who keeps the lamp in Port Vale, and who the boat?", "answers": ["x"]});
    let file = dir.join("prompts.jsonl");
    fs::write(&file, line.to_string()).unwrap();
    let (data, out) = (format!("prompts:{}", text(&file)), dir.join("dump"));
    succeed(&["dump", "--model", text(model), "--data", &data, "--requests", "1", "-o", text(&out)]);
    out
}

/// Attention received is a distribution of every query's one; a token at the end is seen once, the first by all.
#[test]
fn attention_adds_up() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    fs::create_dir(&folder).unwrap();
    tiny(&folder, 257, 400);
    let dump = dump(dir.path(), &folder);
    let manifest = Manifest::read(&dump).unwrap();
    let model: Model = open_model(&dump, None, &manifest).unwrap();
    let (batch, _) = load_caches(&dump, &manifest, &[0], 8, model.decoder.ropes(), 0).unwrap();
    let all = Needs { prompt: true, expected: true, repeated: true };
    let seen = &observe(&model, &batch, all).unwrap()[0].layers[0];
    let tokens = batch.caches[0].tokens;
    // Two query heads read the one key/value head.
    let sum: f32 = seen.received.iter().sum();
    assert!((sum - 2.0 * tokens as f32).abs() < 0.05, "{sum} of {tokens}");
    assert_eq!(tokens, 51);
    assert!(
        seen.window.iter().zip(&seen.received).all(|(a, b)| (a - b).abs() < 1e-4),
        "shorter than the window"
    );
    assert!(seen.repeated.iter().all(|w| *w > 0.0 && *w <= 1.0));
    assert!(seen.expected.iter().all(|w| *w > 0.0 && w.is_finite()));

    // Keeping all changes nothing; what is dropped is not seen: with only sinks and the latest, the answer is that of a cache which
    // never had the others.
    let next = |batch: &mut CacheBatch| -> Vec<f32> {
        let mut fork = batch.caches[0].fork(&mut batch.pool);
        let mut segments = [Segment { cache: &mut fork, tokens: &[7] }];
        let hidden = model.decoder.forward(&mut batch.pool, &mut segments, None).unwrap();
        fork.release(&mut batch.pool);
        hidden
    };
    let whole = next(&mut batch.clone());
    let mut all = batch.clone();
    chain("streaming:keep=1").encode(&mut all, &Memo::default()).unwrap();
    assert_eq!(next(&mut all), whole);
    let mut some = batch.clone();
    chain("streaming:keep=0.5").encode(&mut some, &Memo::default()).unwrap();
    let without = next(&mut some);
    assert_ne!(without, whole);
    // Whatever the dropped tokens held.
    let mut other = batch.clone();
    let page = other.caches[0].layers[0].entries[2].block;
    let numbers = other.pool.keys(page).len();
    let changed = other.pool.allocate(&vec![3.0; numbers], &vec![5.0; numbers]);
    let entry = kvfuse::block::Entry::plain(changed);
    other.caches[0].layers[0].replace(&mut other.pool, 2, entry);
    other.pool.release(changed);
    chain("streaming:keep=0.5").encode(&mut other, &Memo::default()).unwrap();
    assert_eq!(next(&mut other), without);

    let file = dir.path().join("some.kv");
    succeed(&["encode", text(&dump), "--method", "kvzip:keep=0.5", "-o", text(&file)]);
    refuse(
        &["decode", text(&file), "-o", text(&dir.path().join("d"))],
        &["some.kv", "kvzip", "drops tokens"],
    );
    refuse(&["sweep", text(&dump), "--method", "bff:tau=0.9+snapkv"], &["snapkv", "it cannot follow bff"]);
    refuse(&["sweep", text(&dump), "--method", "snapkv:keep=0"], &["above 0"]);
}
