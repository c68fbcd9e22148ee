//! The decoder. The KV cache is not in here: it lies in a block pool and is read through block tables.

use super::attention::{Heads, Query, attend};
use super::config::ModelConfig;
use super::kernels::{add, rms_norm, silu_product};
use super::rope::Rope;
use super::weights::{LayerWeights, Weights};
use crate::block::{BlockPool, BlockShape, RequestCache};
use rayon::prelude::*;
use std::sync::Arc;

pub struct Decoder {
    config: ModelConfig,
    weights: Weights,
    rope: Arc<Rope>,
}

/// New tokens of one request and the cache they extend.
pub struct Segment<'a> {
    pub cache: &'a mut RequestCache,
    pub tokens: &'a [u32],
}

impl Decoder {
    pub fn new(config: ModelConfig, weights: Weights) -> Self {
        let rope = Arc::new(Rope::new(config.rope, config.context.max(1)));
        Decoder { config, weights, rope }
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Longest sequence this decoder can process, in tokens.
    pub fn context(&self) -> usize {
        self.rope.positions()
    }

    /// The position embedding of this model's keys.
    pub fn rope(&self) -> Arc<Rope> {
        Arc::clone(&self.rope)
    }

    /// The shape of this model's cache blocks.
    pub fn block_shape(&self, block_size: usize) -> BlockShape {
        BlockShape { block_size, kv_heads: self.config.kv_heads, head_dim: self.config.head_dim }
    }

    /// An empty cache for one request.
    pub fn new_cache(&self) -> RequestCache {
        RequestCache::new(self.config.layers)
    }

    /// Runs all segments' tokens through the layers, appending their keys and values to the caches.
    ///
    /// Returns the final hidden states after the last norm, `[rows, hidden]`, rows in segment order. With `tap`, the
    /// attention outputs of every layer (`[layers, rows, heads * head_dim]`) are appended to it.
    ///
    /// # Panics
    /// If a sequence grows beyond [`Decoder::context`]; commands check prompt lengths before they come here.
    pub fn forward(
        &self,
        pool: &mut BlockPool,
        segments: &mut [Segment],
        mut tap: Option<&mut Vec<f32>>,
    ) -> Vec<f32> {
        let hidden = self.config.hidden;
        let positions: Vec<usize> =
            segments.iter().flat_map(|s| s.cache.tokens..s.cache.tokens + s.tokens.len()).collect();
        let mut x: Vec<f32> = Vec::with_capacity(positions.len() * hidden);
        for &token in segments.iter().flat_map(|s| s.tokens) {
            x.extend_from_slice(&self.weights.embedding[token as usize * hidden..][..hidden]);
        }
        for (n, layer) in self.weights.layers.iter().enumerate() {
            let attended = self.attention(n, layer, &x, &positions, pool, segments);
            if let Some(tap) = tap.as_deref_mut() {
                tap.extend_from_slice(&attended);
            }
            add(&mut x, &layer.attention_out.apply(&attended));
            let normed = rms_norm(&x, &layer.mlp_norm, self.config.rms_epsilon);
            let gated = by_rows(&layer.gate_up.apply(&normed), 2 * self.config.intermediate, |rows| {
                silu_product(rows, self.config.intermediate)
            });
            add(&mut x, &layer.down.apply(&gated));
        }
        for segment in segments {
            segment.cache.tokens += segment.tokens.len();
        }
        rms_norm(&x, &self.weights.final_norm, self.config.rms_epsilon)
    }

    /// Next-token logits of final hidden states: `[rows, hidden]` to `[rows, vocab]`.
    pub fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        self.weights.head.apply(hidden)
    }

    /// Norm, projections, RoPE, cache append and attention of one layer: `[rows, heads * head_dim]`.
    fn attention(
        &self,
        n: usize,
        layer: &LayerWeights,
        x: &[f32],
        positions: &[usize],
        pool: &mut BlockPool,
        segments: &mut [Segment],
    ) -> Vec<f32> {
        let c = &self.config;
        let normed = rms_norm(x, &layer.attention_norm, c.rms_epsilon);
        let mut qkv = layer.qkv.apply(&normed);
        let (stride, kv) = (layer.qkv.outputs(), c.kv_heads * c.head_dim);
        let rotated = (c.heads + c.kv_heads) * c.head_dim;
        qkv.par_chunks_exact_mut(stride).with_min_len(32).zip(positions).for_each(|(row, &position)| {
            if let Some(bias) = &layer.qkv_bias {
                add(row, bias);
            }
            for head in row[..rotated].chunks_exact_mut(c.head_dim) {
                self.rope.rotate(head, position);
            }
        });
        let mut rows = qkv.chunks_exact(stride);
        for segment in segments.iter_mut() {
            for row in rows.by_ref().take(segment.tokens.len()) {
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
        let heads = Heads { heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim };
        attend(pool, &self.rope, heads, &qkv, stride, &requests)
    }
}

/// Applies a row-wise function to groups of rows in parallel and joins the results.
fn by_rows(x: &[f32], width: usize, f: impl Fn(&[f32]) -> Vec<f32> + Sync + Send) -> Vec<f32> {
    const ROWS: usize = 32;
    let parts: Vec<Vec<f32>> = x.par_chunks(ROWS * width).map(f).collect();
    parts.concat()
}
