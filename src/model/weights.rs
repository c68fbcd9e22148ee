//! The weights of a decoder, in f32, whatever file they come from.

use super::config::ModelConfig;
use super::gemm::Linear;
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::path::Path;

/// A file or folder that yields tensors by their Hugging Face names, with keys and queries in rotate-half layout.
pub trait TensorSource: Sync {
    /// Where errors point.
    fn path(&self) -> &Path;
    fn has(&self, name: &str) -> bool;
    /// Shape (outermost first) and f32 data of a tensor.
    fn tensor(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)>;
}

pub struct LayerWeights {
    pub attention_norm: Vec<f32>,
    /// Queries, keys and values stacked: `hidden -> (heads + 2 kv_heads) * head_dim`.
    pub qkv: Linear,
    /// Added to them (qwen2).
    pub qkv_bias: Option<Vec<f32>>,
    pub attention_out: Linear,
    pub mlp_norm: Vec<f32>,
    /// Gate and up stacked: `hidden -> 2 * intermediate`.
    pub gate_up: Linear,
    pub down: Linear,
}

pub struct Weights {
    /// `[vocab, hidden]`.
    pub embedding: Vec<f32>,
    pub layers: Vec<LayerWeights>,
    pub final_norm: Vec<f32>,
    /// `hidden -> vocab`; the embedding again when the two are tied.
    pub head: Linear,
}

impl Weights {
    /// Reads all tensors, checking every shape against the configuration.
    pub fn load(config: &ModelConfig, source: &dyn TensorSource) -> Result<Self> {
        let tensor = |name: &str, shape: &[usize]| -> Result<Vec<f32>> {
            let (found, data) = source.tensor(name)?;
            if found != shape {
                let problem = format!("tensor {name} has shape {found:?}, expected {shape:?}");
                return Err(Error::file(source.path(), problem));
            }
            Ok(data)
        };
        let (hidden, wide) = (config.hidden, config.intermediate);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let layer = |n: usize| -> Result<LayerWeights> {
            let get = |name: &str, shape: &[usize]| tensor(&format!("model.layers.{n}.{name}.weight"), shape);
            let query = get("self_attn.q_proj", &[q, hidden])?;
            let key = get("self_attn.k_proj", &[kv, hidden])?;
            let value = get("self_attn.v_proj", &[kv, hidden])?;
            let gate = get("mlp.gate_proj", &[wide, hidden])?;
            let up = get("mlp.up_proj", &[wide, hidden])?;
            let bias =
                |part: &str, size: usize| tensor(&format!("model.layers.{n}.self_attn.{part}.bias"), &[size]);
            let qkv_bias = if config.architecture == "qwen2" {
                Some([bias("q_proj", q)?, bias("k_proj", kv)?, bias("v_proj", kv)?].concat())
            } else {
                None
            };
            Ok(LayerWeights {
                qkv_bias,
                attention_norm: get("input_layernorm", &[hidden])?,
                qkv: Linear::from_rows(&[&query, &key, &value], hidden),
                attention_out: Linear::from_rows(&[&get("self_attn.o_proj", &[hidden, q])?], q),
                mlp_norm: get("post_attention_layernorm", &[hidden])?,
                gate_up: Linear::from_rows(&[&gate, &up], hidden),
                down: Linear::from_rows(&[&get("mlp.down_proj", &[hidden, wide])?], wide),
            })
        };
        let embedding = tensor("model.embed_tokens.weight", &[config.vocab, hidden])?;
        let head = if source.has("lm_head.weight") {
            Linear::from_rows(&[&tensor("lm_head.weight", &[config.vocab, hidden])?], hidden)
        } else {
            Linear::from_rows(&[&embedding], hidden)
        };
        Ok(Weights {
            embedding,
            layers: (0..config.layers).into_par_iter().map(layer).collect::<Result<_>>()?,
            final_norm: tensor("model.norm.weight", &[hidden])?,
            head,
        })
    }
}
