//! The pool of physical blocks.

use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::{ArrayView1, ArrayView3};
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

/// Numbers of one block, `[tokens, kv_heads, head_dim]` each, tokens <= block_size.
#[derive(Debug, Default, Clone)]
struct Block {
    keys: Vec<f32>,
    values: Vec<f32>,
    /// What the numbers are read from, if not 16 bits each.
    payload: Option<Payload>,
}

/// An encoded page: its bytes, and how many of their bits are codes of numbers and how many scales and the like.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Payload {
    pub bytes: Vec<u8>,
    pub code_bits: u64,
    pub side_bits: u64,
}

/// `data` is shared only with clones of the pool: an experiment's arms begin as clones of the unfused pool, and copying
/// gigabytes for each would cost more than fusing them. A pool counts, and frees, what its own slots hold.
#[derive(Debug, Default, Clone)]
struct Slot {
    references: u32,
    /// Empty when the slot is free.
    data: Arc<Block>,
}

/// What a number may keep when it goes into the pool. Arithmetic on the cache is in f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// All of it: for dumps and for parity with reference implementations.
    F32,
    /// Rounded to f16: for rate-distortion rows, so that the 16 bits the ledger charges an element are what the
    /// number really needs.
    F16,
}

impl Storage {
    fn round(self, numbers: &[f32]) -> Vec<f32> {
        match self {
            Storage::F32 => numbers.to_vec(),
            Storage::F16 => {
                // Slice conversions use the machine's own instructions; one `from_f32` a number is far slower.
                let mut half = vec![f16::ZERO; numbers.len()];
                half.convert_from_f32_slice(numbers);
                let mut rounded = vec![0.0; numbers.len()];
                half.convert_to_f32_slice(&mut rounded);
                rounded
            }
        }
    }
}

/// Reference-counted physical blocks. Memory of a block goes back to the allocator with its last reference.
#[derive(Debug, Clone)]
pub struct BlockPool {
    storage: Storage,
    shape: BlockShape,
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl BlockPool {
    pub fn new(shape: BlockShape, storage: Storage) -> Self {
        BlockPool { shape, storage, slots: Vec::new(), free: Vec::new() }
    }

    pub fn shape(&self) -> BlockShape {
        self.shape
    }

    /// The largest number, either sign, that the pool can hold.
    pub fn most(&self) -> f32 {
        match self.storage {
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
        let (keys, values) = (self.storage.round(keys), self.storage.round(values));
        let block = Block { keys, values, payload: None };
        let slot = Slot { references: 1, data: Arc::new(block) };
        self.insert(slot)
    }

    fn insert(&mut self, slot: Slot) -> BlockId {
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

    /// Stores a page in another form, for all that point at it: the numbers that are read from a payload.
    pub fn recode(&mut self, id: BlockId, keys: Vec<f32>, values: Vec<f32>, payload: Payload) {
        debug_assert_eq!(keys.len(), self.keys(id).len());
        self.slots[id.0 as usize].data = Arc::new(Block { keys, values, payload: Some(payload) });
    }

    /// What a page is read from, if it is not 16 bits a number.
    pub fn payload(&self, id: BlockId) -> Option<&Payload> {
        self.slots[id.0 as usize].data.payload.as_ref()
    }

    /// What numbers become when they go into the pool.
    pub fn round(&self, numbers: &[f32]) -> Vec<f32> {
        self.storage.round(numbers)
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
            *slot = Slot::default();
            self.free.push(id.0);
        }
    }

    /// Appends one token to a block, copying it first if others share it. Returns the block to use from now on.
    pub fn append(&mut self, id: BlockId, key: &[f32], value: &[f32]) -> BlockId {
        let id = if self.references(id) > 1 {
            let copy = Slot { references: 1, data: Arc::clone(&self.slots[id.0 as usize].data) };
            self.release(id);
            self.insert(copy)
        } else {
            id
        };
        assert!(self.tokens(id) < self.shape.block_size, "block is full");
        // Copies the numbers if a copied slot or a clone of the pool still shares them.
        let block = Arc::make_mut(&mut self.slots[id.0 as usize].data);
        block.keys.extend(self.storage.round(key));
        block.values.extend(self.storage.round(value));
        // A page that grows is no longer what its bits say.
        block.payload = None;
        id
    }

    /// Keys of a block, `[tokens, kv_heads, head_dim]`.
    pub fn keys(&self, id: BlockId) -> &[f32] {
        &self.slots[id.0 as usize].data.keys
    }

    /// Values of a block, `[tokens, kv_heads, head_dim]`.
    pub fn values(&self, id: BlockId) -> &[f32] {
        &self.slots[id.0 as usize].data.values
    }

    /// Tokens stored in a block.
    pub fn tokens(&self, id: BlockId) -> usize {
        self.keys(id).len() / self.shape.token_width()
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

    /// KV numbers (keys and values) held by all live blocks.
    pub fn elements(&self) -> u64 {
        self.slots.iter().map(|s| (s.data.keys.len() + s.data.values.len()) as u64).sum()
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
        assert_eq!(pool.keys(a), [1.0, 1.0]);
        assert_eq!(pool.keys(b), [1.0, 1.0, 5.0, 5.0]);
        assert_eq!((pool.references(a), pool.references(b)), (1, 1));
        let c = pool.append(a, &[7.0, 7.0], &[8.0, 8.0]);
        assert_eq!(a, c, "nobody shares it any more");
    }

    #[test]
    fn numbers_are_stored_in_sixteen_bits() {
        let mut pool = pool();
        let a = pool.allocate(&[0.1, 1.0], &[0.3, 2.0]);
        assert_eq!(pool.keys(a)[0], f16::from_f32(0.1).to_f32());
    }
}
