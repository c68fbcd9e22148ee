//! A column: all layers of one block of tokens, the unit that is coded and decoded by itself.
//!
//! Layer after layer, a token's `[K; V]` (keys without position) is predicted from what was rebuilt of the layers below; what the
//! prediction misses is turned into the layer's own components; these are predicted from the components of a reference token; what is
//! left is quantised and coded.

use super::book::{Book, LayerBook};
use super::entropy::{Coder, Neighbours, Width, from_eighths};
use super::reference::{class_of, sightings};
use crate::model::gemm::{View, product};
use half::f16;

/// What others can be predicted from: the components of a column's tokens, each the mean of all its sightings.
#[derive(Debug, Clone, Default)]
pub struct Components {
    /// `[layers][tokens, components]`.
    pub layers: Vec<Vec<f32>>,
    /// For how many sightings each token stands.
    pub sightings: Vec<u32>,
}

/// What a token's components are predicted from: those of another token, and how much the texts before both agree (a class of
/// matches of [`super::reference`]).
pub struct Source<'a> {
    pub column: &'a Components,
    pub token: usize,
    pub matched: usize,
}

impl Source<'_> {
    pub fn class(&self) -> usize {
        class_of(self.matched, self.column.sightings[self.token])
    }
}

/// What both sides know of a column before its numbers.
pub struct Linked<'a> {
    pub tokens: usize,
    /// The first token is the first of its request: it is stored as it is.
    pub raw_first: bool,
    /// The quantiser's step for each token, in eighths of an octave.
    pub steps: Vec<i32>,
    pub sources: Vec<Option<Source<'a>>>,
}

/// A column as it is read back.
pub struct Rebuilt {
    /// `[layers][tokens, width]`: `[K; V]`, keys without position.
    pub numbers: Vec<Vec<f32>>,
    pub components: Components,
    /// Bits by layer, estimated by the tables; only an encoder knows them.
    pub bits: Vec<f64>,
    /// If it was asked for: what was coded of each component, `[layers][coded tokens, components]`.
    pub seen: Vec<Vec<Seen>>,
}

/// One component of a token as an encoder sees it, in steps of the quantiser.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// What predictions leave.
    pub rest: f32,
    /// What is missed after it was coded.
    pub error: f32,
    /// By the tables.
    pub bits: f32,
}

/// What is to be coded, and how hard rounding tries to save bits; a decoder has none.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// `[layers][tokens, width]`.
    pub numbers: &'a [Vec<f32>],
    /// Squared steps that a bit is worth.
    pub lambda: f32,
    /// Whether [`Rebuilt::seen`] is wanted.
    pub watch: bool,
}

/// Codes a column, or decodes it if nothing is `wanted`.
pub fn run<C: Coder>(book: &Book, linked: &Linked, coder: &mut C, wanted: Option<Wanted>) -> Rebuilt {
    let (tokens, width) = (linked.tokens, book.width());
    let mut numbers: Vec<Vec<f32>> = Vec::with_capacity(book.layers.len());
    let seen =
        |s: &Option<Source>| s.as_ref().map_or(1, |s| sightings(s.matched, s.column.sightings[s.token]));
    let mut components =
        Components { layers: Vec::new(), sightings: linked.sources.iter().map(seen).collect() };
    let mut bits = Vec::with_capacity(book.layers.len());
    let mut seen_all = Vec::new();
    let mut neighbours = vec![Neighbours::default(); tokens];
    for (n, layer) in book.layers.iter().enumerate() {
        let mut own = predicted(layer, &numbers, tokens, width);
        let target = wanted.map(|w| innovations(layer, &w.numbers[n], &own, tokens, width));
        let r = layer.components;
        let mut coded = vec![0.0; tokens * r];
        let before = coder.spent();
        let mut watched = wanted.filter(|w| w.watch).map(|_| Vec::with_capacity(tokens * r));
        for (t, neighbours) in neighbours.iter_mut().enumerate() {
            if linked.raw_first && t == 0 {
                let row = &mut own[..width];
                for (i, x) in row.iter_mut().enumerate() {
                    let wish = wanted.map_or(0, |w| f16::from_f32(w.numbers[n][i]).to_bits());
                    coder.spend(16.0);
                    *x = f16::from_bits(coder.bits(16, u32::from(wish)) as u16).to_f32();
                }
                continue;
            }
            let source = linked.sources[t].as_ref();
            let aim = target.as_ref().map(|u| (&u[t * r..][..r], wanted.map_or(0.0, |w| w.lambda)));
            let out = &mut coded[t * r..][..r];
            token(book, layer, n, linked.steps[t], source, aim, neighbours, coder, out, watched.as_mut());
        }
        bits.push(coder.spent() - before);
        seen_all.extend(watched);
        // Raw tokens have no components, so nothing is added to them.
        let mut residual = vec![0.0; tokens * width];
        let by = View::row_major(&layer.synthesis, r, width);
        product(View::row_major(&coded, tokens, r), by, &mut residual);
        own.iter_mut().zip(&residual).for_each(|(x, e)| *x += e);
        numbers.push(own);
        for ((row, source), seen) in coded.chunks_exact_mut(r).zip(&linked.sources).zip(&components.sightings)
        {
            if let Some(source) = source.as_ref().filter(|_| *seen > 1) {
                let from = &source.column.layers[n][source.token * r..][..r];
                row.iter_mut().zip(from).for_each(|(x, mean)| *x = mean + (*x - mean) / *seen as f32);
            }
        }
        components.layers.push(coded);
    }
    Rebuilt { numbers, components, bits, seen: seen_all }
}

/// What the layers below say of a layer: `[tokens, width]`.
pub fn predicted(layer: &LayerBook, below: &[Vec<f32>], tokens: usize, width: usize) -> Vec<f32> {
    let rank = layer.rank;
    let mut out = vec![0.0; tokens * width];
    if let Some(inputs) = layer.down.len().checked_div(rank) {
        let known = side_by_side(below, inputs / width, tokens, width);
        let mut between = vec![0.0; tokens * rank];
        let down = View::row_major(&layer.down, inputs, rank);
        product(View::row_major(&known, tokens, inputs), down, &mut between);
        product(View::row_major(&between, tokens, rank), View::row_major(&layer.up, rank, width), &mut out);
    }
    for row in out.chunks_exact_mut(width) {
        row.iter_mut().zip(&layer.mean).for_each(|(x, m)| *x += m);
    }
    out
}

/// Numbers of the last `taps` layers side by side, the nearest first: `[tokens, taps * width]`.
pub fn side_by_side(below: &[Vec<f32>], taps: usize, tokens: usize, width: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(tokens * taps * width);
    for t in 0..tokens {
        for layer in below.iter().rev().take(taps) {
            out.extend_from_slice(&layer[t * width..][..width]);
        }
    }
    out
}

/// Components of what a prediction misses: `[tokens, components]`.
fn innovations(layer: &LayerBook, x: &[f32], predicted: &[f32], tokens: usize, width: usize) -> Vec<f32> {
    let missed: Vec<f32> = x.iter().zip(predicted).map(|(x, p)| x - p).collect();
    let mut out = vec![0.0; tokens * layer.components];
    let by = View::row_major(&layer.analysis, width, layer.components);
    product(View::row_major(&missed, tokens, width), by, &mut out);
    out
}

/// One token in one layer.
#[allow(clippy::too_many_arguments)]
fn token<C: Coder>(
    book: &Book,
    layer: &LayerBook,
    n: usize,
    step: i32,
    source: Option<&Source>,
    aim: Option<(&[f32], f32)>,
    neighbours: &mut Neighbours,
    coder: &mut C,
    out: &mut [f32],
    mut watched: Option<&mut Vec<Seen>>,
) {
    let delta = from_eighths(step);
    let r = layer.components;
    let class = source.map_or(0, Source::class);
    let sigma = &layer.sigma[class * r..][..r];
    let gain = &layer.gain[class * r..][..r];
    let from = source.map(|s| &s.column.layers[n][s.token * r..][..r]);
    for k in 0..r {
        let base = from.map_or(0.0, |from| gain[k] * from[k]);
        out[k] = base;
        let before = coder.spent();
        if let Some(width) = Width::of(i32::from(sigma[k]), step) {
            let wish = aim.map_or(0, |(u, lambda)| {
                let x = (u[k] - base) / delta;
                book.tables.quantise(width, neighbours.context(), x, lambda)
            });
            let q = book.tables.code(coder, width, neighbours, wish);
            out[k] += book.tables.rebuild(width, q) * delta;
        }
        if let (Some(watched), Some((u, _))) = (watched.as_deref_mut(), aim) {
            let bits = (coder.spent() - before) as f32;
            watched.push(Seen { rest: (u[k] - base) / delta, error: (u[k] - out[k]) / delta, bits });
        }
    }
}
