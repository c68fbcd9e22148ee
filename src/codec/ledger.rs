//! The rate ledger: every bit an encoded cache occupies, read off the pool and the block tables.

use super::{CacheBatch, Coverage};
use crate::block::BlockId;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::ops::AddAssign;

/// Bits of one KV number in the pool (f16).
const ELEMENT_BITS: u64 = 16;
/// Bits of one block-table entry: a 32-bit block number.
const ENTRY_BITS: u64 = 32;
/// Bits before a list of kept tokens, which has a bit a token, in whole bytes; where a batch has any, tables that kept all say so in these.
const KEPT_BITS: u64 = 32;
/// Bits of the side information of one fused block in one request: a key and a value scale, f32 each.
const SCALE_BITS: u64 = 64;

/// Bits by what they are spent on, over all requests of a batch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// KV numbers of the original caches: tokens * layers * kv_heads * head_dim * 2.
    pub elements: u64,
    /// Full blocks in the layers the codec touches, each physical block once.
    pub block_bits: u64,
    /// Blocks that are not full, in the layers the codec touches.
    pub partial_bits: u64,
    /// Everything in the layers the codec leaves alone.
    pub untouched_bits: u64,
    pub scale_bits: u64,
    pub table_bits: u64,
    /// Scales and zero points of quantised pages, and codebooks.
    pub codebook_bits: u64,
    /// The share of a trained file that these caches pay for; an encoded file does not hold it.
    pub trained_bits: u64,
    pub layers: Vec<LayerRate>,
}

/// One layer's share.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerRate {
    /// KV numbers of the original caches.
    pub elements: u64,
    /// Bits of blocks, scales and table entries.
    pub bits: u64,
    pub touched: bool,
    /// Full blocks that the tables list.
    pub logical_blocks: u64,
    /// Physical blocks behind them.
    pub physical_blocks: u64,
    /// Of the blocks that were offered for fusion: as the tables list them, and physical ones.
    pub leaf_blocks: u64,
    pub root_blocks: u64,
}

impl LayerRate {
    /// 16 bits against what is stored; 1 for an empty cache.
    pub fn cr(&self) -> f64 {
        if self.bits == 0 {
            return 1.0;
        }
        (self.elements * ELEMENT_BITS) as f64 / self.bits as f64
    }
}

impl Ledger {
    /// Counts an encoded batch whose codec covers this much. Layers that share a table pay for it, and for the scales, once:
    /// with the first of them.
    pub fn of(batch: &CacheBatch, coverage: &Coverage) -> Self {
        let touched = &coverage.layers;
        let mut ledger = Ledger::default();
        let shape = batch.pool.shape();
        let layers = batch.caches.first().map_or(0, |c| c.layers.len());
        let evicts = batch.caches.iter().any(|c| c.layers.iter().any(|t| t.kept.is_some()));
        for n in 0..layers {
            let mut layer = LayerRate { touched: touched.contains(&n), ..LayerRate::default() };
            let mut seen: HashSet<BlockId> = HashSet::new();
            let (mut full, mut partial) = (0, 0);
            let has_table = !layer.touched || (n - touched.start).is_multiple_of(coverage.table_layers);
            let mut roots: HashSet<BlockId> = HashSet::new();
            for cache in &batch.caches {
                layer.elements += (2 * cache.tokens * shape.token_width()) as u64;
                if has_table && evicts {
                    let list = cache.layers[n].kept.as_ref().map_or(0, |_| cache.tokens.div_ceil(8));
                    let bits = KEPT_BITS + 8 * list as u64;
                    ledger.table_bits += bits;
                    layer.bits += bits;
                }
            }
            let entries = batch.caches.iter().flat_map(|c| {
                let leaves = coverage.leaf_tokens.map_or(c.tokens, |stretch| c.tokens / stretch * stretch);
                let leaves = leaves / shape.block_size;
                c.layers[n].entries.iter().enumerate().map(move |(i, entry)| (entry, i < leaves))
            });
            for (entry, leaf) in entries {
                let tokens = batch.pool.tokens(entry.block);
                let elements = (2 * tokens * shape.token_width()) as u64;
                let is_full = tokens == shape.block_size;
                layer.logical_blocks += u64::from(is_full);
                if leaf {
                    layer.leaf_blocks += 1;
                    layer.root_blocks += u64::from(roots.insert(entry.block));
                }
                if has_table {
                    ledger.table_bits += ENTRY_BITS;
                    layer.bits += ENTRY_BITS;
                }
                if has_table && entry.scale.is_some() {
                    ledger.scale_bits += SCALE_BITS;
                    layer.bits += SCALE_BITS;
                }
                if seen.insert(entry.block) {
                    layer.physical_blocks += u64::from(is_full);
                    let payload = batch.pool.payload(entry.block);
                    let (code, side) =
                        payload.map_or((elements * ELEMENT_BITS, 0), |p| (p.code_bits, p.side_bits));
                    *(if is_full { &mut full } else { &mut partial }) += code;
                    ledger.codebook_bits += side;
                    layer.bits += side;
                }
            }
            layer.bits += full + partial;
            ledger.elements += layer.elements;
            if layer.touched {
                ledger.block_bits += full;
                ledger.partial_bits += partial;
            } else {
                ledger.untouched_bits += full + partial;
            }
            ledger.layers.push(layer);
        }
        let tokens: usize = batch.caches.iter().map(|c| c.tokens).sum();
        ledger.trained_bits = coverage.trained.share(tokens as u64);
        ledger
    }

    /// Bits that an encoded file of these caches holds.
    pub fn file_bits(&self) -> u64 {
        self.stored_element_bits() + self.scale_bits + self.table_bits + self.codebook_bits
    }

    /// Bits of KV numbers, which the pool must be holding: 16 for each of its elements that is not quantised.
    pub fn stored_element_bits(&self) -> u64 {
        self.block_bits + self.partial_bits + self.untouched_bits
    }

    pub fn total_bits(&self) -> u64 {
        self.file_bits() + self.trained_bits
    }

    /// Bits really stored for each KV number of the original caches; 16 for an empty cache.
    pub fn bits_per_element(&self) -> f64 {
        if self.elements == 0 {
            return ELEMENT_BITS as f64;
        }
        self.total_bits() as f64 / self.elements as f64
    }

    /// Whole-cache compression ratio with all side information: 16 / bits per element.
    pub fn cr_audited(&self) -> f64 {
        ELEMENT_BITS as f64 / self.bits_per_element()
    }

    /// The paper's ratio: blocks that were offered for fusion in the touched layers, over those that are left of them; 1 if
    /// there are none.
    pub fn cr_paper(&self) -> f64 {
        let touched = self.layers.iter().filter(|l| l.touched);
        let (leaves, roots) =
            touched.fold((0, 0), |(l, r), rate| (l + rate.leaf_blocks, r + rate.root_blocks));
        if roots == 0 { 1.0 } else { leaves as f64 / roots as f64 }
    }
}

impl AddAssign<&Ledger> for Ledger {
    /// Joins the ledgers of two batches of the same model and codec.
    fn add_assign(&mut self, other: &Ledger) {
        self.elements += other.elements;
        self.block_bits += other.block_bits;
        self.partial_bits += other.partial_bits;
        self.untouched_bits += other.untouched_bits;
        self.scale_bits += other.scale_bits;
        self.table_bits += other.table_bits;
        self.codebook_bits += other.codebook_bits;
        self.trained_bits += other.trained_bits;
        self.layers.resize(other.layers.len(), LayerRate::default());
        for (mine, theirs) in self.layers.iter_mut().zip(&other.layers) {
            mine.elements += theirs.elements;
            mine.bits += theirs.bits;
            mine.touched |= theirs.touched;
            mine.logical_blocks += theirs.logical_blocks;
            mine.physical_blocks += theirs.physical_blocks;
            mine.leaf_blocks += theirs.leaf_blocks;
            mine.root_blocks += theirs.root_blocks;
        }
    }
}
