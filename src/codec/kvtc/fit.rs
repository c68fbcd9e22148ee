//! Principal directions of a corpus, and what quantising them costs.

use super::book::Transform;
use super::code::{levels, quantised};
use super::widths::{Costs, GROUPS, WIDTHS};
use crate::block::halves;
use crate::codec::joint::corpus::Corpus;
use crate::codec::joint::train::means;
use crate::codec::lowrank::directions;
use crate::error::{Error, Result};
use crate::model::gemm::{View, product};
use rayon::prelude::*;

/// Tokens that costs are measured on.
const MEASURED: usize = 256;

/// Keys (part 0) or values (part 1) of tokens, all layers side by side: `[rows, layers * width / 2]`.
fn rows(corpus: &Corpus, part: usize, tokens: &[usize]) -> Vec<f32> {
    let half = corpus.width / 2;
    let all = corpus.layers.len() * half;
    let mut out = vec![0.0; tokens.len() * all];
    for (&token, row) in tokens.iter().zip(out.chunks_exact_mut(all)) {
        for (layer, own) in corpus.layers.iter().zip(row.chunks_exact_mut(half)) {
            own.copy_from_slice(&layer[token * corpus.width + part * half..][..half]);
        }
    }
    out
}

/// Fits directions to three of four parts of the text and measures costs on the fourth.
///
/// # Errors
/// Too little text.
pub fn fit(corpus: &Corpus, part: usize, most: usize) -> Result<Transform> {
    let usable = |held_out: bool| -> Vec<usize> {
        (0..corpus.tokens()).filter(|&t| !corpus.raw[t] && (corpus.fold[t] == 0) == held_out).collect()
    };
    let (fitted, held_out) = (usable(false), usable(true));
    if fitted.len() < 2 || held_out.is_empty() {
        return Err(Error::argument("too little text to fit a transform to"));
    }
    let mut x = rows(corpus, part, &fitted);
    let width = x.len() / fitted.len();
    let all: Vec<usize> = (0..fitted.len()).collect();
    let mean: Vec<f32> = means(&x, width, &all).into_iter().map(|m| m as f32).collect();
    let center = |x: &mut [f32]| {
        x.par_chunks_exact_mut(width).for_each(|row| row.iter_mut().zip(&mean).for_each(|(x, m)| *x -= m));
    };
    center(&mut x);
    let count = most.min(width).min(fitted.len());
    let exact = directions(&x, fitted.len(), width, count)?;
    // As they are read back.
    let basis = halves::from_bytes(&halves::to_bytes(&exact));
    let every = held_out.len().div_ceil(MEASURED);
    let some: Vec<usize> = held_out.into_iter().step_by(every).collect();
    let mut x = rows(corpus, part, &some);
    center(&mut x);
    let mut places = vec![0.0f32; some.len() * count];
    product(View::row_major(&x, some.len(), width), View::row_major(&basis, width, count), &mut places);
    let costs = costs(&x, &places, some.len(), count);
    Ok(Transform { mean, basis, directions: count, costs })
}

/// Mean squared errors a token, of tokens (`[tokens, width]`) with places along directions (`[tokens, directions]`).
fn costs(x: &[f32], places: &[f32], tokens: usize, directions: usize) -> Costs {
    let square = |x: &f32| f64::from(*x) * f64::from(*x);
    let total = x.iter().map(square).sum::<f64>() / tokens as f64;
    let mut tail = vec![total; directions + 1];
    for k in 0..directions {
        let own = places.iter().skip(k).step_by(directions).map(square).sum::<f64>() / tokens as f64;
        tail[k + 1] = (tail[k] - own).max(0.0);
    }
    let errors = (0..directions)
        .into_par_iter()
        .flat_map_iter(|first| {
            GROUPS.into_iter().flat_map(move |size| {
                WIDTHS.into_iter().map(move |bits| {
                    // A group that reaches too far is never chosen.
                    let Some(last) = Some(first + size).filter(|last| *last <= directions) else {
                        return 0.0;
                    };
                    let error = |row: &[f32]| -> f64 {
                        let own = &row[first..last];
                        let (scale, offset) = levels(own, bits);
                        own.iter()
                            .map(|x| {
                                square(&(x - (quantised(*x, scale, offset, bits) as f32 * scale + offset)))
                            })
                            .sum()
                    };
                    (places.chunks_exact(directions).map(error).sum::<f64>() / tokens as f64) as f32
                })
            })
        })
        .collect();
    Costs { errors, tail: tail.into_iter().map(|t| t as f32).collect() }
}

#[cfg(test)]
mod tests {
    use super::super::code::{kept, project, put, restore, take};
    use super::super::widths::allocate;
    use super::*;
    use crate::codec::quantize::{BitSink, BitSource};

    /// Tokens that lie on a plane through all layers are kept by two directions, in fewer bits than one layer's numbers take.
    #[test]
    fn what_lies_on_a_plane_takes_two_directions() {
        let (layers, half, tokens) = (6, 32, 400);
        let numbers = |layer: usize, i: usize, t: usize| {
            let (a, b) = ((t as f32 * 0.7).sin(), (t as f32 * 0.31).cos());
            let at = (layer * half + i) as f32;
            3.0 + a * (at * 0.9).sin() + b * (at * 1.7).cos()
        };
        let corpus = Corpus {
            width: 2 * half,
            layers: (0..layers)
                .map(|n| {
                    (0..tokens).flat_map(|t| (0..2 * half).map(move |i| numbers(n, i % half, t))).collect()
                })
                .collect(),
            raw: vec![false; tokens],
            fold: (0..tokens).map(|t| (t % 4) as u8).collect(),
            source: vec![None; tokens],
        };
        let transform = fit(&corpus, 0, 16).unwrap();
        assert!(transform.costs.tail[2] < 1e-4 * transform.costs.tail[0], "{:?}", transform.costs.tail);
        let groups = allocate(&transform.costs, 64.0);
        let x = rows(&corpus, 0, &[4, 8, 12, 16]);
        let mut sink = BitSink::default();
        put(&groups, &project(&transform, kept(&groups), &x), 4, &mut sink);
        let (bytes, code, side) = sink.finish();
        assert!(code + side <= 4 * 64, "{groups:?}");
        let mut source = BitSource::new(&bytes);
        let read = restore(&transform, kept(&groups), &take(&groups, 4, &mut source), 4);
        assert_eq!(source.bytes_taken(), bytes.len());
        let spread: f32 = x.iter().map(|x| (x - 3.0).powi(2)).sum();
        let error: f32 = x.iter().zip(&read).map(|(x, y)| (x - y).powi(2)).sum();
        assert!(error < 1e-3 * spread, "{error} of {spread}");
    }
}
