//! Few-shot plain-text prompts over passages.

use super::squad::{Passage, Question};
use super::{PromptSet, Request, checksum};
use crate::error::{Error, Result};
use rand::SeedableRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

/// One worked example; the asked question ends after `Answer:`. Examples and question are a blank line apart.
pub const TEMPLATE: &str = "Passage: {passage}\nQuestion: {question}\nAnswer: {answer}";

fn example(passage: &str, question: &str) -> String {
    TEMPLATE.replace(" {answer}", "").replace("{passage}", passage).replace("{question}", question)
}

/// Draws examples and questions by seed.
///
/// Examples come from the shortest passages (one of the shortest twentieth, but at least two candidates an example), so
/// that most of a prompt is the request's own; no question is asked about a passage shown as an example. All requests
/// share the same examples in the same order.
pub fn draw(
    passages: &[Passage],
    text: &str,
    spec: &str,
    requests: usize,
    shots: usize,
    seed: u64,
) -> Result<PromptSet> {
    if shots >= passages.len() {
        let message =
            format!("--shots {shots}: {spec} has {} passages, one must be left to ask", passages.len());
        return Err(Error::argument(message));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut by_length: Vec<usize> = (0..passages.len()).collect();
    by_length.sort_by_key(|&i| (passages[i].text.len(), i));
    let mut candidates = by_length[..(2 * shots).max(passages.len() / 20).min(passages.len())].to_vec();
    candidates.shuffle(&mut rng);
    let chosen = &candidates[..shots];

    let mut preamble = String::new();
    let mut shot_ids = Vec::new();
    for &i in chosen {
        // `squad::parse` leaves no passage without a question.
        let Some(question) = passages[i].questions.choose(&mut rng) else { continue };
        preamble += &example(&passages[i].text, &question.text);
        preamble += &format!(" {}\n\n", question.references[0]);
        shot_ids.push(question.id.clone());
    }
    let asked = passages.iter().enumerate().filter(|(i, _)| !chosen.contains(i));
    let mut questions: Vec<(&Passage, &Question)> =
        asked.flat_map(|(_, p)| p.questions.iter().map(move |q| (p, q))).collect();
    if requests > questions.len() {
        let message = format!(
            "--requests {requests}: {spec} has {} questions beside those of its {shots} examples",
            questions.len()
        );
        return Err(Error::argument(message));
    }
    questions.shuffle(&mut rng);
    let request = |(passage, question): &(&Passage, &Question)| Request {
        id: question.id.clone(),
        question: question.text.clone(),
        references: question.references.clone(),
        prompt: preamble.clone() + &example(&passage.text, &question.text),
    };
    Ok(PromptSet {
        requests: questions[..requests].iter().map(request).collect(),
        template: TEMPLATE.to_owned(),
        shots: shot_ids,
        stop: Some("\n".to_owned()),
        sha256: checksum(text),
    })
}

#[cfg(test)]
mod tests {
    use super::super::{load, squad};
    use super::*;

    #[test]
    fn the_seed_decides_and_examples_are_not_asked() {
        let a = load("builtin:qa", 60, 3, 7).unwrap();
        assert_eq!(a, load("builtin:qa", 60, 3, 7).unwrap());
        assert_ne!(a.requests, load("builtin:qa", 60, 3, 8).unwrap().requests);
        let preamble = a.requests[0].prompt.rsplit_once("\n\n").unwrap().0;
        for request in &a.requests {
            let (shots, own) = request.prompt.rsplit_once("\n\n").unwrap();
            assert_eq!(shots, preamble);
            assert!(own.starts_with("Passage: ") && own.ends_with("\nAnswer:"), "{own}");
            let passage = own.lines().next().unwrap();
            assert!(!preamble.contains(passage));
            assert!(!a.shots.contains(&request.id));
        }
    }

    #[test]
    fn builtin_questions_are_as_promised() {
        let text = super::super::BUILTIN_QA;
        let passages = squad::parse("qa.json".as_ref(), text).unwrap();
        assert!(passages.len() >= 24);
        assert!(passages.iter().map(|p| p.questions.len()).sum::<usize>() >= 120);
        for p in &passages {
            assert!((120..=250).contains(&p.text.split_whitespace().count()), "{}", p.text);
            for q in &p.questions {
                assert!(q.references.iter().all(|r| p.text.contains(r)), "{}", q.id);
            }
        }
    }

    #[test]
    fn too_many_requests_or_shots_are_refused() {
        assert!(load("builtin:qa", 5000, 3, 0).unwrap_err().to_string().contains("questions beside"));
        assert!(load("builtin:qa", 1, 400, 0).unwrap_err().to_string().contains("passages"));
        assert!(load("builtin:qa", 0, 3, 0).unwrap_err().to_string().contains("at least 1"));
    }
}
