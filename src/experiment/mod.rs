//! Experiments: a grid of arms over a dump, scored against the no-fusion arm, written as rows.

mod arms;
mod evaluate;
mod grid;
mod rows;
mod runs;
mod sweep;
mod table;

pub use arms::{Arm, Method};
pub use evaluate::FirstToken;
pub use grid::parse_taus;
pub use rows::{RequestScore, Row, Timings};
pub use runs::RunRecord;
pub use sweep::{SWEEP_CSV, SweepOptions, TIMINGS_CSV, sweep};
pub use table::{SweepConfig, read_csv, write_csv};
