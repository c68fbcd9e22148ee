//! The columns of a batch, layer after layer from the lowest up: what both sides do to all columns at once.
//!
//! A token's `[K; V]` (keys without position) is predicted linearly from what was rebuilt of the layers below; what the prediction
//! misses is turned into the layer's own components; these are predicted from the components of a reference token; what is left is
//! quantised and coded. Products run over tiles of all tokens, every column has a stream of its own, and quantising, which follows
//! references from token to token, runs over a few components at a time.

use super::book::{Book, LayerBook};
use super::entropy::{Coder, Neighbours, Width, from_eighths};
use super::links::Plan;
use crate::model::gemm::{ROWS, View, product};
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

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
    /// All columns' tokens.
    places: Vec<Place>,
    /// Their number, in whole tiles.
    rows: usize,
    /// Layers that were rebuilt, the nearest first: `[rows, width]`.
    below: Vec<Vec<f32>>,
    /// Layers done.
    done: usize,
}

/// One column's bits, and what its tables go by.
struct Stream<C> {
    coder: C,
    /// Row of its first token.
    first: usize,
    /// Of each token.
    neighbours: Vec<Neighbours>,
}

/// A token, as far as its components go by it.
struct Place {
    /// It is stored as it is and has no components.
    raw: bool,
    /// Of its reference.
    class: usize,
    /// Of the quantiser, in eighths of an octave.
    step: i32,
    sightings: u32,
    /// Row of its reference, an earlier one.
    source: Option<usize>,
}

/// One column of a layer.
#[derive(Default)]
struct Coded {
    /// `[tokens, components]`, whole numbers.
    quantised: Vec<i16>,
    /// Numbers of a first token, which stays as it is.
    raw: Vec<f32>,
    /// Of each component of coded tokens, if they are to be watched.
    costs: Vec<f32>,
    bits: f64,
}

/// Where whole numbers come from, `[tokens, components]`.
#[derive(Clone, Copy)]
enum Origin<'a> {
    /// An encoder's components.
    Targets(&'a [f32]),
    /// What a decoder read.
    Read(&'a [i16]),
}

/// Components of all tokens, or some of them: `[tokens, components]`.
struct Components {
    quantised: Vec<i16>,
    /// What predictions leave of an encoder's components, in steps.
    rests: Vec<f32>,
    rebuilt: Vec<f32>,
}

/// Components that are quantised together: enough to read memory in a row, few enough to share out.
const SOME: usize = 16;

impl<'a, C: Coder + Send + Sync> Layers<'a, C> {
    /// Columns whose steps and references are written, or read, already.
    pub fn new(book: &'a Book, plans: &'a [Plan], coders: Vec<C>) -> Self {
        let mut first = Vec::with_capacity(plans.len());
        let mut places = Vec::new();
        for plan in plans {
            first.push(places.len());
            for (t, source) in plan.sources.iter().enumerate() {
                places.push(Place {
                    raw: plan.raw_first && t == 0,
                    class: plan.classes[t],
                    step: plan.steps[t],
                    sightings: plan.sightings[t],
                    source: source.map(|s| first[s.column] + s.token),
                });
            }
        }
        let stream = |((coder, plan), first): ((C, &Plan), usize)| Stream {
            coder,
            first,
            neighbours: vec![Neighbours::default(); plan.tokens],
        };
        let rows = places.len().next_multiple_of(ROWS);
        let streams = coders.into_iter().zip(plans).zip(first).map(stream).collect();
        Layers { book, plans, streams, places, rows, below: Vec::new(), done: 0 }
    }

    /// Codes the next layer, or decodes it if nothing is `wanted`.
    pub fn next(&mut self, wanted: Option<Wanted>) -> Rebuilt {
        let (layer, width) = (&self.book.layers[self.done], self.book.width());
        let r = layer.components;
        let mut numbers = self.predicted(layer);
        let (components, coded) = match wanted {
            Some(wanted) => {
                let mut padded = wanted.numbers.to_vec();
                padded.resize(self.rows * width, 0.0);
                let targets = self.innovations(layer, &padded, &numbers);
                let components = self.components(layer, Origin::Targets(&targets));
                let coded = self.code(Some((&components.quantised, wanted.numbers)), wanted.watch);
                (components, coded)
            }
            None => {
                let coded = self.code(None, false);
                let read: Vec<i16> = coded.iter().flat_map(|c| &c.quantised).copied().collect();
                (self.components(layer, Origin::Read(&read)), coded)
            }
        };
        self.add(layer, &components.rebuilt, &mut numbers);
        for (stream, coded) in self.streams.iter().zip(&coded) {
            numbers[stream.first * width..][..coded.raw.len()].copy_from_slice(&coded.raw);
        }
        let seen = match wanted.filter(|w| w.watch) {
            Some(_) => self.seen(&components, &coded, r),
            None => Vec::new(),
        };
        self.below.insert(0, numbers.clone());
        let taps = self.book.layers.get(self.done + 1).map_or(0, |next| next.taps(width));
        self.below.truncate(taps);
        self.done += 1;
        numbers.truncate(self.places.len() * width);
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

    /// Adds what components (`[tokens, components]`) stand for. First tokens have none, so nothing is added to them.
    fn add(&self, layer: &LayerBook, components: &[f32], numbers: &mut [f32]) {
        let (width, r) = (self.book.width(), layer.components);
        let mut padded = components.to_vec();
        padded.resize(self.rows * r, 0.0);
        let by = View::row_major(&layer.synthesis, r, width);
        let tiles = numbers.par_chunks_exact_mut(ROWS * width).zip(padded.par_chunks_exact(ROWS * r));
        tiles.for_each(|(numbers, components)| {
            let mut residual = vec![0.0; ROWS * width];
            product(View::row_major(components, ROWS, r), by, &mut residual);
            numbers.iter_mut().zip(&residual).for_each(|(x, e)| *x += e);
        });
    }

    /// All components: each token's after those of the token that it refers to.
    fn components(&self, layer: &LayerBook, origin: Origin) -> Components {
        let r = layer.components;
        let ranges: Vec<Range<usize>> = (0..r).step_by(SOME).map(|k| k..(k + SOME).min(r)).collect();
        let parts: Vec<Components> =
            ranges.par_iter().map(|ks| self.some(layer, ks.clone(), origin)).collect();
        Components {
            quantised: side_by_side_parts(&ranges, parts.iter().map(|p| &p.quantised[..])),
            rests: side_by_side_parts(&ranges, parts.iter().map(|p| &p.rests[..])),
            rebuilt: side_by_side_parts(&ranges, parts.iter().map(|p| &p.rebuilt[..])),
        }
    }

    /// Some components of every token.
    fn some(&self, layer: &LayerBook, ks: Range<usize>, origin: Origin) -> Components {
        let (r, wide, tables) = (layer.components, ks.len(), &self.book.tables);
        let count = self.places.len() * wide;
        let (mut quantised, mut rebuilt) = (vec![0i16; count], vec![0.0f32; count]);
        let mut rests = vec![0.0f32; if matches!(origin, Origin::Targets(_)) { count } else { 0 }];
        // What later tokens are predicted from: means of all sightings.
        let mut means = vec![0.0f32; count];
        for (t, place) in self.places.iter().enumerate().filter(|(_, place)| !place.raw) {
            let delta = from_eighths(place.step);
            let steps = 1.0 / delta;
            let (past, means) = means.split_at_mut(t * wide);
            let from = place.source.map(|s| &past[s * wide..][..wide]);
            for i in 0..wide {
                let (at, k) = (t * wide + i, ks.start + i);
                let known = from.map_or(0.0, |from| from[i]);
                let base = layer.gain[place.class * r + k] * known;
                let width = Width::of(i32::from(layer.sigma[place.class * r + k]), place.step);
                let q = match origin {
                    Origin::Read(read) => read[t * r + k],
                    Origin::Targets(targets) => {
                        rests[at] = (targets[t * r + k] - base) * steps;
                        width.map_or(0, |width| tables.nearest(width, rests[at]))
                    }
                };
                quantised[at] = q;
                rebuilt[at] = base + width.filter(|_| q != 0).map_or(0.0, |w| tables.rebuild(w, q) * delta);
                means[i] = match place.sightings {
                    1 => rebuilt[at],
                    seen => known + (rebuilt[at] - known) / seen as f32,
                };
            }
        }
        Components { quantised, rests, rebuilt }
    }

    /// What was coded of each column's components.
    fn seen(&self, components: &Components, coded: &[Coded], r: usize) -> Vec<Vec<Seen>> {
        let column = |(stream, coded): (&Stream<C>, &Coded)| {
            let places = self.places[stream.first..][..stream.neighbours.len()].iter().enumerate();
            let rows = places.filter(|(_, place)| !place.raw);
            let all = rows.flat_map(|(t, place)| (0..r).map(move |k| ((stream.first + t) * r + k, k, place)));
            let seen = |((at, k, place), bits): ((usize, usize, &Place), &f32)| {
                let width =
                    Width::of(i32::from(self.book.layers[self.done].sigma[place.class * r + k]), place.step);
                let rebuilt =
                    width.map_or(0.0, |width| self.book.tables.rebuild(width, components.quantised[at]));
                Seen { rest: components.rests[at], error: components.rests[at] - rebuilt, bits: *bits }
            };
            all.zip(&coded.costs).map(seen).collect()
        };
        self.streams.iter().zip(coded).map(column).collect()
    }

    /// Writes all columns' whole numbers (`[tokens, components]`) and the numbers of first tokens (`[tokens, width]`), or reads them
    /// where there is no wish.
    fn code(&mut self, wish: Option<(&[i16], &[f32])>, watch: bool) -> Vec<Coded> {
        let (book, n) = (self.book, self.done);
        let (r, width) = (book.layers[n].components, book.width());
        let columns = self.streams.par_iter_mut().zip(self.plans);
        let code = |(stream, plan): (&mut Stream<C>, &Plan)| {
            let first = stream.first;
            let own = wish.map(|(quantised, numbers)| (&quantised[first * r..], &numbers[first * width..]));
            stream.layer(book, n, plan, own, watch)
        };
        columns.map(code).collect()
    }
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

/// Parts of rows, each of some components, as whole rows.
fn side_by_side_parts<'a, T: Copy + 'a>(
    ranges: &[Range<usize>],
    parts: impl Iterator<Item = &'a [T]>,
) -> Vec<T> {
    let parts: Vec<&[T]> = parts.collect();
    let rows = parts.first().map_or(0, |part| part.len() / ranges[0].len());
    let mut out = Vec::with_capacity(parts.iter().map(|part| part.len()).sum());
    for t in 0..rows {
        for (part, ks) in parts.iter().zip(ranges) {
            out.extend_from_slice(&part[t * ks.len()..][..ks.len()]);
        }
    }
    out
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
