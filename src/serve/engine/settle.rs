//! What becomes of blocks that are full: fused, coded, made known to the prefix cache.

use super::Engine;
use crate::block::{BlockPool, Entry, RequestCache, Storage};
use crate::codec::{CacheBatch, Codec, Memo};
use crate::error::Result;
use crate::model::Model;
use crate::serve::fuse::{Candidate, candidates, fuse};
use crate::serve::prefix::{NewColumn, NodeId};
use crate::serve::tier;
use std::time::Instant;

impl Engine<'_> {
    /// Fuses, codes and makes known the blocks of a running request that became full.
    pub(super) fn settle(&mut self, i: usize) -> Result<()> {
        let size = self.limits.block_size;
        let sequence = &mut self.running[i];
        let full = sequence.cache.tokens / size;
        if full == sequence.settled {
            return Ok(());
        }
        let new = sequence.settled..full;
        sequence.settled = full;
        if let Some(fusion) = &self.policy.fusion {
            let started = Instant::now();
            let known = self.known(i);
            let cache = &mut self.running[i].cache;
            self.counts.fused_pages += fuse(fusion, &mut self.pool, cache, new.clone(), &known) as u64;
            self.counts.fuse_seconds += started.elapsed().as_secs_f64();
        }
        if let Some(code) = self.policy.code.clone() {
            let started = Instant::now();
            self.code(&*code, i)?;
            self.counts.code_seconds += started.elapsed().as_secs_f64();
        }
        if self.policy.prefix {
            for block in new {
                let sequence = &mut self.running[i];
                let own = NewColumn {
                    tenant: sequence.tenant,
                    parent: sequence.columns.last().copied(),
                    tokens: &sequence.tokens[block * size..(block + 1) * size],
                    block,
                    entries: column(&sequence.cache, block),
                };
                let id = self.prefix.add(&mut self.pool, own);
                sequence.columns.push(id);
                self.adopt(i, block, id);
            }
        }
        Ok(())
    }

    /// The pages that a running request's blocks may be read from, by layer: those of its tenant.
    fn known(&self, i: usize) -> Vec<Vec<Candidate>> {
        let (tenant, layers) = (self.running[i].tenant, self.model.decoder.config().layers);
        if self.policy.prefix {
            let there = self.prefix.paged().filter(|(n, _)| n.tenant == tenant);
            return candidates(there.map(|(n, e)| (n.block, e)), layers);
        }
        // Without a prefix cache, what runs is all there is.
        let others = self.running.iter().enumerate().filter(|(j, s)| *j != i && s.tenant == tenant);
        let columns: Vec<(usize, Vec<Entry>)> =
            others.flat_map(|(_, s)| (0..s.settled).map(move |b| (b, column(&s.cache, b)))).collect();
        candidates(columns.iter().map(|(b, e)| (*b, &e[..])), layers)
    }

    /// Reads a block from the column that was there already, where two requests computed the same one at once.
    fn adopt(&mut self, i: usize, block: usize, id: NodeId) {
        let Some(entries) = self.prefix.node(id).and_then(|n| n.pages.as_ref()) else { return };
        for (table, entry) in self.running[i].cache.layers.iter_mut().zip(entries) {
            if table.entries[block].block != entry.block {
                table.replace(&mut self.pool, block, *entry);
            }
        }
    }

    /// Puts the full pages of a request into fewer bits, as far as its codec codes them.
    fn code(&mut self, codec: &dyn Codec, i: usize) -> Result<()> {
        let sequence = &mut self.running[i];
        let mut cache = std::mem::replace(&mut sequence.cache, RequestCache::new(0));
        let tokens = sequence.tokens[..cache.tokens].to_vec();
        // A page that is written to holds 16 bits a number again, for which no room was made.
        let open: Vec<Vec<Entry>> =
            cache.layers.iter_mut().map(|t| t.entries.split_off(sequence.settled)).collect();
        let (mut cache, coded) = encode(codec, self.model, &mut self.pool, (cache, tokens, 0));
        for (table, open) in cache.layers.iter_mut().zip(open) {
            table.entries.extend(open);
        }
        self.running[i].cache = cache;
        coded
    }

    /// Puts the pages of columns that follow each other into the bits that pages are kept in.
    pub(super) fn code_columns(&mut self, codec: &dyn Codec, run: &[NodeId]) -> Result<()> {
        let (first_block, tokens) = tier::stretch(&self.prefix, run)?;
        let mut cache = self.model.decoder.new_cache();
        for node in run.iter().filter_map(|id| self.prefix.node(*id)) {
            for (table, entry) in cache.layers.iter_mut().zip(node.pages.iter().flatten()) {
                self.pool.retain(entry.block);
                table.entries.push(*entry);
            }
        }
        cache.tokens = tokens.len();
        let (cache, coded) = encode(codec, self.model, &mut self.pool, (cache, tokens, first_block));
        cache.release(&mut self.pool);
        coded
    }
}

/// A block of all layers.
fn column(cache: &RequestCache, block: usize) -> Vec<Entry> {
    cache.layers.iter().map(|t| t.entries[block]).collect()
}

/// Encodes a cache of the pool, whose tokens begin at a block; gives it back, and how that went.
fn encode(
    codec: &dyn Codec,
    model: &Model,
    pool: &mut BlockPool,
    (cache, tokens, first_block): (RequestCache, Vec<u32>, usize),
) -> (RequestCache, Result<()>) {
    let mut batch = lend(model, pool);
    batch.first_block = first_block;
    batch.push(cache, tokens, "");
    let coded = codec.encode(&mut batch, &Memo::default());
    *pool = batch.pool;
    (batch.caches.pop().unwrap_or_else(|| model.decoder.new_cache()), coded)
}

/// The pool in a batch without requests, for a codec.
fn lend(model: &Model, pool: &mut BlockPool) -> CacheBatch {
    let mut batch = CacheBatch::empty(pool.shape(), Storage::F16, model.decoder.ropes());
    std::mem::swap(&mut batch.pool, pool);
    batch
}
