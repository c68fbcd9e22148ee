//! Result tables: their names, reading and writing them, holding one folder of them against another.

mod columns;
mod differ;

pub use columns::{Columns, read_csv, write_csv};
pub use differ::{Difference, Tolerance, compare_folders};

/// An arm a row.
pub const SWEEP_CSV: &str = "sweep.csv";
/// A request of an arm a row.
pub const REQUESTS_CSV: &str = "requests.csv";
/// A layer of an arm a row.
pub const LAYERS_CSV: &str = "layers.csv";
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
