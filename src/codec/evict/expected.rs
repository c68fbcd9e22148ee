//! Expected Attention: what the queries to come will look at, if they are like those of the prompt.

use super::{Evicting, Needs, Scorer, Seen, share};
use crate::codec::Codec;
use crate::codec::registry::{Method, Scale, Search};
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct Expected {
    /// Share of the tokens that stay
    #[arg(long, default_value_t = 0.5, value_parser = share)]
    keep: f64,
    /// First tokens that always stay
    #[arg(long, default_value_t = 4)]
    sinks: usize,
}

impl Method for Expected {
    const NAME: &'static str = "expected";
    const ROLE: crate::codec::Role = crate::codec::Role::Evict;
    const ABOUT: &'static str = "Keeps the tokens to which a Gaussian query, of the prompt's mean and covariance and turned to the places that come next, would attend \
                                 most, times the norm of their values.";
    const PAPER: &'static str = "Devoto et al. 2025, Expected Attention (arXiv 2510.00636)";
    const DIALS: &'static [&'static str] = &["keep"];
    const SEARCH: Option<Search> =
        Some(Search { option: "keep", fine: 0.999, coarse: 0.02, scale: Scale::Linear });

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Evicting(*self)))
    }
}

impl Scorer for Expected {
    fn keep(&self) -> f64 {
        self.keep
    }

    fn scores(&self, tokens: usize, seen: Option<&Seen>) -> Vec<f32> {
        let expected = seen.map_or(&[][..], |s| &s.expected);
        let score = |t: usize| expected.get(t).copied().unwrap_or(0.0);
        (0..tokens).map(|t| if t < self.sinks { f32::INFINITY } else { score(t) }).collect()
    }
    fn needs(&self) -> Needs {
        Needs { expected: true, ..Needs::default() }
    }
}
