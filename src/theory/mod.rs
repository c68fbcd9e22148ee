//! The Poisson-process rate-distortion model: closed forms, synthetic worlds, predictions from measured statistics
//! (docs/theory.md).

mod against;
mod bound;
mod closed;
mod law;
mod monte_carlo;
mod predict;
mod simulate;
mod verdict;
mod worlds;

pub use bound::{BOUND_MANIFEST, BoundOptions, BoundRow, bound};
pub use closed::{
    b1_of_groups, component_count, giant_share, leader_count, mean_cosine, poisson_error, second_hand_cosine,
    star_error, tree_blocks, verbatim_error,
};
pub use law::{ClassLaw, Exceedance, Extent, LayerLaw, PositionLaw};
pub use monte_carlo::{Draws, MonteCarloRow, monte_carlo};
pub use predict::{Model, Prediction, layer_cr, percolation_requests, predict, representative};
pub use simulate::{
    MONTE_CARLO_CSV, PREDICTIONS_CSV, SCALE_CSV, SIMULATE_MANIFEST, SUMMARY_CSV, SimulateOptions, Simulation,
    simulate,
};
pub use verdict::{Comparison, Verdict, verdict};
pub use worlds::{Recipe, World};
