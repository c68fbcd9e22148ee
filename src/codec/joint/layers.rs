//! The columns of a batch, layer after layer from the lowest up: what both sides do to all columns at once.
//!
//! A token's `[K; V]` (keys without position) is predicted linearly from what was rebuilt of the layers below; what the prediction
//! misses is turned into the layer's own components; these are predicted from the components of a reference token; what is left is
//! quantised and coded. Only quantising follows references from column to column: products run over tiles of all tokens, and every
//! column has a stream of its own.

use super::book::{Book, LayerBook};
use super::entropy::{Coder, Neighbours, Width, from_eighths};
use super::links::{Plan, waves};
use crate::model::gemm::{ROWS, View, product};
use half::f16;
use rayon::prelude::*;

/// What is to be coded of a layer; a decoder has none.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// `[tokens, width]`, column by column.
    pub numbers: &'a [f32],
    /// Whether [`Rebuilt::seen`] is wanted.
    pub watch: bool,
}

/// A layer as it is read back.
pub struct Rebuilt {
    /// `[tokens, width]`, column by column: `[K; V]`, keys without position.
    pub numbers: Vec<f32>,
    /// Bits of each column, estimated by the tables; only an encoder knows them.
    pub bits: Vec<f64>,
    /// If it was asked for: what was coded of each column's components, `[coded tokens, components]`.
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

/// A batch between two layers.
pub struct Layers<'a, C> {
    book: &'a Book,
    plans: &'a [Plan],
    /// Of each column.
    streams: Vec<Stream<C>>,
    /// Columns in groups, each of which refers to earlier groups only.
    waves: Vec<Vec<usize>>,
    /// Tokens of all columns, in whole tiles.
    rows: usize,
    /// Layers that were rebuilt, the last ones: `[rows, width]`.
    below: Vec<Vec<f32>>,
    /// Layers done.
    done: usize,
}

/// One column's bits, and what its tables go by.
struct Stream<C> {
    coder: C,
    /// Of each token.
    neighbours: Vec<Neighbours>,
}

/// One column of a layer.
#[derive(Default)]
struct Coded {
    /// `[tokens, components]`, whole numbers.
    quantised: Vec<i16>,
    /// Numbers of a first token, which stays as it is.
    raw: Vec<f32>,
    /// Of each component, if they are to be watched.
    costs: Vec<f32>,
    bits: f64,
}

/// Components of one column, `[tokens, components]`.
#[derive(Default)]
struct Components {
    own: Vec<f32>,
    /// What later tokens are predicted from: means of all sightings.
    means: Vec<f32>,
    quantised: Vec<i16>,
    /// What predictions leave and what is missed, in steps.
    watched: Vec<(f32, f32)>,
}

impl<'a, C: Coder + Send + Sync> Layers<'a, C> {
    /// Columns whose steps and references are written, or read, already.
    pub fn new(book: &'a Book, plans: &'a [Plan], coders: Vec<C>) -> Self {
        let tokens: usize = plans.iter().map(|plan| plan.tokens).sum();
        let stream = |(coder, plan): (C, &Plan)| Stream {
            coder,
            neighbours: vec![Neighbours::default(); plan.tokens],
        };
        Layers {
            book,
            plans,
            streams: coders.into_iter().zip(plans).map(stream).collect(),
            waves: waves(plans),
            rows: tokens.next_multiple_of(ROWS),
            below: Vec::new(),
            done: 0,
        }
    }

    /// Codes the next layer, or decodes it if nothing is `wanted`.
    pub fn next(&mut self, wanted: Option<Wanted>) -> Rebuilt {
        let (book, plans) = (self.book, self.plans);
        let (layer, width) = (&book.layers[self.done], book.width());
        let r = layer.components;
        let padded = wanted.map(|wanted| {
            let mut numbers = wanted.numbers.to_vec();
            numbers.resize(self.rows * width, 0.0);
            numbers
        });
        let mut numbers = self.predicted(layer);
        let targets = padded.as_ref().map(|x| self.innovations(layer, x, &numbers));
        let (mut columns, coded) = match (&targets, wanted) {
            (Some(targets), Some(wanted)) => {
                let columns = self.components(|row, from, token| {
                    quantise(book, layer, &targets[row * r..][..r], from, token, wanted)
                });
                let first = |at: usize| &wanted.numbers[at * width..][..width];
                let coded =
                    self.code(|number, at| Some((&columns[number].quantised[..], first(at))), wanted.watch);
                (columns, coded)
            }
            _ => {
                let coded = self.code(|_, _| None, false);
                let columns = self.components(|_, from, token| {
                    token.quantised.copy_from_slice(&coded[token.column].quantised[token.token * r..][..r]);
                    rebuild(book, layer, from, token)
                });
                (columns, coded)
            }
        };
        self.add(layer, &columns, &mut numbers);
        let mut at = 0;
        for (plan, coded) in plans.iter().zip(&coded) {
            if plan.raw_first {
                numbers[at * width..][..width].copy_from_slice(&coded.raw);
            }
            at += plan.tokens;
        }
        let seen = columns.iter_mut().zip(&coded).map(|(column, coded)| {
            let watched = std::mem::take(&mut column.watched).into_iter().zip(&coded.costs);
            watched.map(|((rest, error), bits)| Seen { rest, error, bits: *bits }).collect()
        });
        let seen = seen.collect();
        self.below.insert(0, numbers.clone());
        let taps = book.layers.get(self.done + 1).map_or(0, |next| next.taps(width));
        self.below.truncate(taps);
        self.done += 1;
        numbers.truncate(at * width);
        Rebuilt { numbers, bits: coded.iter().map(|c| c.bits).collect(), seen }
    }

    pub fn into_coders(self) -> Vec<C> {
        self.streams.into_iter().map(|stream| stream.coder).collect()
    }

    pub fn coders(&self) -> impl Iterator<Item = &C> {
        self.streams.iter().map(|stream| &stream.coder)
    }

    /// What the layers below say of a layer: `[rows, width]`.
    fn predicted(&self, layer: &LayerBook) -> Vec<f32> {
        let (width, rank) = (self.book.width(), layer.rank);
        let mut out = vec![0.0; self.rows * width];
        out.par_chunks_exact_mut(ROWS * width).enumerate().for_each(|(tile, out)| {
            if let Some(inputs) = layer.down.len().checked_div(rank) {
                let below: Vec<&[f32]> =
                    self.below.iter().map(|x| &x[tile * ROWS * width..][..ROWS * width]).collect();
                let known = side_by_side(&below, width);
                let mut between = vec![0.0; ROWS * rank];
                let down = View::row_major(&layer.down, inputs, rank);
                product(View::row_major(&known, ROWS, inputs), down, &mut between);
                let up = View::row_major(&layer.up, rank, width);
                product(View::row_major(&between, ROWS, rank), up, out);
            }
            for row in out.chunks_exact_mut(width) {
                row.iter_mut().zip(&layer.mean).for_each(|(x, m)| *x += m);
            }
        });
        out
    }

    /// Components of what a prediction misses: `[rows, components]`.
    fn innovations(&self, layer: &LayerBook, x: &[f32], predicted: &[f32]) -> Vec<f32> {
        let (width, r) = (self.book.width(), layer.components);
        let by = View::row_major(&layer.analysis, width, r);
        let mut out = vec![0.0; self.rows * r];
        let tiles = out.par_chunks_exact_mut(ROWS * r).zip(x.par_chunks_exact(ROWS * width));
        tiles.zip(predicted.par_chunks_exact(ROWS * width)).for_each(|((out, x), predicted)| {
            let missed: Vec<f32> = x.iter().zip(predicted).map(|(x, p)| x - p).collect();
            product(View::row_major(&missed, ROWS, width), by, out);
        });
        out
    }

    /// Adds what components stand for. First tokens have none, so nothing is added to them.
    fn add(&self, layer: &LayerBook, columns: &[Components], numbers: &mut [f32]) {
        let (width, r) = (self.book.width(), layer.components);
        let mut coded: Vec<f32> = Vec::with_capacity(self.rows * r);
        columns.iter().for_each(|column| coded.extend_from_slice(&column.own));
        coded.resize(self.rows * r, 0.0);
        let by = View::row_major(&layer.synthesis, r, width);
        let tiles = numbers.par_chunks_exact_mut(ROWS * width).zip(coded.par_chunks_exact(ROWS * r));
        tiles.for_each(|(numbers, coded)| {
            let mut residual = vec![0.0; ROWS * width];
            product(View::row_major(coded, ROWS, r), by, &mut residual);
            numbers.iter_mut().zip(&residual).for_each(|(x, e)| *x += e);
        });
    }

    /// Components of all columns, each after those that it refers to. `token` makes those of a token, from its row and the components
    /// of its reference.
    fn components(&self, token: impl Fn(usize, Option<&[f32]>, &mut Token) + Sync) -> Vec<Components> {
        let first = first_rows(self.plans);
        let mut columns: Vec<Components> = Vec::new();
        columns.resize_with(self.plans.len(), Components::default);
        for wave in &self.waves {
            let one = |&number: &usize| self.column(number, first[number], &columns, &token);
            let made: Vec<Components> = wave.par_iter().map(one).collect();
            for (&number, made) in wave.iter().zip(made) {
                columns[number] = made;
            }
        }
        columns
    }

    /// Those of one column, whose first token has row `first`; `before` has those that it refers to.
    fn column(
        &self,
        number: usize,
        first: usize,
        before: &[Components],
        token: &impl Fn(usize, Option<&[f32]>, &mut Token),
    ) -> Components {
        let (plan, r) = (&self.plans[number], self.book.layers[self.done].components);
        let from = |t: usize| plan.sources[t].map(|s| &before[s.column].means[s.token * r..][..r]);
        let (mut own, mut quantised) = (vec![0.0; plan.tokens * r], vec![0; plan.tokens * r]);
        let mut watched = Vec::new();
        for t in usize::from(plan.raw_first)..plan.tokens {
            let mut place = Token {
                column: number,
                token: t,
                class: plan.classes[t],
                step: plan.steps[t],
                quantised: &mut quantised[t * r..][..r],
                components: &mut own[t * r..][..r],
                watched: &mut watched,
            };
            token(first + t, from(t), &mut place);
        }
        let mut means = own.clone();
        for (t, seen) in plan.sightings.iter().enumerate().filter(|(_, seen)| **seen > 1) {
            let before = from(t).into_iter().flatten();
            let own = means[t * r..][..r].iter_mut().zip(before);
            own.for_each(|(x, mean)| *x = mean + (*x - mean) / *seen as f32);
        }
        Components { own, means, quantised, watched }
    }

    /// Writes whole numbers, or reads them where there is no wish: those of a column, and the numbers of its first token.
    fn code<'b>(
        &mut self,
        wish: impl Fn(usize, usize) -> Option<(&'b [i16], &'b [f32])> + Sync,
        watch: bool,
    ) -> Vec<Coded> {
        let (book, n) = (self.book, self.done);
        let first = first_rows(self.plans);
        self.streams
            .par_iter_mut()
            .zip(self.plans)
            .enumerate()
            .map(|(number, (stream, plan))| stream.layer(book, n, plan, wish(number, first[number]), watch))
            .collect()
    }
}

/// Where each column begins in arrays of all tokens.
fn first_rows(plans: &[Plan]) -> Vec<usize> {
    let before = |sum: &mut usize, plan: &Plan| {
        let first = *sum;
        *sum += plan.tokens;
        Some(first)
    };
    plans.iter().scan(0, before).collect()
}

impl<C: Coder> Stream<C> {
    fn layer(
        &mut self,
        book: &Book,
        n: usize,
        plan: &Plan,
        wish: Option<(&[i16], &[f32])>,
        watch: bool,
    ) -> Coded {
        let (layer, coder) = (&book.layers[n], &mut self.coder);
        let r = layer.components;
        let before = coder.spent();
        let mut coded = Coded { quantised: vec![0; plan.tokens * r], ..Coded::default() };
        for (t, neighbours) in self.neighbours.iter_mut().enumerate() {
            if plan.raw_first && t == 0 {
                let number = |i: usize| {
                    let wish = wish.map_or(0, |(_, raw)| f16::from_f32(raw[i]).to_bits());
                    coder.spend(16.0);
                    f16::from_bits(coder.bits(16, u32::from(wish)) as u16).to_f32()
                };
                coded.raw = (0..book.width()).map(number).collect();
                continue;
            }
            let sigma = &layer.sigma[plan.classes[t] * r..][..r];
            for (k, out) in coded.quantised[t * r..][..r].iter_mut().enumerate() {
                let spent = coder.spent();
                if let Some(width) = Width::of(i32::from(sigma[k]), plan.steps[t]) {
                    let wish = wish.map_or(0, |(quantised, _)| quantised[t * r + k]);
                    *out = book.tables.code(coder, width, neighbours, wish);
                }
                if watch {
                    coded.costs.push((coder.spent() - spent) as f32);
                }
            }
        }
        coded.bits = coder.spent() - before;
        coded
    }
}

/// A token whose components are made.
struct Token<'a> {
    column: usize,
    token: usize,
    /// Of its reference.
    class: usize,
    /// Of the quantiser, in eighths of an octave.
    step: i32,
    quantised: &'a mut [i16],
    components: &'a mut [f32],
    watched: &'a mut Vec<(f32, f32)>,
}

/// An encoder's token: whole numbers for its `targets`, and the components that these stand for.
fn quantise(
    book: &Book,
    layer: &LayerBook,
    targets: &[f32],
    from: Option<&[f32]>,
    token: &mut Token,
    wanted: Wanted,
) {
    let (r, steps) = (layer.components, 1.0 / from_eighths(token.step));
    let sigma = &layer.sigma[token.class * r..][..r];
    let gain = &layer.gain[token.class * r..][..r];
    let rest = |k: usize| (targets[k] - from.map_or(0.0, |from| gain[k] * from[k])) * steps;
    for ((k, sigma), q) in sigma.iter().enumerate().zip(token.quantised.iter_mut()) {
        if let Some(width) = Width::of(i32::from(*sigma), token.step) {
            *q = book.tables.nearest(width, rest(k));
        }
    }
    rebuild(book, layer, from, token);
    if wanted.watch {
        let watched = (0..r).map(|k| (rest(k), (targets[k] - token.components[k]) * steps));
        token.watched.extend(watched);
    }
}

/// The components that a token's whole numbers stand for.
fn rebuild(book: &Book, layer: &LayerBook, from: Option<&[f32]>, token: &mut Token) {
    let (r, delta) = (layer.components, from_eighths(token.step));
    let sigma = &layer.sigma[token.class * r..][..r];
    let gain = &layer.gain[token.class * r..][..r];
    if let Some(from) = from {
        token.components.iter_mut().zip(gain).zip(from).for_each(|((x, gain), from)| *x = gain * from);
    }
    for (k, &q) in token.quantised.iter().enumerate().filter(|(_, q)| **q != 0) {
        if let Some(width) = Width::of(i32::from(sigma[k]), token.step) {
            token.components[k] += book.tables.rebuild(width, q) * delta;
        }
    }
}

/// Numbers of layers side by side, as they are given: `[tokens, layers * width]`.
pub fn side_by_side(layers: &[&[f32]], width: usize) -> Vec<f32> {
    let tokens = layers.first().map_or(0, |layer| layer.len() / width);
    let mut out = Vec::with_capacity(tokens * layers.len() * width);
    for t in 0..tokens {
        for layer in layers {
            out.extend_from_slice(&layer[t * width..][..width]);
        }
    }
    out
}
