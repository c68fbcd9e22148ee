//! RULER (Hsieh et al. 2024): JSON lines with `input` and `outputs`, as its data preparation writes them, a file a task.

use super::metric::Metric;
use super::{PromptSet, Request, context_checksum, lines};
use crate::error::Result;
use serde::Deserialize;
use std::path::Path;

/// One line of a RULER file.
#[derive(Deserialize)]
struct Line {
    index: Option<u64>,
    input: String,
    outputs: Vec<String>,
    /// What the answer begins with, where it is kept apart from the prompt.
    #[serde(default)]
    answer_prefix: String,
}

/// Longest answer its authors let a model give, by the beginning of the task's name.
const ANSWER_TOKENS: [(&str, usize); 5] = [("niah", 128), ("vt", 30), ("cwe", 120), ("fwe", 50), ("qa", 32)];

/// The first prompts of the file, in its order; `counts` as in [`lines::requests`]. RULER names the folder of a file, or
/// the file, after its task.
pub fn take(path: &Path, text: &str, counts: (usize, usize)) -> Result<PromptSet> {
    let names = [path.file_stem(), path.parent().and_then(Path::file_name)];
    let task = names.into_iter().flatten().filter_map(|n| n.to_str()).find_map(|name| {
        ANSWER_TOKENS.iter().find(|(task, _)| name == *task || name.starts_with(&format!("{task}_")))
    });
    let metric = match task {
        Some(("qa", _)) => Metric::ContainsAny,
        _ => Metric::ContainsAll,
    };
    let answer_tokens = task.map_or(128, |(_, tokens)| *tokens);
    let requests = lines::requests(path, text, counts, |n, line: Line| {
        if line.outputs.is_empty() {
            return Err("`outputs` is empty".to_owned());
        }
        Ok(Request {
            references: line.outputs,
            metric,
            answer_tokens: Some(answer_tokens),
            // The question is the input's last line.
            contexts: vec![context_checksum(
                line.input.trim_end().rsplit_once('\n').map_or(&line.input, |(c, _)| c),
            )],
            ..Request::raw(
                line.index.map_or_else(|| format!("line-{n}"), |i| i.to_string()),
                format!("{}{}", line.input, line.answer_prefix),
            )
        })
    })?;
    Ok(lines::set(text, requests, "", None, Some(answer_tokens)))
}
