//! SQuAD v1.1 JSON (Rajpurkar et al. 2016): articles, paragraphs, extractive questions.

use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::Path;

#[derive(Deserialize)]
struct File {
    data: Vec<Article>,
}

#[derive(Deserialize)]
struct Article {
    paragraphs: Vec<Paragraph>,
}

#[derive(Deserialize)]
struct Paragraph {
    context: String,
    qas: Vec<RawQuestion>,
}

#[derive(Deserialize)]
struct RawQuestion {
    id: String,
    question: String,
    #[serde(default)]
    answers: Vec<RawAnswer>,
}

#[derive(Deserialize)]
struct RawAnswer {
    text: String,
}

/// A passage and the questions asked about it; at least one, each with at least one reference answer.
pub struct Passage {
    pub text: String,
    pub questions: Vec<Question>,
}

pub struct Question {
    pub id: String,
    pub text: String,
    pub references: Vec<String>,
}

/// Reads the format. Questions without an answer (SQuAD 2) are left out.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Passage>> {
    let file: File =
        serde_json::from_str(text).map_err(|e| Error::file(path, format!("not SQuAD v1.1 JSON: {e}")))?;
    let paragraphs = file.data.into_iter().flat_map(|a| a.paragraphs);
    let passages: Vec<Passage> = paragraphs.map(passage).filter(|p| !p.questions.is_empty()).collect();
    if passages.is_empty() {
        return Err(Error::file(path, "holds no question with an answer"));
    }
    Ok(passages)
}

fn passage(paragraph: Paragraph) -> Passage {
    let questions = paragraph.qas.into_iter().filter_map(|q| {
        let references: Vec<String> =
            q.answers.into_iter().map(|a| a.text.trim().to_owned()).filter(|a| !a.is_empty()).collect();
        (!references.is_empty()).then(|| Question {
            id: q.id,
            text: q.question.trim().to_owned(),
            references,
        })
    });
    Passage { text: paragraph.context.trim().to_owned(), questions: questions.collect() }
}
