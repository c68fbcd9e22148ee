//! Asymmetric rounding of a group of numbers: an f16 zero point, an f16 scale, whole codes.

use super::{BitSink, BitSource, Cost, put_f16, take_f16};

/// Bits of a zero point and a scale.
pub const SIDE_BITS: u32 = 32;

/// The largest code of so many bits.
fn most(bits: u32) -> f32 {
    ((1u32 << bits) - 1) as f32
}

/// Writes the numbers of `page` at these places.
pub fn put(sink: &mut BitSink, page: &[f32], places: &[usize], bits: u32) {
    let (low, high) = places
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &i| (low.min(page[i]), high.max(page[i])));
    let zero = put_f16(sink, low);
    let scale = put_f16(sink, (high - zero) / most(bits));
    for &i in places {
        let code = if scale > 0.0 { ((page[i] - zero) / scale).round().clamp(0.0, most(bits)) } else { 0.0 };
        sink.put(Cost::Code, code as u32, bits);
    }
}

/// Reads them back into `page`.
pub fn take(source: &mut BitSource, page: &mut [f32], places: &[usize], bits: u32) {
    let (zero, scale) = (take_f16(source), take_f16(source));
    for &i in places {
        page[i] = zero + source.take(bits) as f32 * scale;
    }
}

/// Reads a group as numbers in a row.
pub fn take_run(source: &mut BitSource, out: &mut [f32], bits: u32) {
    let (zero, scale) = (take_f16(source), take_f16(source));
    // As many codes as 32 bits hold, at once.
    let together = (32 / bits) as usize;
    let mask = (1 << bits) - 1;
    for chunk in out.chunks_mut(together) {
        let word = source.take(bits * chunk.len() as u32);
        for (i, x) in chunk.iter_mut().enumerate() {
            *x = zero + (word >> (i as u32 * bits) & mask) as f32 * scale;
        }
    }
}
