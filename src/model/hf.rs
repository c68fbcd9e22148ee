//! Hugging Face folders: `config.json`, `tokenizer.json` and one or more `*.safetensors`.

use super::config::{ARCHITECTURES, ModelConfig, RopeConfig, unknown_architecture};
use super::weights::TensorSource;
use crate::error::{Error, IoAt, Result};
use crate::files;
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

pub struct HfFolder {
    path: PathBuf,
    maps: Vec<(PathBuf, Mmap)>,
    /// Tensor name -> index into `maps`.
    index: HashMap<String, usize>,
    config: ModelConfig,
}

/// The fields of `config.json` that kvfuse reads.
#[derive(Deserialize)]
struct RawConfig {
    model_type: String,
    num_hidden_layers: usize,
    hidden_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    #[serde(default)]
    max_position_embeddings: usize,
    #[serde(default = "default_epsilon")]
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    /// Where transformers 5 puts both of the above.
    rope_parameters: Option<RawRope>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
}

#[derive(Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
}

fn default_epsilon() -> f32 {
    1e-6
}

impl HfFolder {
    pub fn open(path: &Path) -> Result<Self> {
        let config = read_config(&path.join("config.json"))?;
        let mut shards: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(path).at(path)? {
            let file = entry.at(path)?.path();
            if file.extension().is_some_and(|e| e == "safetensors") {
                shards.push(file);
            }
        }
        shards.sort();
        if shards.is_empty() {
            return Err(Error::file(path, "no *.safetensors file in this model folder"));
        }
        let mut maps = Vec::new();
        let mut index = HashMap::new();
        for shard in shards {
            let map = files::map(&shard)?;
            for name in parse(&shard, &map)?.names() {
                index.insert(name.to_owned(), maps.len());
            }
            maps.push((shard, map));
        }
        Ok(HfFolder { path: path.to_owned(), maps, index, config })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn tokenizer_path(&self) -> PathBuf {
        self.path.join("tokenizer.json")
    }

    /// The files that make up the model's identity, in a fixed order.
    pub fn files(&self) -> Vec<PathBuf> {
        let fixed = [self.path.join("config.json"), self.tokenizer_path()];
        fixed.into_iter().chain(self.maps.iter().map(|(p, _)| p.clone())).collect()
    }
}

fn parse<'a>(path: &Path, map: &'a Mmap) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(map).map_err(|e| {
        Error::file(path, format!("damaged or truncated safetensors ({e}); fetch the file again"))
    })
}

impl TensorSource for HfFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn has(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let missing = || Error::file(&self.path, format!("tensor {name} is missing"));
        let (path, map) = &self.maps[*self.index.get(name).ok_or_else(missing)?];
        let tensors = parse(path, map)?;
        let view = tensors.tensor(name).map_err(|_| missing())?;
        let data = to_f32(view.dtype(), view.data()).ok_or_else(|| {
            Error::file(path, format!("tensor {name} is {:?}; f32, f16 and bf16 are supported", view.dtype()))
        })?;
        Ok((view.shape().to_vec(), data))
    }
}

/// Little-endian safetensors bytes as f32; `None` for a type that is no floating-point storage of weights.
pub fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let (pairs, _) = bytes.as_chunks::<2>();
    match dtype {
        Dtype::F32 => Some(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        Dtype::F16 => Some(pairs.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()),
        Dtype::BF16 => Some(pairs.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()),
        _ => None,
    }
}

fn read_config(path: &Path) -> Result<ModelConfig> {
    let text = fs::read_to_string(path).at(path)?;
    let bad = |e: serde_json::Error| Error::file(path, format!("not a model configuration: {e}"));
    let value: serde_json::Value = serde_json::from_str(&text).map_err(bad)?;
    let architecture = value.get("model_type").and_then(|v| v.as_str()).unwrap_or_default();
    if !ARCHITECTURES.contains(&architecture) {
        return Err(unknown_architecture(path, architecture));
    }
    let raw: RawConfig = serde_json::from_value(value).map_err(bad)?;
    let scaling = [&raw.rope_scaling, &raw.rope_parameters];
    let mut kinds = scaling.into_iter().flatten().filter_map(|r| r.rope_type.as_deref());
    if let Some(kind) = kinds.find(|k| *k != "default") {
        return Err(Error::file(
            path,
            format!("RoPE scaling '{kind}' is not supported; use a model without it"),
        ));
    }
    if raw.use_sliding_window {
        return Err(Error::file(path, "sliding-window attention is not supported; use a model without it"));
    }
    // qwen2 has its three biases whether its configuration says so or not.
    if raw.attention_bias && raw.model_type == "llama" || raw.mlp_bias {
        return Err(Error::file(path, "attention biases of llama and MLP biases are not supported"));
    }
    let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / raw.num_attention_heads.max(1));
    let base = raw.rope_theta.or(raw.rope_parameters.as_ref().and_then(|r| r.rope_theta));
    ModelConfig {
        architecture: raw.model_type,
        layers: raw.num_hidden_layers,
        hidden: raw.hidden_size,
        heads: raw.num_attention_heads,
        kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
        head_dim,
        intermediate: raw.intermediate_size,
        vocab: raw.vocab_size,
        context: raw.max_position_embeddings,
        rms_epsilon: raw.rms_norm_eps,
        rope: RopeConfig { base: base.unwrap_or(10_000.0), dims: head_dim },
    }
    .checked(path)
}
