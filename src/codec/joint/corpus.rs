//! The tokens that a codec is trained on.

use super::links::references;
use super::reference::{self, sightings};
use crate::codec::CacheBatch;
use crate::codec::columns::{columns, stripped_layer};
use crate::error::Result;

/// Tokens to train on, in the order in which they would be coded.
pub struct Corpus {
    /// Numbers of a token in one layer.
    pub width: usize,
    /// `[layers][tokens, width]`: `[K; V]`, keys without position.
    pub layers: Vec<Vec<f32>>,
    /// First tokens of requests, which are stored raw.
    pub raw: Vec<bool>,
    /// Which part each token's text is in, below [`super::train::FOLDS`].
    pub fold: Vec<u8>,
    /// The token that each refers to, an earlier row, and the match's class.
    pub source: Vec<Option<(usize, usize)>>,
}

impl Corpus {
    pub fn tokens(&self) -> usize {
        self.raw.len()
    }

    /// Tokens that are coded: all but those that are stored raw.
    pub fn coded(&self) -> Vec<usize> {
        (0..self.tokens()).filter(|t| !self.raw[*t]).collect()
    }

    /// Adds the tokens of another corpus; nothing refers from one to the other.
    pub fn join(&mut self, other: Corpus) {
        let base = self.tokens();
        self.raw.extend(other.raw);
        self.fold.extend(other.fold);
        self.source.extend(other.source.into_iter().map(|s| s.map(|(row, class)| (base + row, class))));
        self.layers.iter_mut().zip(other.layers).for_each(|(mine, theirs)| mine.extend(theirs));
    }

    /// For how many sightings each token stands.
    pub fn sightings(&self) -> Vec<u32> {
        let mut seen: Vec<u32> = Vec::with_capacity(self.tokens());
        for source in &self.source {
            seen.push(source.map_or(1, |(s, matched)| sightings(matched, seen[s])));
        }
        seen
    }
}

/// The tokens of a batch to train on, each physical block once. `folds`: the part that each request's text is in.
pub fn corpus_of(batch: &CacheBatch, folds: &[u8]) -> Result<Corpus> {
    let (all, of_requests) = columns(batch)?;
    let found = references(batch, &all, &of_requests, false);
    let layers = batch.caches.first().map_or(0, |c| c.layers.len());
    let mut corpus = Corpus {
        width: 2 * batch.pool.shape().token_width(),
        layers: Vec::new(),
        raw: Vec::new(),
        fold: Vec::new(),
        source: Vec::new(),
    };
    let mut first_row = Vec::with_capacity(all.len());
    for (column, sources) in all.iter().zip(&found) {
        first_row.push(corpus.raw.len());
        for (t, source) in sources.iter().enumerate() {
            corpus.raw.push(column.block == 0 && t == 0);
            let source = source.map(|r| (first_row[r.column] + r.token, r.class));
            // The same text again is in the same part.
            let same = source.filter(|(_, class)| *class >= reference::SAME);
            corpus.fold.push(same.map_or(folds[column.request], |(row, _)| corpus.fold[row]));
            corpus.source.push(source);
        }
    }
    corpus.layers = (0..layers).map(|layer| stripped_layer(batch, &all, layer)).collect();
    Ok(corpus)
}
