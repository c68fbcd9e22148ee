//! How much an error in a key or value matters: to the inner products with queries, and to what attention passes on.

use super::sensitivity::Sensitivity;
use crate::block::Part;
use crate::block::{BlockPool, Storage};
use crate::codec::joint::{corpus::Corpus, train::Metric};
use crate::dump::{Manifest, open_request};
use crate::error::Result;
use crate::interrupt;
use crate::model::{Model, ModelConfig, Segment, Tapped};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;

/// Keys by the second moment of the queries that meet them, turned to random distances; values by the squares of what the output
/// projection makes of them. Each layer's keys, and its values, are scaled to a mean weight of one.
pub fn base(
    dump: &Path,
    manifest: &Manifest,
    model: &Model,
    requests: usize,
    seed: u64,
) -> Result<Vec<Metric>> {
    let config = model.decoder.config();
    let (d, group) = (config.head_dim, config.heads / config.kv_heads);
    let ropes = model.decoder.ropes();
    let mut metrics: Vec<Metric> = vec![vec![vec![0.0; d * d]; 2 * config.kv_heads]; config.layers];
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut pool = BlockPool::new(model.decoder.block_shape(64), Storage::F32);
    for i in 0..manifest.requests.len().min(requests) {
        interrupt::check()?;
        let tokens = open_request(dump, manifest, i)?.tokens().to_vec();
        let mut cache = model.decoder.new_cache();
        let mut listen = |tapped: &Tapped| {
            let rope = ropes.layer(tapped.layer);
            for (position, row) in tapped.queries.chunks_exact(tapped.stride).enumerate() {
                for head in 0..config.heads {
                    let mut query = row[head * d..][..d].to_vec();
                    // As a key without position sees it that stands at this place.
                    rope.strip(&mut query, rng.random_range(0..=position));
                    let sum = &mut metrics[tapped.layer][head / group];
                    for (a, row) in query.iter().zip(sum.chunks_exact_mut(d)) {
                        row.iter_mut().zip(&query).for_each(|(s, b)| *s += f64::from(a * b));
                    }
                }
            }
        };
        let mut segments = [Segment { cache: &mut cache, tokens: &tokens }];
        let fed = model.decoder.forward(&mut pool, &mut segments, Some(&mut listen));
        fed.map_err(|f| f.of(|_| &manifest.requests[i].request.id))?;
        cache.release(&mut pool);
    }
    for (n, metric) in metrics.iter_mut().enumerate() {
        let (keys, values) = metric.split_at_mut(config.kv_heads);
        output_grams(model, n, values);
        [keys, values].into_iter().for_each(|part| to_mean_one(part, d));
    }
    Ok(metrics)
}

/// `W_o^T W_o` of the heads that read each value head.
fn output_grams(model: &Model, layer: usize, values: &mut [Vec<f64>]) {
    let config = model.decoder.config();
    let (d, q) = (config.head_dim, config.heads * config.head_dim);
    let mut identity = vec![0.0; q * q];
    (0..q).for_each(|i| identity[i * q + i] = 1.0);
    let rows = model.decoder.attention_out(layer, &identity);
    for head in 0..config.heads {
        let own = &rows[head * d * config.hidden..][..d * config.hidden];
        let sum = &mut values[head * config.kv_heads / config.heads];
        for (i, a) in own.chunks_exact(config.hidden).enumerate() {
            for (j, b) in own.chunks_exact(config.hidden).enumerate() {
                sum[i * d + j] += a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            }
        }
    }
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
