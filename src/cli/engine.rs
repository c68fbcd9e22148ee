//! What an engine may hold and do at once: options that `serve` and `serve-bench` have in common.

use crate::serve::Limits;
use anyhow::{Result, anyhow};

#[derive(Debug, Clone, clap::Args)]
pub struct EngineArgs {
    /// Requests that run at once
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_num_seqs: usize,
    /// Tokens of one step; a longer prompt is prefilled in chunks
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_num_batched_tokens: usize,
    /// Tokens a block
    #[arg(long, default_value_t = 16)]
    block_size: usize,
}

impl EngineArgs {
    /// Limits with so many bytes of keys and values.
    pub fn limits(&self, budget_bytes: usize) -> Result<Limits> {
        Ok(Limits {
            block_size: at_least_one("--block-size", self.block_size)?,
            budget_bytes,
            running: at_least_one("--max-num-seqs", self.max_num_seqs)?,
            step_tokens: at_least_one("--max-num-batched-tokens", self.max_num_batched_tokens)?,
        })
    }
}

/// A number that must be above 0.
pub fn above_zero(name: &str, x: f64) -> Result<f64> {
    if x > 0.0 && x.is_finite() { Ok(x) } else { Err(anyhow!("{name} {x}: must be above 0")) }
}

/// A count that must not be 0.
pub fn at_least_one(name: &str, n: usize) -> Result<usize> {
    if n == 0 { Err(anyhow!("{name} must be at least 1")) } else { Ok(n) }
}
