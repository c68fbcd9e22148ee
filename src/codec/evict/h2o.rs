//! H2O: the heavy hitters of attention and the latest tokens.

use super::{Evicting, KEEP, Needs, Scorer, Seen, share};
use crate::codec::registry::{Method, Search};
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct H2o {
    /// Share of the tokens that stay
    #[arg(long, default_value_t = 0.5, value_parser = share())]
    keep: f64,
    /// Share of these that are the latest
    #[arg(long, default_value_t = 0.5, value_parser = share())]
    recent: f64,
}

impl Method for H2o {
    const NAME: &'static str = "h2o";
    const ROLE: Role = Role::Evict;
    const ABOUT: &'static str =
        "Keeps the tokens that got the most attention from all tokens of the prompt, and the latest ones.";
    const PAPER: &'static str = "Zhang et al. 2023, H2O (arXiv 2306.14048)";
    const DIALS: &'static [&'static str] = &["keep"];
    const SEARCH: Option<Search> = Some(KEEP);

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Evicting(*self)))
    }
}

impl Scorer for H2o {
    fn keep(&self) -> f64 {
        self.keep
    }

    fn scores(&self, tokens: usize, seen: Option<&Seen>) -> Vec<f32> {
        let recent = (self.keep * self.recent * tokens as f64).floor() as usize;
        let received = seen.map_or(&[][..], |s| &s.received);
        let score = |t: usize| received.get(t).copied().unwrap_or(0.0);
        (0..tokens).map(|t| if t + recent >= tokens { f32::INFINITY } else { score(t) }).collect()
    }

    fn needs(&self) -> Needs {
        Needs { prompt: true, ..Needs::default() }
    }
}
