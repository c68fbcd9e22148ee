//! Block tables: the logical view of one request's cache.

use super::{BlockId, BlockPool};
use std::sync::Arc;

/// Two factors that turn a shared representative back into one request's block (the paper's restored norms).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    pub key: f32,
    pub value: f32,
}

/// One logical block: where it lies and, if it was fused, what makes it this request's own again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry {
    pub block: BlockId,
    pub scale: Option<Scale>,
    /// The block's keys are stored without position (RoPE taken off): a reader rotates them to where the entry stands.
    pub stripped: bool,
    /// The block stands for several, though nobody else may point at it (any more).
    pub fused: bool,
}

impl Entry {
    /// A block as it is.
    pub fn plain(block: BlockId) -> Self {
        Entry { block, scale: None, stripped: false, fused: false }
    }

    /// Factor on the block's keys.
    pub fn key_scale(&self) -> f32 {
        self.scale.map_or(1.0, |s| s.key)
    }

    /// Factor on the block's values.
    pub fn value_scale(&self) -> f32 {
        self.scale.map_or(1.0, |s| s.value)
    }
}

/// Which tokens a table still holds after others were evicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Positions of the tokens that were kept, rising.
    pub positions: Vec<u32>,
    /// Tokens there were; those appended later go on from here.
    pub tokens: usize,
}

/// One request's blocks in one layer, in token order. All but the last are full.
///
/// A token's place among those stored is its *slot*; without evictions that is its position.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct BlockTable {
    pub entries: Vec<Entry>,
    /// `None` if no token was evicted.
    pub kept: Option<Arc<Kept>>,
}

impl BlockTable {
    /// Cuts keys and values (`[tokens, kv_heads, head_dim]` each) into blocks of a pool.
    pub fn of(pool: &mut BlockPool, keys: &[f32], values: &[f32]) -> Self {
        let width = pool.shape().block_width();
        let mut table = BlockTable::default();
        for (k, v) in keys.chunks(width).zip(values.chunks(width)) {
            table.push(pool.allocate(k, v));
        }
        table
    }

    /// Slots of tokens before a position.
    pub fn slots_before(&self, position: usize) -> usize {
        match &self.kept {
            Some(kept) if position < kept.tokens => {
                kept.positions.partition_point(|p| (*p as usize) < position)
            }
            Some(kept) => kept.positions.len() + position - kept.tokens,
            None => position,
        }
    }

    /// The position of the token in a slot.
    pub fn position(&self, slot: usize) -> usize {
        match &self.kept {
            Some(kept) => match kept.positions.get(slot) {
                Some(position) => *position as usize,
                None => kept.tokens + slot - kept.positions.len(),
            },
            None => slot,
        }
    }

    /// Appends one token's key and value (`[kv_heads, head_dim]` each), opening a block when the last is full.
    pub fn append(&mut self, pool: &mut BlockPool, key: &[f32], value: &[f32]) {
        match self.entries.last_mut() {
            Some(last) if pool.tokens(last.block) < pool.shape().block_size => {
                debug_assert!(!last.fused, "a block that grows is never fused");
                last.block = pool.append(last.block, key, value);
            }
            _ => self.push(pool.open(key, value)),
        }
    }

    /// Adds a block that this table now owns a reference to.
    pub fn push(&mut self, block: BlockId) {
        self.entries.push(Entry::plain(block));
    }

    /// Points logical block `index` at `entry` (taking a reference) and lets go of what it pointed at.
    pub fn replace(&mut self, pool: &mut BlockPool, index: usize, entry: Entry) {
        pool.retain(entry.block);
        pool.release(self.entries[index].block);
        self.entries[index] = entry;
    }

    /// A second table over the same blocks.
    pub fn fork(&self, pool: &mut BlockPool) -> BlockTable {
        for entry in &self.entries {
            pool.retain(entry.block);
        }
        self.clone()
    }

    /// Gives all blocks back.
    pub fn release(self, pool: &mut BlockPool) {
        for entry in self.entries {
            pool.release(entry.block);
        }
    }
}

/// One request's cache: a block table a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestCache {
    pub layers: Vec<BlockTable>,
    /// Tokens in the cache; the next token's position.
    pub tokens: usize,
}

impl RequestCache {
    pub fn new(layers: usize) -> Self {
        RequestCache { layers: vec![BlockTable::default(); layers], tokens: 0 }
    }

    /// A cache over the same blocks; appending to either copies a shared last block first.
    pub fn fork(&self, pool: &mut BlockPool) -> RequestCache {
        RequestCache { layers: self.layers.iter().map(|t| t.fork(pool)).collect(), tokens: self.tokens }
    }

    /// Gives all blocks back.
    pub fn release(self, pool: &mut BlockPool) {
        for table in self.layers {
            table.release(pool);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockShape, Storage};
    use proptest::prelude::*;

    proptest! {
        /// Whatever is appended, forked and released, tables read back what went in and no block outlives them.
        #[test]
        fn forks_read_back_their_own_tokens_and_nothing_leaks(
            shared in 0usize..7, left in 0usize..6, right in 0usize..6, block_size in 1usize..5,
        ) {
            let mut pool = BlockPool::new(BlockShape { block_size, kv_heads: 1, head_dim: 1 }, Storage::F32);
            let mut a = RequestCache::new(1);
            let append = |cache: &mut RequestCache, pool: &mut BlockPool, x: f32| {
                cache.layers[0].append(pool, &[x], &[-x]);
                cache.tokens += 1;
            };
            for i in 0..shared { append(&mut a, &mut pool, i as f32); }
            let mut b = a.fork(&mut pool);
            for i in 0..left { append(&mut a, &mut pool, 100.0 + i as f32); }
            for i in 0..right { append(&mut b, &mut pool, 200.0 + i as f32); }

            let read = |cache: &RequestCache| -> Vec<f32> {
                cache.layers[0].entries.iter().flat_map(|e| pool.keys(e.block).to_vec()).collect()
            };
            let expect = |from: f32, n: usize| -> Vec<f32> {
                (0..shared).map(|i| i as f32).chain((0..n).map(|i| from + i as f32)).collect()
            };
            prop_assert_eq!(read(&a), expect(100.0, left));
            prop_assert_eq!(read(&b), expect(200.0, right));
            a.release(&mut pool);
            b.release(&mut pool);
            prop_assert_eq!((pool.live_blocks(), pool.elements()), (0, 0));
        }
    }
    #[test]
    fn tokens_keep_their_positions_when_others_go() {
        let kept = Arc::new(Kept { positions: vec![0, 3, 4, 9], tokens: 12 });
        let table = BlockTable { entries: Vec::new(), kept: Some(kept) };
        let positions: Vec<usize> = (0..7).map(|slot| table.position(slot)).collect();
        assert_eq!(positions, [0, 3, 4, 9, 12, 13, 14]);
        for (slot, &position) in positions.iter().enumerate() {
            assert_eq!(table.slots_before(position), slot);
        }
        assert_eq!((table.slots_before(1), table.slots_before(11), table.slots_before(14)), (1, 4, 6));
    }
}
