//! A dump's caches in blocks.

use crate::block::{BlockShape, BlockTable, RequestCache, Storage};
use crate::codec::CacheBatch;
use crate::dump::{Manifest, open_request};
use crate::error::{Error, Result};
use crate::model::Ropes;
use rayon::prelude::*;
use std::path::Path;
use std::sync::Arc;

/// Caches of some requests of a dump in blocks of f16 numbers, without the last `left_out` tokens of each; with them the
/// token ids of the whole prompts.
///
/// # Errors
/// Shards that are missing, damaged or another dump's; numbers beyond f16, with request and layer.
pub fn load_caches(
    dump: &Path,
    manifest: &Manifest,
    requests: &[usize],
    block_size: usize,
    ropes: Arc<Ropes>,
    left_out: usize,
) -> Result<(CacheBatch, Vec<Vec<u32>>)> {
    let config = &manifest.model.config;
    let shape = BlockShape { block_size, kv_heads: config.kv_heads, head_dim: config.head_dim };
    let mut batch = CacheBatch::empty(shape, Storage::F16, ropes);
    let mut prompts = Vec::new();
    for &i in requests {
        let shard = open_request(dump, manifest, i)?;
        let tokens = shard.tokens().to_vec();
        let layers: Vec<(Vec<f32>, Vec<f32>)> =
            (0..shard.layers()).into_par_iter().map(|n| shard.layer(n)).collect::<Result<_>>()?;
        let cached = &tokens[..tokens.len() - left_out];
        push_request(&mut batch, (dump, manifest, i), cached, 0, &layers)?;
        prompts.push(tokens);
    }
    Ok((batch, prompts))
}

/// Puts one request's keys and values of some consecutive layers (`[tokens, kv_heads, head_dim]` each, of which the first `cached` are
/// taken) into a batch.
///
/// # Errors
/// Numbers beyond what the pool can hold, with request and layer.
pub fn push_request(
    batch: &mut CacheBatch,
    (dump, manifest, request): (&Path, &Manifest, usize),
    cached: &[u32],
    first_layer: usize,
    layers: &[(Vec<f32>, Vec<f32>)],
) -> Result<()> {
    let entry = &manifest.requests[request].request;
    if let Some((layer, number)) = too_large(layers, batch.pool.most()) {
        let problem = format!(
            "request {}, layer {}: a key or value of {number} does not fit into the cache's f16 numbers (at most {})",
            entry.id,
            first_layer + layer,
            batch.pool.most()
        );
        return Err(Error::file(manifest.shard_path(dump, request), problem));
    }
    let numbers = cached.len() * batch.pool.shape().token_width();
    let tables = layers
        .iter()
        .map(|(keys, values)| BlockTable::of(&mut batch.pool, &keys[..numbers], &values[..numbers]));
    let cache = RequestCache { layers: tables.collect(), tokens: cached.len() };
    batch.push(cache, cached.to_vec(), &entry.tenant);
    Ok(())
}

/// The first layer with a number beyond what the pool can hold, and the number.
fn too_large(layers: &[(Vec<f32>, Vec<f32>)], most: f32) -> Option<(usize, f32)> {
    let of = |(n, (keys, values)): (usize, &(Vec<f32>, Vec<f32>))| {
        keys.iter().chain(values).find(|x| x.abs() > most).map(|x| (n, *x))
    };
    layers.iter().enumerate().find_map(of)
}
