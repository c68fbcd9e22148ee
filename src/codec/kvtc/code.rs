//! Places of tokens along directions as bytes, and back.

use super::book::Transform;
use super::widths::Group;
use crate::codec::quantize::{BitSink, BitSource, Cost};
use crate::model::gemm::{View, product};
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

fn put_f16(sink: &mut BitSink, cost: Cost, x: f32) {
    sink.put(cost, u32::from(f16::from_f32(x).to_bits()), 16);
}

fn take_f16(source: &mut BitSource) -> f32 {
    f16::from_bits(source.take(16) as u16).to_f32()
}

/// Tokens (`[tokens, width]`) as bits: of each group in turn, scales and offsets of all tokens, then codes direction by direction, so
/// that what is alike stands together.
pub fn put(transform: &Transform, groups: &[Group], x: &[f32], sink: &mut BitSink) {
    let (width, count) = (transform.mean.len(), transform.directions);
    let tokens = x.len() / width;
    let centered: Vec<f32> =
        x.chunks_exact(width).flat_map(|row| row.iter().zip(&transform.mean).map(|(x, m)| x - m)).collect();
    let mut places = vec![0.0f32; tokens * count];
    let basis = View::row_major(&transform.basis, width, count);
    product(View::row_major(&centered, tokens, width), basis, &mut places);
    let mut first = 0;
    for group in groups {
        let own = |t: usize| &places[t * count + first..][..group.size()];
        match *group {
            Group::Raw => (0..tokens).for_each(|t| put_f16(sink, Cost::Code, own(t)[0])),
            Group::Coded { size, bits } => {
                let levels: Vec<(f32, f32)> = (0..tokens).map(|t| levels(own(t), bits)).collect();
                for (scale, offset) in &levels {
                    put_f16(sink, Cost::Side, *scale);
                    put_f16(sink, Cost::Side, *offset);
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

/// What [`put`] put: `[tokens, width]`.
pub fn take(transform: &Transform, groups: &[Group], tokens: usize, source: &mut BitSource) -> Vec<f32> {
    let (width, count) = (transform.mean.len(), transform.directions);
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
    let mut x = vec![0.0f32; tokens * width];
    let back = View::row_major(&transform.basis, width, count).transposed();
    product(View::row_major(&places, tokens, count), back, &mut x);
    x.chunks_exact_mut(width).for_each(|row| row.iter_mut().zip(&transform.mean).for_each(|(x, m)| *x += m));
    x
}
