//! Paged KV storage: physical blocks in a reference-counted pool, and the block tables that point at them.
//!
//! One physical block holds keys and values of up to `block_size` consecutive tokens of ONE layer. A request owns one
//! [`BlockTable`] a layer; several tables may point at the same block. A block whose last reference goes is freed.

pub(crate) mod halves;
mod page;
mod pool;
mod slab;
mod table;

pub use page::{Part, Payload, ReadPage, Storage};
pub use pool::{BlockId, BlockPool, BlockShape, CodedPages, by_head};
pub use table::{BlockTable, Entry, Kept, RequestCache, Scale};
