//! Conversations: every turn is a request that has the turns before it in its prompt.

use super::qa::unanswered;
use super::squad::{Passage, Question};
use super::{Draw, Request, context_checksum};
use crate::error::{Error, Result};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// How a conversation is written, as manifests show it; what is asked ends after the last `Answer:`.
pub const TEMPLATE: &str =
    "Passage: {passage}\nQuestion: {question}\nAnswer: {answer}\nQuestion: {question}\nAnswer: {answer}";

/// Requests in conversations of `turns` questions about one passage each, all behind one preamble (the system prompt). First turns
/// come first, then second ones, and so on, each time in another order drawn by seed: between two turns of a conversation lie as
/// many others as there are conversations, on average. Earlier turns are answered with their references, so that prompts are the
/// same whatever a method makes a model say.
///
/// # Errors
/// More requests than the passages have turns for.
pub fn requests(
    passages: &[Passage],
    preamble: &str,
    options: &Draw,
    turns: usize,
    rng: &mut ChaCha8Rng,
) -> Result<Vec<Request>> {
    let mut conversations: Vec<(&Passage, Vec<&Question>)> = Vec::new();
    for passage in passages {
        let mut questions: Vec<&Question> = passage.questions.iter().collect();
        questions.shuffle(rng);
        conversations.extend(questions.chunks_exact(turns).map(|c| (passage, c.to_vec())));
    }
    conversations.shuffle(rng);
    let there = conversations.len() * turns;
    let wanted = options.limit.map_or(options.requests, |limit| limit.min(there));
    if wanted > there || there == 0 {
        return Err(Error::argument(format!(
            "--requests {wanted}: {} has {there} turns in conversations of --turns {turns}",
            options.spec
        )));
    }
    conversations.truncate(wanted.div_ceil(turns));
    let request = |turn: usize, (passage, questions): &(&Passage, Vec<&Question>)| {
        let mut prompt = preamble.to_owned() + &unanswered(&[&passage.text], &questions[0].text);
        for pair in questions[..=turn].windows(2) {
            prompt += &format!(" {}\n{}", pair[0].references[0], unanswered(&[], &pair[1].text));
        }
        let question = questions[turn];
        Request {
            question: question.text.clone(),
            references: question.references.clone(),
            contexts: vec![context_checksum(&passage.text)],
            follows: turn.checked_sub(1).map(|last| questions[last].id.clone()).unwrap_or_default(),
            ..Request::raw(question.id.clone(), prompt)
        }
    };
    let mut all = Vec::with_capacity(wanted);
    for turn in 0..turns {
        all.extend(conversations.iter().map(|c| request(turn, c)));
        conversations.shuffle(rng);
    }
    all.truncate(wanted);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::super::{Draw, load};
    use std::collections::BTreeMap;

    fn words(text: &str) -> crate::error::Result<usize> {
        Ok(text.split_whitespace().count())
    }

    /// A turn's prompt is that of the turn before, its answer, and a question; both turns are of one tenant.
    #[test]
    fn turns_go_on_where_those_before_ended() {
        let draw = Draw { turns: Some(3), tenants: 2, ..Draw::plain("builtin:qa", 20, 2, 4) };
        let set = load(&draw, &words).unwrap();
        assert_eq!(set, load(&draw, &words).unwrap());
        assert_ne!(set.requests, load(&Draw { seed: 5, ..draw.clone() }, &words).unwrap().requests);
        let before: BTreeMap<&str, usize> =
            set.requests.iter().enumerate().map(|(i, r)| (&r.id[..], i)).collect();
        assert_eq!(before.len(), 20, "no question twice");
        let first = set.requests.iter().filter(|r| r.follows.is_empty()).count();
        assert_eq!(first, 7);
        for (i, r) in set.requests.iter().enumerate().filter(|(_, r)| !r.follows.is_empty()) {
            let last = &set.requests[before[&r.follows[..]]];
            assert!(before[&r.follows[..]] < i);
            let asked = format!("{} {}\nQuestion: {}\nAnswer:", last.prompt, last.references[0], r.question);
            assert_eq!(r.prompt, asked);
            assert_eq!((&r.contexts, &r.tenant), (&last.contexts, &last.tenant));
        }
        let limited = Draw { limit: Some(100_000), ..draw.clone() };
        assert!(load(&limited, &words).unwrap().requests.len() > 60);
        for (turns, words_of_error) in [(0, "at least 1"), (100, "conversations")] {
            let refused = load(&Draw { turns: Some(turns), ..draw.clone() }, &words).unwrap_err();
            assert!(refused.to_string().contains(words_of_error), "{refused}");
        }
    }
}
