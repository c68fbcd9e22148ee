//! Expected Attention: what the queries to come will look at, if they are like those of the prompt.

use super::{Evicting, KEEP, Needs, Scorer, Seen, behind_sinks, share};
use crate::codec::registry::{Method, Search};
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct Expected {
    /// Share of the tokens that stay
    #[arg(long, default_value_t = 0.5, value_parser = share())]
    keep: f64,
    /// First tokens that always stay
    #[arg(long, default_value_t = 4)]
    sinks: usize,
}

impl Method for Expected {
    const NAME: &'static str = "expected";
    const ROLE: Role = Role::Evict;
    const ABOUT: &'static str = "Keeps the tokens to which a Gaussian query, of the prompt's mean and covariance and turned to the places that come next, would attend \
                                 most, times the norm of their values.";
    const PAPER: &'static str = "Devoto et al. 2025, Expected Attention (arXiv 2510.00636)";
    const DIALS: &'static [&'static str] = &["keep"];
    const SEARCH: Option<Search> = Some(KEEP);

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Evicting(*self)))
    }
}

impl Scorer for Expected {
    fn keep(&self) -> f64 {
        self.keep
    }

    fn scores(&self, tokens: usize, seen: Option<&Seen>) -> Vec<f32> {
        behind_sinks(tokens, self.sinks, seen.map(|s| &s.expected))
    }

    fn needs(&self) -> Needs {
        Needs { expected: true, ..Needs::default() }
    }
}
