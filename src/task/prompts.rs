//! Raw prompts: JSON lines with `prompt` and optional `answers` and `tenant`, used as they stand.

use super::{PromptSet, Request, lines};
use crate::error::Result;
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

/// The first prompts of the file, in its order; `counts` as in [`lines::requests`].
pub fn take(path: &Path, text: &str, counts: (usize, usize)) -> Result<PromptSet> {
    let requests = lines::requests(path, text, counts, |n, line: Line| {
        let id = format!("line-{n}");
        Ok(Request { references: line.answers, tenant: line.tenant, ..Request::raw(id, line.prompt) })
    })?;
    Ok(lines::set(text, requests, "", None, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_is_named() {
        let text = "{\"prompt\": \"a\", \"answers\": [\"b\"]}\n\n{\"promt\": \"c\"}\n";
        let set = take(Path::new("p.jsonl"), text, (1, 1)).unwrap();
        assert_eq!((set.requests[0].prompt.as_str(), set.requests[0].references.len()), ("a", 1));
        let error = take(Path::new("p.jsonl"), text, (2, 2)).unwrap_err().to_string();
        assert!(error.starts_with("p.jsonl: line 3: missing field `prompt`"), "{error}");
    }
}
