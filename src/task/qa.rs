//! Few-shot plain-text prompts over passages.

use super::squad::{Passage, Question};
use super::{PromptSet, Request, checksum};
use crate::error::{Error, Result};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use std::path::Path;

/// One worked example, as manifests show it; the asked question ends after `Answer:`. Examples and question are a blank
/// line apart.
const TEMPLATE: &str = "Passage: {passage}\nQuestion: {question}\nAnswer: {answer}";

/// Worked examples about short passages of their own, so that most of a prompt is the request's, and no passage of the
/// data is given away.
const SHOTS: &str = include_str!("../../data/shots.json");

#[derive(Deserialize)]
struct Shot {
    passage: String,
    question: String,
    answer: String,
}

fn unanswered(passage: &str, question: &str) -> String {
    format!("Passage: {passage}\nQuestion: {question}\nAnswer:")
}

/// Draws examples and questions by seed. All requests share the same examples in the same order.
pub fn draw(
    passages: &[Passage],
    text: &str,
    spec: &str,
    requests: usize,
    shots: usize,
    seed: u64,
) -> Result<PromptSet> {
    let all: Vec<Shot> =
        serde_json::from_str(SHOTS).map_err(|e| Error::file(Path::new("data/shots.json"), e.to_string()))?;
    if shots > all.len() {
        return Err(Error::argument(format!("--shots {shots}: there are {} worked examples", all.len())));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.shuffle(&mut rng);
    let chosen = &order[..shots];
    let example =
        |&i: &usize| format!("{} {}\n\n", unanswered(&all[i].passage, &all[i].question), all[i].answer);
    let preamble: String = chosen.iter().map(example).collect();

    let mut questions: Vec<(&Passage, &Question)> =
        passages.iter().flat_map(|p| p.questions.iter().map(move |q| (p, q))).collect();
    if requests > questions.len() {
        return Err(Error::argument(format!(
            "--requests {requests}: {spec} has {} questions",
            questions.len()
        )));
    }
    questions.shuffle(&mut rng);
    let request = |(passage, question): &(&Passage, &Question)| Request {
        id: question.id.clone(),
        question: question.text.clone(),
        references: question.references.clone(),
        prompt: preamble.clone() + &unanswered(&passage.text, &question.text),
        tenant: String::new(),
    };
    Ok(PromptSet {
        requests: questions[..requests].iter().map(request).collect(),
        template: TEMPLATE.to_owned(),
        shots: chosen.iter().map(|i| format!("shot-{}", i + 1)).collect(),
        stop: Some("\n".to_owned()),
        sha256: checksum(text),
    })
}

#[cfg(test)]
mod tests {
    use super::super::{BUILTIN_QA, load, squad};
    use super::*;

    #[test]
    fn the_seed_decides_and_all_requests_share_the_examples() {
        let a = load("builtin:qa", 60, 3, 7).unwrap();
        assert_eq!(a, load("builtin:qa", 60, 3, 7).unwrap());
        assert_ne!(a.requests, load("builtin:qa", 60, 3, 8).unwrap().requests);
        assert_ne!(a.shots, load("builtin:qa", 60, 3, 8).unwrap().shots);
        let preamble = a.requests[0].prompt.rsplit_once("\n\n").unwrap().0;
        assert_eq!(preamble.matches("Answer: ").count(), 3);
        for request in &a.requests {
            let (shots, own) = request.prompt.rsplit_once("\n\n").unwrap();
            assert_eq!(shots, preamble);
            assert!(own.starts_with("Passage: ") && own.ends_with("\nAnswer:"), "{own}");
            assert!(own.contains(&request.question));
        }
    }

    #[test]
    fn builtin_texts_are_as_promised() {
        let passages = squad::parse("qa.json".as_ref(), BUILTIN_QA).unwrap();
        assert!(passages.len() >= 24);
        assert!(passages.iter().map(|p| p.questions.len()).sum::<usize>() >= 120);
        for p in &passages {
            assert!((120..=250).contains(&p.text.split_whitespace().count()), "{}", p.text);
            for q in &p.questions {
                assert!(q.references.iter().all(|r| p.text.contains(r)), "{}", q.id);
            }
        }
        for shot in serde_json::from_str::<Vec<Shot>>(SHOTS).unwrap() {
            assert!(shot.passage.contains(&shot.answer), "{}", shot.answer);
        }
    }

    #[test]
    fn too_many_requests_or_shots_are_refused() {
        assert!(load("builtin:qa", 5000, 3, 0).unwrap_err().to_string().contains("questions"));
        assert!(load("builtin:qa", 1, 400, 0).unwrap_err().to_string().contains("worked examples"));
        assert!(load("builtin:qa", 0, 3, 0).unwrap_err().to_string().contains("at least 1"));
    }
}
