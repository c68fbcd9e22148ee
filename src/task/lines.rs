//! Files of JSON lines, whose faults are named by line.

use super::{PromptSet, Request, checksum};
use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use std::path::Path;

/// The first `most` lines that are not empty, each made a request by `request`. Fewer than `least` are an error.
pub fn requests<L: DeserializeOwned>(
    path: &Path,
    text: &str,
    (least, most): (usize, usize),
    request: impl Fn(usize, L) -> std::result::Result<Request, String>,
) -> Result<Vec<Request>> {
    let lines: Vec<(usize, &str)> =
        (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return Err(Error::file(path, "holds no prompt"));
    }
    if lines.len() < least {
        let problem = format!("has {} prompts, fewer than --requests {least}", lines.len());
        return Err(Error::file(path, problem));
    }
    let read = |&(n, line): &(usize, &str)| {
        let bad = |problem: String| Error::file(path, format!("line {n}: {problem}"));
        // serde numbers the lines of what it is given, which is always one.
        let parsed = serde_json::from_str(line)
            .map_err(|e| bad(e.to_string().replace(" at line 1 column", " at column")))?;
        let request: Request = request(n, parsed).map_err(bad)?;
        if request.prompt.is_empty() {
            return Err(bad("the prompt is empty".to_owned()));
        }
        Ok(request)
    };
    lines.iter().take(most).map(read).collect()
}

/// A set of requests that were read line by line.
pub fn set(
    text: &str,
    requests: Vec<Request>,
    template: &str,
    stop: Option<&str>,
    answer: Option<usize>,
) -> PromptSet {
    PromptSet {
        requests,
        template: template.to_owned(),
        shots: Vec::new(),
        stop: stop.map(str::to_owned),
        sha256: checksum(text),
        answer_tokens: answer,
    }
}
