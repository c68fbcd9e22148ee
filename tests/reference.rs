//! Token ids and log-probabilities against transformers and llama.cpp, for every architecture and both kinds of file.
//! `tests/reference/make.py` made the fixture; the files are written here from it, weights from a hash.

use candle_core::quantized::gguf_file::{self, Value as Meta};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use kvfuse::block::{BlockPool, Storage};
use kvfuse::model::{ARCHITECTURES, Model, Segment, log_sum_exp};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::Path;

#[derive(Deserialize)]
struct Fixture {
    texts: Vec<String>,
    tokenizers: BTreeMap<String, Tokens>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Tokens {
    json: Value,
    metadata: BTreeMap<String, (String, Value)>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    tokenizer: String,
    config: Value,
    metadata: BTreeMap<String, (String, Value)>,
    /// Hugging Face name -> GGUF name, shape, kind, heads whose rows GGUF interleaves.
    tensors: BTreeMap<String, (String, Vec<usize>, String, usize)>,
    prompt: Vec<u32>,
    transformers: Said,
    #[serde(rename = "llama.cpp")]
    llama_cpp: Said,
}

/// What another implementation says.
#[derive(Deserialize)]
struct Said {
    /// Of each text.
    ids: Vec<Vec<u32>>,
    /// Token and log-probability after the prompt, most likely first.
    top: Vec<(u32, f64)>,
}

/// Number `i` of a tensor, in [-0.25, 0.25): FNV-1a of its name and the index, mixed as MurmurHash3 ends.
fn weight(name: &str, i: usize) -> f32 {
    let seed = name.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let mut h = seed.wrapping_add((i as u32).wrapping_mul(0x9e37_79b9));
    h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
    h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    h ^= h >> 16;
    ((h >> 8) as f32 / (1 << 23) as f32 - 1.0) * 0.25
}

fn numbers(name: &str, shape: &[usize], offset: f32) -> Vec<f32> {
    (0..shape.iter().product()).map(|i| offset + weight(name, i)).collect()
}

/// Rows of each head in turns from its two halves.
fn interleaved(rows: &[f32], shape: &[usize], heads: usize) -> Vec<f32> {
    if heads == 0 {
        return rows.to_vec();
    }
    let (dim, width) = (shape[0] / heads, shape[1]);
    let source = |r: usize| r / dim * dim + (r % dim) % 2 * (dim / 2) + (r % dim) / 2;
    (0..shape[0]).flat_map(|r| &rows[source(r) * width..][..width]).copied().collect()
}

impl Case {
    fn write_folder(&self, tokenizer: &Value, folder: &Path) {
        fs::create_dir(folder).unwrap();
        fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
        fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let data: Vec<(&String, &Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(name, (_, shape, kind, _))| {
                let numbers = numbers(name, shape, if kind == "gain" { 1.0 } else { 0.0 });
                (name, shape, numbers.iter().flat_map(|x| x.to_le_bytes()).collect())
            })
            .collect();
        let views = data.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::F32, (*s).clone(), b).unwrap()));
        safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    }

    fn write_gguf(&self, tokenizer: &BTreeMap<String, (String, Value)>, path: &Path) {
        let metadata: Vec<(&str, Meta)> = self
            .metadata
            .iter()
            .chain(tokenizer)
            .map(|(key, (kind, value))| (key.as_str(), meta(kind, value)))
            .collect();
        let tensors: Vec<(&str, QTensor)> = self
            .tensors
            .iter()
            .map(|(name, (own, shape, kind, heads))| {
                let plain = numbers(name, shape, if kind == "weight" { 0.0 } else { 1.0 });
                let data = interleaved(&plain, shape, *heads);
                let tensor = Tensor::from_vec(data, shape.as_slice(), &Device::Cpu).unwrap();
                (own.as_str(), QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
            })
            .collect();
        let metadata: Vec<(&str, &Meta)> = metadata.iter().map(|(k, v)| (*k, v)).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }
}

fn meta(kind: &str, value: &Value) -> Meta {
    let list = |f: &dyn Fn(&Value) -> Meta| Meta::Array(value.as_array().unwrap().iter().map(f).collect());
    match kind {
        "str" => Meta::String(value.as_str().unwrap().to_owned()),
        "u32" => Meta::U32(value.as_u64().unwrap() as u32),
        "f32" => Meta::F32(value.as_f64().unwrap() as f32),
        "bool" => Meta::Bool(value.as_bool().unwrap()),
        "strs" => list(&|v| Meta::String(v.as_str().unwrap().to_owned())),
        "i32s" => list(&|v| Meta::I32(v.as_i64().unwrap() as i32)),
        "f32s" => list(&|v| Meta::F32(v.as_f64().unwrap() as f32)),
        other => panic!("{other}"),
    }
}

/// Log-probabilities of the token after a prompt.
fn log_probabilities(model: &Model, prompt: &[u32]) -> Vec<f64> {
    let decoder = &model.decoder;
    let mut pool = BlockPool::new(decoder.block_shape(16), Storage::F32);
    let mut cache = decoder.new_cache();
    let segment = Segment { cache: &mut cache, tokens: prompt };
    let hidden = decoder.forward(&mut pool, &mut [segment], None).unwrap();
    let logits = decoder.logits(&hidden);
    let last = logits.rchunks_exact(decoder.config().vocab).next().unwrap();
    let norm = log_sum_exp(last);
    last.iter().map(|x| f64::from(*x) - norm).collect()
}

/// llama.cpp rounds activations to 16 bits in places: it differs from transformers by up to 6e-3 itself.
const TOLERANCES: [f64; 2] = [2e-4, 2e-2];

#[test]
fn transformers_and_llama_cpp_say_the_same() {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/reference.json"));
    let fixture: Fixture = serde_json::from_str(&text.unwrap()).unwrap();
    assert!(fixture.texts.len() >= 100);
    let covered: BTreeSet<&str> = fixture.cases.iter().map(|c| c.name.as_str()).collect();
    assert!(ARCHITECTURES.iter().all(|a| covered.contains(a)), "{covered:?}");
    let dir = tempfile::tempdir().unwrap();
    for (n, case) in fixture.cases.iter().enumerate() {
        let tokens = &fixture.tokenizers[&case.tokenizer];
        let (folder, gguf) = (dir.path().join(format!("{n}")), dir.path().join(format!("{n}.gguf")));
        case.write_folder(&tokens.json, &folder);
        case.write_gguf(&tokens.metadata, &gguf);
        for (path, kind) in [(folder, "folder"), (gguf, "GGUF")] {
            let model = Model::open(&path).unwrap();
            let label = format!("{} with {}, {kind}", case.name, case.tokenizer);
            for (i, text) in fixture.texts.iter().enumerate() {
                let ids = model.tokenizer.encode_prompt(text).unwrap();
                assert_eq!(ids, case.transformers.ids[i], "{label}: {text:?}, transformers");
                // llama.cpp leaves out the NFC that Qwen's own tokenizer does.
                let composed = case.tokenizer == "qwen2" && case.llama_cpp.ids[i] != case.transformers.ids[i];
                if composed {
                    assert!(
                        ["cafe\u{301}", "\u{212b} \u{c5} A\u{30a}", "\u{1112}\u{1161}\u{11ab}"]
                            .contains(&text.as_str())
                    );
                } else {
                    assert_eq!(ids, case.llama_cpp.ids[i], "{label}: {text:?}, llama.cpp");
                }
            }
            let own = log_probabilities(&model, &case.prompt);
            for (said, tolerance) in [&case.transformers, &case.llama_cpp].into_iter().zip(TOLERANCES) {
                for &(token, expected) in &said.top {
                    let error = (own[token as usize] - expected).abs();
                    assert!(error < tolerance, "{label}: token {token}, {} {expected}", own[token as usize]);
                }
            }
        }
    }
}
