//! KVzip: what the model looks at when it has to repeat the prompt.

use super::{Evicting, KEEP, Needs, Scorer, Seen, behind_sinks, share};
use crate::codec::registry::{Method, Search};
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct KvZip {
    /// Share of the tokens that stay
    #[arg(long, default_value_t = 0.5, value_parser = share())]
    keep: f64,
    /// First tokens that always stay
    #[arg(long, default_value_t = 4)]
    sinks: usize,
}

impl Method for KvZip {
    const NAME: &'static str = "kvzip";
    const ROLE: Role = Role::Evict;
    const ABOUT: &'static str = "Feeds the prompt once more behind itself, as if to be repeated, and keeps the tokens that got the highest attention in that.";
    const PAPER: &'static str = "Kim et al. 2025, KVzip (arXiv 2505.23416)";
    const DIALS: &'static [&'static str] = &["keep"];
    const SEARCH: Option<Search> = Some(KEEP);

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Evicting(*self)))
    }
}

impl Scorer for KvZip {
    fn keep(&self) -> f64 {
        self.keep
    }

    fn scores(&self, tokens: usize, seen: Option<&Seen>) -> Vec<f32> {
        behind_sinks(tokens, self.sinks, seen.map(|s| &s.repeated))
    }

    fn needs(&self) -> Needs {
        Needs { repeated: true, ..Needs::default() }
    }
}
