//! What is handed to an engine and what it hands back.

use serde::Serialize;

/// How much an engine may hold and do at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Tokens of a block.
    pub block_size: usize,
    /// Bytes of keys and values, encoded ones included.
    pub budget_bytes: usize,
    /// Requests that run at once.
    pub running: usize,
    /// Tokens of one step: those of a prompt beyond it wait for the next.
    pub step_tokens: usize,
}

/// A request as it is handed in.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub id: u64,
    /// Pages are never shared between tenants.
    pub tenant: String,
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    /// Text that ends the answer.
    pub stop: Vec<String>,
    /// Go on behind the model's end of text.
    pub ignore_end: bool,
    /// Hand the logits of so many first tokens out (for measuring quality).
    pub keep_logits: usize,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The stop text or the model's end of text.
    Stop,
    /// As many tokens as were asked for.
    Length,
    /// It would need more than the budget alone.
    TooLarge,
    /// It was called off.
    Aborted,
}

/// What a step did to a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub id: u64,
    /// A token of the answer; none where it ends without one.
    pub token: Option<u32>,
    pub finish: Option<Finish>,
    /// `[vocab]`, where they were asked for.
    pub logits: Option<Vec<f32>>,
}

/// What an engine has done since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    pub steps: u64,
    pub preemptions: u64,
    /// Prompt tokens that were looked up in the prefix cache, and found; those of preempted requests apart.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    pub preempted_queries: u64,
    pub preempted_hits: u64,
    /// Tokens found encoded and decoded.
    pub decoded_tokens: u64,
    /// Columns that went for good, and that were encoded.
    pub dropped_columns: u64,
    pub encoded_columns: u64,
    /// Pages that fusion saved.
    pub fused_pages: u64,
    pub prefill_tokens: u64,
    pub decode_tokens: u64,
    pub forward_seconds: f64,
    pub fuse_seconds: f64,
    pub code_seconds: f64,
    pub encode_seconds: f64,
    pub decode_seconds: f64,
}
