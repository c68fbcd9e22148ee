//! Sweeps: a grid of arms over a dump, scored against the no-fusion arm, written as rows.

mod arms;
mod evaluate;
mod explain;
mod grid;
mod labels;
mod lot;
mod positions;
mod room;
mod rows;
mod run;
mod runs;
mod search;
mod settings;
mod shard;
mod stage;

pub use arms::{Arm, ArmColumns, Packing};
pub use evaluate::{Base, FirstToken, Prompt, Reference, answer_text, divergence};
pub use explain::{ExplainOptions, Explanation, FusedBlock, Partner, explain};
pub use grid::parse_taus;
pub use labels::{Labelled, PACKING, boundary, named, series_labels};
pub use lot::{Source, load, targets};
pub use rows::{LayerRow, LayerScore, RequestRow, RequestScore, Row, Timings};
pub use run::sweep;
pub use runs::RunRecord;
pub use search::{Goal, SearchOptions, Tried, search};
pub use settings::{ANSWER_TOKENS, Settings, SweepOptions};
pub use shard::{Shard, merge};
pub use stage::Stage;
