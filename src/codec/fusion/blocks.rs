//! The blocks of a batch that may fuse, and what every threshold and pairing wants to know of them: which are exact
//! duplicates, and all inner products. Both are computed once a layer and kept for the next arm.

use super::choices::RopeMode;
use super::gram::gram;
use crate::block::{Entry, Part};
use crate::codec::CacheBatch;
use crate::codec::sharing::{Shared, sharing};
use crate::model::kernels::inner;
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// One full block of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub request: usize,
    pub block: usize,
    /// The leaf of the tree it belongs to: its request, or its chunk of a request.
    pub leaf: usize,
}

/// All blocks that may fuse, in request and token order.
pub struct Blocks {
    pub places: Vec<Place>,
    pub leaves: usize,
    /// Blocks that share storage with one of `places`, and are not among them.
    pub(in crate::codec) shared: Vec<Shared>,
    kept: Vec<OnceLock<Layer>>,
    stripped: Vec<OnceLock<Layer>>,
    /// Of tables, counted in [`KEPT`] too.
    kept_bytes: AtomicUsize,
}

/// One layer of [`Blocks`].
pub struct Layer {
    /// Place -> distinct vector.
    pub vectors: Vec<u32>,
    /// Distinct vector -> the first place that has it.
    pub first: Vec<usize>,
    /// Squared norms of the distinct vectors: keys and values.
    pub squares: Vec<(f64, f64)>,
    /// Inner products of all distinct vectors, `[vectors, vectors]`.
    key_gram: OnceLock<Vec<f32>>,
    value_gram: OnceLock<Vec<f32>>,
}

impl Blocks {
    /// The full blocks of all requests, a leaf a request (BFF). Of blocks that share storage, the first stands for all.
    pub fn of_requests(batch: &CacheBatch) -> Self {
        let shared = sharing(batch);
        let left_out: HashSet<(usize, usize)> = shared.iter().map(|s| (s.request, s.block)).collect();
        let size = batch.pool.shape().block_size;
        let full = |request: usize| batch.caches[request].tokens / size;
        let places = (0..batch.caches.len())
            .flat_map(|request| (0..full(request)).map(move |block| Place { request, block, leaf: request }))
            .filter(|p| !left_out.contains(&(p.request, p.block)));
        let mut blocks = Self::new(batch, places.collect(), batch.caches.len());
        blocks.shared = shared;
        blocks
    }

    /// Some blocks of one request, a leaf every `chunk` blocks (CFF).
    pub fn of_chunks(batch: &CacheBatch, request: usize, blocks: Range<usize>, chunk: usize) -> Self {
        let leaves = blocks.len() / chunk;
        let places = blocks.enumerate().map(|(i, block)| Place { request, block, leaf: i / chunk });
        Self::new(batch, places.collect(), leaves)
    }

    fn new(batch: &CacheBatch, places: Vec<Place>, leaves: usize) -> Self {
        let layers = batch.caches.first().map_or(0, |c| c.layers.len());
        let empty = || (0..layers).map(|_| OnceLock::new()).collect();
        Blocks {
            places,
            leaves,
            shared: Vec::new(),
            kept: empty(),
            stripped: empty(),
            kept_bytes: AtomicUsize::new(0),
        }
    }

    /// The block-table entry of a place.
    pub fn entry<'a>(&self, batch: &'a CacheBatch, layer: usize, place: usize) -> &'a Entry {
        let Place { request, block, .. } = self.places[place];
        &batch.caches[request].layers[layer].entries[block]
    }

    /// The numbers of a place's block, as they are compared: `[block_size * kv_heads * head_dim]`.
    pub fn numbers<'a>(
        &self,
        batch: &'a CacheBatch,
        rope: RopeMode,
        part: Part,
        layer: usize,
        place: usize,
    ) -> Cow<'a, [f32]> {
        let block = self.entry(batch, layer, place).block;
        match (part, rope) {
            (Part::Value, _) => batch.pool.values(block),
            (Part::Key, RopeMode::Keep) => batch.pool.keys(block),
            (Part::Key, RopeMode::Strip) => {
                let shape = batch.pool.shape();
                let mut keys = batch.pool.keys(block).into_owned();
                let position = self.places[place].block * shape.block_size;
                batch.ropes.layer(layer).strip_tokens(&mut keys, shape.token_width(), position);
                Cow::Owned(keys)
            }
        }
    }

    /// One layer, its exact duplicates found.
    pub fn layer(&self, batch: &CacheBatch, rope: RopeMode, layer: usize) -> &Layer {
        let memo = match rope {
            RopeMode::Keep => &self.kept,
            RopeMode::Strip => &self.stripped,
        };
        memo[layer].get_or_init(|| {
            // Keys without position that differ by rounding only are left to the similarities.
            let position = |place: usize| match rope {
                RopeMode::Keep => 0,
                RopeMode::Strip => self.places[place].block,
            };
            let mut seen: HashMap<(usize, [[u32; GLANCE]; 2]), Vec<u32>> = HashMap::new();
            let mut found = Layer {
                vectors: Vec::with_capacity(self.places.len()),
                first: Vec::new(),
                squares: Vec::new(),
                key_gram: OnceLock::new(),
                value_gram: OnceLock::new(),
            };
            for place in 0..self.places.len() {
                let block = self.entry(batch, layer, place).block;
                let glance = Part::BOTH.map(|part| bits(&batch.pool.last(block, part, GLANCE)));
                let alike = seen.entry((position(place), glance)).or_default();
                let same = alike.iter().copied().find(|&v| {
                    let other = self.entry(batch, layer, found.first[v as usize]).block;
                    batch.pool.same(other, block)
                });
                let vector = same.unwrap_or_else(|| {
                    alike.push(found.first.len() as u32);
                    found.first.push(place);
                    let square = |x: Cow<[f32]>| f64::from(inner(&x, &x));
                    found.squares.push((square(batch.pool.keys(block)), square(batch.pool.values(block))));
                    found.first.len() as u32 - 1
                });
                found.vectors.push(vector);
            }
            found
        })
    }

    /// Inner products of one layer's distinct blocks, `[vectors, vectors]`. Kept for the next arm if there is room.
    pub fn gram(&self, batch: &CacheBatch, rope: RopeMode, part: Part, layer: usize) -> Cow<'_, [f32]> {
        let found = self.layer(batch, rope, layer);
        let compute = || {
            let width = batch.pool.shape().block_width();
            let mut rows = Vec::with_capacity(found.first.len() * width);
            for &place in &found.first {
                rows.extend_from_slice(&self.numbers(batch, rope, part, layer, place));
            }
            gram(&rows, width)
        };
        let memo = match part {
            Part::Key => &found.key_gram,
            Part::Value => &found.value_gram,
        };
        let bytes = found.first.len().pow(2) * size_of::<f32>();
        if memo.get().is_none() && !self.reserve(bytes) {
            return Cow::Owned(compute());
        }
        Cow::Borrowed(memo.get_or_init(compute))
    }

    /// Whether a table of so many bytes may be kept.
    fn reserve(&self, bytes: usize) -> bool {
        let add = |kept: usize| kept.checked_add(bytes).filter(|&k| k <= MOST_KEPT.load(Relaxed));
        let granted = KEPT.fetch_update(Relaxed, Relaxed, add).is_ok();
        if granted {
            self.kept_bytes.fetch_add(bytes, Relaxed);
        }
        granted
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        KEPT.fetch_sub(self.kept_bytes.load(Relaxed), Relaxed);
    }
}

/// Tables of inner products that would take all that are kept beyond this (3 GiB unless told otherwise) are computed anew by
/// every arm.
static MOST_KEPT: AtomicUsize = AtomicUsize::new(3 << 30);

/// Keeps tables of inner products up to so many bytes, of all batches together.
pub fn keep_tables(bytes: usize) {
    MOST_KEPT.store(bytes, Relaxed);
}

/// Bytes of all tables that are kept.
static KEPT: AtomicUsize = AtomicUsize::new(0);

/// Numbers of a block that are looked at before all are compared.
const GLANCE: usize = 4;

/// Bits of a few numbers: cheap to hash, and rarely equal by chance.
fn bits(numbers: &[f32]) -> [u32; GLANCE] {
    let mut bits = [0; GLANCE];
    for (bit, x) in bits.iter_mut().zip(numbers) {
        *bit = x.to_bits();
    }
    bits
}
