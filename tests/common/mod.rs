//! What the tests of the binary share.
#![allow(dead_code)]

use assert_cmd::Command;
use kvfuse::block::{BlockShape, BlockTable, RequestCache, Storage};
use kvfuse::codec::CacheBatch;
use kvfuse::codec::evict::{Observed, Seen};
use kvfuse::model::{Rope, RopeConfig, Ropes};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Arc, OnceLock};
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;

/// The binary under test.
pub fn kvfuse() -> Command {
    Command::cargo_bin("kvfuse").unwrap()
}

/// Runs the binary; returns what it printed and its status.
pub fn run(arguments: &[&str]) -> Output {
    kvfuse().args(arguments).output().unwrap()
}

/// Runs the binary and expects success.
pub fn succeed(arguments: &[&str]) -> String {
    let output = run(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the binary and expects exit 2 with one line of error that contains `words`, no panic, no backtrace.
pub fn refuse(arguments: &[&str], words: &[&str]) {
    let output = run(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    // Progress lines may come before it.
    let errors: Vec<&str> = stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{arguments:?}: {stderr}");
    // Only a caret under its place may follow.
    let after: Vec<&str> = stderr.lines().skip_while(|l| !l.starts_with("error: ")).skip(1).collect();
    assert!(after.is_empty() || after.len() == 2 && after[1].trim() == "^", "{arguments:?}: {stderr}");
    for word in words {
        assert!(errors[0].contains(word), "{arguments:?}: {:?} lacks {word:?}", errors[0]);
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The default model's file, fetched on first use.
pub fn model_file() -> PathBuf {
    kvfuse::model::registry::resolve(kvfuse::model::registry::DEFAULT_MODEL).unwrap()
}

/// Requests of [`small_dump`].
pub const REQUESTS: usize = 5;

/// Arguments of the dump that [`small_dump`] holds, but for its folder.
pub const SMALL: [&str; 7] = ["dump", "--requests", "5", "--shots", "1", "--dtype", "f16"];

/// A folder of this test binary's own in cargo's folder for tests, made anew.
fn own_folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", env!("CARGO_CRATE_NAME")));
    // That of an earlier run.
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// A random model of thirty small layers, written once per test binary: no download, and a sweep takes seconds.
pub fn small_model() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| {
        let folder = own_folder("model");
        Shape { layers: 30, hidden: 36, heads: 9, kv_heads: 3, wide: 48, vocab: 257, context: 8192 }
            .write(&folder);
        folder
    })
}

/// A dump of [`small_model`] that tests only read, made once per test binary.
pub fn small_dump() -> &'static Path {
    static DUMP: OnceLock<PathBuf> = OnceLock::new();
    DUMP.get_or_init(|| {
        let folder = own_folder("dump");
        let mut arguments = SMALL.to_vec();
        arguments.extend(["--model", text(small_model()), "-o", text(&folder)]);
        succeed(&arguments);
        folder
    })
}

/// The same prompts through the default model: for tests that need a real one, which is fetched on first use.
pub fn real_dump() -> &'static Path {
    static DUMP: OnceLock<PathBuf> = OnceLock::new();
    DUMP.get_or_init(|| {
        let folder = own_folder("real-dump");
        let mut arguments = SMALL.to_vec();
        arguments.extend(["-o", text(&folder)]);
        succeed(&arguments);
        folder
    })
}

/// A file among the tests' fixtures.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// `--data` of a file of some kind.
pub fn spec(kind: &str, path: &Path) -> String {
    format!("{kind}:{}", path.display())
}

pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Writes a file; returns where it is.
pub fn write(path: &Path, bytes: &[u8]) -> PathBuf {
    fs::write(path, bytes).unwrap();
    path.to_owned()
}

/// Dumps in f16 and reads the manifest back.
pub fn dumped(out: &Path, arguments: &[&str]) -> serde_json::Value {
    succeed(&[&["dump", "--dtype", "f16", "-o", text(out)], arguments].concat());
    serde_json::from_str(&fs::read_to_string(out.join("manifest.json")).unwrap()).unwrap()
}

/// A sweep of two thresholds with short answers.
pub fn sweep_arguments<'a>(dump: &'a str, out: &'a str) -> Vec<&'a str> {
    vec![
        "sweep",
        dump,
        "--method",
        "bff:tau=0.9|0.75",
        "--max-new-tokens",
        "8",
        "--resamples",
        "200",
        "-o",
        out,
    ]
}

/// Copies the files of a folder (not its subfolders).
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// Every shard of two dumps, byte for byte.
pub fn assert_same_dump(a: &Path, b: &Path) {
    for i in 0..REQUESTS {
        let name = format!("request-{i:05}.safetensors");
        assert!(fs::read(a.join(&name)).unwrap() == fs::read(b.join(&name)).unwrap(), "{name} differs");
    }
}

/// A model of one layer, with embeddings for the first `vocab` of its 257 tokens.
pub fn tiny(folder: &Path, vocab: usize, context: u64) {
    Shape { layers: 1, hidden: 16, heads: 2, kv_heads: 1, wide: 24, vocab, context }.write(folder);
}

/// A random model whose tokens are bytes and a BOS.
pub struct Shape {
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub wide: usize,
    pub vocab: usize,
    pub context: u64,
}

impl Shape {
    /// A Hugging Face folder, its weights in two files.
    pub fn write(&self, folder: &Path) {
        let Shape { layers, hidden, heads, kv_heads, wide, vocab, context } = *self;
        let config = json!({"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": wide,
            "vocab_size": vocab, "max_position_embeddings": context, "tie_word_embeddings": true});
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        write_tokenizer(folder);
        self.write_weights(folder);
        fs::write(folder.join("README.md"), "not asked for").unwrap();
    }

    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let Shape { layers, hidden, heads, kv_heads, wide, vocab, .. } = *self;
        let kv = hidden / heads * kv_heads;
        let mut all = vec![
            ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ];
        for n in 0..layers {
            let own = [
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![hidden, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, hidden]),
                ("mlp.gate_proj", vec![wide, hidden]),
                ("mlp.up_proj", vec![wide, hidden]),
                ("mlp.down_proj", vec![hidden, wide]),
            ];
            all.extend(own.map(|(part, shape)| (format!("model.layers.{n}.{part}.weight"), shape)));
        }
        all
    }

    fn write_weights(&self, folder: &Path) {
        use rand::{RngExt, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .tensors()
            .into_iter()
            .map(|(name, shape)| {
                let n: usize = shape.iter().product();
                let mut number = || match shape.len() {
                    1 => rng.random_range(0.5f32..1.5),
                    _ => rng.random_range(-1.7f32..1.7) / (shape[1] as f32).sqrt(),
                };
                let data = (0..n).flat_map(|_| number().to_le_bytes()).collect();
                (name, shape.clone(), data)
            })
            .collect();
        let mut map = serde_json::Map::new();
        for (shard, file) in
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"].iter().enumerate()
        {
            let part: Vec<_> = bytes.iter().skip(shard).step_by(2).collect();
            map.extend(part.iter().map(|(name, ..)| (name.clone(), json!(file))));
            let views = part.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
            safetensors::serialize_to_file(views, None, &folder.join(file)).unwrap();
        }
        let index = json!({"metadata": {}, "weight_map": map});
        fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}

fn write_tokenizer(folder: &Path) {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab_map: Vocab =
        ["<s>".to_owned()].into_iter().chain(alphabet.iter().map(char::to_string)).zip(0..).collect();
    let mut tokenizer =
        tokenizers::Tokenizer::new(BPE::builder().vocab_and_merges(vocab_map, vec![]).build().unwrap());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer.add_special_tokens([AddedToken::from("<s>", true)]).unwrap();
    let mut bos = TemplateProcessing::builder();
    let bos = bos.try_single("<s> $A").unwrap().special_tokens(vec![("<s>", 0)]);
    tokenizer.with_post_processor(Some(bos.build().unwrap()));
    tokenizer.save(folder.join("tokenizer.json"), false).unwrap();
}

/// Caches that look a little like real ones: tokens with numbers of their own, layers that follow from the layers below, and what
/// stands before. Requests share beginnings and phrases; the last is one token long.
pub fn made_up(
    seed: u64,
    requests: usize,
    longest: usize,
    block_size: usize,
    tenants: &[&str],
) -> CacheBatch {
    use rand::{RngExt, SeedableRng};
    const LAYERS: usize = 3;
    let shape = BlockShape { block_size, kv_heads: 2, head_dim: 4 };
    let width = 2 * shape.token_width();
    let ropes = Arc::new(Ropes::same(Rope::new(&RopeConfig::plain(100.0, 4), 512)));
    let mut batch = CacheBatch::empty(shape, Storage::F16, ropes);
    // What a token is, and how a layer follows from the one below, is the same for all seeds.
    let hash = |a: u64, b: u64| {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(a.wrapping_mul(1_000_003) ^ b);
        rng.random_range(-1.0f32..1.0)
    };
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    for request in 0..requests {
        let length = if request + 1 == requests { 1 } else { rng.random_range(1..=longest) };
        let shared = rng.random_range(0..=length);
        let tokens: Vec<u32> =
            (0..length).map(|t| if t < shared { t as u32 % 7 } else { rng.random_range(0..9) }).collect();
        let mut cache = RequestCache { layers: Vec::new(), tokens: length };
        let mut below: Vec<Vec<f32>> =
            tokens.iter().map(|t| (0..width as u64).map(|i| hash(u64::from(*t), i)).collect()).collect();
        for layer in 0..LAYERS {
            let mut rows = Vec::new();
            for t in 0..length {
                let before = if t > 0 { tokens[t - 1] } else { 99 };
                let row: Vec<f32> = (0..width)
                    .map(|i| {
                        let mixed = below[t][i] + 0.5 * below[t][(i + 3) % width];
                        let context = 0.2 * hash(1000 + u64::from(before), (layer * width + i) as u64);
                        let new = 0.1 * rng.random_range(-1.0f32..1.0);
                        mixed + context + new
                    })
                    .collect();
                rows.push(row);
            }
            let mut table = BlockTable::default();
            let half = width / 2;
            for (b, rows) in rows.chunks(block_size).enumerate() {
                let mut keys: Vec<f32> = rows.iter().flat_map(|r| &r[..half]).copied().collect();
                batch.ropes.layer(layer).rotate_tokens(&mut keys, half, b * block_size);
                let values: Vec<f32> = rows.iter().flat_map(|r| &r[half..]).copied().collect();
                table.push(batch.pool.allocate(&keys, &values));
            }
            cache.layers.push(table);
            below = rows;
        }
        batch.push(cache, tokens, tenants[request % tenants.len()]);
    }
    batch
}

/// The same numbers in a new pool, without payloads.
pub fn plain_copy(batch: &CacheBatch) -> CacheBatch {
    copied(batch, |value| value)
}

/// Other values in a new pool, without payloads.
pub fn copied(batch: &CacheBatch, value: impl Fn(f32) -> f32) -> CacheBatch {
    let mut copy = CacheBatch::empty(batch.pool.shape(), Storage::F16, batch.ropes.clone());
    for (request, cache) in batch.caches.iter().enumerate() {
        let mut own = RequestCache { layers: Vec::new(), tokens: cache.tokens };
        for old in &cache.layers {
            let mut table = BlockTable::default();
            for entry in &old.entries {
                let values: Vec<f32> = batch.pool.values(entry.block).iter().map(|v| value(*v)).collect();
                table.push(copy.pool.allocate(&batch.pool.keys(entry.block), &values));
            }
            own.layers.push(table);
        }
        copy.push(own, batch.tokens[request].clone(), &batch.tenants[request]);
    }
    copy
}

/// Trains a joint codec on caches and writes it, all errors weighing the same, and a KVTC transform beside it.
pub fn joint_codec(path: &Path, batch: &CacheBatch) {
    use kvfuse::codec::joint::{book, corpus_of, eighths, train};
    use kvfuse::codec::kvtc;
    let shape = batch.pool.shape();
    let layers = batch.caches[0].layers.len();
    let corpus = corpus_of(batch, &vec![0; batch.caches.len()]).unwrap();
    let d = shape.head_dim;
    let unit: Vec<f64> = (0..d * d).map(|i| if i % (d + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let metrics = vec![vec![unit; 2 * shape.kv_heads]; layers];
    let training = train::Training { step: eighths(0.1), taps: 2, klt: true, ridge: 1e-2, rank: 16 };
    let (books, tables) = train::train(&corpus, &metrics, &training, || ()).unwrap();
    let origin = book::Origin {
        schema: book::SCHEMA,
        kvfuse_version: String::new(),
        command: Vec::new(),
        model: "made up".into(),
        model_sha256: String::new(),
        layers,
        kv_heads: shape.kv_heads,
        head_dim: d,
        step: training.step,
        training_tokens: corpus.tokens(),
        contexts: Vec::new(),
        dumps: Vec::new(),
        settings: json!(null),
    };
    book::write(path, &origin, &books, &tables).unwrap();
    let own = kvtc::Origin {
        schema: kvtc::SCHEMA,
        kvfuse_version: String::new(),
        model: "made up".into(),
        model_sha256: String::new(),
        layers,
        kv_heads: shape.kv_heads,
        head_dim: d,
        training_tokens: corpus.tokens(),
        dumps: Vec::new(),
        directions: 64,
    };
    let dealt =
        corpus_of(batch, &(0..batch.caches.len()).map(|i| (i % 4) as u8).collect::<Vec<_>>()).unwrap();
    let parts = [0, 1].map(|part| kvtc::fit(&dealt, part, 64).unwrap());
    let stem = path.file_stem().unwrap().to_str().unwrap();
    kvtc::Book::write(&path.with_file_name(format!("{stem}-kvtc.safetensors")), &own, &parts).unwrap();
}

/// Attention that grows with a hash of the token, so that every scorer has its own order.
pub fn made_up_attention(batch: &CacheBatch, salt: u64) -> Arc<Vec<Observed>> {
    let numbers = |tokens: usize, salt: u64| -> Vec<f32> {
        (0..tokens as u64).map(|t| ((t + 1) * 2_654_435_761 * salt % 1009) as f32).collect()
    };
    let of = |cache: &RequestCache| Observed {
        layers: (0..cache.layers.len() as u64)
            .map(|n| Seen {
                received: numbers(cache.tokens, salt + n),
                window: numbers(cache.tokens, salt + n + 31),
                expected: numbers(cache.tokens, salt + n + 57),
                repeated: numbers(cache.tokens, salt + n + 83),
            })
            .collect(),
    };
    Arc::new(batch.caches.iter().map(of).collect())
}
