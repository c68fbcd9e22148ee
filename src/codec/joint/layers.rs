//! The columns of a batch, layer after layer from the lowest up: what both sides do to all columns at once.
//!
//! A token's `[K; V]` (keys without position) is predicted linearly from what was rebuilt of the layers below; what the prediction
//! misses is turned into the layer's own components; these are predicted from the components of a reference token; what is left is
//! quantised and coded. Products run over tiles of all tokens, every column has a stream of its own, and quantising, which follows
//! references from token to token, runs over a few components at a time.

use super::book::{Book, LayerBook};
use super::entropy::{Coder, Neighbours, Width, from_eighths};
use super::links::Plan;
use crate::model::gemm::{View, by_tiles, for_tiles, tile_product};
use half::f16;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::ops::Range;

/// What is to be coded of a layer; a decoder has none.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// `[tokens, width]`, column by column: `[K; V]`, keys without position.
    pub numbers: &'a [f32],
    /// Whether [`Spent::seen`] is wanted.
    pub watch: bool,
}

/// What an encoder knows of a layer.
pub struct Spent {
    /// Bits of each column, estimated by the tables.
    pub bits: Vec<f64>,
    /// If it was asked for: what was coded of components, `[coded tokens, components]`, column by column.
    pub seen: Vec<Seen>,
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
    /// Of each column.
    streams: Vec<Stream<C>>,
    /// All columns' tokens.
    places: Vec<Place>,
    kinds: Vec<Kind>,
    /// Layers that were rebuilt, the nearest first: `[tokens, width]`.
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
    /// A number into [`Layers::kinds`].
    kind: usize,
    sightings: u32,
    /// Row of its reference, an earlier one.
    source: Option<usize>,
}

/// Tokens whose components are as wide.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    /// Of their references.
    class: usize,
    /// Of the quantiser, in eighths of an octave.
    step: i32,
}

/// Of each kind of tokens, how wide the components of a layer are: `[kinds][components]`.
type Widths = Vec<Vec<Option<Width>>>;

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

/// A few components of all tokens: `[tokens, wide]`.
struct Part {
    wide: usize,
    rebuilt: Vec<f32>,
    /// An encoder's.
    quantised: Vec<i16>,
}

/// Components that are quantised together: enough to read memory in a row, few enough to share out.
const SOME: usize = 16;

impl<'a, C: Coder + Send + Sync> Layers<'a, C> {
    /// Columns whose steps and references are written, or read, already.
    pub fn new(book: &'a Book, plans: &[Plan], coders: Vec<C>) -> Self {
        let mut streams: Vec<Stream<C>> = Vec::with_capacity(plans.len());
        let (mut places, mut kinds, mut numbers) = (Vec::new(), Vec::new(), BTreeMap::new());
        for (plan, coder) in plans.iter().zip(coders) {
            let first = places.len();
            streams.push(Stream { coder, first, neighbours: vec![Neighbours::default(); plan.tokens] });
            for (t, source) in plan.sources.iter().enumerate() {
                let kind = Kind { class: plan.classes[t], step: plan.steps[t] };
                places.push(Place {
                    raw: plan.raw_first && t == 0,
                    kind: *numbers.entry(kind).or_insert_with(|| {
                        kinds.push(kind);
                        kinds.len() - 1
                    }),
                    sightings: plan.sightings[t],
                    source: source.map(|s| streams[s.column].first + s.token),
                });
            }
        }
        Layers { book, streams, places, kinds, below: Vec::new(), done: 0 }
    }

    /// Codes the next layer, or decodes it if nothing is `wanted`.
    pub fn next(&mut self, wanted: Option<Wanted>) -> Spent {
        let layer = &self.book.layers[self.done];
        let widths = self.widths(layer);
        let mut numbers = self.predicted(layer);
        let (parts, coded, seen) = match wanted {
            Some(Wanted { numbers: wanted, watch }) => {
                let targets = innovations(layer, wanted, &numbers);
                let parts = self.components(layer, &widths, Origin::Targets(&targets));
                let quantised = beside(&parts, |part| &part.quantised);
                let coded = self.code(&widths, Some((&quantised, wanted)), watch);
                let seen = match watch {
                    true => {
                        let rebuilt = beside(&parts, |part| &part.rebuilt);
                        self.seen(&widths, &targets, (&rebuilt, &quantised), &coded)
                    }
                    false => Vec::new(),
                };
                (parts, coded, seen)
            }
            None => {
                let coded = self.code(&widths, None, false);
                let read: Vec<&[i16]> = coded.iter().map(|c| &c.quantised[..]).collect();
                (self.components(layer, &widths, Origin::Read(&read.concat())), coded, Vec::new())
            }
        };
        self.add(layer, &parts, &mut numbers);
        for (stream, coded) in self.streams.iter().zip(&coded) {
            numbers[stream.first * self.book.width()..][..coded.raw.len()].copy_from_slice(&coded.raw);
        }
        self.done += 1;
        let taps = self.book.layers.get(self.done).map_or(0, |next| next.taps(self.book.width()));
        self.below.insert(0, numbers);
        self.below.truncate(taps.max(1));
        Spent { bits: coded.iter().map(|c| c.bits).collect(), seen }
    }

    /// The layer that was coded last, as it is read back: `[tokens, width]`, column by column.
    pub fn rebuilt(&self) -> &[f32] {
        self.below.first().map_or(&[], |numbers| numbers)
    }

    pub fn into_coders(self) -> Vec<C> {
        self.streams.into_iter().map(|stream| stream.coder).collect()
    }

    pub fn coders(&self) -> impl Iterator<Item = &C> {
        self.streams.iter().map(|stream| &stream.coder)
    }

    fn widths(&self, layer: &LayerBook) -> Widths {
        let r = layer.components;
        let of = |kind: &Kind| {
            let sigma = &layer.sigma[kind.class * r..][..r];
            sigma.iter().map(|sigma| Width::of(i32::from(*sigma), kind.step)).collect()
        };
        self.kinds.iter().map(of).collect()
    }

    /// What the layers below say of a layer: `[tokens, width]`.
    fn predicted(&self, layer: &LayerBook) -> Vec<f32> {
        let (width, rank) = (self.book.width(), layer.rank);
        by_tiles(self.places.len(), width, |rows, out| {
            if let Some(inputs) = layer.down.len().checked_div(rank) {
                let below = self.below.iter().map(|x| (&x[rows.start * width..rows.end * width], width));
                let below = side_by_side(&below.collect::<Vec<_>>());
                let mut between = vec![0.0; rows.len() * rank];
                tile_product(&below, View::row_major(&layer.down, inputs, rank), &mut between);
                tile_product(&between, View::row_major(&layer.up, rank, width), out);
            }
            for row in out.chunks_exact_mut(width) {
                row.iter_mut().zip(&layer.mean).for_each(|(x, m)| *x += m);
            }
        })
    }

    /// Adds what components stand for. First tokens have none, so nothing is added to them.
    fn add(&self, layer: &LayerBook, parts: &[Part], numbers: &mut [f32]) {
        let width = self.book.width();
        let synthesis = View::row_major(&layer.synthesis, layer.components, width);
        for_tiles(numbers, width, |rows, numbers| {
            let own = parts.iter().map(|p| (&p.rebuilt[rows.start * p.wide..rows.end * p.wide], p.wide));
            let mut missed = vec![0.0; numbers.len()];
            tile_product(&side_by_side(&own.collect::<Vec<_>>()), synthesis, &mut missed);
            numbers.iter_mut().zip(&missed).for_each(|(x, e)| *x += e);
        });
    }

    /// All components, a few at a time.
    fn components(&self, layer: &LayerBook, widths: &Widths, origin: Origin) -> Vec<Part> {
        let r = layer.components;
        let parts: Vec<Range<usize>> = (0..r).step_by(SOME).map(|k| k..(k + SOME).min(r)).collect();
        parts.into_par_iter().map(|ks| self.part(layer, widths, ks, origin)).collect()
    }

    /// Components of every token, each token's after those of the token that it refers to.
    fn part(&self, layer: &LayerBook, widths: &Widths, ks: Range<usize>, origin: Origin) -> Part {
        let (r, wide, tables) = (layer.components, ks.len(), &self.book.tables);
        let (count, encodes) = (self.places.len() * wide, matches!(origin, Origin::Targets(_)));
        let mut quantised = vec![0i16; if encodes { count } else { 0 }];
        let (mut rebuilt, mut means) = (vec![0.0f32; count], vec![0.0f32; count]);
        let steps: Vec<f32> = self.kinds.iter().map(|kind| from_eighths(kind.step)).collect();
        for (t, place) in self.places.iter().enumerate().filter(|(_, place)| !place.raw) {
            let (step, widths) = (steps[place.kind], &widths[place.kind][ks.clone()]);
            let gain = &layer.gain[self.kinds[place.kind].class * r..][ks.clone()];
            let (past, means) = means.split_at_mut(t * wide);
            let known = place.source.map_or(&[0.0; SOME][..wide], |s| &past[s * wide..][..wide]);
            let rebuilt = &mut rebuilt[t * wide..][..wide];
            rebuilt.iter_mut().zip(gain).zip(known).for_each(|((x, gain), known)| *x = gain * known);
            let q = match origin {
                Origin::Read(read) => &read[t * r..][ks.clone()],
                Origin::Targets(targets) => {
                    let (targets, q) = (&targets[t * r..][ks.clone()], &mut quantised[t * wide..][..wide]);
                    let steps = 1.0 / step;
                    for (i, q) in q.iter_mut().enumerate() {
                        let rest = (targets[i] - rebuilt[i]) * steps;
                        *q = widths[i].map_or(0, |width| tables.nearest(width, rest));
                    }
                    &*q
                }
            };
            for ((x, q), width) in rebuilt.iter_mut().zip(q).zip(widths) {
                // Most are zero.
                if let Some(width) = width.filter(|_| *q != 0) {
                    *x += tables.rebuild(width, *q) * step;
                }
            }
            // What later tokens are predicted from: means of all sightings.
            let seen = place.sightings as f32;
            for ((mean, x), known) in means.iter_mut().zip(&*rebuilt).zip(known) {
                *mean = if place.sightings == 1 { *x } else { known + (x - known) / seen };
            }
        }
        Part { wide, rebuilt, quantised }
    }

    /// What was coded of components that should have been `targets` and became `rebuilt`: all `[tokens, components]`.
    fn seen(
        &self,
        widths: &Widths,
        targets: &[f32],
        (rebuilt, quantised): (&[f32], &[i16]),
        coded: &[Coded],
    ) -> Vec<Seen> {
        let r = widths.first().map_or(0, Vec::len);
        let rows = self.places.iter().enumerate().filter(|(_, place)| !place.raw);
        let all = rows.flat_map(|(t, place)| (0..r).map(move |k| (t * r + k, place.kind, k)));
        let costs = coded.iter().flat_map(|coded| &coded.costs);
        let seen = |((at, kind, k), bits): ((usize, usize, usize), &f32)| {
            let error = (targets[at] - rebuilt[at]) / from_eighths(self.kinds[kind].step);
            let said = widths[kind][k].map_or(0.0, |width| self.book.tables.rebuild(width, quantised[at]));
            Seen { rest: error + said, error, bits: *bits }
        };
        all.zip(costs).map(seen).collect()
    }

    /// Writes all columns' whole numbers (`[tokens, components]`) and the numbers of first tokens (`[tokens, width]`), or reads them
    /// where there is no wish.
    fn code(&mut self, widths: &Widths, wish: Option<(&[i16], &[f32])>, watch: bool) -> Vec<Coded> {
        let (book, places) = (self.book, &self.places);
        let (r, width) = (book.layers[self.done].components, book.width());
        let code = |stream: &mut Stream<C>| {
            let places = &places[stream.first..][..stream.neighbours.len()];
            let own = wish.map(|(quantised, numbers)| {
                (&quantised[stream.first * r..], &numbers[stream.first * width..][..width])
            });
            stream.layer(book, places, widths, own, watch)
        };
        self.streams.par_iter_mut().map(code).collect()
    }
}

impl<C: Coder> Stream<C> {
    /// Codes a layer of a column: whole numbers (`[tokens, components]`), and the numbers of its first token (`[width]`) if that stays
    /// as it is.
    fn layer(
        &mut self,
        book: &Book,
        places: &[Place],
        widths: &Widths,
        wish: Option<(&[i16], &[f32])>,
        watch: bool,
    ) -> Coded {
        let (coder, r) = (&mut self.coder, widths.first().map_or(0, Vec::len));
        let before = coder.spent();
        let mut coded = Coded { quantised: vec![0; places.len() * r], ..Coded::default() };
        for (t, (place, neighbours)) in places.iter().zip(&mut self.neighbours).enumerate() {
            if place.raw {
                let number = |i: usize| {
                    let wish = wish.map_or(0, |(_, raw)| f16::from_f32(raw[i]).to_bits());
                    coder.spend(16.0);
                    f16::from_bits(coder.bits(16, u32::from(wish)) as u16).to_f32()
                };
                coded.raw = (0..book.width()).map(number).collect();
                continue;
            }
            let own = t * r..(t + 1) * r;
            let wish = wish.map(|(quantised, _)| &quantised[own.clone()]);
            for (k, (out, width)) in coded.quantised[own].iter_mut().zip(&widths[place.kind]).enumerate() {
                let spent = coder.spent();
                if let Some(width) = width {
                    *out = book.tables.code(coder, *width, neighbours, wish.map_or(0, |wish| wish[k]));
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

/// Components of what a prediction misses: `[tokens, components]`.
fn innovations(layer: &LayerBook, x: &[f32], predicted: &[f32]) -> Vec<f32> {
    let (width, r) = (layer.mean.len(), layer.components);
    by_tiles(x.len() / width, r, |rows, out| {
        let all = rows.start * width..rows.end * width;
        let missed: Vec<f32> = x[all.clone()].iter().zip(&predicted[all]).map(|(x, p)| x - p).collect();
        tile_product(&missed, View::row_major(&layer.analysis, width, r), out);
    })
}

/// What parts have of all components: `[tokens, components]`.
fn beside<T: Copy + Default>(parts: &[Part], of: impl Fn(&Part) -> &[T]) -> Vec<T> {
    side_by_side(&parts.iter().map(|part| (of(part), part.wide)).collect::<Vec<_>>())
}

/// Matrices of as many rows, each with its columns, side by side.
pub fn side_by_side<T: Copy + Default>(parts: &[(&[T], usize)]) -> Vec<T> {
    let wide: usize = parts.iter().map(|(_, columns)| columns).sum();
    let mut out = vec![T::default(); parts.iter().map(|(part, _)| part.len()).sum()];
    for (t, mut out) in out.chunks_mut(wide.max(1)).enumerate() {
        for (part, columns) in parts {
            let (own, rest) = out.split_at_mut(*columns);
            own.copy_from_slice(&part[t * columns..][..*columns]);
            out = rest;
        }
    }
    out
}
