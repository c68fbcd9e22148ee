//! Result tables: their names, reading and writing them, holding one folder of them against another.

mod differ;
mod record;
mod table;
mod write;

pub use differ::{Difference, Tolerance, compare_folders};
pub use table::Table;
pub use write::write_table;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// An arm a row.
pub const SWEEP_CSV: &str = "sweep.csv";
/// Long tables, as CSV or as Parquet: a request of an arm a row, and a layer of an arm a row.
pub const REQUESTS: &str = "requests";
pub const LAYERS: &str = "layers";
/// A band of answer tokens of an arm a row.
pub const POSITIONS_CSV: &str = "positions.csv";
/// A codec against the Gaussian bound, a chain a row, and a layer's keys or values a row.
pub const BOUND_CSV: &str = "bound.csv";
pub const BOUND_LAYERS_CSV: &str = "bound_layers.csv";
/// Tokens by the class of their reference.
pub const BOUND_MATCHES_CSV: &str = "bound_matches.csv";
/// A method a row.
pub const COMPARE_CSV: &str = "compare.csv";
/// A chain of several lossy stages a row.
pub const PRODUCTS_CSV: &str = "products.csv";
/// What each arm took.
pub const TIMINGS_CSV: &str = "timings.csv";

/// What a long table is written as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    #[default]
    Csv,
    Parquet,
}

impl Format {
    /// A long table's file.
    pub fn file(self, folder: &Path, name: &str) -> PathBuf {
        folder.join(match self {
            Format::Csv => format!("{name}.csv"),
            Format::Parquet => format!("{name}.parquet"),
        })
    }

    /// The files that a long table may be in.
    pub fn files(folder: &Path, name: &str) -> [PathBuf; 2] {
        [Format::Csv, Format::Parquet].map(|format| format.file(folder, name))
    }
}

/// The file that a long table is in, if it is there.
pub fn find_long_table(folder: &Path, name: &str) -> Option<PathBuf> {
    Format::files(folder, name).into_iter().find(|path| path.exists())
}
