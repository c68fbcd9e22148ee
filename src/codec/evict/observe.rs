//! How much each cached token was attended to: measured by running the prompt through the model.

use crate::block::{BlockPool, Storage, by_head};
use crate::codec::{CacheBatch, Codec, Memo};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::gemm::{View, product};
use crate::model::kernels::{causal_softmax, softmax_row};
use crate::model::{Model, Rope, Segment, Tapped};
use ndarray::s;
use rayon::prelude::*;

/// Last tokens of a prompt whose attention SnapKV counts.
pub const WINDOW: usize = 64;
/// Positions behind the prompt over which Expected Attention averages.
const FUTURE: usize = 512;
/// Query tokens that are multiplied at a time.
const ROWS: usize = 64;
/// Tokens that are repeated at a time (KVzip's chunks have 2,048).
const REPEATED: usize = 1024;
/// What makes a model repeat its prompt.
const REPEAT: &str = "\n\nRepeat the previous context exactly.\n";

/// Which parts of [`Seen`] are wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// `received` and `window`.
    pub prompt: bool,
    pub expected: bool,
    pub repeated: bool,
}

impl Needs {
    pub fn and(self, other: Needs) -> Needs {
        Needs {
            prompt: self.prompt || other.prompt,
            expected: self.expected || other.expected,
            repeated: self.repeated || other.repeated,
        }
    }

    /// Whether nothing is wanted that is not here.
    pub fn cover(self, wanted: Needs) -> bool {
        self.and(wanted) == self
    }
}

/// One request's attention, layer by layer.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    pub layers: Vec<Seen>,
}

/// Attention to each token of one layer, mean over key/value heads; empty where it was not wanted.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// From all tokens of the prompt.
    pub received: Vec<f32>,
    /// From the last 64 tokens, as SnapKV has it.
    pub window: Vec<f32>,
    /// Expected of later tokens, times the norm of the value.
    pub expected: Vec<f32>,
    /// The highest from a token of the repeated prompt.
    pub repeated: Vec<f32>,
}

/// One layer's geometry.
#[derive(Clone, Copy)]
struct Layer<'a> {
    group: usize,
    kv_heads: usize,
    d: usize,
    scale: f32,
    window: usize,
    rope: &'a Rope,
}

/// Runs every request's cached tokens through the model once more, and if that is wanted once again behind themselves.
///
/// # Errors
/// Numbers that are not finite; prompts that leave the context no room to be repeated.
pub fn observe(model: &Model, batch: &CacheBatch, needs: Needs) -> Result<Vec<Observed>> {
    let mut batch = batch.clone();
    let repeat = model.tokenizer.encode(REPEAT)?;
    let mut all = Vec::with_capacity(batch.caches.len());
    for request in 0..batch.caches.len() {
        interrupt::check()?;
        all.push(one(model, &mut batch, request, &repeat, needs)?);
    }
    Ok(all)
}

/// Lets a batch of caches as prefill left them know what a codec must know of attention; `measure` is called where that is not known yet.
pub fn show_attention(
    batch: &mut CacheBatch,
    codec: &dyn Codec,
    memo: &Memo,
    measure: impl FnOnce(&CacheBatch, Needs) -> Result<Vec<Observed>>,
) -> Result<()> {
    let needs = codec.needs();
    if needs != Needs::default() {
        batch.observed = Some(memo.observed(needs, || measure(batch, needs))?);
    }
    Ok(())
}

fn one(
    model: &Model,
    batch: &mut CacheBatch,
    request: usize,
    repeat: &[u32],
    needs: Needs,
) -> Result<Observed> {
    let decoder = &model.decoder;
    let config = decoder.config();
    let tokens = batch.tokens[request].clone();
    if tokens.is_empty() {
        return Ok(Observed { layers: vec![Seen::default(); config.layers] });
    }
    let ropes = decoder.ropes();
    let layer = |n: usize| Layer {
        group: config.heads / config.kv_heads,
        kv_heads: config.kv_heads,
        d: config.head_dim,
        scale: config.attention_scale(),
        window: config.window(n).unwrap_or(usize::MAX),
        rope: ropes.layer(n),
    };
    // Keys `[tokens, kv_heads * head_dim]` of each layer, and values.
    let read = |batch: &CacheBatch, n: usize| -> (Vec<f32>, Vec<f32>) {
        let blocks = batch.caches[request].layers[n].entries.len();
        let (keys, values): (Vec<_>, Vec<_>) = (0..blocks).map(|b| batch.read(request, n, b)).unzip();
        (keys.concat(), values.concat())
    };
    let caches: Vec<(Vec<f32>, Vec<f32>)> = (0..config.layers).map(|n| read(batch, n)).collect();
    let id = format!("{request} of its batch");
    let mut layers: Vec<Seen> = Vec::with_capacity(config.layers);
    let mut pool = BlockPool::new(batch.pool.shape(), Storage::F32);
    let mut cache = decoder.new_cache();
    let mut listen = |tapped: &Tapped| {
        let (keys, values) = &caches[tapped.layer];
        layers.push(first_pass(layer(tapped.layer), tapped, keys, values, needs));
    };
    if needs.prompt || needs.expected {
        let mut segments = [Segment { cache: &mut cache, tokens: &tokens }];
        let ran = decoder.forward(&mut pool, &mut segments, Some(&mut listen));
        ran.map_err(|f| f.of(|_| &id))?;
    } else {
        layers.resize(config.layers, Seen::default());
    }
    if !needs.repeated {
        return Ok(Observed { layers });
    }
    for seen in &mut layers {
        seen.repeated = vec![0.0; tokens.len()];
    }
    let room = decoder.context().saturating_sub(tokens.len() + repeat.len());
    if room == 0 {
        let problem = format!(
            "request {id}: {} tokens leave no room to be repeated; use shorter prompts",
            tokens.len()
        );
        return Err(Error::argument(problem));
    }
    for chunk in tokens.chunks(REPEATED.min(room)) {
        let fed = [repeat, chunk].concat();
        let mut fork = batch.caches[request].fork(&mut batch.pool);
        let mut listen = |tapped: &Tapped| {
            let n = tapped.layer;
            let rows = &tapped.queries[repeat.len() * tapped.stride..];
            // Positions go on behind the prompt.
            let first = tokens.len() + repeat.len();
            second_pass(layer(n), rows, tapped.stride, first, &caches[n].0, &mut layers[n].repeated);
        };
        let mut segments = [Segment { cache: &mut fork, tokens: &fed }];
        let ran = decoder.forward(&mut batch.pool, &mut segments, Some(&mut listen));
        ran.map_err(|f| f.of(|_| &id))?;
        fork.release(&mut batch.pool);
    }
    Ok(Observed { layers })
}

/// One key/value head's numbers, token by token: `[tokens, d]`, of `[tokens, kv_heads, d]`.
fn head_of(rows: &[f32], layer: Layer, head: usize) -> Vec<f32> {
    by_head(rows, layer.kv_heads, layer.d).slice(s![.., head, ..]).iter().copied().collect()
}

/// Queries of one group of heads for some rows, scaled: `[rows * group, d]`.
fn queries_of(rows: &[f32], stride: usize, layer: Layer, head: usize) -> Vec<f32> {
    let wide = layer.group * layer.d;
    let own = rows.chunks_exact(stride).flat_map(|row| &row[head * wide..][..wide]);
    own.map(|x| x * layer.scale).collect()
}

/// What the prompt itself attends to, and what later queries are expected to.
fn first_pass(layer: Layer, tapped: &Tapped, keys: &[f32], values: &[f32], needs: Needs) -> Seen {
    let tokens = keys.len() / (layer.kv_heads * layer.d);
    let heads: Vec<Seen> = (0..layer.kv_heads)
        .into_par_iter()
        .map(|head| {
            let (keys, values) = (head_of(keys, layer, head), head_of(values, layer, head));
            let mut seen = Seen {
                received: vec![0.0; tokens],
                window: vec![0.0; tokens],
                expected: match needs.expected {
                    true => expected(layer, tapped, head, &keys, &values),
                    false => vec![0.0; tokens],
                },
                repeated: Vec::new(),
            };
            if !needs.prompt {
                return seen;
            }
            for first in (0..tokens).step_by(ROWS) {
                let end = (first + ROWS).min(tokens);
                let rows = &tapped.queries[first * tapped.stride..end * tapped.stride];
                let queries = queries_of(rows, tapped.stride, layer, head);
                let count = (end - first) * layer.group;
                let mut weights = vec![0.0; count * end];
                let by = View::row_major(&keys[..end * layer.d], end, layer.d).transposed();
                product(View::row_major(&queries, count, layer.d), by, &mut weights);
                causal_softmax(&mut weights, end, first + 1, layer.group, layer.window);
                for (i, row) in weights.chunks_exact(end).enumerate() {
                    let late = first + i / layer.group + WINDOW >= tokens;
                    for (t, weight) in row.iter().enumerate() {
                        seen.received[t] += weight;
                        seen.window[t] += if late { *weight } else { 0.0 };
                    }
                }
            }
            seen
        })
        .collect();
    let mean = |of: fn(&Seen) -> &[f32]| -> Vec<f32> {
        let share = 1.0 / heads.len() as f32;
        (0..tokens).map(|t| heads.iter().map(|h| of(h)[t]).sum::<f32>() * share).collect()
    };
    Seen {
        received: mean(|s| &s.received),
        window: mean(|s| &s.window),
        expected: mean(|s| &s.expected),
        repeated: Vec::new(),
    }
}

/// The attention that a Gaussian query of each head's mean and covariance expects, averaged over heads of the group, times the norm of
/// the value (Expected Attention, equations of section 3; means over the next [`FUTURE`] positions).
fn expected(layer: Layer, tapped: &Tapped, head: usize, keys: &[f32], values: &[f32]) -> Vec<f32> {
    let (d, group) = (layer.d, layer.group);
    let tokens = keys.len() / d;
    let mut all = vec![0.0f32; tokens];
    for own in 0..group {
        let at = (head * group + own) * d;
        let stripped: Vec<Vec<f32>> = (0..tokens)
            .map(|t| {
                let mut query = tapped.queries[t * tapped.stride + at..][..d].to_vec();
                layer.rope.strip(&mut query, t);
                query
            })
            .collect();
        let mean: Vec<f32> =
            (0..d).map(|i| stripped.iter().map(|q| q[i]).sum::<f32>() / tokens as f32).collect();
        // What a vector becomes on average over the positions to come.
        let last = layer.rope.positions();
        let turned = |x: &[f32]| -> Vec<f32> {
            let mut sum = vec![0.0f32; d];
            let places = tokens..(tokens + FUTURE).min(last);
            let count = places.len().max(1) as f32;
            for place in places.step_by(8) {
                let mut own = x.to_vec();
                layer.rope.rotate(&mut own, place);
                sum.iter_mut().zip(&own).for_each(|(s, x)| *s += 8.0 * x / count);
            }
            sum
        };
        let mean_turned = turned(&mean);
        let deviations: Vec<f32> = stripped
            .iter()
            .flat_map(|q| turned(&q.iter().zip(&mean).map(|(q, m)| q - m).collect::<Vec<f32>>()))
            .collect();
        // k^T S k, as the mean of squared inner products with the deviations.
        let mut inner = vec![0.0; tokens * tokens];
        let by = View::row_major(&deviations, tokens, d).transposed();
        product(View::row_major(keys, tokens, d), by, &mut inner);
        let mut scores: Vec<f32> = keys
            .chunks_exact(d)
            .zip(inner.chunks_exact(tokens))
            .map(|(key, row)| {
                let along: f32 = key.iter().zip(&mean_turned).map(|(k, m)| k * m).sum();
                let spread = row.iter().map(|x| x * x).sum::<f32>() / tokens as f32;
                layer.scale * along + 0.5 * layer.scale * layer.scale * spread
            })
            .collect();
        // What the next token does not see any more is not attended to.
        let forgotten = (tokens + 1).saturating_sub(layer.window).min(tokens.saturating_sub(1));
        let (forgotten, seen) = scores.split_at_mut(forgotten);
        forgotten.fill(0.0);
        softmax_row(seen);
        all.iter_mut().zip(&scores).for_each(|(a, s)| *a += s / group as f32);
    }
    let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt();
    all.iter().zip(values.chunks_exact(d)).map(|(a, v)| (a + 0.02 / tokens as f32) * norm(v)).collect()
}

/// Raises `highest` to the attention that rows of a repeated prompt pay to the prompt itself.
fn second_pass(layer: Layer, rows: &[f32], stride: usize, first: usize, keys: &[f32], highest: &mut [f32]) {
    let tokens = highest.len();
    let heads: Vec<Vec<f32>> = (0..layer.kv_heads)
        .into_par_iter()
        .map(|head| {
            let keys = head_of(keys, layer, head);
            let mut most = vec![0.0f32; tokens];
            for (chunk, rows) in rows.chunks(ROWS * stride).enumerate() {
                let queries = queries_of(rows, stride, layer, head);
                let count = queries.len() / layer.d;
                let mut weights = vec![0.0; count * tokens];
                let by = View::row_major(&keys, tokens, layer.d).transposed();
                product(View::row_major(&queries, count, layer.d), by, &mut weights);
                for (i, row) in weights.chunks_exact_mut(tokens).enumerate() {
                    let position = first + chunk * ROWS + i / layer.group;
                    let forgotten = (position + 1).saturating_sub(layer.window).min(tokens);
                    let (forgotten, row) = row.split_at_mut(forgotten);
                    forgotten.fill(0.0);
                    if row.is_empty() {
                        continue;
                    }
                    softmax_row(row);
                    let most = &mut most[forgotten.len()..];
                    most.iter_mut().zip(&*row).for_each(|(m, w)| *m = m.max(*w));
                }
            }
            most
        })
        .collect();
    let share = 1.0 / heads.len() as f32;
    for (t, most) in highest.iter_mut().enumerate() {
        *most = most.max(heads.iter().map(|h| h[t]).sum::<f32>() * share);
    }
}
