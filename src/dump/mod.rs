//! KV caches on disk: one safetensors shard a request and a manifest. The schema is docs/dump-format.md.

mod halves;
mod inspect;
mod maker;
mod manifest;
mod prefill;
mod shard;

pub use crate::task::Half;
pub(crate) use inspect::open_request;
pub use inspect::{Summary, inspect};
pub use maker::open_model;
pub use manifest::{DataEntry, EncodedBy, MANIFEST, Manifest, ModelEntry, RequestEntry};
pub use prefill::{DumpOptions, Sort, dump, shared_prefix};
pub use shard::{DumpDtype, Shard, write_shard};
