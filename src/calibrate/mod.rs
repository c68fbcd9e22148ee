//! Thresholds of single layers: measured on the model, or predicted from statistics.

mod floors;
mod measured;
mod predicted;

pub use measured::{CalibrateOptions, LayerReport, Target, calibrate};
pub use predicted::calibrate_from_model;
