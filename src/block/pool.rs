//! The pool of physical blocks.

use super::page::{Page, Part, Payload, ReadPage, Storage, Store};
use super::slab::Slab;
use half::f16;
use ndarray::{ArrayView1, ArrayView3};
use std::borrow::Cow;
use std::sync::Arc;

/// Geometry of every block of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockShape {
    /// Tokens a full block holds.
    pub block_size: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl BlockShape {
    /// Numbers that one token takes in K (and again in V): `kv_heads * head_dim`.
    pub fn token_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Length of a full block as one vector, the paper's r = t*h*d.
    pub fn block_width(&self) -> usize {
        self.block_size * self.token_width()
    }
}

/// Numbers of a block, or of a whole layer, with named axes: `[tokens, kv_heads, head_dim]`.
///
/// # Panics
/// If they are not whole tokens: a bug of the caller, never of input.
pub fn by_head(numbers: &[f32], kv_heads: usize, head_dim: usize) -> ArrayView3<'_, f32> {
    let width = kv_heads * head_dim;
    assert!(width > 0 && numbers.len().is_multiple_of(width));
    let view = ArrayView1::from(numbers);
    match view.into_shape_with_order((numbers.len() / width, kv_heads, head_dim)) {
        Ok(view) => view,
        // As many numbers as the shape has.
        Err(_) => unreachable!("the shape fits"),
    }
}

/// Name of a physical block. Only meaningful in the pool that gave it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(u32);

/// `data` is shared only with clones of the pool: an experiment's arms begin as clones of the unfused pool, and copying
/// gigabytes for each would cost more than fusing them. A pool counts, and frees, what its own slots hold.
#[derive(Debug, Default, Clone)]
struct Slot {
    references: u32,
    /// Empty when the slot is free.
    data: Arc<Page>,
}

/// Reference-counted physical blocks. Memory of a block goes back to the allocator with its last reference.
#[derive(Debug, Clone)]
pub struct BlockPool {
    store: Store,
    shape: BlockShape,
    slots: Vec<Slot>,
    free: Vec<u32>,
    bytes: usize,
    coded: CodedPages,
}

/// What the pool keeps of coded pages whose bytes can be read in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodedPages {
    /// Their numbers beside their bytes.
    WithNumbers,
    /// Their bytes alone, read token by token: less memory, slower reading.
    Packed,
    /// Their bytes alone, keys read channel by channel where they are stored so: faster, but scores that are summed so round otherwise.
    PackedByChannel,
}

impl BlockPool {
    pub fn new(shape: BlockShape, storage: Storage) -> Self {
        let store = match storage {
            Storage::F32 => Store::F32,
            Storage::F16 => Store::F16(Slab::new(shape.block_width())),
        };
        BlockPool {
            shape,
            store,
            slots: Vec::new(),
            free: Vec::new(),
            bytes: 0,
            coded: CodedPages::WithNumbers,
        }
    }

    pub fn shape(&self) -> BlockShape {
        self.shape
    }

    fn storage(&self) -> Storage {
        match self.store {
            Store::F32 => Storage::F32,
            Store::F16(_) => Storage::F16,
        }
    }

    /// The largest number, either sign, that the pool can hold.
    pub fn most(&self) -> f32 {
        match self.storage() {
            Storage::F32 => f32::MAX,
            Storage::F16 => f16::MAX.to_f32(),
        }
    }

    /// Stores a block with one reference. Both slices are `[tokens, kv_heads, head_dim]`.
    ///
    /// # Panics
    /// If the lengths differ, are not whole tokens, or exceed a block: a bug of the caller, never of input.
    pub fn allocate(&mut self, keys: &[f32], values: &[f32]) -> BlockId {
        assert_eq!(keys.len(), values.len());
        assert_eq!(keys.len() % self.shape.token_width(), 0);
        assert!(keys.len() <= self.shape.block_width());
        let page = Page::new(&self.store, keys, values);
        self.insert(page)
    }

    /// Stores the first token of a block that will grow, with one reference and room for a whole block: what it counts as
    /// does not change as it fills.
    pub fn open(&mut self, key: &[f32], value: &[f32]) -> BlockId {
        let mut page = Page::new(&self.store, &[], &[]);
        page.append(self.storage(), [key, value], self.shape.block_width());
        self.insert(page)
    }

    fn insert(&mut self, page: Page) -> BlockId {
        self.bytes += page.bytes();
        let slot = Slot { references: 1, data: Arc::new(page) };
        match self.free.pop() {
            Some(id) => {
                self.slots[id as usize] = slot;
                BlockId(id)
            }
            None => {
                self.slots.push(slot);
                BlockId(self.slots.len() as u32 - 1)
            }
        }
    }

    fn page(&self, id: BlockId) -> &Page {
        &self.slots[id.0 as usize].data
    }

    fn put(&mut self, id: BlockId, page: Page) {
        self.bytes = self.bytes - self.page(id).bytes() + page.bytes();
        self.slots[id.0 as usize].data = Arc::new(page);
    }

    /// Stores a page in another form, for all that point at it: the numbers that are read from a payload, and what reads
    /// them if that can be done whenever the page is used.
    pub fn recode(
        &mut self,
        id: BlockId,
        keys: Vec<f32>,
        values: Vec<f32>,
        payload: Payload,
        reader: Option<Arc<dyn ReadPage>>,
    ) {
        debug_assert_eq!(keys.len(), self.page(id).len());
        let mut page = Page::coded(keys, values, payload, reader);
        if self.coded != CodedPages::WithNumbers && page.is_packable() {
            page.pack();
        }
        self.put(id, page);
    }

    /// Says what a coded page is read from, and what it takes.
    pub fn charge(&mut self, id: BlockId, payload: Payload) {
        let before = self.page(id).bytes();
        Arc::make_mut(&mut self.slots[id.0 as usize].data).charge(payload);
        self.bytes = self.bytes - before + self.page(id).bytes();
    }

    /// What to keep of pages that are coded from now on.
    pub fn hold_coded(&mut self, coded: CodedPages) {
        self.coded = coded;
    }

    /// What a page is read from, if it is not 16 bits a number.
    pub fn payload(&self, id: BlockId) -> Option<&Payload> {
        self.page(id).payload()
    }

    /// What numbers become when they go into the pool.
    pub fn round(&self, numbers: &[f32]) -> Vec<f32> {
        self.storage().round(numbers)
    }

    /// Adds a reference.
    pub fn retain(&mut self, id: BlockId) {
        self.slots[id.0 as usize].references += 1;
    }

    /// Drops a reference; the last one frees the memory.
    pub fn release(&mut self, id: BlockId) {
        let slot = &mut self.slots[id.0 as usize];
        assert!(slot.references > 0, "block released twice");
        slot.references -= 1;
        if slot.references == 0 {
            self.bytes -= slot.data.bytes();
            *slot = Slot::default();
            self.free.push(id.0);
        }
    }

    /// Appends one token to a block, copying it first if others share it. Returns the block to use from now on.
    pub fn append(&mut self, id: BlockId, key: &[f32], value: &[f32]) -> BlockId {
        let id = if self.references(id) > 1 {
            let copy = self.page(id).clone();
            self.release(id);
            self.insert(copy)
        } else {
            id
        };
        assert!(self.tokens(id) < self.shape.block_size, "block is full");
        let (before, storage) = (self.page(id).bytes(), self.storage());
        // Copies the numbers if a clone of the pool still shares them.
        let page = Arc::make_mut(&mut self.slots[id.0 as usize].data);
        page.append(storage, [key, value], self.shape.block_width());
        self.bytes = self.bytes - before + page.bytes();
        id
    }

    /// Keys or values of a block, `[tokens, kv_heads, head_dim]`.
    pub fn numbers(&self, id: BlockId, part: Part) -> Cow<'_, [f32]> {
        self.page(id).read(part)
    }

    /// Keys of a block, `[tokens, kv_heads, head_dim]`.
    pub fn keys(&self, id: BlockId) -> Cow<'_, [f32]> {
        self.numbers(id, Part::Key)
    }

    /// Values of a block, `[tokens, kv_heads, head_dim]`.
    pub fn values(&self, id: BlockId) -> Cow<'_, [f32]> {
        self.numbers(id, Part::Value)
    }

    /// Appends keys or values of one head of a block's first tokens: `[tokens, head_dim]`.
    pub fn read_head(&self, id: BlockId, part: Part, head: usize, tokens: usize, out: &mut Vec<f32>) {
        let widths = (self.shape.token_width(), self.shape.head_dim);
        self.page(id).read_head(part, head, widths, tokens, out);
    }

    /// Appends keys of one head of a block channel by channel (`[head_dim, tokens]`), where they are stored so and may be read so.
    pub fn read_by_channel(&self, id: BlockId, head: usize, out: &mut Vec<f32>) -> bool {
        self.coded == CodedPages::PackedByChannel && self.page(id).read_by_channel(head, out)
    }

    /// Whether two blocks hold the same numbers.
    pub fn same(&self, a: BlockId, b: BlockId) -> bool {
        a == b || self.page(a).same(self.page(b))
    }

    /// The last few keys or values of a block.
    pub fn last(&self, id: BlockId, part: Part, count: usize) -> Vec<f32> {
        self.page(id).last(part, count)
    }

    /// Tokens stored in a block.
    pub fn tokens(&self, id: BlockId) -> usize {
        self.page(id).len() / self.shape.token_width()
    }

    pub fn references(&self, id: BlockId) -> u32 {
        self.slots[id.0 as usize].references
    }

    /// All blocks alive.
    pub fn pages(&self) -> impl Iterator<Item = BlockId> {
        let alive = self.slots.iter().enumerate().filter(|(_, slot)| slot.references > 0);
        alive.map(|(i, _)| BlockId(i as u32))
    }

    /// Physical blocks alive.
    pub fn live_blocks(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Bytes of memory of all live blocks' numbers and payloads; a block of f16 counts as full, since it has room for that.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of one block, as they are counted in [`BlockPool::bytes`].
    pub fn bytes_of(&self, id: BlockId) -> usize {
        self.page(id).bytes()
    }

    /// KV numbers (keys and values) held by all live blocks.
    pub fn elements(&self) -> u64 {
        self.slots.iter().map(|s| 2 * s.data.len() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> BlockPool {
        BlockPool::new(BlockShape { block_size: 2, kv_heads: 1, head_dim: 2 }, Storage::F16)
    }

    #[test]
    fn the_last_release_frees_the_memory_and_the_slot_is_used_again() {
        let mut pool = pool();
        let a = pool.allocate(&[1.0; 4], &[2.0; 4]);
        pool.retain(a);
        pool.release(a);
        assert_eq!((pool.live_blocks(), pool.elements()), (1, 8));
        pool.release(a);
        assert_eq!((pool.live_blocks(), pool.elements()), (0, 0));
        let b = pool.allocate(&[3.0; 2], &[4.0; 2]);
        assert_eq!(a, b);
        assert_eq!(pool.tokens(b), 1);
    }

    #[test]
    fn append_to_a_shared_block_copies_it() {
        let mut pool = pool();
        let a = pool.allocate(&[1.0, 1.0], &[2.0, 2.0]);
        pool.retain(a);
        let b = pool.append(a, &[5.0, 5.0], &[6.0, 6.0]);
        assert_ne!(a, b);
        assert_eq!(*pool.keys(a), [1.0, 1.0]);
        assert_eq!(*pool.keys(b), [1.0, 1.0, 5.0, 5.0]);
        assert_eq!((pool.references(a), pool.references(b)), (1, 1));
        let c = pool.append(a, &[7.0, 7.0], &[8.0, 8.0]);
        assert_eq!(a, c, "nobody shares it any more");
    }

    #[test]
    fn numbers_are_stored_in_sixteen_bits() {
        let mut pool = pool();
        let a = pool.allocate(&[0.1, 1.0], &[0.3, 2.0]);
        assert_eq!(pool.keys(a)[0], f16::from_f32(0.1).to_f32());
        assert_eq!(pool.bytes(), 16, "two tokens of two keys and two values each");
        let a = pool.append(a, &[1.0, 1.0], &[2.0, 2.0]);
        assert_eq!((pool.tokens(a), pool.bytes()), (2, 16));
        pool.release(a);
        assert_eq!(pool.bytes(), 0);
    }
}
