//! A batch as columns: blocks of tokens in all layers, taken out of the pool and put back.

use super::CacheBatch;
use crate::block::{BlockId, Payload};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;

/// A block of tokens in all layers, as it lies in the pool.
#[derive(Debug, Clone)]
pub struct Column {
    /// Where it stands first.
    pub request: usize,
    pub block: usize,
    /// Its pages, layer by layer.
    pub pages: Vec<BlockId>,
    pub tokens: usize,
    /// Requests that have it.
    pub readers: usize,
}

/// All columns of a batch, in the order in which requests first have them; and each request's columns, block by block.
pub fn columns(batch: &CacheBatch) -> Result<(Vec<Column>, Vec<Vec<usize>>)> {
    let mut all: Vec<Column> = Vec::new();
    let mut known: HashMap<BlockId, usize> = HashMap::new();
    let mut of_requests = Vec::with_capacity(batch.caches.len());
    for (request, cache) in batch.caches.iter().enumerate() {
        let blocks = cache.layers.first().map_or(0, |t| t.entries.len());
        let mut own = Vec::with_capacity(blocks);
        for block in 0..blocks {
            let entries = cache.layers.iter().map(|table| table.entries[block]);
            if entries.clone().any(|e| e.scale.is_some() || e.stripped) {
                return Err(Error::argument(
                    "columns of blocks are coded as prefill left them: it follows nothing but prefix",
                ));
            }
            let pages: Vec<BlockId> = entries.map(|e| e.block).collect();
            let number = *known.entry(pages[0]).or_insert_with(|| {
                let tokens = batch.pool.tokens(pages[0]);
                all.push(Column {
                    request,
                    block: batch.first_block + block,
                    pages: pages.clone(),
                    tokens,
                    readers: 0,
                });
                all.len() - 1
            });
            if all[number].pages != pages {
                return Err(Error::argument(
                    "columns of blocks need the same sharing in all layers: it follows nothing but prefix",
                ));
            }
            all[number].readers += 1;
            own.push(number);
        }
        of_requests.push(own);
    }
    Ok((all, of_requests))
}

/// Numbers of a column, keys without position: `[layers][tokens, width]`.
pub fn stripped(batch: &CacheBatch, column: &Column) -> Vec<Vec<f32>> {
    let shape = batch.pool.shape();
    let half = shape.token_width();
    let first = column.block * shape.block_size;
    let layer = |(n, page): (usize, &BlockId)| {
        let mut keys = batch.pool.keys(*page).into_owned();
        batch.ropes.layer(n).strip_tokens(&mut keys, half, first);
        let values = batch.pool.values(*page);
        keys.chunks_exact(half)
            .zip(values.chunks_exact(half))
            .flat_map(|(k, v)| k.iter().chain(v))
            .copied()
            .collect()
    };
    column.pages.iter().enumerate().map(layer).collect()
}

/// Puts a column as it is read back (`[layers][tokens, K and V]`, keys without position) into the pool: its bytes with the first
/// layer's page, its bits shared out in proportion to `bits`, a number a layer.
pub fn store(batch: &mut CacheBatch, column: &Column, numbers: &[Vec<f32>], bits: &[f64], bytes: Vec<u8>) {
    let shape = batch.pool.shape();
    let half = shape.token_width();
    let first = column.block * shape.block_size;
    let total = 8 * bytes.len() as u64;
    let ropes = Arc::clone(&batch.ropes);
    let by_layer = shares(total, bits);
    let mut bytes = Some(bytes);
    for (n, (page, numbers)) in column.pages.iter().zip(numbers).enumerate() {
        let rows = numbers.chunks_exact(2 * half);
        let mut keys: Vec<f32> = rows.clone().flat_map(|row| &row[..half]).copied().collect();
        let values = rows.flat_map(|row| &row[half..]).copied().collect();
        ropes.layer(n).rotate_tokens(&mut keys, half, first);
        let payload =
            Payload { bytes: bytes.take().unwrap_or_default(), code_bits: by_layer[n], side_bits: 0 };
        batch.pool.recode(*page, keys, values, payload, None);
    }
}

/// A total in whole parts that go with `weights`; what rounding leaves goes to the first.
fn shares(total: u64, weights: &[f64]) -> Vec<u64> {
    let sum: f64 = weights.iter().sum();
    let mut parts: Vec<u64> =
        weights.iter().map(|w| if sum > 0.0 { (w / sum * total as f64).floor() as u64 } else { 0 }).collect();
    let left = total - parts.iter().sum::<u64>().min(total);
    if let Some(first) = parts.first_mut() {
        *first += left;
    }
    parts
}
