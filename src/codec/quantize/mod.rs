//! Quantisation of pages: every physical page that is left is written to bits and read back from them, so that what the ledger
//! counts is what was written and what attention sees is what can be read.

mod affine;
mod bits;
mod cachegen;
mod fp8;
mod int8;
mod kitty;
mod kivi;
mod kvarn;
mod kvquant;
mod minifloat;
mod nvfp4;
mod per_head;
mod rotated;

pub use bits::{BitSink, BitSource, Cost};
pub use int8::Int8;
use per_head::PerHead;

use super::registry::{Entry, entry};
use super::{CacheBatch, Codec, Coverage, Memo};
use crate::block::{BlockId, BlockShape, Part, Payload, ReadPage};
use crate::error::{Error, Result};
use half::f16;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Rows of the registry.
pub(super) const METHODS: &[Entry] = &[
    entry::<Int8>(),
    entry::<fp8::Fp8>(),
    entry::<nvfp4::NvFp4>(),
    entry::<kivi::Kivi>(),
    entry::<kitty::Kitty>(),
    entry::<kvquant::KvQuant>(),
    entry::<kvarn::KvarN>(),
    entry::<cachegen::CacheGen>(),
    entry::<rotated::Rotated>(),
];

/// How the numbers of a page lie: `[tokens, kv_heads, head_dim]`; and of which layer they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageShape {
    pub tokens: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub layer: usize,
    /// Layers of the model.
    pub layers: usize,
}

impl PageShape {
    /// Numbers of one token.
    pub fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    pub fn numbers(&self) -> usize {
        self.tokens * self.width()
    }
}

/// A page to bits and back. `decode` takes exactly the bits that `encode` put.
pub trait Quantizer: Send + Sync {
    fn encode(&self, part: Part, page: &[f32], shape: PageShape, sink: &mut BitSink);

    fn decode(&self, part: Part, shape: PageShape, source: &mut BitSource) -> Vec<f32>;

    /// Reads one head of keys or values (`[tokens, head_dim]`) out of a page's bytes, if that is quick enough to be done
    /// whenever the page is used; false if it is not.
    fn read_head(&self, _: Part, _: PageShape, _head: usize, _: &[u8], _out: &mut Vec<f32>) -> bool {
        false
    }

    /// Reads keys of one head channel by channel (`[head_dim, tokens]`), if they lie so; false if they do not.
    fn read_by_channel(&self, _: PageShape, _head: usize, _: &[u8], _out: &mut Vec<f32>) -> bool {
        false
    }

    /// First tokens of every request whose pages stay as they are.
    fn raw_first(&self) -> usize {
        0
    }

    /// Last tokens of every request whose pages stay as they are.
    fn raw_tokens(&self) -> usize {
        0
    }

    /// Whether pages that are not full are quantised too.
    fn takes_partial(&self) -> bool {
        true
    }
}

/// A quantiser as a codec of all layers.
pub struct Quantized<Q>(Arc<Q>);

/// Reads one page.
struct Reader<Q> {
    quantizer: Arc<Q>,
    shape: PageShape,
}

impl<Q: Quantizer> ReadPage for Reader<Q> {
    fn read_by_channel(&self, bytes: &[u8], head: usize, out: &mut Vec<f32>) -> bool {
        self.quantizer.read_by_channel(self.shape, head, bytes, out)
    }

    fn read(&self, bytes: &[u8], part: Part, head: Option<usize>, out: &mut Vec<f32>) {
        if let Some(head) = head {
            self.quantizer.read_head(part, self.shape, head, bytes, out);
            return;
        }
        let mut source = BitSource::new(bytes);
        let keys = self.quantizer.decode(Part::Key, self.shape, &mut source);
        out.extend(match part {
            Part::Key => keys,
            Part::Value => self.quantizer.decode(Part::Value, self.shape, &mut source),
        });
    }
}

impl<Q: Quantizer + 'static> Codec for Quantized<Q> {
    fn coverage(&self, layers: usize) -> Coverage {
        Coverage::of(0..layers)
    }

    fn blocks_stand_alone(&self) -> bool {
        self.0.raw_first() == 0 && self.0.raw_tokens() == 0
    }

    fn reads_in_place(&self, shape: BlockShape) -> bool {
        let BlockShape { block_size: tokens, kv_heads, head_dim } = shape;
        let shape = PageShape { tokens, kv_heads, head_dim, layer: 0, layers: 1 };
        let zeros = vec![0.0; shape.numbers()];
        let (_, _, payload) = self.page(&zeros, &zeros, shape);
        self.0.read_head(Part::Key, shape, 0, &payload.bytes, &mut Vec::new())
    }

    fn decode(&self, batch: &mut CacheBatch) -> Result<()> {
        let pool = &batch.pool;
        let coded: Vec<(BlockId, PageShape)> =
            pages(batch).into_iter().filter(|(id, _)| pool.payload(*id).is_some()).collect();
        let read: Vec<Option<(Vec<f32>, Vec<f32>)>> = coded
            .par_iter()
            .map(|&(id, shape)| {
                let bytes = &pool.payload(id)?.bytes;
                let mut source = BitSource::new(bytes);
                let keys = self.0.decode(Part::Key, shape, &mut source);
                let values = self.0.decode(Part::Value, shape, &mut source);
                (source.bytes_taken() == bytes.len()).then_some((keys, values))
            })
            .collect();
        for ((id, _), read) in coded.into_iter().zip(read) {
            let (keys, values) = read.ok_or_else(|| Error::argument("has a page of another shape"))?;
            let payload = batch.pool.payload(id).cloned().unwrap_or_default();
            batch.pool.recode(id, keys, values, payload, None);
        }
        Ok(())
    }

    fn encode(&self, batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        let block = batch.pool.shape();
        // A page is quantised if no request that has it needs it raw.
        let mut raw: BTreeSet<BlockId> = BTreeSet::new();
        for cache in &batch.caches {
            let raw_from = cache.tokens.saturating_sub(self.0.raw_tokens());
            for table in &cache.layers {
                for (i, entry) in table.entries.iter().enumerate() {
                    let tokens = batch.pool.tokens(entry.block);
                    let whole = tokens == block.block_size || self.0.takes_partial();
                    let first = i * block.block_size;
                    let past = table.position(first + tokens - 1) < raw_from;
                    let coded = batch.pool.payload(entry.block).is_some();
                    if coded || !(whole && past && table.position(first) >= self.0.raw_first()) {
                        raw.insert(entry.block);
                    }
                }
            }
        }
        let coded: Vec<(BlockId, PageShape)> =
            pages(batch).into_iter().filter(|(id, _)| !raw.contains(id)).collect();
        for some in coded.chunks(WRITTEN) {
            let pool = &batch.pool;
            let written: Vec<(Vec<f32>, Vec<f32>, Payload)> = some
                .par_iter()
                .map(|&(id, shape)| self.page(&pool.keys(id), &pool.values(id), shape))
                .collect();
            for (&(id, shape), (keys, values, payload)) in some.iter().zip(written) {
                let quick = self.0.read_head(Part::Key, shape, 0, &payload.bytes, &mut Vec::new());
                let reader = Reader { quantizer: Arc::clone(&self.0), shape };
                let reader = quick.then_some(reader).map(|r| Arc::new(r) as Arc<dyn ReadPage>);
                batch.pool.recode(id, keys, values, payload, reader);
            }
        }
        Ok(())
    }
}

/// Pages whose numbers are held before they go into the pool, which may pack them.
const WRITTEN: usize = 256;

/// All pages that tables list, each once, with the layer of the first table that does.
fn pages(batch: &CacheBatch) -> Vec<(BlockId, PageShape)> {
    let block = batch.pool.shape();
    let mut all: BTreeMap<BlockId, PageShape> = BTreeMap::new();
    for cache in &batch.caches {
        let layers = cache.layers.len();
        for (layer, table) in cache.layers.iter().enumerate() {
            for entry in &table.entries {
                let tokens = batch.pool.tokens(entry.block);
                let (kv_heads, head_dim) = (block.kv_heads, block.head_dim);
                all.entry(entry.block).or_insert(PageShape { tokens, kv_heads, head_dim, layer, layers });
            }
        }
    }
    all.into_iter().collect()
}

impl<Q: Quantizer> Quantized<Q> {
    pub fn new(quantizer: Q) -> Self {
        Quantized(Arc::new(quantizer))
    }

    /// A page as it is read back, and what it is read from.
    fn page(&self, keys: &[f32], values: &[f32], shape: PageShape) -> (Vec<f32>, Vec<f32>, Payload) {
        let mut sink = BitSink::default();
        self.0.encode(Part::Key, keys, shape, &mut sink);
        self.0.encode(Part::Value, values, shape, &mut sink);
        let (bytes, code_bits, side_bits) = sink.finish();
        let mut source = BitSource::new(&bytes);
        let keys = self.0.decode(Part::Key, shape, &mut source);
        let values = self.0.decode(Part::Value, shape, &mut source);
        (keys, values, Payload { bytes, code_bits, side_bits })
    }
}

/// The largest of some numbers without their signs.
pub(super) fn largest(numbers: &[f32]) -> f32 {
    numbers.iter().fold(0.0, |most, x| most.max(x.abs()))
}

/// Writes a number as f16; returns what is read back.
pub(super) fn put_f16(sink: &mut BitSink, x: f32) -> f32 {
    let half = f16::from_f32(x);
    sink.put(Cost::Side, u32::from(half.to_bits()), 16);
    half.to_f32()
}

pub(super) fn take_f16(source: &mut BitSource) -> f32 {
    f16::from_bits(source.take(16) as u16).to_f32()
}
