//! The weights of a decoder, whatever file they come from.

use super::config::ModelConfig;
use super::gemm::Linear;
use super::numbers::Numbers;
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// A file or folder that yields tensors by their Hugging Face names, with keys and queries in rotate-half layout and norms'
/// gains as they multiply.
pub trait TensorSource: Sync {
    /// Where errors point.
    fn path(&self) -> &Path;
    /// Whether the head is the embedding.
    fn is_tied(&self) -> bool;
    /// Tensors that change numbers and are not among those `read` (Hugging Face names); in the file's own names.
    fn unread(&self, read: &BTreeSet<String>) -> Vec<String>;
    /// Shape (outermost first) and data of a tensor.
    fn tensor(&self, name: &str) -> Result<(Vec<usize>, Numbers)>;
}

pub struct LayerWeights {
    pub attention_norm: Vec<f32>,
    /// Queries, keys and values stacked: `hidden -> (heads + 2 kv_heads) * head_dim`.
    pub qkv: Linear,
    /// Added to them (qwen2).
    pub qkv_bias: Option<Vec<f32>>,
    /// Gains of the norms of each head's query and key, `[head_dim]` each (qwen3, gemma3).
    pub qk_norms: Option<[Vec<f32>; 2]>,
    pub attention_out: Linear,
    pub mlp_norm: Vec<f32>,
    /// Gate and up stacked: `hidden -> 2 * intermediate`.
    pub gate_up: Linear,
    pub down: Linear,
    /// Gains of the norms after attention and after the MLP (gemma3).
    pub post_norms: Option<[Vec<f32>; 2]>,
}

pub struct Weights {
    /// `hidden -> vocab`; an embedding is a row of it where the two are tied.
    pub head: Linear,
    /// `[vocab, hidden]`, where it is not tied to the head.
    pub embedding: Option<Linear>,
    pub layers: Vec<LayerWeights>,
    pub final_norm: Vec<f32>,
}

impl Weights {
    /// Reads all tensors, checking every shape against the configuration.
    pub fn load(config: &ModelConfig, source: &dyn TensorSource) -> Result<Self> {
        let read = Mutex::new(BTreeSet::new());
        let tensor = |name: &str, shape: &[usize]| -> Result<Numbers> {
            let (found, data) = source.tensor(name)?;
            read.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
            if found != shape {
                let problem = format!("tensor {name} has shape {found:?}, expected {shape:?}");
                return Err(Error::file(source.path(), problem));
            }
            match data.first_not_finite() {
                None => Ok(data),
                Some((at, number)) => {
                    let problem =
                        format!("tensor {name} holds {number} at element {at}; fetch the model again");
                    Err(Error::file(source.path(), problem))
                }
            }
        };
        // The largest first: what it needs on the way into memory is free again before the others come.
        let embedding = "model.embed_tokens.weight";
        let matrix = |name: &str, outputs: usize, inputs: usize| -> Result<Linear> {
            Ok(Linear::stack(vec![tensor(name, &[outputs, inputs])?], inputs))
        };
        let (head, embedding) = if source.is_tied() {
            (matrix(embedding, config.vocab, config.hidden)?, None)
        } else {
            let own = matrix(embedding, config.vocab, config.hidden)?;
            (matrix("lm_head.weight", config.vocab, config.hidden)?, Some(own))
        };
        let layer =
            |n: usize| layer(config, &|name, shape| tensor(&format!("model.layers.{n}.{name}"), shape));
        let layers = (0..config.layers).into_par_iter().map(layer).collect::<Result<_>>()?;
        let final_norm = tensor("model.norm.weight", &[config.hidden])?.into_f32();
        let unread = source.unread(&read.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(name) = unread.iter().min() {
            let problem = format!(
                "holds {} tensors that a {} of this version does not use ({name} ...); it is another kind of model",
                unread.len(),
                config.architecture
            );
            return Err(Error::file(source.path(), problem));
        }
        Ok(Weights { head, embedding, layers, final_norm })
    }

    /// Appends a token's embedding (`[hidden]`).
    pub fn embed(&self, token: u32, out: &mut Vec<f32>) {
        self.embedding.as_ref().unwrap_or(&self.head).extend_with_row(token as usize, out);
    }
}

/// Reads one layer; `tensor` takes names within it.
fn layer(config: &ModelConfig, tensor: &dyn Fn(&str, &[usize]) -> Result<Numbers>) -> Result<LayerWeights> {
    let traits = config.traits();
    let (hidden, wide) = (config.hidden, config.intermediate);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let vector = |name: &str, size: usize| Ok(tensor(name, &[size])?.into_f32());
    let (qkv, gate_up) = if traits.fused_projections {
        let qkv = vec![tensor("self_attn.qkv_proj.weight", &[q + 2 * kv, hidden])?];
        (qkv, vec![tensor("mlp.gate_up_proj.weight", &[2 * wide, hidden])?])
    } else {
        let qkv = vec![
            tensor("self_attn.q_proj.weight", &[q, hidden])?,
            tensor("self_attn.k_proj.weight", &[kv, hidden])?,
            tensor("self_attn.v_proj.weight", &[kv, hidden])?,
        ];
        let gate = tensor("mlp.gate_proj.weight", &[wide, hidden])?;
        (qkv, vec![gate, tensor("mlp.up_proj.weight", &[wide, hidden])?])
    };
    let qkv_bias = if traits.qkv_bias {
        let parts = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
        let parts = parts.map(|(part, size)| vector(&format!("self_attn.{part}.bias"), size));
        Some(parts.into_iter().collect::<Result<Vec<_>>>()?.concat())
    } else {
        None
    };
    let qk_norms = if traits.qk_norm {
        let d = config.head_dim;
        Some([vector("self_attn.q_norm.weight", d)?, vector("self_attn.k_norm.weight", d)?])
    } else {
        None
    };
    let after_attention = vector("post_attention_layernorm.weight", hidden)?;
    let (mlp_norm, post_norms) = if traits.post_norms {
        let after_mlp = vector("post_feedforward_layernorm.weight", hidden)?;
        (vector("pre_feedforward_layernorm.weight", hidden)?, Some([after_attention, after_mlp]))
    } else {
        (after_attention, None)
    };
    Ok(LayerWeights {
        attention_norm: vector("input_layernorm.weight", hidden)?,
        qkv: Linear::stack(qkv, hidden),
        qkv_bias,
        qk_norms,
        attention_out: Linear::stack(vec![tensor("self_attn.o_proj.weight", &[hidden, q])?], q),
        mlp_norm,
        gate_up: Linear::stack(gate_up, hidden),
        down: Linear::stack(vec![tensor("mlp.down_proj.weight", &[hidden, wide])?], wide),
        post_norms,
    })
}
