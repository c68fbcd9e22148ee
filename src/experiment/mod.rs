//! Experiments: a grid of arms over a dump, scored against the no-fusion arm, written as rows.

mod arms;
mod calibrate;
mod calibrate_model;
mod compare;
mod differ;
mod evaluate;
mod explain;
mod floors;
mod grid;
mod labels;
mod measure;
mod rows;
mod runs;
mod search;
mod settings;
mod simulate;
mod stage;
mod sweep;
mod table;

pub use arms::{Arm, ArmColumns, Packing};
pub use calibrate::{CalibrateOptions, LayerReport, Target, calibrate};
pub use calibrate_model::calibrate_from_model;
pub use differ::{Difference, Tolerance, compare_folders};
pub use evaluate::{Base, FirstToken, Prompt, Reference};
pub use explain::{ExplainOptions, Explanation, FusedBlock, Partner, explain};
pub use grid::parse_taus;
pub use labels::{Labelled, PACKING, series_labels};
pub use measure::{STATS_CSV, STATS_MANIFEST, StatsOptions, measure, read_stats};
pub use rows::{LayerRow, LayerScore, RequestRow, RequestScore, Row, Timings};
pub use runs::RunRecord;
pub use search::{SearchOptions, Tried, search};
pub use settings::{Settings, SweepOptions};
pub use simulate::{
    MONTE_CARLO_CSV, PREDICTIONS_CSV, SCALE_CSV, SIMULATE_MANIFEST, SUMMARY_CSV, SimulateOptions, Simulation,
    simulate,
};
pub use stage::{load, targets};
pub use sweep::{LAYERS_CSV, REQUESTS_CSV, SWEEP_CSV, TIMINGS_CSV, open_model, sweep};
pub use table::{Columns, read_csv, write_csv};
