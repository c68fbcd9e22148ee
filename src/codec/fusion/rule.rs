//! When blocks are alike enough: the rule of a fusion, and the gate that it puts before pairs of a layer.

use super::choices::{Choices, ScaleRule, Similarity};
use super::thresholds::Thresholds;
use crate::error::{Error, Result};
use std::sync::Arc;

/// When two blocks are alike enough.
#[derive(Debug, Clone, PartialEq)]
pub enum Rule {
    /// Their similarity lies above tau.
    Tau(f64),
    /// No block's relative squared error, of its keys or of its values, exceeds this.
    MaxError(f64),
    /// Keys and values lie above thresholds of their layer.
    Thresholds(Arc<Thresholds>),
}

/// Which of two blocks' cosines decide, and how far above the threshold a pair lies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gate {
    similarity: Similarity,
    key: f32,
    value: f32,
}

impl Gate {
    /// Nothing lies above a threshold of 1, though a cosine may round to a hair above it.
    pub fn new(similarity: Similarity, key: f32, value: f32) -> Self {
        let reachable = |threshold: f32| if threshold < 1.0 { threshold } else { f32::INFINITY };
        Gate { similarity, key: reachable(key), value: reachable(value) }
    }

    pub fn needs_keys(&self) -> bool {
        self.similarity != Similarity::Values
    }

    pub fn needs_values(&self) -> bool {
        self.similarity != Similarity::Keys
    }

    /// How far a pair with these cosines of keys and values lies above its threshold; it fuses above zero. What
    /// [`Gate::needs_keys`] and [`Gate::needs_values`] do not ask for is not looked at.
    pub fn margin(&self, key: f32, value: f32) -> f32 {
        match self.similarity {
            Similarity::Keys => key - self.key,
            Similarity::Values => value - self.value,
            Similarity::Lower => (key - self.key).min(value - self.value),
            Similarity::Mean => 0.5 * (key + value) - self.key,
        }
    }
}

impl Rule {
    /// The gate of one layer (of the first layer of a group).
    pub(super) fn gate(&self, choices: &Choices, layer: usize) -> Gate {
        match self {
            Rule::Tau(tau) => Gate::new(choices.similarity, *tau as f32, *tau as f32),
            Rule::MaxError(error) => {
                // For a verbatim representative at cosine c: 2(1 - c) with the own norm, 1 - c^2 at best.
                let least = match choices.scale {
                    ScaleRule::Norm => 1.0 - error / 2.0,
                    ScaleRule::LeastSquares | ScaleRule::None => (1.0 - error).max(0.0).sqrt(),
                };
                Gate::new(Similarity::Lower, least as f32, least as f32)
            }
            Rule::Thresholds(file) => {
                let (key, value) = file.layer(layer);
                Gate::new(Similarity::Lower, key, value)
            }
        }
    }

    /// The calibration that it follows.
    pub fn thresholds(&self) -> Option<&Arc<Thresholds>> {
        match self {
            Rule::Thresholds(file) => Some(file),
            _ => None,
        }
    }

    /// The most that a block's relative squared error may be.
    pub(super) fn budget(&self) -> Option<f64> {
        match self {
            Rule::MaxError(error) => Some(*error),
            _ => None,
        }
    }

    pub(super) fn check(&self, choices: &Choices) -> Result<()> {
        match self {
            Rule::Tau(tau) if !(*tau > -1.0 && *tau <= 1.0) => {
                Err(Error::argument(format!("tau {tau} lies outside of (-1, 1]")))
            }
            Rule::MaxError(error) if !(*error > 0.0 && *error < 2.0) => {
                Err(Error::argument(format!("max-error {error} lies outside of (0, 2)")))
            }
            Rule::Thresholds(_) if choices.group_layers > 1 => {
                Err(Error::argument("thresholds of single layers do not go with group-layers"))
            }
            _ => Ok(()),
        }
    }
}
