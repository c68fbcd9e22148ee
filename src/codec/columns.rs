//! A batch as columns: blocks of tokens in all layers, taken out of the pool and put back.

use super::CacheBatch;
use crate::block::{BlockId, Payload};
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::collections::HashMap;

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

/// Numbers of a column, keys without position: `[layers][tokens, K and V]`.
pub fn stripped(batch: &CacheBatch, column: &Column) -> Vec<Vec<f32>> {
    (0..column.pages.len()).map(|layer| stripped_page(batch, column, layer)).collect()
}

/// Numbers of all columns in one layer, keys without position, one after the other: `[tokens, K and V]`.
pub fn stripped_layer(batch: &CacheBatch, columns: &[Column], layer: usize) -> Vec<f32> {
    let pages: Vec<Vec<f32>> = columns.par_iter().map(|column| stripped_page(batch, column, layer)).collect();
    pages.concat()
}

fn stripped_page(batch: &CacheBatch, column: &Column, layer: usize) -> Vec<f32> {
    let (half, page) = (batch.pool.shape().token_width(), column.pages[layer]);
    let mut keys = batch.pool.keys(page).into_owned();
    batch.ropes.layer(layer).strip_tokens(&mut keys, half, first_token(batch, column));
    let values = batch.pool.values(page);
    let mut numbers = Vec::with_capacity(2 * keys.len());
    for (keys, values) in keys.chunks_exact(half).zip(values.chunks_exact(half)) {
        numbers.extend_from_slice(keys);
        numbers.extend_from_slice(values);
    }
    numbers
}

/// Position of a column's first token.
fn first_token(batch: &CacheBatch, column: &Column) -> usize {
    column.block * batch.pool.shape().block_size
}

/// Puts a column as it is read back (`[layers][tokens, K and V]`, keys without position) into the pool: its bytes with the first
/// layer's page, its bits shared out in proportion to `bits`, a number a layer.
pub fn store(batch: &mut CacheBatch, column: &Column, numbers: &[Vec<f32>], bits: &[f64], bytes: Vec<u8>) {
    for (layer, numbers) in numbers.iter().enumerate() {
        let (keys, values) = placed(batch, column, layer, numbers);
        batch.pool.recode(column.pages[layer], keys, values, Payload::default(), None);
    }
    charge(batch, column, bits, bytes);
}

/// Puts one layer of all columns into the pool, as it is read back; [`charge`] follows when all layers are done.
pub fn store_layer(batch: &mut CacheBatch, columns: &[Column], layer: usize, numbers: &[f32]) {
    let width = 2 * batch.pool.shape().token_width();
    let mut rest = numbers;
    let mut own = |column: &Column| {
        let (own, after) = rest.split_at(column.tokens * width);
        rest = after;
        own
    };
    let parts: Vec<&[f32]> = columns.iter().map(&mut own).collect();
    let shared: &CacheBatch = batch;
    let placed: Vec<(Vec<f32>, Vec<f32>)> =
        columns.par_iter().zip(parts).map(|(column, own)| placed(shared, column, layer, own)).collect();
    for (column, (keys, values)) in columns.iter().zip(placed) {
        batch.pool.recode(column.pages[layer], keys, values, Payload::default(), None);
    }
}

/// What a column takes: its bytes with the first layer's page, its bits shared out in proportion to `bits`, a number a layer.
pub fn charge(batch: &mut CacheBatch, column: &Column, bits: &[f64], bytes: Vec<u8>) {
    let by_layer = shares(8 * bytes.len() as u64, bits);
    let mut bytes = Some(bytes);
    for (page, code_bits) in column.pages.iter().zip(by_layer) {
        let payload = Payload { bytes: bytes.take().unwrap_or_default(), code_bits, side_bits: 0 };
        batch.pool.charge(*page, payload);
    }
}

/// Keys and values of a column in one layer at their positions.
fn placed(batch: &CacheBatch, column: &Column, layer: usize, numbers: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let half = batch.pool.shape().token_width();
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for row in numbers.chunks_exact(2 * half) {
        keys.extend_from_slice(&row[..half]);
        values.extend_from_slice(&row[half..]);
    }
    batch.ropes.layer(layer).rotate_tokens(&mut keys, half, first_token(batch, column));
    (keys, values)
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
