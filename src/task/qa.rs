//! Few-shot plain-text prompts over passages.

use super::squad::{Passage, Question};
use super::{Draw, PromptSet, Request, checksum, context_checksum, turns};
use crate::error::{Error, Result};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
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

/// A question behind passages, up to where its answer begins.
pub fn unanswered(passages: &[&str], question: &str) -> String {
    let passages: String = passages.iter().map(|p| format!("Passage: {p}\n")).collect();
    format!("{passages}Question: {question}\nAnswer:")
}

/// Tokens of a prompt of `builtin:longqa` where none are asked for: five chunks of 512 and some.
pub const LONG: usize = 2700;

/// Draws examples and questions by seed. All requests share the same examples in the same order. With a length, other
/// passages are put around the question's own, in an order drawn by seed, as many as fit.
pub fn draw(
    passages: &[Passage],
    text: &str,
    options: &Draw,
    tokens: &dyn Fn(&str) -> Result<usize>,
) -> Result<PromptSet> {
    let all: Vec<Shot> =
        serde_json::from_str(SHOTS).map_err(|e| Error::file(Path::new("data/shots.json"), e.to_string()))?;
    let Draw { shots, requests, seed, .. } = *options;
    if shots > all.len() {
        return Err(Error::argument(format!("--shots {shots}: there are {} worked examples", all.len())));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.shuffle(&mut rng);
    let chosen = &order[..shots];
    let example =
        |&i: &usize| format!("{} {}\n\n", unanswered(&[&all[i].passage], &all[i].question), all[i].answer);
    let preamble: String = chosen.iter().map(example).collect();

    let set = |requests: Vec<Request>, template: &str| PromptSet {
        requests,
        template: template.to_owned(),
        shots: chosen.iter().map(|i| format!("shot-{}", i + 1)).collect(),
        stop: Some("\n".to_owned()),
        sha256: checksum(text),
        answer_tokens: None,
    };
    if let Some(turns) = options.turns {
        let requests = turns::requests(passages, &preamble, options, turns, &mut rng)?;
        return Ok(set(requests, turns::TEMPLATE));
    }
    let pool = match options.passages {
        Some(count) => pool(passages.len(), count, options, &mut rng)?,
        None => (0..passages.len()).collect(),
    };
    let mut questions: Vec<(usize, &Question)> =
        pool.iter().flat_map(|&i| passages[i].questions.iter().map(move |q| (i, q))).collect();
    let requests = options.limit.map_or(requests, |limit| limit.min(questions.len()));
    if requests > questions.len() {
        return Err(Error::argument(format!(
            "--requests {requests}: {} has {} questions",
            options.spec,
            questions.len()
        )));
    }
    questions.shuffle(&mut rng);
    let sizes: Vec<usize> = match options.length {
        Some(_) => {
            passages.iter().map(|p| tokens(&format!("Passage: {}\n", p.text))).collect::<Result<_>>()?
        }
        None => Vec::new(),
    };
    let request = |&(own, question): &(usize, &Question)| -> Result<Request> {
        let around = match (options.passages, options.length) {
            (Some(count), _) => retrieved(own, count, &pool, &mut rng),
            (None, Some(length)) => {
                let alone = preamble.clone() + &unanswered(&[&passages[own].text], &question.text);
                surround(own, length, tokens(&alone)?, &sizes, &mut rng)?
            }
            (None, None) => vec![own],
        };
        let texts: Vec<&str> = around.iter().map(|&i| &passages[i].text[..]).collect();
        Ok(Request {
            question: question.text.clone(),
            references: question.references.clone(),
            contexts: texts.iter().map(|text| context_checksum(text)).collect(),
            ..Request::raw(question.id.clone(), preamble.clone() + &unanswered(&texts, &question.text))
        })
    };
    let requests = questions[..requests].iter().map(request).collect::<Result<_>>()?;
    Ok(set(requests, TEMPLATE))
}

/// The passages that a retriever can find: so many of all, drawn by seed, in order.
fn pool(all: usize, count: usize, options: &Draw, rng: &mut ChaCha8Rng) -> Result<Vec<usize>> {
    let size = if options.pool == 0 { all } else { options.pool };
    if options.length.is_some() {
        return Err(Error::argument(
            "--passages and --length both say what stands around a passage; leave one out",
        ));
    }
    if count == 0 || count > size || size > all {
        let message = format!(
            "--passages {count} of --pool {size}: there are {all} passages, and a prompt has at least 1 and at most the pool's"
        );
        return Err(Error::argument(message));
    }
    let mut order: Vec<usize> = (0..all).collect();
    order.shuffle(rng);
    order.truncate(size);
    order.sort_unstable();
    Ok(order)
}

/// A question's own passage and others of the pool, in random order.
fn retrieved(own: usize, count: usize, pool: &[usize], rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut others: Vec<usize> = pool.iter().copied().filter(|&i| i != own).collect();
    others.shuffle(rng);
    others.truncate(count - 1);
    others.push(own);
    others.shuffle(rng);
    others
}

/// Passages whose `sizes` (tokens) with the prompt that has only passage `own` (`alone` tokens) stay within `length`, in a
/// random order with `own` somewhere among them.
fn surround(
    own: usize,
    length: usize,
    alone: usize,
    sizes: &[usize],
    rng: &mut ChaCha8Rng,
) -> Result<Vec<usize>> {
    if alone > length {
        let message =
            format!("--length {length}: a question with its own passage alone takes {alone} tokens");
        return Err(Error::argument(message));
    }
    let all: usize = sizes.iter().sum::<usize>() - sizes[own] + alone;
    let largest = sizes.iter().copied().max().unwrap_or(0);
    if all + largest < length {
        return Err(Error::argument(format!("--length {length}: all passages together take {all} tokens")));
    }
    let mut others: Vec<usize> = (0..sizes.len()).filter(|&i| i != own).collect();
    others.shuffle(rng);
    let (mut chosen, mut used) = (Vec::new(), alone);
    for other in others {
        if used + sizes[other] <= length {
            used += sizes[other];
            chosen.push(other);
        }
    }
    chosen.insert(rng.random_range(0..=chosen.len()), own);
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::super::{BUILTIN_QA, squad};
    use super::*;

    /// One token a word.
    fn words(text: &str) -> Result<usize> {
        Ok(text.split_whitespace().count())
    }

    fn load(spec: &str, requests: usize, shots: usize, seed: u64) -> Result<PromptSet> {
        super::super::load(&Draw::plain(spec, requests, shots, seed), &words)
    }

    #[test]
    fn long_prompts_hold_the_own_passage_once_and_keep_to_their_length() {
        let draw = Draw { length: Some(1500), ..Draw::plain("builtin:longqa", 20, 2, 3) };
        let set = super::super::load(&draw, &words).unwrap();
        assert_eq!(set, super::super::load(&draw, &words).unwrap());
        let passages = squad::parse("qa.json".as_ref(), BUILTIN_QA).unwrap();
        for r in &set.requests {
            let n = words(&r.prompt).unwrap();
            assert!((1300..=1500).contains(&n), "{n}");
            let own = passages.iter().find(|p| p.questions.iter().any(|q| q.id == r.id)).unwrap();
            assert_eq!(r.prompt.matches(&own.text).count(), 1);
        }
        let places: Vec<usize> =
            set.requests.iter().map(|r| r.prompt.find(&r.references[0]).unwrap()).collect();
        assert!(places.iter().max() > places.iter().min());
        let refused = |length| {
            let draw = Draw { length: Some(length), ..draw.clone() };
            super::super::load(&draw, &words).unwrap_err().to_string()
        };
        assert!(refused(100).contains("alone takes") && refused(100_000).contains("all passages together"));
    }

    #[test]
    fn retrieved_passages_come_from_one_pool_in_any_order() {
        let draw = Draw { passages: Some(3), pool: 5, ..Draw::plain("builtin:qa", 20, 1, 4) };
        let set = super::super::load(&draw, &words).unwrap();
        assert_eq!(set, super::super::load(&draw, &words).unwrap());
        let passages = squad::parse("qa.json".as_ref(), BUILTIN_QA).unwrap();
        let (mut found, mut places) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
        for r in &set.requests {
            let mut held: Vec<(usize, usize)> =
                (0..passages.len()).filter_map(|i| Some((r.prompt.find(&passages[i].text)?, i))).collect();
            held.sort_unstable();
            assert_eq!(held.len(), 3);
            let own = passages.iter().position(|p| p.questions.iter().any(|q| q.id == r.id)).unwrap();
            places.insert(held.iter().position(|(_, i)| *i == own).unwrap());
            found.extend(held.iter().map(|(_, i)| *i));
            assert_eq!(r.contexts.len(), 3);
        }
        assert_eq!((found.len(), places.len()), (5, 3), "one pool, any place");
        for (passages, pool) in [(0, 5), (6, 5), (2, 10_000)] {
            let draw = Draw { passages: Some(passages), pool, ..draw.clone() };
            assert!(super::super::load(&draw, &words).unwrap_err().to_string().contains("--pool"));
        }
    }

    #[test]
    fn needles_are_where_and_what_the_seed_says() {
        let draw = Draw { length: Some(400), needles: 3, tenants: 2, ..Draw::plain("synth:niah", 12, 0, 5) };
        let set = super::super::load(&draw, &words).unwrap();
        assert_eq!(set, super::super::load(&draw, &words).unwrap());
        assert_ne!(
            set.requests,
            super::super::load(&Draw { seed: 6, ..draw.clone() }, &words).unwrap().requests
        );
        for r in &set.requests {
            assert_eq!(r.prompt.matches(&format!("is {}.", r.references[0])).count(), 1);
            assert_eq!(
                r.prompt.matches("The code of").count(),
                4,
                "three needles and the answer's beginning"
            );
            assert!((350..=400).contains(&words(&r.prompt).unwrap()));
        }
        let of = |tenant: &str| set.requests.iter().filter(|r| r.tenant == tenant).count();
        assert_eq!((of("tenant-1"), of("tenant-2")), (6, 6));
        // The first of many are the same as those of few.
        let fewer = Draw { requests: 4, tenants: 0, ..draw };
        let prompts = |s: &PromptSet| s.requests[..4].iter().map(|r| r.prompt.clone()).collect::<Vec<_>>();
        assert_eq!(prompts(&super::super::load(&fewer, &words).unwrap()), prompts(&set));
    }

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
