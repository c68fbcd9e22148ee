//! Prompt sets: where requests come from, what their prompts look like, and how answers are scored.

mod filler;
mod lines;
mod longbench;
mod metric;
mod niah;
mod passages;
mod prompts;
mod qa;
mod ruler;
mod score;
mod squad;
mod turns;

pub use filler::Filler;
pub use metric::Metric;
pub use score::{exact_match, token_f1};

use crate::error::{Error, IoAt, Result};
use crate::files;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// One request: a prompt and, where the data has them, reference answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// The question's id in its data file, or the line of a prompts file.
    pub id: String,
    /// Empty for raw prompts.
    pub question: String,
    pub references: Vec<String>,
    pub prompt: String,
    /// Checksums of the passages or contexts in the prompt: what calibration and sweep must not share.
    pub contexts: Vec<String>,
    /// Whose request it is; empty if nobody's in particular.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tenant: String,
    /// Id of the request whose turn of the conversation came before; empty if none did.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub follows: String,
    /// How its answer is scored.
    #[serde(default, skip_serializing_if = "is_f1")]
    pub metric: Metric,
    /// All classes there are, where the metric is classification.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// Longest answer the task's authors let a model give, in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_tokens: Option<usize>,
    /// Tokens that were cut out of the middle of the prompt (`kvfuse dump --max-tokens`).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cut_tokens: usize,
    /// Filler tokens that were put in front of the prompt (`kvfuse dump --shift`).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shift_tokens: usize,
}

impl Request {
    /// A prompt as it stands, with no question about it yet.
    pub fn raw(id: String, prompt: String) -> Self {
        Request {
            id,
            question: String::new(),
            references: Vec::new(),
            contexts: vec![context_checksum(&prompt)],
            prompt,
            tenant: String::new(),
            follows: String::new(),
            metric: Metric::F1,
            classes: Vec::new(),
            answer_tokens: None,
            cut_tokens: 0,
            shift_tokens: 0,
        }
    }
}

fn is_f1(metric: &Metric) -> bool {
    *metric == Metric::F1
}

fn is_zero(n: &usize) -> bool {
    *n == 0
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
    /// Longest answer a sweep should let a model give, where the data has an opinion.
    pub answer_tokens: Option<usize>,
}

impl PromptSet {
    /// For every request the index of the one that it follows in a conversation.
    pub fn followed(&self) -> Vec<Option<usize>> {
        followed(&self.requests)
    }
}

fn followed(requests: &[Request]) -> Vec<Option<usize>> {
    let mut earlier: BTreeMap<&str, usize> = BTreeMap::new();
    let mut all = Vec::with_capacity(requests.len());
    for (i, request) in requests.iter().enumerate() {
        let follows = Some(&request.follows[..]).filter(|id| !id.is_empty());
        all.push(follows.and_then(|id| earlier.get(id).copied()));
        earlier.insert(&request.id, i);
    }
    all
}

/// Kinds of data that a file holds.
const FILES: [&str; 5] = ["squad", "longbench", "ruler", "text", "prompts"];
const BUILTIN_QA: &str = include_str!("../../data/qa.json");

/// Which prompts to draw.
#[derive(Debug, Clone, Serialize)]
pub struct Draw {
    /// `builtin:qa`, `builtin:longqa`, `builtin:text`, `synth:niah`, `squad:PATH`, `longbench:PATH`, `ruler:PATH`, `text:PATH` or
    /// `prompts:PATH`.
    pub spec: String,
    pub requests: usize,
    /// Instead of `requests`: so many, or all where there are fewer.
    pub limit: Option<usize>,
    /// Worked examples in front of a question.
    pub shots: usize,
    pub seed: u64,
    /// Tokens of a prompt, at most: passages are joined, or filler made, up to this.
    pub length: Option<usize>,
    /// Passages of a prompt, its own among them in random order, and of how many passages they are drawn (retrieval-augmented
    /// generation); `pool` of 0: all there are.
    pub passages: Option<usize>,
    pub pool: usize,
    /// Turns of a conversation about one passage, of which each is a request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turns: Option<usize>,
    /// Only questions about the first, or the last, half of the data's passages; other passages are not seen at all.
    pub half: Option<Half>,
    /// Tokens at the end of a window of text whose likelihood is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub continuation: Option<usize>,
    /// Codes hidden in a prompt of `synth:niah`.
    pub needles: usize,
    /// Tenants that requests are dealt to; 0 for none.
    pub tenants: usize,
}

/// One of two parts of a set of texts, or of requests, that share no text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Half {
    First,
    Second,
}

impl Draw {
    /// Prompts as they come: no joining, no tenants.
    pub fn plain(spec: &str, requests: usize, shots: usize, seed: u64) -> Self {
        let spec = spec.to_owned();
        Draw {
            spec,
            requests,
            limit: None,
            shots,
            seed,
            length: None,
            passages: None,
            pool: 0,
            turns: None,
            half: None,
            continuation: None,
            needles: 1,
            tenants: 0,
        }
    }

    /// Refuses no requests, unknown data, a file that is not there, and options of other data.
    pub fn check(&self) -> Result<()> {
        let (option, wanted) = self.limit.map_or(("--requests", self.requests), |limit| ("--limit", limit));
        if wanted == 0 {
            return Err(Error::argument(format!("{option} must be at least 1")));
        }
        let source = self.source();
        match source {
            ("builtin", "qa" | "longqa" | "text") | ("synth", "niah") => {}
            (kind, file) if FILES.contains(&kind) && !file.is_empty() => {
                fs::metadata(file).at(Path::new(file))?;
            }
            _ => return Err(self.unknown()),
        }
        let asks = matches!(source, ("builtin", "qa") | ("squad", _));
        let retrieves = self.passages.is_some() && source.0 == "longbench";
        let misplaced = [
            ("--passages", self.passages.is_some(), asks || retrieves),
            ("--turns", self.turns.is_some(), asks),
            ("--half", self.half.is_some(), matches!(source, ("builtin" | "squad", _)) || retrieves),
            (
                "--continuation",
                self.continuation.is_some(),
                matches!(source, ("builtin", "text") | ("text", _)),
            ),
        ];
        if let Some((name, ..)) = misplaced.iter().find(|(_, given, fits)| *given && !fits) {
            return Err(Error::argument(format!("{name} does not go with --data {}", self.spec)));
        }
        match self.turns {
            Some(0) => Err(Error::argument("--turns must be at least 1")),
            Some(_) if self.passages.is_some() || self.length.is_some() => {
                Err(Error::argument("--turns ask about one passage; leave out --passages and --length"))
            }
            _ => Ok(()),
        }
    }

    /// Kind of data, and which: a name, or a file.
    fn source(&self) -> (&str, &str) {
        self.spec.split_once(':').unwrap_or((&self.spec, ""))
    }

    fn unknown(&self) -> Error {
        let known = "builtin:qa, builtin:longqa, builtin:text, synth:niah, squad:FILE, longbench:FILE, ruler:FILE, text:FILE or \
                     prompts:FILE";
        Error::argument(format!("--data {}: use {known}", self.spec))
    }

    /// The least and the most requests wanted.
    fn counts(&self) -> (usize, usize) {
        self.limit.map_or((self.requests, self.requests), |limit| (1, limit))
    }

    /// The passages that may be seen.
    fn seen<'a>(&self, passages: &'a [squad::Passage]) -> &'a [squad::Passage] {
        let (first, second) = passages.split_at(passages.len() / 2);
        match self.half {
            None => passages,
            Some(Half::First) => first,
            Some(Half::Second) => second,
        }
    }

    /// With as many requests as there are questions, if fewer than the limit.
    fn limited(&self, passages: &[squad::Passage]) -> Draw {
        let there: usize = passages.iter().map(|p| p.questions.len()).sum();
        Draw { requests: self.limit.map_or(self.requests, |l| l.min(there)), ..self.clone() }
    }
}

/// Draws prompts. `tokens` counts the tokens of a text.
pub fn load(draw: &Draw, tokens: &dyn Fn(&str) -> Result<usize>) -> Result<PromptSet> {
    draw.check()?;
    let spec = &draw.spec[..];
    let (kind, rest) = draw.source();
    let path = PathBuf::from(rest);
    let fixed = |set: PromptSet| match draw.length {
        Some(_) => Err(Error::argument(format!("--length does not go with --data {spec}"))),
        None => Ok(set),
    };
    let mut set = match (kind, rest) {
        ("builtin", "qa" | "longqa") => {
            let length = draw.length.or((rest == "longqa").then_some(qa::LONG));
            let passages = squad::parse(&PathBuf::from(spec), BUILTIN_QA)?;
            let passages = draw.seen(&passages);
            let draw = Draw { length, ..draw.limited(passages) };
            qa::draw(passages, BUILTIN_QA, &draw, tokens)
        }
        ("builtin", "text") => {
            passages::windows(&PathBuf::from(spec), &prose(draw)?.0, draw, draw.counts(), tokens)
        }
        ("synth", "niah") => {
            niah::draw(&Draw { requests: draw.limit.unwrap_or(draw.requests), ..draw.clone() }, tokens)
        }
        (kind, _) if FILES.contains(&kind) && !rest.is_empty() => {
            let text = files::read_text(&path)?;
            let ask = |passages: Vec<squad::Passage>| {
                let passages = draw.seen(&passages);
                qa::draw(passages, &text, &draw.limited(passages), tokens)
            };
            match kind {
                "squad" => ask(squad::parse(&path, &text)?),
                "longbench" if draw.passages.is_some() => ask(longbench::passages(&path, &text)?),
                "longbench" => longbench::take(&path, &text, draw.counts()).and_then(fixed),
                "ruler" => ruler::take(&path, &text, draw.counts()).and_then(fixed),
                "text" => passages::windows(&path, &text, draw, draw.counts(), tokens),
                _ => prompts::take(&path, &text, draw.counts()).and_then(fixed),
            }
        }
        _ => Err(draw.unknown()),
    }?;
    if draw.tenants > 0 {
        deal(&mut set.requests, draw);
    }
    Ok(set)
}

/// The text of SQuAD-like or plain data as one, and its checksum.
///
/// # Errors
/// Data of another kind, which has no prose of its own.
pub fn prose(draw: &Draw) -> Result<(String, String)> {
    draw.check()?;
    let (kind, rest) = draw.source();
    let path = PathBuf::from(rest);
    let passages = |path: &Path, text: &str| -> Result<String> {
        let passages = squad::parse(path, text)?;
        let texts: Vec<&str> = draw.seen(&passages).iter().map(|p| &p.text[..]).collect();
        Ok(texts.join("\n\n"))
    };
    let text = match kind {
        "builtin" => passages(Path::new(&draw.spec), BUILTIN_QA)?,
        "squad" => passages(&path, &files::read_text(&path)?)?,
        "text" => files::read_text(&path)?,
        _ => {
            let problem = format!(
                "--data {}: a trace takes its text from builtin:qa, squad:FILE or text:FILE",
                draw.spec
            );
            return Err(Error::argument(problem));
        }
    };
    let sum = checksum(&text);
    Ok((text, sum))
}

/// Deals requests to tenants, as evenly as can be, by seed.
fn deal(requests: &mut [Request], draw: &Draw) {
    let followed = followed(requests);
    // A conversation is one tenant's.
    let (first, later): (Vec<usize>, Vec<usize>) = (0..requests.len()).partition(|&i| followed[i].is_none());
    let mut labels: Vec<usize> = (0..first.len()).map(|i| i % draw.tenants + 1).collect();
    labels.shuffle(&mut ChaCha8Rng::seed_from_u64(draw.seed));
    for (i, label) in first.into_iter().zip(labels) {
        requests[i].tenant = format!("tenant-{label}");
    }
    for i in later {
        requests[i].tenant = followed[i].map(|before| requests[before].tenant.clone()).unwrap_or_default();
    }
}

/// Names a passage by its content, but for the white space around it.
fn context_checksum(text: &str) -> String {
    files::sha256_bytes(text.trim().as_bytes())[..16].to_owned()
}

fn checksum(text: &str) -> String {
    files::sha256_bytes(text.as_bytes())
}
