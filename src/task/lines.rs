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
    let there = filled(text).count();
    if there > 0 && there < least {
        return Err(Error::file(path, format!("has {there} prompts, fewer than --requests {least}")));
    }
    read(path, text, most, |n, line| {
        let request: Request = request(n, line)?;
        if request.prompt.is_empty() { Err("the prompt is empty".to_owned()) } else { Ok(request) }
    })
}

/// The first `most` lines that are not empty, each made something of, by its number.
pub fn read<L: DeserializeOwned, T>(
    path: &Path,
    text: &str,
    most: usize,
    make: impl Fn(usize, L) -> std::result::Result<T, String>,
) -> Result<Vec<T>> {
    let made = filled(text).take(most).map(|(n, line)| {
        let bad = |problem: String| Error::file(path, format!("line {n}: {problem}"));
        // serde numbers the lines of what it is given, which is always one.
        let parsed = serde_json::from_str(line)
            .map_err(|e| bad(e.to_string().replace(" at line 1 column", " at column")))?;
        make(n, parsed).map_err(bad)
    });
    let made: Vec<T> = made.collect::<Result<_>>()?;
    if made.is_empty() { Err(Error::file(path, "holds no prompt")) } else { Ok(made) }
}

/// Lines that are not empty, with their numbers.
fn filled(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty())
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
