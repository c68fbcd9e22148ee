//! The distinct blocks of a layer, and what two of them have to do with each other.

use crate::model::Rope;
use crate::model::kernels::inner;
use std::collections::HashMap;

/// What two blocks have to do with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Some request holds both.
    SameRequest,
    /// Of different requests, at the same position.
    SamePosition,
    /// Of different requests, at different positions.
    Other,
    /// Any pair.
    All,
}

impl Class {
    pub const ALL: [Class; 4] = [Class::SameRequest, Class::SamePosition, Class::Other, Class::All];

    /// As in stats.csv.
    pub fn name(self) -> &'static str {
        match self {
            Class::SameRequest => "same_request",
            Class::SamePosition => "same_position",
            Class::Other => "other",
            Class::All => "all",
        }
    }
}

/// Where a block stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Home {
    /// Number of the request in the dump.
    pub request: u32,
    /// Number of the block in its request.
    pub position: u32,
}

/// The distinct blocks of one layer; exact duplicates are one block with several homes.
#[derive(Debug, Default)]
pub struct DistinctBlocks {
    /// Numbers of a block.
    pub width: usize,
    /// Keys and values scaled to unit norm, `[blocks, width]`; a block of zeros stays one.
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
    pub key_norms: Vec<f64>,
    pub value_norms: Vec<f64>,
    /// Rising; the first is the one that counts where a block can have one only.
    pub homes: Vec<Vec<Home>>,
}

impl DistinctBlocks {
    pub fn len(&self) -> usize {
        self.homes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.homes.is_empty()
    }

    pub fn class(&self, a: usize, b: usize) -> Class {
        let (a, b) = (&self.homes[a], &self.homes[b]);
        // Both lists rise by request, so one pass over both finds a common one.
        let (mut i, mut j) = (0, 0);
        while i < a.len() && j < b.len() {
            match a[i].request.cmp(&b[j].request) {
                std::cmp::Ordering::Equal => return Class::SameRequest,
                std::cmp::Ordering::Less => i += 1,
                std::cmp::Ordering::Greater => j += 1,
            }
        }
        let same = a.iter().any(|x| b.iter().any(|y| x.position == y.position));
        if same { Class::SamePosition } else { Class::Other }
    }
}

/// The distinct blocks at some places of one layer. `caches`: keys and values of each request, `[tokens, width]`. With
/// `strip`, keys are compared without positions; exact duplicates are then still looked for at equal positions only, where
/// no rounding can part them.
pub fn distinct_blocks(
    caches: &[(Vec<f32>, Vec<f32>)],
    places: &[Home],
    block_size: usize,
    width: usize,
    strip: Option<&Rope>,
) -> DistinctBlocks {
    let length = block_size * width;
    let numbers = |home: &Home| {
        let at = home.position as usize * length;
        let (keys, values) = &caches[home.request as usize];
        (&keys[at..at + length], &values[at..at + length])
    };
    let mut found = DistinctBlocks { width: length, ..DistinctBlocks::default() };
    // The last numbers of a block are cheap to look up and rarely equal by chance.
    let glance = |x: &[f32]| x.last_chunk::<2>().map(|last| last.map(f32::to_bits));
    let mut seen: HashMap<_, Vec<usize>> = HashMap::new();
    for home in places {
        let (keys, values) = numbers(home);
        let position = strip.map(|_| home.position);
        let alike = seen.entry((position, glance(keys), glance(values))).or_default();
        match alike.iter().find(|&&b| numbers(&found.homes[b][0]) == (keys, values)) {
            Some(&block) => found.homes[block].push(*home),
            None => {
                alike.push(found.homes.len());
                found.homes.push(vec![*home]);
            }
        }
    }
    let unit = |numbers: &[f32], into: &mut Vec<f32>| {
        let norm = f64::from(inner(numbers, numbers)).sqrt();
        let factor = if norm > 0.0 { 1.0 / norm } else { 0.0 };
        into.extend(numbers.iter().map(|&x| (f64::from(x) * factor) as f32));
        norm
    };
    let DistinctBlocks { keys: all_keys, values: all_values, key_norms, value_norms, homes, .. } = &mut found;
    for home in homes.iter().map(|homes| homes[0]) {
        let (keys, values) = numbers(&home);
        let mut keys = keys.to_vec();
        if let Some(rope) = strip {
            rope.strip_tokens(&mut keys, width, home.position as usize * block_size);
        }
        key_norms.push(unit(&keys, all_keys));
        value_norms.push(unit(values, all_values));
    }
    found
}
