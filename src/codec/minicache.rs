//! MiniCache-like: the caches of two neighbouring layers in one. Of each token both layers keep their own norm and share a direction between
//! theirs; tokens whose directions are far apart stay as they are.

use super::registry::{Method, Scale, Search, number};
use super::{CacheBatch, Codec, Coverage, Memo, Role};
use crate::block::{BlockId, Part, Payload, halves};
use crate::error::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;

/// How far the shared direction lies from the shallower layer's to the deeper one's (the paper's).
const BETWEEN: f32 = 0.6;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct MiniCache {
    /// Share of the tokens of a pair of layers, those whose directions are farthest apart, that stay as they are
    #[arg(long, default_value_t = 0.05, value_parser = number("a share", Bound::Included(0.0), Bound::Included(1.0)))]
    retain: f64,
    /// Share of the layers, from the first on, that are left alone
    #[arg(long, default_value_t = 0.5, value_parser = number("a share", Bound::Included(0.0), Bound::Excluded(1.0)))]
    from: f64,
}

impl Method for MiniCache {
    const NAME: &'static str = "minicache";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "Two neighbouring layers of the deeper half in one: of each token's keys, and of its values, both keep their norm and share a direction \
                                 between theirs; a bit a token says which ones, farthest apart, stay as they are.";
    const PAPER: &'static str = "after Liu et al. 2024, MiniCache (arXiv 2405.14366)";
    const DIALS: &'static [&'static str] = &["retain"];
    const SEARCH: Option<Search> =
        Some(Search { option: "retain", fine: 1.0, coarse: 0.0, scale: Scale::Linear });

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(*self))
    }
}

/// Pages of the same tokens in two neighbouring layers.
type Pair = (BlockId, BlockId);

impl Codec for MiniCache {
    fn coverage(&self, layers: usize) -> Coverage {
        Coverage::of(self.first(layers)..layers)
    }

    fn takes_changed(&self) -> bool {
        false
    }

    fn encode(&self, batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        let layers = batch.caches.first().map_or(0, |c| c.layers.len());
        for layer in (self.first(layers)..layers.saturating_sub(1)).step_by(2) {
            let pairs = pairs(batch, layer, |batch, page| batch.pool.payload(page).is_none());
            let shared = &*batch;
            let farthest = Part::BOTH.map(|part| self.farthest(shared, &pairs, part));
            let coded: Vec<Vec<u8>> = pairs.par_iter().map(|&pair| bytes(shared, pair, farthest)).collect();
            for (pair, bytes) in pairs.into_iter().zip(coded) {
                read(batch, pair, bytes)?;
            }
        }
        Ok(())
    }

    fn decode(&self, batch: &mut CacheBatch) -> Result<()> {
        let layers = batch.caches.first().map_or(0, |c| c.layers.len());
        for layer in (self.first(layers)..layers.saturating_sub(1)).step_by(2) {
            for pair in pairs(batch, layer, |batch, page| batch.pool.payload(page).is_some()) {
                let bytes = batch.pool.payload(pair.0).map(|p| p.bytes.clone()).unwrap_or_default();
                read(batch, pair, bytes)?;
            }
        }
        Ok(())
    }
}

impl MiniCache {
    /// The first layer that is paired.
    fn first(&self, layers: usize) -> usize {
        (layers as f64 * self.from).ceil() as usize
    }

    /// The angle beyond which tokens stay as they are.
    fn farthest(&self, batch: &CacheBatch, pairs: &[Pair], part: Part) -> f32 {
        let width = batch.pool.shape().token_width();
        let of = |&(a, b): &Pair| {
            let (x, y) = (batch.pool.numbers(a, part), batch.pool.numbers(b, part));
            let angles = x.chunks_exact(width).zip(y.chunks_exact(width)).map(|(x, y)| angle(x, y));
            angles.collect::<Vec<f32>>()
        };
        let mut angles: Vec<f32> = pairs.par_iter().flat_map_iter(of).collect();
        angles.sort_by(f32::total_cmp);
        let merged = ((1.0 - self.retain) * angles.len() as f64).round() as usize;
        // Nothing is as near as this where nothing is to be merged.
        if merged == 0 { -1.0 } else { angles[merged - 1] }
    }
}

/// Pages that stand side by side in a layer and the next, each pair once, in the order of requests. Pages that one of the layers pairs with
/// several of the other stay alone.
fn pairs(batch: &CacheBatch, layer: usize, wanted: impl Fn(&CacheBatch, BlockId) -> bool) -> Vec<Pair> {
    let mut all: Vec<Pair> = Vec::new();
    let mut seen: HashSet<Pair> = HashSet::new();
    for cache in &batch.caches {
        let sides = cache.layers[layer].entries.iter().zip(&cache.layers[layer + 1].entries);
        all.extend(sides.map(|(a, b)| (a.block, b.block)).filter(|&pair| seen.insert(pair)));
    }
    let mut times = HashMap::new();
    for &(a, b) in &all {
        *times.entry(a).or_insert(0) += 1;
        *times.entry(b).or_insert(0) += 1;
    }
    let fits = |&(a, b): &Pair| {
        a != b
            && times[&a] == 1
            && times[&b] == 1
            && batch.pool.tokens(a) == batch.pool.tokens(b)
            && wanted(batch, a)
            && wanted(batch, b)
    };
    all.into_iter().filter(fits).collect()
}

fn norm(x: &[f32]) -> f32 {
    x.iter().map(|x| x * x).sum::<f32>().sqrt()
}

/// Between two vectors, radians; 0 where one is zero.
fn angle(x: &[f32], y: &[f32]) -> f32 {
    let norms = norm(x) * norm(y);
    let product: f32 = x.iter().zip(y).map(|(x, y)| x * y).sum();
    if norms > 0.0 { (product / norms).clamp(-1.0, 1.0).acos() } else { 0.0 }
}

/// The unit vector on the way from the direction of `x` to that of `y` (spherical interpolation, Shoemake 1985).
fn between(x: &[f32], y: &[f32]) -> Vec<f32> {
    let (angle, norms) = (angle(x, y), (norm(x), norm(y)));
    let weights = match angle.sin() {
        sine if sine > 1e-4 => (((1.0 - BETWEEN) * angle).sin() / sine, (BETWEEN * angle).sin() / sine),
        _ => (1.0 - BETWEEN, BETWEEN),
    };
    // A vector of zeros has no direction: the other's is taken.
    let weights = match norms {
        (x, y) if x > 0.0 && y > 0.0 => weights,
        (x, _) if x > 0.0 => (1.0, 0.0),
        _ => (0.0, 1.0),
    };
    let unit = |x: f32, norm: f32| if norm > 0.0 { x / norm } else { 0.0 };
    x.iter().zip(y).map(|(&x, &y)| weights.0 * unit(x, norms.0) + weights.1 * unit(y, norms.1)).collect()
}

/// Keys, then values: a bit a token, set if it is merged; then token by token both norms and the direction, or both vectors. All f16.
fn bytes(batch: &CacheBatch, (a, b): Pair, farthest: [f32; 2]) -> Vec<u8> {
    let width = batch.pool.shape().token_width();
    let mut bytes = Vec::new();
    for part in Part::BOTH {
        let (x, y) = (batch.pool.numbers(a, part), batch.pool.numbers(b, part));
        let tokens = || x.chunks_exact(width).zip(y.chunks_exact(width));
        let merged: Vec<bool> = tokens().map(|(x, y)| angle(x, y) <= farthest[part as usize]).collect();
        let mut flags = vec![0u8; merged.len().div_ceil(8)];
        for (i, &merged) in merged.iter().enumerate() {
            flags[i / 8] |= u8::from(merged) << (i % 8);
        }
        bytes.extend(flags);
        for ((x, y), merged) in tokens().zip(merged) {
            if merged {
                bytes.extend(halves::to_bytes(&[norm(x), norm(y)]));
                bytes.extend(halves::to_bytes(&between(x, y)));
            } else {
                bytes.extend(halves::to_bytes(x));
                bytes.extend(halves::to_bytes(y));
            }
        }
    }
    bytes
}

/// Puts what the bytes say into both pages; each bears half of the bits, the first all of the bytes.
fn read(batch: &mut CacheBatch, (a, b): Pair, bytes: Vec<u8>) -> Result<()> {
    let width = batch.pool.shape().token_width();
    let tokens = batch.pool.tokens(a);
    let (mut x, mut y): ([Vec<f32>; 2], [Vec<f32>; 2]) = Default::default();
    let mut rest = &bytes[..];
    for part in 0..2 {
        let flags = take(&mut rest, tokens.div_ceil(8))?;
        for i in 0..tokens {
            if flags[i / 8] >> (i % 8) & 1 == 1 {
                let norms = halves::from_bytes(take(&mut rest, 4)?);
                let direction = halves::from_bytes(take(&mut rest, 2 * width)?);
                x[part].extend(direction.iter().map(|d| d * norms[0]));
                y[part].extend(direction.iter().map(|d| d * norms[1]));
            } else {
                x[part].extend(halves::from_bytes(take(&mut rest, 2 * width)?));
                y[part].extend(halves::from_bytes(take(&mut rest, 2 * width)?));
            }
        }
    }
    if !rest.is_empty() {
        return Err(foreign());
    }
    // The flags are side information.
    let (bits, side_bits) = (8 * bytes.len() as u64, 2 * 8 * tokens.div_ceil(8) as u64);
    let code_bits = bits - side_bits;
    let half = |bytes, first: bool| Payload {
        bytes,
        code_bits: code_bits / 2 + if first { code_bits % 2 } else { 0 },
        side_bits: if first { side_bits } else { 0 },
    };
    let [keys, values] = y;
    batch.pool.recode(b, keys, values, half(Vec::new(), false), None);
    let [keys, values] = x;
    batch.pool.recode(a, keys, values, half(bytes, true), None);
    Ok(())
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8]> {
    let (taken, left) = rest.split_at_checked(count).ok_or_else(foreign)?;
    *rest = left;
    Ok(taken)
}

fn foreign() -> Error {
    Error::argument("has a pair of pages of another shape")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shared_direction_lies_six_tenths_of_the_way() {
        let (x, y) = ([2.0f32, 0.0, 0.0], [0.0f32, 5.0, 0.0]);
        let shared = between(&x, &y);
        assert!((norm(&shared) - 1.0).abs() < 1e-6);
        let whole = angle(&x, &y);
        assert!((angle(&x, &shared) - BETWEEN * whole).abs() < 1e-4);
        assert!((angle(&shared, &y) - (1.0 - BETWEEN) * whole).abs() < 1e-4);
        // Layers that agree lose nothing but rounding; a layer of zeros takes nothing from the other.
        assert_eq!(between(&[3.0, 4.0], &[6.0, 8.0]), [0.6, 0.8]);
        assert_eq!(between(&[0.0, 0.0], &[0.0, 2.0]), [0.0, 1.0]);
    }
}
