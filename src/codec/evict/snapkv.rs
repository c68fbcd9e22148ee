//! SnapKV: what the last tokens of the prompt look at.

use super::observe::WINDOW;
use super::{Evicting, KEEP, Needs, Scorer, Seen, share};
use crate::codec::registry::{Method, Search};
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct SnapKv {
    /// Share of the tokens that stay
    #[arg(long, default_value_t = 0.5, value_parser = share())]
    keep: f64,
    /// Neighbours over which the highest attention counts
    #[arg(long, default_value_t = 5, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=255))]
    kernel: usize,
}

impl Method for SnapKv {
    const NAME: &'static str = "snapkv";
    const ROLE: Role = Role::Evict;
    const ABOUT: &'static str =
        "Keeps the last 64 tokens of the prompt and those that they look at most, with their neighbours.";
    const PAPER: &'static str = "Li et al. 2024, SnapKV (arXiv 2404.14469)";
    const DIALS: &'static [&'static str] = &["keep"];
    const SEARCH: Option<Search> = Some(KEEP);

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Evicting(*self)))
    }
}

impl Scorer for SnapKv {
    fn keep(&self) -> f64 {
        self.keep
    }

    fn scores(&self, tokens: usize, seen: Option<&Seen>) -> Vec<f32> {
        let window = seen.map_or(&[][..], |s| &s.window);
        let reach = self.kernel / 2;
        let pooled = |t: usize| {
            let near = window.get(t.saturating_sub(reach)..(t + reach + 1).min(window.len()));
            near.unwrap_or_default().iter().copied().fold(0.0, f32::max)
        };
        // The window itself, the latest of it first where it is more than what stays.
        let own = |t: usize| f32::MAX / 2.0 * (1.0 + t as f32 / tokens as f32);
        (0..tokens).map(|t| if t + WINDOW >= tokens { own(t) } else { pooled(t) }).collect()
    }

    fn needs(&self) -> Needs {
        Needs { prompt: true, ..Needs::default() }
    }
}
