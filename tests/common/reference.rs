//! Tiny random models as files, from tests/fixtures/reference.json (tests/reference/make.py).
#![allow(dead_code)]

use candle_core::quantized::gguf_file::{self, Value as Meta};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use kvfuse::block::{BlockPool, Storage};
use kvfuse::model::{Model, Segment};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

/// GGUF metadata: key -> type and value.
pub type Metadata = BTreeMap<String, (String, Value)>;

impl Fixture {
    pub fn read() -> Self {
        let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/reference.json"));
        serde_json::from_str(&text.unwrap()).unwrap()
    }

    /// The first case of an architecture with a tokenizer.
    pub fn case(&self, name: &str, tokenizer: &str) -> &Case {
        self.cases.iter().find(|c| c.name == name && c.tokenizer == tokenizer).unwrap()
    }
}

#[derive(Deserialize)]
pub struct Fixture {
    pub texts: Vec<String>,
    pub tokenizers: BTreeMap<String, Tokens>,
    pub cases: Vec<Case>,
}

#[derive(Deserialize)]
pub struct Tokens {
    pub json: Value,
    pub metadata: Metadata,
}

#[derive(Deserialize)]
pub struct Case {
    pub name: String,
    pub tokenizer: String,
    pub config: Value,
    pub metadata: Metadata,
    /// Hugging Face name -> GGUF name, shape, kind, heads whose rows GGUF interleaves.
    pub tensors: BTreeMap<String, (String, Vec<usize>, String, usize)>,
    pub prompt: Vec<u32>,
    pub transformers: Said,
    #[serde(rename = "llama.cpp")]
    pub llama_cpp: Said,
}

/// What another implementation says.
#[derive(Deserialize)]
pub struct Said {
    /// Of each text.
    pub ids: Vec<Vec<u32>>,
    /// Token and log-probability after the prompt, most likely first.
    pub top: Vec<(u32, f64)>,
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
    pub fn write_folder(&self, tokenizer: &Value, folder: &Path) {
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

    pub fn write_gguf(&self, tokenizer: &Metadata, path: &Path) {
        self.write_gguf_of(
            &self.metadata.iter().chain(tokenizer).map(|(k, v)| (k.clone(), v.clone())).collect(),
            path,
        );
    }

    pub fn write_gguf_of(&self, metadata: &Metadata, path: &Path) {
        let metadata: Vec<(&str, Meta)> =
            metadata.iter().map(|(key, (kind, value))| (key.as_str(), meta(kind, value))).collect();
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
        "u16" => Meta::U16(value.as_u64().unwrap() as u16),
        "u32" => Meta::U32(value.as_u64().unwrap() as u32),
        "u64" => Meta::U64(value.as_u64().unwrap()),
        "i32" => Meta::I32(value.as_i64().unwrap() as i32),
        "f64" => Meta::F64(value.as_f64().unwrap()),
        "f32" => Meta::F32(value.as_f64().unwrap() as f32),
        "bool" => Meta::Bool(value.as_bool().unwrap()),
        "strs" => list(&|v| Meta::String(v.as_str().unwrap().to_owned())),
        "i32s" => list(&|v| Meta::I32(v.as_i64().unwrap() as i32)),
        "f32s" => list(&|v| Meta::F32(v.as_f64().unwrap() as f32)),
        other => panic!("{other}"),
    }
}

/// Logits of the token after a prompt.
pub fn logits(model: &Model, prompt: &[u32]) -> Vec<f32> {
    let decoder = &model.decoder;
    let mut pool = BlockPool::new(decoder.block_shape(16), Storage::F32);
    let mut cache = decoder.new_cache();
    let segment = Segment { cache: &mut cache, tokens: prompt };
    let hidden = decoder.forward(&mut pool, &mut [segment], None).unwrap();
    let logits = decoder.logits(&hidden);
    logits.rchunks_exact(decoder.config().vocab).next().unwrap().to_vec()
}
