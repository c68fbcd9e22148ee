//! One group of layers as the pairings see it: distinct vectors, their cosines, and the units that may fuse.

use super::blocks::Blocks;
use super::choices::{Choices, Positions, RopeMode};
use super::rule::Gate;
use crate::block::Part;
use crate::codec::CacheBatch;
use crate::error::{Error, Result};
use crate::model::kernels::inner;
use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

/// Distinct blocks beyond which all pairs are too many for memory (a table of 2.3 GiB).
const MOST_VECTORS: usize = 24_576;

/// The blocks of a group of layers. A block's vector is that of all its layers, one after the other; `vectors` numbers
/// the distinct ones.
pub struct Geometry<'a> {
    pub batch: &'a CacheBatch,
    pub blocks: &'a Blocks,
    pub rope: RopeMode,
    pub layers: Range<usize>,
    /// Place -> distinct vector.
    vectors: Cow<'a, [u32]>,
    /// Distinct vector -> the first place that has it.
    pub first: Cow<'a, [usize]>,
    key: Products<'a>,
    value: Products<'a>,
}

/// Inner products of keys or of values.
struct Products<'a> {
    /// `[vectors, vectors]`, or computed pair by pair.
    table: Option<Cow<'a, [f32]>>,
    /// 1 / norm of every vector; 0 for a zero vector.
    inverse_norms: Vec<f32>,
}

impl<'a> Geometry<'a> {
    pub fn new(batch: &'a CacheBatch, blocks: &'a Blocks, rope: RopeMode, layers: Range<usize>) -> Self {
        let (vectors, first) = if layers.len() == 1 {
            let layer = blocks.layer(batch, rope, layers.start);
            (Cow::Borrowed(&layer.vectors[..]), Cow::Borrowed(&layer.first[..]))
        } else {
            let mut seen: HashMap<Vec<u32>, u32> = HashMap::new();
            let mut first = Vec::new();
            let vectors = (0..blocks.places.len()).map(|place| {
                let of = layers.clone().map(|l| blocks.layer(batch, rope, l).vectors[place]);
                *seen.entry(of.collect()).or_insert_with(|| {
                    first.push(place);
                    first.len() as u32 - 1
                })
            });
            (Cow::Owned(vectors.collect()), Cow::Owned(first))
        };
        let mut geometry = Geometry {
            batch,
            blocks,
            rope,
            layers,
            vectors,
            first,
            key: Products { table: None, inverse_norms: Vec::new() },
            value: Products { table: None, inverse_norms: Vec::new() },
        };
        for part in [Part::Key, Part::Value] {
            let square = |place: usize, layer: usize| {
                let layer = blocks.layer(batch, rope, layer);
                let (key, value) = layer.squares[layer.vectors[place] as usize];
                if part == Part::Key { key } else { value }
            };
            let squares = geometry.first.iter().map(|&p| geometry.layers.clone().map(|l| square(p, l)).sum());
            let inverse = |s: f64| if s > 0.0 { (1.0 / s.sqrt()) as f32 } else { 0.0 };
            let inverse_norms = squares.map(inverse).collect();
            geometry.products_mut(part).inverse_norms = inverse_norms;
        }
        geometry
    }

    /// Computes all inner products at once, or takes those of an earlier arm.
    pub fn tabulate(&mut self, part: Part) -> Result<()> {
        let n = self.first.len();
        if n > MOST_VECTORS {
            let message = format!(
                "{n} distinct blocks a layer are too many to compare each with each (at most {MOST_VECTORS}): \
                 use pairing=lsh or fewer requests a batch"
            );
            return Err(Error::argument(message));
        }
        if self.products(part).table.is_some() {
            return Ok(());
        }
        let table = if self.layers.len() == 1 {
            self.blocks.gram(self.batch, self.rope, part, self.layers.start)
        } else {
            let mut sum = vec![0.0; n * n];
            for layer in self.layers.clone() {
                let own = self.blocks.layer(self.batch, self.rope, layer);
                let gram = self.blocks.gram(self.batch, self.rope, part, layer);
                let number = |v: usize| own.vectors[self.first[v]] as usize;
                for (i, row) in sum.chunks_exact_mut(n).enumerate() {
                    let from = &gram[number(i) * own.first.len()..][..own.first.len()];
                    for (j, x) in row.iter_mut().enumerate() {
                        *x += from[number(j)];
                    }
                }
            }
            Cow::Owned(sum)
        };
        self.products_mut(part).table = Some(table);
        Ok(())
    }

    fn products(&self, part: Part) -> &Products<'a> {
        match part {
            Part::Key => &self.key,
            Part::Value => &self.value,
        }
    }

    fn products_mut(&mut self, part: Part) -> &mut Products<'a> {
        match part {
            Part::Key => &mut self.key,
            Part::Value => &mut self.value,
        }
    }

    /// Number of distinct vectors.
    pub fn distinct(&self) -> usize {
        self.first.len()
    }

    /// Distinct vector of a place.
    pub fn vector(&self, place: usize) -> usize {
        self.vectors[place] as usize
    }

    /// One layer of a place's vector.
    pub fn numbers(&self, part: Part, layer: usize, place: usize) -> Cow<'a, [f32]> {
        self.blocks.numbers(self.batch, self.rope, part, layer, place)
    }

    /// Inner product of two vectors, read from their numbers.
    fn dot(&self, part: Part, a: usize, b: usize) -> f64 {
        let layer = |l: usize| {
            let (x, y) = (self.numbers(part, l, self.first[a]), self.numbers(part, l, self.first[b]));
            f64::from(inner(&x, &y))
        };
        self.layers.clone().map(layer).sum()
    }

    pub fn norm(&self, part: Part, vector: usize) -> f64 {
        let inverse = f64::from(self.products(part).inverse_norms[vector]);
        if inverse > 0.0 { 1.0 / inverse } else { 0.0 }
    }

    /// Norm of a vector's keys and of its values, added: breaks ties by what a block is, not by where it stands.
    pub fn energy(&self, vector: usize) -> f64 {
        self.norm(Part::Key, vector) + self.norm(Part::Value, vector)
    }

    pub fn inverse_norms(&self, part: Part) -> &[f32] {
        &self.products(part).inverse_norms
    }

    /// Inner products of a vector with all; only after [`Geometry::tabulate`].
    pub fn products_of(&self, part: Part, vector: usize) -> &[f32] {
        let n = self.distinct();
        self.products(part).table.as_ref().map_or(&[], |t| &t[vector * n..][..n])
    }

    pub fn cosine(&self, part: Part, a: usize, b: usize) -> f32 {
        let products = self.products(part);
        let dot = match &products.table {
            Some(table) => table[a * self.distinct() + b],
            None => self.dot(part, a, b) as f32,
        };
        dot * products.inverse_norms[a] * products.inverse_norms[b]
    }

    /// How far two vectors lie above the gate.
    pub fn margin(&self, gate: &Gate, a: usize, b: usize) -> f32 {
        let key = if gate.needs_keys() { self.cosine(Part::Key, a, b) } else { 0.0 };
        let value = if gate.needs_values() { self.cosine(Part::Value, a, b) } else { 0.0 };
        gate.margin(key, value)
    }
}

/// What the pairings put together: blocks, or classes of exact duplicates.
pub struct Units {
    /// The places of each unit, ascending.
    pub places: Vec<Vec<usize>>,
    /// The vector that all places of a unit have.
    pub vector: Vec<usize>,
    /// Units of different classes must not meet.
    pub class: Vec<u32>,
}

impl Units {
    /// A unit a block, in order: the tree's.
    pub fn blocks(geometry: &Geometry, choices: &Choices) -> Self {
        let places = geometry.blocks.places.len();
        Units {
            places: (0..places).map(|p| vec![p]).collect(),
            vector: (0..places).map(|p| geometry.vector(p)).collect(),
            class: classes(geometry, choices),
        }
    }

    /// A unit a class of exact duplicates.
    pub fn distinct(geometry: &Geometry, choices: &Choices) -> Self {
        let mut units = Units { places: Vec::new(), vector: Vec::new(), class: Vec::new() };
        let mut seen: HashMap<(usize, u32), usize> = HashMap::new();
        for (place, class) in classes(geometry, choices).into_iter().enumerate() {
            let vector = geometry.vector(place);
            let unit = *seen.entry((vector, class)).or_insert_with(|| {
                units.places.push(Vec::new());
                units.vector.push(vector);
                units.class.push(class);
                units.places.len() - 1
            });
            units.places[unit].push(place);
        }
        units
    }

    pub fn len(&self) -> usize {
        self.places.len()
    }
}

/// Blocks that may meet have the same class: their tenants, and where asked for their positions, are the same.
fn classes(geometry: &Geometry, choices: &Choices) -> Vec<u32> {
    let mut seen: HashMap<(&str, usize), u32> = HashMap::new();
    let class = |place: &super::blocks::Place| {
        let tenant = if choices.within_tenant { &geometry.batch.tenants[place.request][..] } else { "" };
        let position = if choices.positions == Positions::Same { place.block } else { 0 };
        let next = seen.len() as u32;
        *seen.entry((tenant, position)).or_insert(next)
    };
    geometry.blocks.places.iter().map(class).collect()
}
