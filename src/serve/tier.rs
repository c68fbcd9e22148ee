//! The second tier: columns that nobody reads are kept as a codec's bytes and decoded when their tokens come again.
//!
//! Every column can be decoded by itself (the codec refers to no other block), so a request's common part with another is
//! stored once and any part of a prompt can come back alone.

use super::prefix::{NodeId, PrefixCache, bytes_of};
use crate::block::{BlockPool, BlockTable, Entry, Part, Payload, RequestCache, Storage};
use crate::codec::{CacheBatch, Codec, Memo};
use crate::error::{Error, Result};
use crate::model::Model;

/// Codes a run of columns that follow each other, as far as that takes less than their pages. These stay.
pub fn encode(
    codec: &dyn Codec,
    model: &Model,
    pool: &BlockPool,
    prefix: &mut PrefixCache,
    run: &[NodeId],
) -> Result<()> {
    // On copies: what is still read stays as it is.
    let mut batch = empty(model, pool, prefix, run)?;
    for id in run {
        let entries = prefix.node(*id).and_then(|n| n.pages.as_deref()).unwrap_or_default();
        for (table, entry) in batch.caches[0].layers.iter_mut().zip(entries) {
            let (keys, values) = (pool.keys(entry.block), pool.values(entry.block));
            table.push(batch.pool.allocate(&keys, &values));
        }
    }
    codec.encode(&mut batch, &Memo::default())?;
    for (block, id) in run.iter().enumerate() {
        let page = |t: &BlockTable| batch.pool.payload(t.entries[block].block).cloned();
        let payloads: Option<Vec<Payload>> = batch.caches[0].layers.iter().map(page).collect();
        let payloads = payloads.ok_or_else(|| Error::argument("a codec left a page as it was"))?;
        let pages = prefix.node(*id).and_then(|n| n.pages.as_deref()).unwrap_or_default();
        let held: usize = pages.iter().map(|e| pool.bytes_of(e.block)).sum();
        if bytes_of(&payloads) < held {
            prefix.set_coded(*id, payloads);
        }
    }
    Ok(())
}

/// Makes pages of a run of coded columns that follow each other.
pub fn decode(
    codec: &dyn Codec,
    model: &Model,
    pool: &mut BlockPool,
    prefix: &mut PrefixCache,
    run: &[NodeId],
) -> Result<()> {
    let mut batch = empty(model, pool, prefix, run)?;
    let zeros = vec![0.0; pool.shape().block_width()];
    for id in run {
        let payloads = prefix.node(*id).and_then(|n| n.coded.as_deref()).unwrap_or_default();
        for (table, payload) in batch.caches[0].layers.iter_mut().zip(payloads) {
            let page = batch.pool.allocate(&zeros, &zeros);
            batch.pool.recode(page, zeros.clone(), zeros.clone(), payload.clone(), None);
            table.push(page);
        }
    }
    codec.decode(&mut batch)?;
    for (block, id) in run.iter().enumerate() {
        let entry = |table: &BlockTable| {
            let numbers = Part::BOTH.map(|part| batch.pool.numbers(table.entries[block].block, part));
            Entry::plain(pool.allocate(&numbers[0], &numbers[1]))
        };
        let entries = batch.caches[0].layers.iter().map(entry).collect();
        prefix.set_pages(*id, entries);
    }
    Ok(())
}

/// A batch of one request that is to have the blocks of a run.
fn empty(model: &Model, pool: &BlockPool, prefix: &PrefixCache, run: &[NodeId]) -> Result<CacheBatch> {
    let (first_block, tokens) = stretch(prefix, run)?;
    let mut batch = CacheBatch::empty(pool.shape(), Storage::F16, model.decoder.ropes());
    batch.first_block = first_block;
    let mut cache = RequestCache::new(model.decoder.config().layers);
    cache.tokens = tokens.len();
    batch.push(cache, tokens, "");
    Ok(batch)
}

/// The first block and the tokens of a run of columns.
pub fn stretch(prefix: &PrefixCache, run: &[NodeId]) -> Result<(usize, Vec<u32>)> {
    let nodes = run.iter().map(|id| prefix.node(*id).ok_or_else(|| Error::argument("a column is gone")));
    let nodes: Vec<_> = nodes.collect::<Result<_>>()?;
    let tokens = nodes.iter().flat_map(|n| n.tokens.iter().copied()).collect();
    Ok((nodes.first().map_or(0, |n| n.block), tokens))
}
