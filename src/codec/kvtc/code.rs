//! Places of tokens along directions as bytes, and back.

use super::book::Transform;
use super::widths::Group;
use crate::codec::quantize::{BitSink, BitSource, Cost, put_f16, take_f16};
use crate::model::gemm::{View, tiled};
use half::f16;

/// Scale and offset of a group of so many bits a code, as they are read back from f16.
pub fn levels(numbers: &[f32], bits: u32) -> (f32, f32) {
    let least = numbers.iter().copied().fold(f32::INFINITY, f32::min);
    let most = numbers.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scale = (most - least) / ((1u32 << bits) - 1) as f32;
    (f16::from_f32(scale).to_f32(), f16::from_f32(least).to_f32())
}

pub fn quantised(x: f32, scale: f32, offset: f32, bits: u32) -> u32 {
    let most = ((1u32 << bits) - 1) as f32;
    if scale > 0.0 { ((x - offset) / scale).round().clamp(0.0, most) as u32 } else { 0 }
}

/// The first `count` directions, as columns.
fn basis(transform: &Transform, count: usize) -> View<'_> {
    View { columns: count, ..View::row_major(&transform.basis, transform.mean.len(), transform.directions) }
}

/// Directions that groups keep.
pub fn kept(groups: &[Group]) -> usize {
    groups.iter().map(|group| group.size()).sum()
}

/// Where tokens (`[tokens, width]`) lie along the first `count` directions: `[tokens, count]`.
pub fn project(transform: &Transform, count: usize, x: &[f32]) -> Vec<f32> {
    let row = |row: &[f32]| -> Vec<f32> { row.iter().zip(&transform.mean).map(|(x, m)| x - m).collect() };
    let centered: Vec<f32> = x.chunks_exact(transform.mean.len()).flat_map(row).collect();
    tiled(&centered, basis(transform, count))
}

/// Tokens at these places (`[tokens, count]`): `[tokens, width]`.
pub fn restore(transform: &Transform, count: usize, places: &[f32], tokens: usize) -> Vec<f32> {
    if count == 0 {
        return transform.mean.repeat(tokens);
    }
    let mut x = tiled(places, basis(transform, count).transposed());
    let add = |row: &mut [f32]| row.iter_mut().zip(&transform.mean).for_each(|(x, m)| *x += m);
    x.chunks_exact_mut(transform.mean.len()).for_each(add);
    x
}

/// Places of tokens (`[tokens, kept]`) as bits: of each group in turn, scales and offsets of all tokens, then codes direction by
/// direction, so that what is alike stands together.
pub fn put(groups: &[Group], places: &[f32], tokens: usize, sink: &mut BitSink) {
    let count = kept(groups);
    let mut first = 0;
    for group in groups {
        let own = |t: usize| &places[t * count + first..][..group.size()];
        match *group {
            Group::Raw => (0..tokens).for_each(|t| _ = put_f16(sink, own(t)[0])),
            Group::Coded { size, bits } => {
                let levels: Vec<(f32, f32)> = (0..tokens).map(|t| levels(own(t), bits)).collect();
                for (scale, offset) in &levels {
                    put_f16(sink, *scale);
                    put_f16(sink, *offset);
                }
                for k in 0..size {
                    for (t, (scale, offset)) in levels.iter().enumerate() {
                        sink.put(Cost::Code, quantised(own(t)[k], *scale, *offset, bits), bits);
                    }
                }
            }
        }
        first += group.size();
    }
}

/// What [`put`] put, as it is read back: `[tokens, kept]`.
pub fn take(groups: &[Group], tokens: usize, source: &mut BitSource) -> Vec<f32> {
    let count = kept(groups);
    let mut places = vec![0.0f32; tokens * count];
    let mut first = 0;
    for group in groups {
        match *group {
            Group::Raw => (0..tokens).for_each(|t| places[t * count + first] = take_f16(source)),
            Group::Coded { size, bits } => {
                let levels: Vec<(f32, f32)> =
                    (0..tokens).map(|_| (take_f16(source), take_f16(source))).collect();
                for k in 0..size {
                    for (t, (scale, offset)) in levels.iter().enumerate() {
                        places[t * count + first + k] = source.take(bits) as f32 * scale + offset;
                    }
                }
            }
        }
        first += group.size();
    }
    places
}
