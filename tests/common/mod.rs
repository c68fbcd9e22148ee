//! What the tests of the binary share.
#![allow(dead_code)]

use assert_cmd::Command;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;
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

/// A dump that tests only read, made once per test binary. Its folder lives in cargo's own test folder.
pub fn small_dump() -> &'static Path {
    static DUMP: OnceLock<PathBuf> = OnceLock::new();
    DUMP.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(concat!("dump-", env!("CARGO_CRATE_NAME")));
        // The folder of an earlier run.
        let _ = fs::remove_dir_all(&folder);
        let mut arguments = SMALL.to_vec();
        arguments.extend(["-o", text(&folder)]);
        succeed(&arguments);
        folder
    })
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

/// A model of one layer whose tokens are bytes and a BOS, in two files of weights. It has embeddings for the first
/// `vocab` of the 257 tokens.
pub fn tiny(folder: &Path, vocab: usize, context: u64) {
    let (hidden, wide) = (16, 24);
    let config = json!({"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": wide, "vocab_size": vocab,
        "max_position_embeddings": context, "tie_word_embeddings": true});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
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
    let shapes = [
        ("model.embed_tokens.weight", vec![vocab, hidden]),
        ("model.norm.weight", vec![hidden]),
        ("model.layers.0.input_layernorm.weight", vec![hidden]),
        ("model.layers.0.post_attention_layernorm.weight", vec![hidden]),
        ("model.layers.0.self_attn.q_proj.weight", vec![hidden, hidden]),
        ("model.layers.0.self_attn.k_proj.weight", vec![8, hidden]),
        ("model.layers.0.self_attn.v_proj.weight", vec![8, hidden]),
        ("model.layers.0.self_attn.o_proj.weight", vec![hidden, hidden]),
        ("model.layers.0.mlp.gate_proj.weight", vec![wide, hidden]),
        ("model.layers.0.mlp.up_proj.weight", vec![wide, hidden]),
        ("model.layers.0.mlp.down_proj.weight", vec![hidden, wide]),
    ];
    let bytes: Vec<(&str, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let n: usize = shape.iter().product();
            let data = (0..n).flat_map(|i| (((i * 37 + name.len()) % 19) as f32 / 19.0 - 0.4).to_le_bytes());
            (name, shape, data.collect())
        })
        .collect();
    let mut map = serde_json::Map::new();
    for (shard, file) in
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"].iter().enumerate()
    {
        let part: Vec<_> = bytes.iter().skip(shard).step_by(2).collect();
        map.extend(part.iter().map(|(name, ..)| ((*name).to_owned(), json!(file))));
        let views = part.iter().map(|(n, s, b)| (*n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
        safetensors::serialize_to_file(views, None, &folder.join(file)).unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::write(folder.join("README.md"), "not asked for").unwrap();
}
