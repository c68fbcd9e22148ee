//! LongBench (Bai et al. 2023): JSON lines with `input`, `context`, `answers` and `dataset`; a prompt a task in our own
//! words, the task's published metric and answer length.

use super::metric::Metric;
use super::squad::{Passage, Question};
use super::{PromptSet, Request, context_checksum, lines};
use crate::error::{Error, Result};
use regex::Regex;
use serde::Deserialize;
use std::path::Path;

/// One line of a LongBench file.
#[derive(Deserialize)]
struct Line {
    input: String,
    context: String,
    answers: Vec<String>,
    dataset: String,
    #[serde(rename = "_id")]
    id: Option<String>,
    all_classes: Option<Vec<String>>,
}

impl Line {
    /// Its task.
    ///
    /// # Errors
    /// Data sets that are none; no answer.
    fn task(&self) -> std::result::Result<&'static Task, String> {
        // LongBench-E appends "_e" to the names of the same tasks.
        let name = self.dataset.strip_suffix("_e").unwrap_or(&self.dataset);
        let task = TASKS.iter().find(|t| t.name == name).ok_or_else(|| {
            let known: Vec<&str> = TASKS.iter().map(|t| t.name).collect();
            format!("dataset '{}' is not one of {}", self.dataset, known.join(", "))
        })?;
        if self.answers.is_empty() { Err("`answers` is empty".to_owned()) } else { Ok(task) }
    }

    fn id(&self, n: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("line-{n}"))
    }
}

/// A task: its name, its metric, the longest answer its authors let a model give, and the prompt, with `{context}` and
/// `{input}` left open.
struct Task {
    name: &'static str,
    metric: Metric,
    answer_tokens: usize,
    prompt: &'static str,
}

const fn task(name: &'static str, metric: Metric, answer_tokens: usize, prompt: &'static str) -> Task {
    Task { name, metric, answer_tokens, prompt }
}

const PASSAGES: &str = "Passages:\n{context}\n\nAnswer the question from the passages above, in a few words and without \
                        explaining.\nQuestion: {input}\nAnswer:";

/// The English tasks and those on code.
static TASKS: [Task; 16] = [
    task(
        "narrativeqa",
        Metric::F1,
        128,
        "Story:\n{context}\n\nAnswer the question about the story in as few words as you can.\nQuestion: {input}\nAnswer:",
    ),
    task(
        "qasper",
        Metric::F1,
        128,
        "Article:\n{context}\n\nAnswer the question about the article in a phrase or a sentence. If the article does not \
         tell, write \"unanswerable\"; to a yes/no question answer \"yes\", \"no\" or \"unanswerable\".\nQuestion: {input}\nAnswer:",
    ),
    task(
        "multifieldqa_en",
        Metric::F1,
        64,
        "Text:\n{context}\n\nAnswer the question from the text, in a few words.\nQuestion: {input}\nAnswer:",
    ),
    task("hotpotqa", Metric::F1, 32, PASSAGES),
    task("2wikimqa", Metric::F1, 32, PASSAGES),
    task("musique", Metric::F1, 32, PASSAGES),
    task(
        "gov_report",
        Metric::RougeL,
        512,
        "Report:\n{context}\n\nWrite a summary of the report on one page.\nSummary:",
    ),
    task(
        "qmsum",
        Metric::RougeL,
        512,
        "Transcript of a meeting:\n{context}\n\nAnswer the request in a few sentences.\nRequest: {input}\nAnswer:",
    ),
    task(
        "multi_news",
        Metric::RougeL,
        512,
        "News articles:\n{context}\n\nWrite one summary of all the articles on one page.\nSummary:",
    ),
    task(
        "trec",
        Metric::Classification,
        64,
        "Name the type of the last question, as the examples do.\n{context}\n{input}",
    ),
    task(
        "triviaqa",
        Metric::F1FirstLine,
        32,
        "Answer the last question from its passage, as the examples do, with the answer alone.\n{context}\n{input}",
    ),
    task(
        "samsum",
        Metric::RougeLFirstLine,
        128,
        "Summarise the last dialogue, as the examples do.\n{context}\n{input}",
    ),
    task(
        "passage_count",
        Metric::Count,
        32,
        "Some of these paragraphs are copies of others.\n{context}\n\nHow many different paragraphs are there? Write the \
         number alone.\nNumber:",
    ),
    task(
        "passage_retrieval_en",
        Metric::Retrieval,
        32,
        "Paragraphs:\n{context}\n\nAn abstract of one of them:\n{input}\n\nWhich paragraph is it an abstract of? Write \
         \"Paragraph\" and its number.\nAnswer:",
    ),
    task("lcc", Metric::CodeSimilarity, 64, "Continue this code with its next line.\n{context}"),
    task(
        "repobench-p",
        Metric::CodeSimilarity,
        64,
        "Continue this code with its next line.\n{context}{input}",
    ),
];

/// Of every question of a task of several passages, the passage of its own in which an answer stands, for retrieval-augmented prompts
/// (`--passages`). Questions whose answers stand in none, as "yes" may not, are left out.
///
/// # Errors
/// Lines of other tasks; files without such a passage.
pub fn passages(path: &Path, text: &str) -> Result<Vec<Passage>> {
    let heading = Regex::new(r"(?m)^Passage \d+:\s*").map_err(|e| Error::argument(e.to_string()))?;
    let found = lines::read(path, text, usize::MAX, |n, line: Line| {
        let of_passages = |task: &&Task| task.prompt == PASSAGES;
        if !of_passages(&line.task()?) {
            let known: Vec<&str> = TASKS.iter().filter(of_passages).map(|t| t.name).collect();
            return Err(format!(
                "--passages goes with {}, and dataset is '{}'",
                known.join(", "),
                line.dataset
            ));
        }
        let answers: Vec<String> = line.answers.iter().map(|a| a.to_lowercase()).collect();
        let holds = |passage: &&str| {
            let passage = passage.to_lowercase();
            answers.iter().any(|a| !a.trim().is_empty() && passage.contains(a.trim()))
        };
        let own = heading.split(&line.context).map(str::trim).find(holds);
        let question = Question { id: line.id(n), text: line.input, references: line.answers };
        Ok(own.map(|own| (own.split_whitespace().collect::<Vec<_>>().join(" "), question)))
    })?;
    let mut passages: Vec<Passage> = Vec::new();
    for (text, question) in found.into_iter().flatten() {
        match passages.iter_mut().find(|p| p.text == text) {
            Some(passage) => passage.questions.push(question),
            None => passages.push(Passage { text, questions: vec![question] }),
        }
    }
    if passages.is_empty() {
        return Err(Error::file(path, "holds no passage in which an answer stands"));
    }
    Ok(passages)
}

/// The first prompts of the file, in its order; `counts` as in [`lines::requests`].
pub fn take(path: &Path, text: &str, counts: (usize, usize)) -> Result<PromptSet> {
    let requests = lines::requests(path, text, counts, |n, line: Line| {
        let (task, id) = (line.task()?, line.id(n));
        let classes = line.all_classes.unwrap_or_default();
        if task.metric == Metric::Classification && classes.is_empty() {
            return Err("`all_classes` is empty, which its score needs".to_owned());
        }
        // In this order, so that "{input}" in a context stays what it is.
        let (before, after) = task.prompt.split_once("{context}").unwrap_or((task.prompt, ""));
        Ok(Request {
            question: line.input.clone(),
            references: line.answers,
            metric: task.metric,
            classes,
            answer_tokens: Some(task.answer_tokens),
            contexts: vec![context_checksum(&line.context)],
            ..Request::raw(id, format!("{before}{}{}", line.context, after.replace("{input}", &line.input)))
        })
    })?;
    let longest = requests.iter().filter_map(|r| r.answer_tokens).max();
    Ok(lines::set(text, requests, "LongBench, a prompt a task (src/task/longbench.rs)", None, longest))
}
