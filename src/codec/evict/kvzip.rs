//! KVzip: what the model looks at when it has to repeat the prompt.

use super::{Evicting, Needs, Scorer, Seen, share};
use crate::codec::Codec;
use crate::codec::registry::{Method, Scale, Search};
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct KvZip {
    /// Share of the tokens that stay
    #[arg(long, default_value_t = 0.5, value_parser = share)]
    keep: f64,
    /// First tokens that always stay
    #[arg(long, default_value_t = 4)]
    sinks: usize,
}

impl Method for KvZip {
    const NAME: &'static str = "kvzip";
    const ROLE: crate::codec::Role = crate::codec::Role::Evict;
    const ABOUT: &'static str = "Feeds the prompt once more behind itself, as if to be repeated, and keeps the tokens that got the highest attention in that.";
    const PAPER: &'static str = "Kim et al. 2025, KVzip (arXiv 2505.23416)";
    const DIALS: &'static [&'static str] = &["keep"];
    const SEARCH: Option<Search> =
        Some(Search { option: "keep", fine: 0.999, coarse: 0.02, scale: Scale::Linear });

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Evicting(*self)))
    }
}

impl Scorer for KvZip {
    fn keep(&self) -> f64 {
        self.keep
    }

    fn scores(&self, tokens: usize, seen: Option<&Seen>) -> Vec<f32> {
        let repeated = seen.map_or(&[][..], |s| &s.repeated);
        let score = |t: usize| repeated.get(t).copied().unwrap_or(0.0);
        (0..tokens).map(|t| if t < self.sinks { f32::INFINITY } else { score(t) }).collect()
    }
    fn needs(&self) -> Needs {
        Needs { repeated: true, ..Needs::default() }
    }
}
