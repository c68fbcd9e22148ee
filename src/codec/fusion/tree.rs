//! The paper's recursive fusion of one layer.
//!
//! A fused row is a weighted sum of blocks, so all its inner products follow from the table of inner products of the
//! blocks themselves: no level of the tree reads a key or a value.

use super::choices::Representative;
use super::cluster::{Centre, Cluster};
use super::geometry::{Geometry, Units};
use super::rule::Gate;
use crate::block::Part;
use crate::model::gemm::{View, product};
use crate::model::kernels::{add_multiple, inner};
use std::ops::Range;

/// What a row of a node stands for.
#[derive(Debug, Clone, Copy)]
struct Row {
    direction: Direction,
    class: u32,
    /// Whether blocks were merged into it.
    fused: bool,
    /// Blocks that have a vote in it.
    blocks: usize,
}

#[derive(Debug, Clone, Copy)]
enum Direction {
    /// One block's own.
    Unit(usize),
    /// A mean: the number of its row in [`Means`].
    Mean(usize),
}

/// Means of keys or of values as unit vectors.
#[derive(Default)]
struct Means {
    /// Weights of the distinct unit vectors they are made of, `[means, vectors]`.
    weights: Vec<f32>,
    /// Cosines with all distinct vectors, `[means, vectors]`.
    cosines: Vec<f32>,
}

/// The fused blocks of a range of leaves.
struct Node {
    rows: Vec<Row>,
    key: Means,
    value: Means,
    /// For every block of the range, in order: the row it is restored from.
    back: Vec<usize>,
}

/// What the whole tree shares.
pub struct Tree<'a> {
    pub geometry: &'a Geometry<'a>,
    pub units: &'a Units,
    pub gate: Gate,
    pub representative: Representative,
}

impl Tree<'_> {
    /// The clusters at the root: all rows into which blocks were merged.
    pub fn clusters(&self) -> Vec<Cluster> {
        let places = &self.geometry.blocks.places;
        let mut leaves: Vec<Range<usize>> = Vec::with_capacity(self.geometry.blocks.leaves);
        for leaf in 0..self.geometry.blocks.leaves {
            let first = leaves.last().map_or(0, |l| l.end);
            let end = first + places[first..].iter().take_while(|p| p.leaf == leaf).count();
            leaves.push(first..end);
        }
        let root = self.fuse(&leaves);
        let mut units: Vec<Vec<usize>> = vec![Vec::new(); root.rows.len()];
        for (unit, &row) in root.back.iter().enumerate() {
            units[row].push(unit);
        }
        let fused = root.rows.iter().zip(units).filter(|(row, units)| row.fused && !units.is_empty());
        fused
            .map(|(row, mut units)| match row.direction {
                Direction::Mean(m) => {
                    let centre =
                        Centre { key: self.sparse(&root.key, m), value: self.sparse(&root.value, m) };
                    Cluster { units, centre: Some(centre) }
                }
                Direction::Unit(first) => {
                    // Its own unit may have been restored from elsewhere: then whoever is left begins.
                    if let Some(at) = units.iter().position(|&u| u == first) {
                        units[..=at].rotate_right(1);
                    }
                    Cluster::of(units)
                }
            })
            .collect()
    }

    fn sparse(&self, means: &Means, mean: usize) -> Vec<(usize, f32)> {
        let n = self.geometry.distinct();
        let weights = means.weights[mean * n..][..n].iter().copied().enumerate();
        weights.filter(|(_, w)| *w != 0.0).collect()
    }

    /// floor(n/2) leaves to the left, the rest to the right, each side first.
    fn fuse(&self, leaves: &[Range<usize>]) -> Node {
        match leaves {
            [] => Node { rows: Vec::new(), key: Means::default(), value: Means::default(), back: Vec::new() },
            [leaf] => {
                let row = |unit: usize| Row {
                    direction: Direction::Unit(unit),
                    class: self.units.class[unit],
                    fused: false,
                    blocks: 1,
                };
                Node {
                    rows: leaf.clone().map(row).collect(),
                    key: Means::default(),
                    value: Means::default(),
                    back: (0..leaf.len()).collect(),
                }
            }
            _ => {
                let (left, right) = leaves.split_at(leaves.len() / 2);
                self.merge(&self.fuse(left), &self.fuse(right))
            }
        }
    }

    /// One node. The output is: the fused lefts in ascending order, the unmatched lefts, the unmatched rights.
    ///
    /// A right row that matches several lefts enters all their means and is restored to the last of them: the paper's
    /// rule, kept here to compare with.
    fn merge(&self, left: &Node, right: &Node) -> Node {
        let mut out =
            Node { rows: Vec::new(), key: Means::default(), value: Means::default(), back: Vec::new() };
        let mut left_to: Vec<Option<usize>> = vec![None; left.rows.len()];
        let mut right_to: Vec<Option<usize>> = vec![None; right.rows.len()];
        let between =
            |needed: bool, part: Part| needed.then(|| Between::new(self.geometry, part, left, right));
        let keys = between(self.gate.needs_keys(), Part::Key);
        let values = between(self.gate.needs_values(), Part::Value);
        let (mut key_row, mut value_row) = (vec![0.0; right.rows.len()], vec![0.0; right.rows.len()]);
        let mut matches = Vec::new();
        for (i, left_to) in left_to.iter_mut().enumerate() {
            if let Some(keys) = &keys {
                keys.row(self, i, &mut key_row);
            }
            if let Some(values) = &values {
                values.row(self, i, &mut value_row);
            }
            let is_match = |&j: &usize| {
                self.gate.margin(key_row[j], value_row[j]) > 0.0 && left.rows[i].class == right.rows[j].class
            };
            matches.clear();
            matches.extend((0..right.rows.len()).filter(is_match));
            if matches.is_empty() {
                continue;
            }
            *left_to = Some(out.rows.len());
            for &j in &matches {
                right_to[j] = Some(out.rows.len());
            }
            self.push_merged(&mut out, left, i, right, &matches);
        }
        for (side, to) in [(left, &mut left_to), (right, &mut right_to)] {
            for (i, to) in to.iter_mut().enumerate().filter(|(_, to)| to.is_none()) {
                *to = Some(out.rows.len());
                let mut row = side.rows[i];
                if let Direction::Mean(m) = row.direction {
                    row.direction = Direction::Mean(out.key.copy(&side.key, m, self.geometry.distinct()));
                    out.value.copy(&side.value, m, self.geometry.distinct());
                }
                out.rows.push(row);
            }
            // Every row has its place now.
            out.back.extend(side.back.iter().filter_map(|&row| to[row]));
        }
        out
    }

    /// Appends what `left`'s row i and `right`'s rows `js` become: for keys and, replayed, for values.
    fn push_merged(&self, out: &mut Node, left: &Node, i: usize, right: &Node, js: &[usize]) {
        let all = || std::iter::once((left, i)).chain(js.iter().map(|&j| (right, j)));
        let blocks = all().map(|(node, row)| node.rows[row].blocks).sum();
        let direction = match self.representative {
            Representative::Mean | Representative::Weighted => {
                let mean = out.key.push_sum(self, Part::Key, all());
                out.value.push_sum(self, Part::Value, all());
                Direction::Mean(mean)
            }
            Representative::First => left.rows[i].direction,
            Representative::Medoid => {
                let vector = |direction: Direction| match direction {
                    Direction::Unit(u) => self.units.vector[u],
                    Direction::Mean(_) => unreachable!("blocks as they are have no means"),
                };
                let total = |a: usize| -> f32 {
                    all()
                        .map(|(node, row)| {
                            self.geometry.margin(&self.gate, a, vector(node.rows[row].direction))
                        })
                        .sum()
                };
                // The first of equals.
                let mut best = (f32::NEG_INFINITY, left.rows[i].direction);
                for (node, row) in all() {
                    let direction = node.rows[row].direction;
                    let total = total(vector(direction));
                    if total > best.0 {
                        best = (total, direction);
                    }
                }
                best.1
            }
        };
        out.rows.push(Row { direction, class: left.rows[i].class, fused: true, blocks });
    }
}

impl Node {
    fn means(&self, part: Part) -> &Means {
        match part {
            Part::Key => &self.key,
            Part::Value => &self.value,
        }
    }
}

impl Means {
    /// Appends another node's mean; returns its number here.
    fn copy(&mut self, from: &Means, mean: usize, n: usize) -> usize {
        self.weights.extend_from_slice(&from.weights[mean * n..][..n]);
        self.cosines.extend_from_slice(&from.cosines[mean * n..][..n]);
        self.weights.len() / n - 1
    }

    /// Appends the mean direction of rows; returns its number.
    fn push_sum<'n>(
        &mut self,
        tree: &Tree,
        part: Part,
        rows: impl Iterator<Item = (&'n Node, usize)> + Clone,
    ) -> usize {
        let n = tree.geometry.distinct();
        let start = self.weights.len();
        self.weights.resize(start + n, 0.0);
        self.cosines.resize(start + n, 0.0);
        let (weights, cosines) = (&mut self.weights[start..], &mut self.cosines[start..]);
        let votes = |row: &Row| match tree.representative {
            Representative::Weighted => row.blocks as f32,
            _ => 1.0,
        };
        for (node, row) in rows.clone() {
            if let Direction::Unit(u) = node.rows[row].direction {
                weights[tree.units.vector[u]] += votes(&node.rows[row]);
            }
        }
        let inverse = tree.geometry.inverse_norms(part);
        for (v, &weight) in weights.iter().enumerate().filter(|(_, w)| **w != 0.0) {
            add_multiple(cosines, weight * inverse[v], tree.geometry.products_of(part, v));
        }
        for (cosine, inverse) in cosines.iter_mut().zip(inverse) {
            *cosine *= inverse;
        }
        for (node, row) in rows {
            if let Direction::Mean(m) = node.rows[row].direction {
                let (from, votes) = (node.means(part), votes(&node.rows[row]));
                add_multiple(weights, votes, &from.weights[m * n..][..n]);
                add_multiple(cosines, votes, &from.cosines[m * n..][..n]);
            }
        }
        let square = inner(weights, cosines);
        let factor = if square > 0.0 { 1.0 / square.sqrt() } else { 0.0 };
        for x in weights.iter_mut().chain(cosines) {
            *x *= factor;
        }
        start / n
    }
}

/// Cosines between the rows of two nodes.
struct Between<'n> {
    part: Part,
    left: &'n Node,
    right: &'n Node,
    /// Left means with right means, `[left means, right means]`.
    means: Vec<f32>,
    right_means: usize,
}

impl<'n> Between<'n> {
    fn new(geometry: &Geometry, part: Part, left: &'n Node, right: &'n Node) -> Self {
        let n = geometry.distinct();
        let (from, to) = (&left.means(part).cosines, &right.means(part).weights);
        let (rows, columns) = (from.len() / n.max(1), to.len() / n.max(1));
        let mut means = vec![0.0; rows * columns];
        let to = View::row_major(to, columns, n).transposed();
        product(View::row_major(from, rows, n), to, &mut means);
        Between { part, left, right, means, right_means: columns }
    }

    /// Cosines of left row i with every right row.
    fn row(&self, tree: &Tree, i: usize, out: &mut [f32]) {
        let n = tree.geometry.distinct();
        let inverse = tree.geometry.inverse_norms(self.part);
        let theirs = &self.right.means(self.part).cosines;
        match self.left.rows[i].direction {
            Direction::Unit(u) => {
                let vector = tree.units.vector[u];
                let products = tree.geometry.products_of(self.part, vector);
                for (out, row) in out.iter_mut().zip(&self.right.rows) {
                    *out = match row.direction {
                        Direction::Unit(u) => {
                            let other = tree.units.vector[u];
                            products[other] * inverse[vector] * inverse[other]
                        }
                        Direction::Mean(m) => theirs[m * n + vector],
                    };
                }
            }
            Direction::Mean(mine) => {
                let cosines = &self.left.means(self.part).cosines[mine * n..][..n];
                for (out, row) in out.iter_mut().zip(&self.right.rows) {
                    *out = match row.direction {
                        Direction::Unit(u) => cosines[tree.units.vector[u]],
                        Direction::Mean(m) => self.means[mine * self.right_means + m],
                    };
                }
            }
        }
    }
}
