//! Prose that says nothing of use: sentences of our own (data/filler.json), put together by seed.

use crate::error::{Error, Result};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use std::path::Path;

const FILLER: &str = include_str!("../../data/filler.json");

/// Words and sentence patterns.
#[derive(Deserialize)]
pub struct Filler {
    people: Vec<String>,
    places: Vec<String>,
    things: Vec<String>,
    times: Vec<String>,
    sentences: Vec<String>,
}

impl Filler {
    pub fn load() -> Result<Self> {
        serde_json::from_str(FILLER).map_err(|e| Error::file(Path::new("data/filler.json"), e.to_string()))
    }

    /// The next sentence, beginning with a capital.
    pub fn sentence(&self, rng: &mut ChaCha8Rng) -> String {
        let mut pick = |list: &[String]| list[rng.random_range(0..list.len())].clone();
        let pattern = pick(&self.sentences);
        let (first, mut second) = (pick(&self.people), pick(&self.people));
        while second == first {
            second = pick(&self.people);
        }
        let sentence = pattern
            .replace("{person2}", &second)
            .replace("{person}", &first)
            .replace("{place}", &pick(&self.places))
            .replace("{thing}", &pick(&self.things))
            .replace("{time}", &pick(&self.times));
        let mut letters = sentence.chars();
        letters.next().map_or(String::new(), |c| c.to_uppercase().chain(letters).collect())
    }
}

/// What the text depends on, for checksums.
pub fn source() -> &'static str {
    FILLER
}
