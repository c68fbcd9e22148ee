//! The decoder. The KV cache is not in here: it lies in a block pool and is read through block tables.

use super::attention::{Heads, Query, attend};
use super::config::ModelConfig;
use super::kernels::{add, gelu_product, rms_norm, silu_product};
use super::rope::Ropes;
use super::weights::{LayerWeights, Weights};
use crate::block::{BlockPool, BlockShape, RequestCache};
use crate::error::Error;
use rayon::prelude::*;
use std::sync::Arc;

/// Longest sequence that position tables are made for, in tokens: models of a million take gigabytes of them.
const LONGEST: usize = 1 << 18;

pub struct Decoder {
    config: ModelConfig,
    weights: Weights,
    ropes: Arc<Ropes>,
}

/// New tokens of one request and the cache they extend.
pub struct Segment<'a> {
    pub cache: &'a mut RequestCache,
    pub tokens: &'a [u32],
}

/// What passes through the attention of a layer.
pub struct Tapped<'a> {
    pub layer: usize,
    /// Queries as they meet the keys, with position: the first `heads * head_dim` numbers of each row of `[rows, stride]`.
    pub queries: &'a [f32],
    pub stride: usize,
    /// What attention puts out: `[rows, heads * head_dim]`.
    pub attended: &'a [f32],
}

/// Listens to every layer of a forward pass.
pub type Tap<'a> = &'a mut dyn FnMut(&Tapped);

/// A key, value or hidden state that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fault {
    /// Index of the segment it is of.
    pub segment: usize,
    /// The layer; `None` for the final hidden state.
    pub layer: Option<usize>,
    pub number: f32,
}

impl Fault {
    /// As an error about a request, named by its segment.
    pub fn of<'a>(self, id: impl FnOnce(usize) -> &'a String) -> Error {
        let place = match self.layer {
            Some(layer) => format!("layer {layer}: a key or value of {}", self.number),
            None => format!("the final hidden state holds {}", self.number),
        };
        let reason = match self.number.is_finite() {
            true => format!("does not fit into the cache's f16 numbers (at most {})", half::f16::MAX),
            false => "is not a finite number; use another model".to_owned(),
        };
        Error::Number(format!("request {}, {place} {reason}", id(self.segment)))
    }
}

impl Decoder {
    pub fn new(config: ModelConfig, weights: Weights) -> Self {
        let ropes = Arc::new(Ropes::new(&config, config.context.clamp(1, LONGEST)));
        Decoder { config, weights, ropes }
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Longest sequence this decoder can process, in tokens.
    pub fn context(&self) -> usize {
        self.ropes.positions()
    }

    /// The position embeddings of this model's keys.
    pub fn ropes(&self) -> Arc<Ropes> {
        Arc::clone(&self.ropes)
    }

    /// The shape of this model's cache blocks.
    pub fn block_shape(&self, block_size: usize) -> BlockShape {
        BlockShape { block_size, kv_heads: self.config.kv_heads, head_dim: self.config.head_dim }
    }

    /// Bytes of a full block of so many tokens in all layers, in f16.
    pub fn column_bytes(&self, block_size: usize) -> usize {
        2 * size_of::<half::f16>() * self.block_shape(block_size).block_width() * self.config.layers
    }

    /// An empty cache for one request.
    pub fn new_cache(&self) -> RequestCache {
        RequestCache::new(self.config.layers)
    }

    /// Runs all segments' tokens through the layers, appending their keys and values to the caches.
    ///
    /// Returns the final hidden states after the last norm, `[rows, hidden]`, rows in segment order. `tap` is
    /// shown every layer's attention.
    ///
    /// # Errors
    /// If a key or value cannot be stored in the pool, or a hidden state is not finite.
    ///
    /// # Panics
    /// If a sequence grows beyond [`Decoder::context`]; commands check prompt lengths before they come here.
    pub fn forward(
        &self,
        pool: &mut BlockPool,
        segments: &mut [Segment],
        mut tap: Option<Tap>,
    ) -> std::result::Result<Vec<f32>, Fault> {
        let hidden = self.config.hidden;
        let positions: Vec<usize> =
            segments.iter().flat_map(|s| s.cache.tokens..s.cache.tokens + s.tokens.len()).collect();
        let mut x: Vec<f32> = Vec::with_capacity(positions.len() * hidden);
        for &token in segments.iter().flat_map(|s| s.tokens) {
            self.weights.embed(token, &mut x);
        }
        let traits = self.config.traits();
        if traits.scaled_embedding {
            let factor = (hidden as f32).sqrt();
            x.iter_mut().for_each(|x| *x *= factor);
        }
        let (epsilon, wide) = (self.config.rms_epsilon, self.config.intermediate);
        let gate = if traits.gelu { gelu_product } else { silu_product };
        for (n, layer) in self.weights.layers.iter().enumerate() {
            let (qkv, attended) = self.attention(n, layer, &x, &positions, pool, segments)?;
            if let Some(tap) = tap.as_mut() {
                tap(&Tapped { layer: n, queries: &qkv, stride: layer.qkv.outputs(), attended: &attended });
            }
            let mut out = layer.attention_out.apply(&attended);
            if let Some([gain, _]) = &layer.post_norms {
                out = rms_norm(&out, gain, epsilon);
            }
            add(&mut x, &out);
            let normed = rms_norm(&x, &layer.mlp_norm, epsilon);
            let gated = by_rows(&layer.gate_up.apply(&normed), 2 * wide, |rows| gate(rows, wide));
            let mut out = layer.down.apply(&gated);
            if let Some([_, gain]) = &layer.post_norms {
                out = rms_norm(&out, gain, epsilon);
            }
            add(&mut x, &out);
        }
        let out = rms_norm(&x, &self.weights.final_norm, self.config.rms_epsilon);
        let mut rows = out.chunks_exact(hidden);
        for (i, segment) in segments.iter_mut().enumerate() {
            let own = rows.by_ref().take(segment.tokens.len()).flatten();
            if let Some(&number) = own.into_iter().find(|x| !x.is_finite()) {
                return Err(Fault { segment: i, layer: None, number });
            }
            segment.cache.tokens += segment.tokens.len();
        }
        Ok(out)
    }

    /// Next-token logits of final hidden states: `[rows, hidden]` to `[rows, vocab]`.
    pub fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        self.weights.head.apply(hidden)
    }

    /// What a layer makes of attention outputs: `[rows, heads * head_dim]` to `[rows, hidden]`.
    pub fn attention_out(&self, layer: usize, attended: &[f32]) -> Vec<f32> {
        self.weights.layers[layer].attention_out.apply(attended)
    }

    /// Norm, projections, RoPE, cache append and attention of one layer: queries, keys and values side by side
    /// (`[rows, (heads + 2 kv_heads) * head_dim]`), and what attention makes of them (`[rows, heads * head_dim]`).
    fn attention(
        &self,
        n: usize,
        layer: &LayerWeights,
        x: &[f32],
        positions: &[usize],
        pool: &mut BlockPool,
        segments: &mut [Segment],
    ) -> std::result::Result<(Vec<f32>, Vec<f32>), Fault> {
        let c = &self.config;
        let normed = rms_norm(x, &layer.attention_norm, c.rms_epsilon);
        let mut qkv = layer.qkv.apply(&normed);
        let (stride, kv) = (layer.qkv.outputs(), c.kv_heads * c.head_dim);
        let rotated = (c.heads + c.kv_heads) * c.head_dim;
        let rope = self.ropes.layer(n);
        qkv.par_chunks_exact_mut(stride).with_min_len(32).zip(positions).for_each(|(row, &position)| {
            if let Some(bias) = &layer.qkv_bias {
                add(row, bias);
            }
            for (i, head) in row[..rotated].chunks_exact_mut(c.head_dim).enumerate() {
                if let Some(gains) = &layer.qk_norms {
                    let gain = &gains[usize::from(i >= c.heads)];
                    head.copy_from_slice(&rms_norm(head, gain, c.rms_epsilon));
                }
                rope.rotate(head, position);
            }
        });
        let mut rows = qkv.chunks_exact(stride);
        let most = pool.most();
        for (i, segment) in segments.iter_mut().enumerate() {
            for row in rows.by_ref().take(segment.tokens.len()) {
                if let Some(&number) = row[rotated - kv..].iter().find(|x| x.is_nan() || x.abs() > most) {
                    return Err(Fault { segment: i, layer: Some(n), number });
                }
                let (key, value) = row[rotated - kv..].split_at(kv);
                segment.cache.layers[n].append(pool, key, value);
            }
        }
        let mut row = 0;
        let requests: Vec<Query> = segments
            .iter()
            .map(|s| {
                let query =
                    Query { table: &s.cache.layers[n], row, tokens: s.tokens.len(), start: s.cache.tokens };
                row += s.tokens.len();
                query
            })
            .collect();
        let heads = Heads {
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            scale: c.attention_scale(),
            window: c.window(n),
        };
        let attended = attend(pool, rope, heads, &qkv, stride, &requests);
        Ok((qkv, attended))
    }
}

/// Applies a row-wise function to groups of rows in parallel and joins the results.
fn by_rows(x: &[f32], width: usize, f: impl Fn(&[f32]) -> Vec<f32> + Sync + Send) -> Vec<f32> {
    const ROWS: usize = 32;
    let parts: Vec<Vec<f32>> = x.par_chunks(ROWS * width).map(f).collect();
    parts.concat()
}
