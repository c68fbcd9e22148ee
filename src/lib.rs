//! Rate-distortion experiments on KV-cache block fusion. See docs/architecture.md for the map.

pub mod bench;
pub mod block;
pub mod calibrate;
pub mod cli;
pub mod codec;
pub mod compare;
pub mod dump;
pub mod encoded;
pub mod error;
pub mod files;
pub mod interrupt;
pub mod lock;
pub mod memory;
pub mod model;
pub mod plot;
pub mod progress;
pub mod report;
pub mod serve;
pub mod stats;
pub mod sweep;
pub mod tables;
pub mod task;
pub mod theory;
pub mod train;
