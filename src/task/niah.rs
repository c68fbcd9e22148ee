//! A seeded retrieval task: codes hidden in filler prose, one of them asked for (a needle in a haystack).

use super::filler::{self, Filler};
use super::{Draw, PromptSet, Request, checksum};
use crate::error::{Error, Result};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const COLOURS: [&str; 12] = [
    "red", "green", "grey", "white", "black", "brown", "yellow", "purple", "silver", "orange", "pink",
    "golden",
];
const OBJECTS: [&str; 10] =
    ["cabinet", "trunk", "locker", "drawer", "safe", "chest", "gate", "cupboard", "suitcase", "desk"];

/// Tokens of a prompt where none are asked for.
pub const LENGTH: usize = 1500;

/// Filler of `length` tokens with `needles` codes in it, at places drawn by seed; the question names one of them.
pub fn draw(options: &Draw, tokens: &dyn Fn(&str) -> Result<usize>) -> Result<PromptSet> {
    let most = COLOURS.len() * OBJECTS.len();
    if !(1..=most).contains(&options.needles) {
        return Err(Error::argument(format!("--needles {}: must be from 1 to {most}", options.needles)));
    }
    let filler = Filler::load()?;
    let length = options.length.unwrap_or(LENGTH);
    let requests = (0..options.requests).map(|i| request(options, &filler, length, i, tokens));
    Ok(PromptSet {
        requests: requests.collect::<Result<_>>()?,
        template: template("{text}", "{name}"),
        shots: Vec::new(),
        stop: Some("\n".to_owned()),
        sha256: checksum(filler::source()),
        answer_tokens: None,
    })
}

fn template(text: &str, name: &str) -> String {
    format!("{text}\nQuestion: What is the code of {name}?\nAnswer: The code of {name} is")
}

fn request(
    options: &Draw,
    filler: &Filler,
    length: usize,
    i: usize,
    tokens: &dyn Fn(&str) -> Result<usize>,
) -> Result<Request> {
    // A stream a request: the first requests of a longer set are those of a shorter one.
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    rng.set_stream(i as u64);
    let mut names: Vec<String> =
        OBJECTS.iter().flat_map(|o| COLOURS.iter().map(move |c| format!("the {c} {o}"))).collect();
    names.shuffle(&mut rng);
    names.truncate(options.needles);
    let codes: Vec<String> = names.iter().map(|_| rng.random_range(10_000..100_000).to_string()).collect();
    let needle = |(name, code): (&String, &String)| format!("The code of {name} is {code}.");
    let needles: Vec<String> = names.iter().zip(&codes).map(needle).collect();

    let mut used = tokens(&template("", &names[0]))?;
    for needle in &needles {
        used += tokens(&format!(" {needle}"))?;
    }
    if used >= length {
        return Err(Error::argument(format!(
            "--length {length} is too short for {} needles, which take {used} tokens",
            options.needles
        )));
    }
    let mut sentences = Vec::new();
    loop {
        let sentence = filler.sentence(&mut rng);
        used += tokens(&format!(" {sentence}"))?;
        if used > length {
            break;
        }
        sentences.push(sentence);
    }
    for needle in needles {
        let at = rng.random_range(0..=sentences.len());
        sentences.insert(at, needle);
    }
    let id = format!("niah-{}-{}", options.seed, i + 1);
    Ok(Request {
        question: format!("What is the code of {}?", names[0]),
        references: vec![codes[0].clone()],
        ..Request::raw(id, template(&sentences.join(" "), &names[0]))
    })
}
