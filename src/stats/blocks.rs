//! The distinct blocks of a layer, and what two of them have to do with each other.

use crate::error::Result;
use crate::interrupt;
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

/// Reads keys and values of some requests, `[tokens, width]` each, in their order.
pub type ReadCaches<'a> = dyn Fn(&[u32]) -> Result<Vec<(Vec<f32>, Vec<f32>)>> + 'a;

/// Requests whose caches are in memory at a time.
const READ: usize = 16;

/// The distinct blocks at some places of one layer, which rise by request. With `strip`, keys are compared without positions; exact
/// duplicates are then still looked for at equal positions only, where no rounding can part them.
pub fn distinct_blocks(
    caches: &ReadCaches,
    places: &[Home],
    block_size: usize,
    width: usize,
    strip: Option<&Rope>,
) -> Result<DistinctBlocks> {
    let length = block_size * width;
    let mut found = DistinctBlocks { width: length, ..DistinctBlocks::default() };
    // The last numbers of a block are cheap to look up and rarely equal by chance.
    let glance = |x: &[f32]| x.last_chunk::<2>().map(|last| last.map(f32::to_bits));
    let mut seen: HashMap<_, Vec<usize>> = HashMap::new();
    let by_request: Vec<&[Home]> = places.chunk_by(|a, b| a.request == b.request).collect();
    for some in by_request.chunks(READ) {
        interrupt::check()?;
        let requests: Vec<u32> = some.iter().map(|homes| homes[0].request).collect();
        for (homes, (keys, values)) in some.iter().zip(caches(&requests)?) {
            for home in *homes {
                let at = home.position as usize * length..(home.position as usize + 1) * length;
                let (keys, values) = (&keys[at.clone()], &values[at]);
                let position = strip.map(|_| home.position);
                let alike = seen.entry((position, glance(keys), glance(values))).or_default();
                let same = |b: &&usize| {
                    let at = **b * length..(**b + 1) * length;
                    found.keys[at.clone()] == *keys && found.values[at] == *values
                };
                match alike.iter().find(same) {
                    Some(&block) => found.homes[block].push(*home),
                    None => {
                        alike.push(found.homes.len());
                        found.homes.push(vec![*home]);
                        found.keys.extend_from_slice(keys);
                        found.values.extend_from_slice(values);
                    }
                }
            }
        }
    }
    let unit = |numbers: &mut [f32]| {
        let norm = f64::from(inner(numbers, numbers)).sqrt();
        let factor = if norm > 0.0 { 1.0 / norm } else { 0.0 };
        numbers.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
        norm
    };
    let DistinctBlocks { keys, values, key_norms, value_norms, homes, .. } = &mut found;
    for (home, keys) in homes.iter().map(|homes| homes[0]).zip(keys.chunks_exact_mut(length)) {
        if let Some(rope) = strip {
            rope.strip_tokens(keys, width, home.position as usize * block_size);
        }
        key_norms.push(unit(keys));
    }
    value_norms.extend(values.chunks_exact_mut(length).map(unit));
    Ok(found)
}
