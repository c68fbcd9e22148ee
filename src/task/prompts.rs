//! Raw prompts: JSON lines with `prompt` and optional `answers` and `tenant`, used as they stand.

use super::{PromptSet, Request, checksum};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::Path;

#[derive(Deserialize)]
struct Line {
    prompt: String,
    #[serde(default)]
    answers: Vec<String>,
    #[serde(default)]
    tenant: String,
}

/// The first `requests` prompts of the file, in its order.
pub fn take(path: &Path, text: &str, requests: usize) -> Result<PromptSet> {
    let lines: Vec<(usize, &str)> =
        text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return Err(Error::file(path, "holds no prompt"));
    }
    if requests > lines.len() {
        let problem = format!("has {} prompts, fewer than --requests {requests}", lines.len());
        return Err(Error::file(path, problem));
    }
    let request = |&(n, line): &(usize, &str)| {
        let bad = |problem: String| Error::file(path, format!("line {}: {problem}", n + 1));
        let line: Line = serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
        if line.prompt.is_empty() {
            return Err(bad("the prompt is empty".to_owned()));
        }
        Ok(Request {
            id: format!("line-{}", n + 1),
            question: String::new(),
            references: line.answers,
            prompt: line.prompt,
            tenant: line.tenant,
            shift_tokens: 0,
        })
    };
    Ok(PromptSet {
        requests: lines[..requests].iter().map(request).collect::<Result<_>>()?,
        template: String::new(),
        shots: Vec::new(),
        stop: None,
        sha256: checksum(text),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_is_named() {
        let text = "{\"prompt\": \"a\", \"answers\": [\"b\"]}\n\n{\"promt\": \"c\"}\n";
        let set = take(Path::new("p.jsonl"), text, 1).unwrap();
        assert_eq!((set.requests[0].prompt.as_str(), set.requests[0].references.len()), ("a", 1));
        let error = take(Path::new("p.jsonl"), text, 2).unwrap_err().to_string();
        assert!(error.starts_with("p.jsonl: line 3: missing field `prompt`"), "{error}");
    }
}
