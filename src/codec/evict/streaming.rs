//! StreamingLLM: the first tokens and the latest ones.

use super::{Evicting, KEEP, Needs, Scorer, Seen, share};
use crate::codec::registry::{Method, Search};
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct Streaming {
    /// Share of the tokens that stay
    #[arg(long, default_value_t = 0.5, value_parser = share())]
    keep: f64,
    /// First tokens that always stay
    #[arg(long, default_value_t = 4)]
    sinks: usize,
}

impl Method for Streaming {
    const NAME: &'static str = "streaming";
    const ROLE: Role = Role::Evict;
    const ABOUT: &'static str = "Keeps the first tokens (attention sinks) and the latest ones, at their own positions; the rest is dropped.";
    const PAPER: &'static str = "Xiao et al. 2023, StreamingLLM (arXiv 2309.17453)";
    const DIALS: &'static [&'static str] = &["keep"];
    const SEARCH: Option<Search> = Some(KEEP);

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Evicting(*self)))
    }
}

impl Scorer for Streaming {
    fn keep(&self) -> f64 {
        self.keep
    }

    fn scores(&self, tokens: usize, _seen: Option<&Seen>) -> Vec<f32> {
        (0..tokens).map(|t| if t < self.sinks { f32::INFINITY } else { t as f32 }).collect()
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }
}
