//! Encoded caches as files: what the ledger counts, in bytes (docs/encoded-format.md).

mod load;
mod read;
mod write;

pub use load::{load_caches, push_request};
pub use read::{Encoded, decode};
pub use write::{EncodeOptions, Size, encode};

use crate::codec::Coverage;
use crate::dump::Manifest;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What a file begins with: a name and the version of the format.
const MAGIC: &[u8; 8] = b"KVFUSE\0\x02";
/// Bytes before a page's own: tokens, kind, length, checksum.
const PAGE_FRAME: usize = 12;
/// Bytes of a layer beside its pages and entries: number of pages, checksum of the tables.
const LAYER_FRAME: usize = 8;
/// Set in an entry whose block has scales, is stored without positions, stands for several; the other bits number the page
/// within its layer.
const SCALED: u32 = 1 << 31;
const STRIPPED: u32 = 1 << 30;
const FUSED: u32 = 1 << 29;

/// The header, as JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    kvfuse_version: String,
    /// The chain in normal form.
    method: String,
    /// The stage that reads coded pages.
    code: Option<String>,
    /// SHA-256 of the trained file that it names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    code_sha256: Option<String>,
    block_size: usize,
    /// Layers that the chain touches, and how many of them share a table.
    touched: Range<usize>,
    table_layers: usize,
    /// Whether tables begin with a list of the tokens that were kept.
    evicts: bool,
    /// Of the dump, without its shards' checksums.
    manifest: Manifest,
    /// Token ids of every request.
    tokens: Vec<Vec<u32>>,
}

impl Header {
    /// Whether a layer has a table of its own, or the one before it is its too.
    fn has_table(&self, layer: usize) -> bool {
        let touched = &self.touched;
        !touched.contains(&layer) || (layer - touched.start).is_multiple_of(self.table_layers)
    }

    fn set_coverage(&mut self, coverage: &Coverage) {
        self.touched = coverage.layers.clone();
        self.table_layers = coverage.table_layers;
    }
}
