//! Statistics that know nothing of models or figures.

mod bootstrap;

pub use bootstrap::{Interval, bootstrap_mean, mean};
