//! Prompt sets: where requests come from, what their prompts look like, and how answers are scored.

mod prompts;
mod qa;
mod score;
mod squad;

pub use score::{exact_match, token_f1};

use crate::error::{Error, IoAt, Result};
use crate::files;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::PathBuf;

/// One request: a prompt and, where the data has them, reference answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// The question's id in its data file, or the line of a prompts file.
    pub id: String,
    /// Empty for raw prompts.
    pub question: String,
    pub references: Vec<String>,
    pub prompt: String,
    /// Whose request it is; empty if nobody's in particular.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tenant: String,
}

/// The requests of one experiment.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptSet {
    pub requests: Vec<Request>,
    /// How a prompt was made, with `{passage}`, `{question}` and `{answer}` left open; empty for raw prompts.
    pub template: String,
    /// Ids of the questions shown as worked examples.
    pub shots: Vec<String>,
    /// Text that ends an answer besides the model's own end-of-text tokens.
    pub stop: Option<String>,
    /// SHA-256 of the data file.
    pub sha256: String,
}

const BUILTIN_QA: &str = include_str!("../../data/qa.json");

/// Loads `builtin:qa`, `squad:PATH` or `prompts:PATH` and draws `requests` prompts with `shots` examples by `seed`.
pub fn load(spec: &str, requests: usize, shots: usize, seed: u64) -> Result<PromptSet> {
    if requests == 0 {
        return Err(Error::argument("--requests must be at least 1"));
    }
    let (kind, rest) = spec.split_once(':').unwrap_or((spec, ""));
    let path = PathBuf::from(rest);
    match (kind, rest) {
        ("builtin", "qa") => qa::draw(
            &squad::parse(&PathBuf::from(spec), BUILTIN_QA)?,
            BUILTIN_QA,
            spec,
            requests,
            shots,
            seed,
        ),
        ("squad", _) if !rest.is_empty() => {
            let text = fs::read_to_string(&path).at(&path)?;
            qa::draw(&squad::parse(&path, &text)?, &text, spec, requests, shots, seed)
        }
        ("prompts", _) if !rest.is_empty() => {
            let text = fs::read_to_string(&path).at(&path)?;
            prompts::take(&path, &text, requests)
        }
        _ => {
            let message = format!("--data {spec}: use builtin:qa, squad:FILE or prompts:FILE");
            Err(Error::argument(message))
        }
    }
}

fn checksum(text: &str) -> String {
    files::sha256_bytes(text.as_bytes())
}
