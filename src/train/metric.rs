//! How much an error in a key or value matters: to what the tokens of answers take out of attention.

use super::asked;
use super::sensitivity::Sensitivity;
use crate::block::Part;
use crate::codec::CacheBatch;
use crate::codec::joint::{corpus::Corpus, train::Metric};
use crate::dump::Manifest;
use crate::error::Result;
use crate::interrupt;
use crate::model::gemm::{View, product};
use crate::model::kernels::causal_softmax;
use crate::model::{Model, ModelConfig, Rope, Segment, Tapped};
use crate::progress::{Progress, Unit};
use crate::sweep::{Prompt, load, targets};
use rayon::prelude::*;
use std::path::Path;

/// Requests whose answers are looked at, at most.
const REQUESTS: usize = 96;
/// Blocks that caches are read in; numbers do not depend on it.
const BLOCK_SIZE: usize = 64;
/// The usual share of what errors would do if answers attended to all tokens alike: what a few answers do not look at is not free.
pub const EVEN: f64 = 0.1;

/// Second moments of what errors in keys without position, and in values, do to the attention outputs behind `W_o` of an answer's
/// tokens, to first order and summed over cached tokens. With attention `a` of query `q` to token `j`, output `o` and any direction `c`
/// behind `W_o`, a value's error moves the output along `c` by `a W_o^T c`, a key's by `a (W_o^T c . (v_j - o)) q`, `q` turned back by
/// the token's position; heads that read the same keys add up. Of all this a share `even` is taken as if answers attended to all tokens
/// alike. Each layer's keys, and its values, are scaled to a mean weight of one.
///
/// # Errors
/// Damaged dumps; dumps without questions; Ctrl-C.
pub fn base(dump: &Path, manifest: &Manifest, model: &Model, even: f64) -> Result<Vec<Metric>> {
    let config = model.decoder.config();
    let (d, kv_heads) = (config.head_dim, config.kv_heads);
    let grams: Vec<Vec<Grams>> = (0..config.layers).map(|n| output_grams(model, n)).collect();
    let mut moments = vec![vec![Moments::new(d); kv_heads]; config.layers];
    let requests = asked(dump, manifest, REQUESTS)?;
    let progress =
        Progress::new("measuring what answers attend to", requests.len() as u64, Unit::Items("requests"));
    for i in requests {
        interrupt::check()?;
        let (batch, prompts) = load(dump, model, manifest, &[i], BLOCK_SIZE)?;
        let (targets, _) = targets(model, manifest, i, &[])?;
        let found = answer(model, batch, &prompts[0], &targets, &grams)?;
        for (sum, found) in moments.iter_mut().flatten().zip(found.iter().flatten()) {
            sum.add(found);
        }
        progress.increment();
    }
    progress.finish();
    Ok(moments.iter().map(|heads| metric(heads, d, even)).collect())
}

/// Runs one request's answer through the model, and takes the moments of each layer's key/value heads.
fn answer(
    model: &Model,
    mut batch: CacheBatch,
    prompt: &Prompt,
    targets: &[u32],
    grams: &[Vec<Grams>],
) -> Result<Vec<Vec<Moments>>> {
    let config = model.decoder.config();
    let (d, group) = (config.head_dim, config.heads / config.kv_heads);
    let cached = prompt.tokens.len() - 1;
    let fed = [&prompt.tokens[cached..], &targets[..targets.len() - 1]].concat();
    let mut queries: Vec<Vec<f32>> = Vec::with_capacity(config.layers);
    let mut listen = |tapped: &Tapped| {
        let own = tapped.queries.chunks_exact(tapped.stride).flat_map(|row| &row[..config.heads * d]);
        queries.push(own.map(|x| x * config.attention_scale()).collect());
    };
    let CacheBatch { pool, caches, .. } = &mut batch;
    let mut segments = [Segment { cache: &mut caches[0], tokens: &fed }];
    let ran = model.decoder.forward(pool, &mut segments, Some(&mut listen));
    ran.map_err(|f| f.of(|_| &prompt.id))?;
    let (pool, caches) = (&*pool, &*caches);
    let head = |n: usize, head: usize| -> Moments {
        let numbers = |part: Part| {
            let mut all = Vec::new();
            for entry in &caches[0].layers[n].entries {
                pool.read_head(entry.block, part, head, pool.tokens(entry.block), &mut all);
            }
            all
        };
        let (keys, values) = (numbers(Part::Key), numbers(Part::Value));
        let rows = queries[n].chunks_exact(config.heads * d);
        let queries = rows.flat_map(|row| &row[head * group * d..][..group * d]).copied().collect();
        let window = config.window(n).unwrap_or(usize::MAX);
        let attention = Attention { d, group, cached, queries, keys, values, window };
        attention.moments(model.decoder.ropes().layer(n), &grams[n][head])
    };
    let layer = |n: usize| (0..config.kv_heads).map(|h| head(n, h)).collect();
    Ok((0..config.layers).into_par_iter().map(layer).collect())
}

/// Attention of one key/value head's queries: numbers token by token, queries scaled, `[rows, group, d]`.
struct Attention {
    d: usize,
    group: usize,
    /// Tokens that a codec may change; those behind them are the answer's.
    cached: usize,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    window: usize,
}

/// `W_o^T W_o` between the query heads of a group: `[group, group][d, d]`.
type Grams = Vec<Vec<f32>>;

/// Sums of one head, `[d, d]`: weighted by attention, and as if all tokens were attended to alike.
#[derive(Clone)]
struct Moments {
    keys: Vec<f64>,
    values: Vec<f64>,
    even_keys: Vec<f64>,
    even_values: Vec<f64>,
}

impl Moments {
    fn new(d: usize) -> Self {
        let zeros = vec![0.0; d * d];
        Moments { keys: zeros.clone(), values: zeros.clone(), even_keys: zeros.clone(), even_values: zeros }
    }

    fn add(&mut self, other: &Moments) {
        for (mine, other) in [
            (&mut self.keys, &other.keys),
            (&mut self.values, &other.values),
            (&mut self.even_keys, &other.even_keys),
            (&mut self.even_values, &other.even_values),
        ] {
            mine.iter_mut().zip(other).for_each(|(a, b)| *a += b);
        }
    }
}

impl Attention {
    fn moments(&self, rope: &Rope, grams: &Grams) -> Moments {
        let (d, group) = (self.d, self.group);
        let (tokens, rows) = (self.keys.len() / d, self.queries.len() / d);
        let mut weights = vec![0.0; rows * tokens];
        let keys = View::row_major(&self.keys, tokens, d).transposed();
        product(View::row_major(&self.queries, rows, d), keys, &mut weights);
        causal_softmax(&mut weights, tokens, self.cached + 1, group, self.window);
        let values = View::row_major(&self.values, tokens, d);
        let mut outputs = vec![0.0; rows * d];
        product(View::row_major(&weights, rows, tokens), values, &mut outputs);
        let mut moments = Moments::new(d);
        for row in (0..rows).step_by(group) {
            let heads: Vec<Head> = (row..row + group)
                .map(|i| Head {
                    // The first token stays as it is.
                    weights: &weights[i * tokens..][1..self.cached.max(1)],
                    output: &outputs[i * d..][..d],
                    queries: self.turned_back(i, rope),
                })
                .collect();
            for a in 0..group {
                for b in a..group {
                    self.pair(&heads[a], &heads[b], a == b, &grams[a * group + b], &mut moments);
                }
            }
        }
        moments
    }

    /// Adds what two heads, or one with itself, make of errors together.
    fn pair(&self, a: &Head, b: &Head, same: bool, gram: &[f32], moments: &mut Moments) {
        let (d, places) = (self.d, a.weights.len());
        let values = &self.values[d..][..places * d];
        // (v_j - o_a)^T G (v_j - o_b)
        let missed: Vec<f32> =
            values.chunks_exact(d).flat_map(|v| v.iter().zip(a.output).map(|(v, o)| v - o)).collect();
        let mut turned = vec![0.0; places * d];
        product(View::row_major(&missed, places, d), View::row_major(gram, d, d), &mut turned);
        let both: Vec<f32> = a.weights.iter().zip(b.weights).map(|(a, b)| a * b).collect();
        let weighted: Vec<f32> = a
            .queries
            .chunks_exact(d)
            .zip(turned.chunks_exact(d).zip(values.chunks_exact(d)))
            .zip(&both)
            .flat_map(|((query, (turned, v)), both)| {
                let moved: f32 =
                    turned.iter().zip(v.iter().zip(b.output)).map(|(t, (v, o))| t * (v - o)).sum();
                query.iter().map(move |q| both * moved * q)
            })
            .collect();
        add_symmetric(&mut moments.keys, &self.outer(&weighted, &b.queries), same, 1.0);
        add_symmetric(&mut moments.values, gram, same, both.iter().map(|x| f64::from(*x)).sum());
        if same {
            add_symmetric(&mut moments.even_keys, &self.outer(&a.queries, &a.queries), same, 1.0);
            add_symmetric(&mut moments.even_values, gram, same, 1.0);
        }
    }

    /// `a^T b` of `[places, d]` each.
    fn outer(&self, a: &[f32], b: &[f32]) -> Vec<f32> {
        let (d, places) = (self.d, a.len() / self.d);
        let mut sum = vec![0.0; d * d];
        let a = View::row_major(a, places, d).transposed();
        product(a, View::row_major(b, places, d), &mut sum);
        sum
    }

    /// A query as keys without position see it that stand behind the first token: `[places, d]`.
    fn turned_back(&self, row: usize, rope: &Rope) -> Vec<f32> {
        let query = &self.queries[row * self.d..][..self.d];
        let mut turned = query.repeat(self.cached.saturating_sub(1));
        rope.strip_tokens(&mut turned, self.d, 1);
        turned
    }
}

/// One query head of a token.
struct Head<'a> {
    /// Attention to all cached tokens but the first.
    weights: &'a [f32],
    output: &'a [f32],
    /// [`Attention::turned_back`].
    queries: Vec<f32>,
}

/// Adds a matrix made symmetric: of a pair of heads twice, since its mirror image is another pair.
fn add_symmetric(sum: &mut [f64], matrix: &[f32], same: bool, times: f64) {
    let d = matrix.len().isqrt();
    let times = if same { 0.5 * times } else { times };
    for (i, row) in sum.chunks_exact_mut(d).enumerate() {
        for (k, x) in row.iter_mut().enumerate() {
            *x += times * f64::from(matrix[i * d + k] + matrix[k * d + i]);
        }
    }
}

/// Keys' and values' weights of a layer, a `share` of them spread evenly.
fn metric(heads: &[Moments], d: usize, share: f64) -> Metric {
    let part = |own: fn(&Moments) -> &Vec<f64>, even: fn(&Moments) -> &Vec<f64>| {
        let mut own: Metric = heads.iter().map(|h| own(h).clone()).collect();
        let mut even: Metric = heads.iter().map(|h| even(h).clone()).collect();
        [&mut own, &mut even].into_iter().for_each(|part| to_mean_one(part, d));
        for (x, even) in own.iter_mut().flatten().zip(even.iter().flatten()) {
            *x = (1.0 - share) * *x + share * even;
        }
        own
    };
    [part(|m| &m.keys, |m| &m.even_keys), part(|m| &m.values, |m| &m.even_values)].concat()
}

/// For each key/value head of a layer.
fn output_grams(model: &Model, layer: usize) -> Vec<Grams> {
    let config = model.decoder.config();
    let (d, q) = (config.head_dim, config.heads * config.head_dim);
    let mut identity = vec![0.0; q * q];
    (0..q).for_each(|i| identity[i * q + i] = 1.0);
    let rows = model.decoder.attention_out(layer, &identity);
    let own = |head: usize| View::row_major(&rows[head * d * config.hidden..], d, config.hidden);
    let group = config.heads / config.kv_heads;
    let gram = |a: usize, b: usize| {
        let mut gram = vec![0.0; d * d];
        product(own(a), own(b).transposed(), &mut gram);
        gram
    };
    let pairs = |head: usize| {
        (0..group * group).map(|i| gram(head * group + i / group, head * group + i % group)).collect()
    };
    (0..config.kv_heads).map(pairs).collect()
}

fn to_mean_one(part: &mut [Vec<f64>], d: usize) {
    let trace: f64 = part.iter().map(|m| (0..d).map(|i| m[i * d + i]).sum::<f64>()).sum();
    let scale = if trace > 0.0 { (part.len() * d) as f64 / trace } else { 0.0 };
    part.iter_mut().flatten().for_each(|x| *x *= scale);
}

/// Multiplies each layer's keys and values by what a unit of such error adds to the KL.
pub fn weigh(metrics: &mut [Metric], rows: &[Sensitivity]) {
    for row in rows {
        let metric = &mut metrics[row.layer];
        let half = metric.len() / 2;
        let part = if row.part == Part::Key { &mut metric[..half] } else { &mut metric[half..] };
        part.iter_mut().flatten().for_each(|x| *x *= row.kl_per_unit);
    }
}

/// No knowledge of what errors do: keys and values by their own variances in each layer.
pub fn plain(corpus: &Corpus, config: &ModelConfig) -> Vec<Metric> {
    let (d, half) = (config.head_dim, config.kv_heads * config.head_dim);
    let of = |x: &Vec<f32>| {
        let variance = |from: usize| {
            let numbers = || {
                x.chunks_exact(2 * half)
                    .zip(&corpus.raw)
                    .filter(|(_, raw)| !**raw)
                    .flat_map(move |(row, _)| &row[from..from + half])
            };
            let n = numbers().count().max(1) as f64;
            let mean = numbers().map(|x| f64::from(*x)).sum::<f64>() / n;
            numbers().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n
        };
        let part = |from: usize| {
            let weight = 1e-3 / variance(from).max(1e-12) / (2 * half) as f64;
            vec![
                (0..d * d).map(|i| if i % (d + 1) == 0 { weight } else { 0.0 }).collect::<Vec<f64>>();
                config.kv_heads
            ]
        };
        [part(0), part(half)].concat()
    };
    corpus.layers.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::RopeConfig;

    const D: usize = 4;
    const GROUP: usize = 2;
    const HIDDEN: usize = 6;
    const CACHED: usize = 5;
    const ROWS: usize = 2;

    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let number = |i: u64| (((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5) - 1.0;
        (0..count as u64).map(number).collect()
    }

    /// What attention adds to the residual stream, both rows: `[rows, hidden]`, in f64.
    fn outputs(attention: &Attention, keys: &[f64], values: &[f64], out: &[f32]) -> Vec<f64> {
        let mut sum = vec![0.0; ROWS * HIDDEN];
        for (i, query) in attention.queries.chunks_exact(D).enumerate() {
            let seen = CACHED + 1 + i / GROUP;
            let score = |j: usize| (0..D).map(|k| f64::from(query[k]) * keys[j * D + k]).sum::<f64>().exp();
            let total: f64 = (0..seen).map(score).sum();
            for j in 0..seen {
                for h in 0..HIDDEN {
                    let value =
                        |k: usize| values[j * D + k] * f64::from(out[(i % GROUP * D + k) * HIDDEN + h]);
                    sum[i / GROUP * HIDDEN + h] += score(j) / total * (0..D).map(value).sum::<f64>();
                }
            }
        }
        sum
    }

    /// The moments are those of finite differences: errors in one token's key without position, or value, at a time.
    #[test]
    fn moments_are_squared_derivatives() {
        let rope = Rope::new(&RopeConfig::plain(100.0, D), 16);
        let tokens = CACHED + ROWS;
        let attention = Attention {
            d: D,
            group: GROUP,
            cached: CACHED,
            queries: numbers(ROWS * GROUP * D, 1),
            keys: numbers(tokens * D, 2),
            values: numbers(tokens * D, 3),
            window: usize::MAX,
        };
        let out = numbers(GROUP * D * HIDDEN, 4);
        let head = |h: usize| View::row_major(&out[h * D * HIDDEN..], D, HIDDEN);
        let gram = |i: usize| {
            let mut gram = vec![0.0; D * D];
            product(head(i / GROUP), head(i % GROUP).transposed(), &mut gram);
            gram
        };
        let moments = attention.moments(&rope, &(0..GROUP * GROUP).map(gram).collect());
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
        let (keys, values) = (wide(&attention.keys), wide(&attention.values));
        let before = outputs(&attention, &keys, &values, &out);
        let error = numbers(D, 5);
        let (mut by_keys, mut by_values) = (0.0, 0.0);
        for j in 1..CACHED {
            let moved = |numbers: &[f64], error: &[f32]| {
                let mut numbers = numbers.to_vec();
                numbers[j * D..][..D].iter_mut().zip(error).for_each(|(x, e)| *x += 1e-4 * f64::from(*e));
                numbers
            };
            let squares = |after: Vec<f64>| -> f64 {
                after.iter().zip(&before).map(|(a, b)| ((a - b) / 1e-4).powi(2)).sum()
            };
            let mut rotated = error.clone();
            rope.rotate(&mut rotated, j);
            by_keys += squares(outputs(&attention, &moved(&keys, &rotated), &values, &out));
            by_values += squares(outputs(&attention, &keys, &moved(&values, &error), &out));
        }
        let form = |m: &[f64]| -> f64 {
            let pair = |i: usize| m[i] * f64::from(error[i / D]) * f64::from(error[i % D]);
            (0..D * D).map(pair).sum()
        };
        for (measured, moments) in [(by_keys, &moments.keys), (by_values, &moments.values)] {
            assert!(
                measured > 0.01 && (form(moments) / measured - 1.0).abs() < 1e-2,
                "{measured} {}",
                form(moments)
            );
        }
    }
}
