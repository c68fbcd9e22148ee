//! Which prompts: options that `dump` and `serve-bench` have in common.

use crate::task::{Draw, Half};

#[derive(Debug, Clone, clap::Args)]
pub struct DrawArgs {
    /// builtin:qa, builtin:longqa (several passages, one of which holds the answer), synth:niah (codes hidden in filler),
    /// squad:FILE (SQuAD v1.1 JSON), longbench:FILE, ruler:FILE, prompts:FILE (JSON lines with prompt and answers), text:FILE
    /// (plain text, for perplexity) or builtin:text (the passages of builtin:qa as one text)
    #[arg(long, default_value = "builtin:qa")]
    pub data: String,
    /// Prompts to draw
    #[arg(long, visible_alias = "num-prompts", default_value_t = 64)]
    pub requests: usize,
    /// Instead of --requests: so many prompts, or all where there are fewer
    #[arg(long, value_name = "N", conflicts_with = "requests")]
    pub limit: Option<usize>,
    /// Worked examples in front of every question
    #[arg(long, default_value_t = 3)]
    pub shots: usize,
    /// Decides which examples and questions are drawn
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Tokens of a prompt: other passages are joined to a question's own up to this [default: 2700 for builtin:longqa, 1500
    /// for synth:niah, 512 for text, none for others]
    #[arg(long, value_name = "TOKENS")]
    pub length: Option<usize>,
    /// Put this many passages into every prompt, the question's own among them, in random order: retrieval-augmented generation
    #[arg(long, value_name = "K")]
    pub passages: Option<usize>,
    /// Ask in conversations of so many turns about one passage: the prompt of a turn holds the turns before it, with their reference
    /// answers
    #[arg(long, value_name = "T", conflicts_with_all = ["passages", "length"])]
    pub turns: Option<usize>,
    /// Only questions about one half of the data's passages, as the file has them: train on one, test on the other
    #[arg(long, value_enum)]
    pub half: Option<Half>,
    /// Draw the passages of --passages from so many [default: all there are]
    #[arg(long, value_name = "P", requires = "passages", default_value_t = 0, hide_default_value = true)]
    pub pool: usize,
    /// Tokens at the end of a window of text whose likelihood is measured [default: 64]
    #[arg(long, value_name = "TOKENS")]
    pub continuation: Option<usize>,
    /// Codes hidden in a prompt of synth:niah; one is asked for
    #[arg(long, default_value_t = 1)]
    pub needles: usize,
    /// Deal the requests to this many tenants
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub tenants: usize,
}

impl DrawArgs {
    pub fn draw(self) -> Draw {
        Draw {
            spec: self.data,
            requests: self.requests,
            limit: self.limit,
            shots: self.shots,
            seed: self.seed,
            length: self.length,
            passages: self.passages,
            pool: self.pool,
            turns: self.turns,
            half: self.half,
            continuation: self.continuation,
            needles: self.needles,
            tenants: self.tenants,
        }
    }
}
