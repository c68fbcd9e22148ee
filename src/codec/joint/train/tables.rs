//! The entropy coder's tables.

use super::Training;
use crate::codec::joint::book::{LayerBook, TableParts};
use crate::codec::joint::corpus::Corpus;
use crate::codec::joint::entropy::{Counts, Neighbours, Tables, Width, from_eighths};
use crate::codec::joint::reference::class_of;
use crate::error::{Error, Result};
use crate::interrupt;
use half::f16;
use rayon::prelude::*;

/// Tables count numbers as rounded with this price of a bit, though encoders round to the nearest: so numbers are rebuilt a little further
/// out than their centroids. That costs squared error and saves KL, to which a bias towards the prediction is worse than noise.
const OUTWARD: f32 = 0.1;

/// Steps that are counted, around the trained one, in eighths of an octave.
const OFFSETS: [i32; 6] = [-16, -8, -4, 0, 4, 8];
/// Tokens that are counted at a time.
const TOKENS: usize = 1024;

/// Tables of what is left (`[layers][tokens, components]`, in steps), at steps around the trained one; twice, since rounding and contexts
/// depend on the tables.
pub fn tables(
    corpus: &Corpus,
    books: &[LayerBook],
    left: &[Vec<f16>],
    training: &Training,
) -> Result<TableParts> {
    let seen_by = corpus.sightings();
    let rows = corpus.coded();
    let mut counts = Counts::default();
    for _ in 0..2 {
        interrupt::check()?;
        let now = parts(&counts);
        let tables = Tables::new(&now.probabilities, &now.means, &now.centroids)
            .ok_or_else(|| Error::Number("tables of a codec are not finite".into()))?;
        let count = |rows: &[usize]| {
            let mut counts = Counts::default();
            for &t in rows {
                let class = corpus.source[t].map_or(0, |(s, matched)| class_of(matched, seen_by[s]));
                OFFSETS
                    .iter()
                    .for_each(|&o| see(&mut counts, &tables, books, left, (t, class), (training.step, o)));
            }
            counts
        };
        counts = Counts::default();
        rows.par_chunk_by(|a, b| a / TOKENS == b / TOKENS)
            .map(count)
            .collect::<Vec<_>>()
            .iter()
            .for_each(|part| counts.add(part));
    }
    Ok(parts(&counts))
}

fn parts(counts: &Counts) -> TableParts {
    TableParts { probabilities: counts.probabilities(), means: counts.means(), centroids: counts.centroids() }
}

/// Counts what is left of a token of a class, layer by layer, at the trained step and so many eighths of an octave above.
fn see(
    counts: &mut Counts,
    tables: &Tables,
    books: &[LayerBook],
    left: &[Vec<f16>],
    (t, class): (usize, usize),
    (step, offset): (i32, i32),
) {
    let scale = 1.0 / from_eighths(offset);
    let mut neighbours = Neighbours::default();
    for (book, left) in books.iter().zip(left) {
        let r = book.components;
        for (sigma, left) in book.sigma[class * r..][..r].iter().zip(&left[t * r..][..r]) {
            let Some(width) = Width::of(i32::from(*sigma), step + offset) else { continue };
            let x = left.to_f32() * scale;
            let context = neighbours.context();
            let q = tables.quantise(width, context, x, OUTWARD);
            counts.see(width, context, q, x);
            tables.pass(width, &mut neighbours, q);
        }
    }
}
