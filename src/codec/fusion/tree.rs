//! The paper's recursive fusion of one layer.

use super::similarity::pairs_above;
use crate::block::{BlockId, BlockPool, Scale};

/// One request's full blocks of one layer, scaled to unit norm.
pub struct Leaf {
    /// `[blocks, width]`.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// The norms taken off, which restore the blocks.
    pub scales: Vec<Scale>,
}

impl Leaf {
    pub fn new(pool: &BlockPool, blocks: &[BlockId]) -> Self {
        let width = pool.shape().block_width();
        let mut leaf = Leaf {
            keys: Vec::with_capacity(blocks.len() * width),
            values: Vec::with_capacity(blocks.len() * width),
            scales: Vec::with_capacity(blocks.len()),
        };
        for &block in blocks {
            let key = push_unit(&mut leaf.keys, pool.keys(block));
            let value = push_unit(&mut leaf.values, pool.values(block));
            leaf.scales.push(Scale { key, value });
        }
        leaf
    }
}

/// What a row of a node stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// One block, as it was.
    Single,
    /// The normalised mean of several.
    Fused,
}

/// The fused blocks of a range of requests.
pub struct Node {
    width: usize,
    /// `[rows, width]` unit vectors each.
    keys: Vec<f32>,
    values: Vec<f32>,
    pub rows: Vec<Row>,
    /// For every leaf block of the range, in order: the row it is restored from.
    pub back: Vec<usize>,
}

impl Node {
    fn leaf(leaf: Leaf, width: usize) -> Self {
        let n = leaf.scales.len();
        Node {
            width,
            keys: leaf.keys,
            values: leaf.values,
            rows: vec![Row::Single; n],
            back: (0..n).collect(),
        }
    }

    fn empty(width: usize) -> Self {
        Node { width, keys: Vec::new(), values: Vec::new(), rows: Vec::new(), back: Vec::new() }
    }

    pub fn key_row(&self, row: usize) -> &[f32] {
        &self.keys[row * self.width..][..self.width]
    }

    pub fn value_row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..][..self.width]
    }

    fn push(&mut self, row: Row, keys: &[f32], values: &[f32]) {
        self.keys.extend_from_slice(keys);
        self.values.extend_from_slice(values);
        self.rows.push(row);
    }

    /// Appends the mean direction of `left`'s row i and `right`'s rows `js`, for keys and, replayed, for values.
    fn push_mean(&mut self, left: &Node, i: usize, right: &Node, js: &[usize]) {
        let width = self.width;
        let sum = |first: &[f32], all: &[f32]| {
            let mut sum = first.to_vec();
            for &j in js {
                for (s, x) in sum.iter_mut().zip(&all[j * width..][..width]) {
                    *s += x;
                }
            }
            sum
        };
        // A mean's length does not matter: the sum points the same way.
        let keys = sum(left.key_row(i), &right.keys);
        let values = sum(left.value_row(i), &right.values);
        push_unit(&mut self.keys, &keys);
        push_unit(&mut self.values, &values);
        self.rows.push(Row::Fused);
    }
}

/// Fuses the leaves: floor(n/2) of them to the left, the rest to the right, each side first.
pub fn fuse(mut leaves: Vec<Leaf>, width: usize, tau: f32) -> Node {
    match leaves.len() {
        0 => Node::empty(width),
        1 => Node::leaf(leaves.remove(0), width),
        n => {
            let right = leaves.split_off(n / 2);
            merge(&fuse(leaves, width, tau), &fuse(right, width, tau), tau)
        }
    }
}

/// One node. The output is: the fused lefts in ascending order, the unmatched lefts, the unmatched rights.
///
/// A right row that matches several lefts enters all their means and is restored to the last of them: the paper's
/// rule, kept here to compare with.
fn merge(left: &Node, right: &Node, tau: f32) -> Node {
    let mut out = Node::empty(left.width);
    let mut left_to: Vec<Option<usize>> = vec![None; left.rows.len()];
    let mut right_to: Vec<Option<usize>> = vec![None; right.rows.len()];
    pairs_above(&left.keys, &right.keys, left.width, tau, |i, js| {
        let row = out.rows.len();
        out.push_mean(left, i, right, js);
        left_to[i] = Some(row);
        for &j in js {
            right_to[j] = Some(row);
        }
    });
    for (side, to) in [(left, &mut left_to), (right, &mut right_to)] {
        for (i, to) in to.iter_mut().enumerate().filter(|(_, to)| to.is_none()) {
            *to = Some(out.rows.len());
            out.push(side.rows[i], side.key_row(i), side.value_row(i));
        }
        // Every row has its place now.
        out.back.extend(side.back.iter().filter_map(|&row| to[row]));
    }
    out
}

/// Appends `x / |x|` (zero stays zero) and returns |x|.
fn push_unit(out: &mut Vec<f32>, x: &[f32]) -> f32 {
    let norm = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let factor = if norm > 0.0 { (1.0 / norm) as f32 } else { 0.0 };
    out.extend(x.iter().map(|x| x * factor));
    norm as f32
}
