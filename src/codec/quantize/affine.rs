//! Asymmetric rounding of a group of numbers: an f16 zero point, an f16 scale, whole codes.

use super::{BitSink, BitSource, Cost, put_f16, take_f16};
use crate::block::halves::finite;
use multiversion::multiversion;

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

/// Groups of codes in bytes, as a page is read while it is used: every group a zero point, a scale and its codes, in whole
/// bytes.
#[derive(Clone, Copy)]
pub struct Groups {
    pub bits: u32,
    /// Codes of a group.
    pub size: usize,
}

impl Groups {
    /// Bytes of a group; `None` if it does not end with a byte.
    pub fn bytes(&self) -> Option<usize> {
        let codes = self.bits as usize * self.size;
        codes.is_multiple_of(8).then_some(SIDE_BITS as usize / 8 + codes / 8)
    }

    /// Reads groups one after the other, each a row of `out`.
    pub fn read_rows(&self, bytes: &[u8], out: &mut [f32]) {
        read_rows(bytes, self.bits, self.size, out);
    }

    /// Reads groups one after the other, each a column of `out` (`[size, columns]`).
    pub fn read_columns(&self, bytes: &[u8], columns: usize, out: &mut [f32]) {
        read_columns(bytes, self.bits, self.size, columns, out);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn read_rows(bytes: &[u8], bits: u32, size: usize, out: &mut [f32]) {
    let group = 4 + bits as usize * size / 8;
    for (bytes, row) in bytes.chunks_exact(group).zip(out.chunks_exact_mut(size)) {
        unpack(bytes, bits, row);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn read_columns(bytes: &[u8], bits: u32, size: usize, columns: usize, out: &mut [f32]) {
    const AT_ONCE: usize = 16;
    let group = 4 + bits as usize * size / 8;
    let mut buffer = vec![0.0; AT_ONCE * size];
    for (n, several) in bytes[..group * columns].chunks(group * AT_ONCE).enumerate() {
        let count = several.len() / group;
        for (bytes, column) in several.chunks_exact(group).zip(buffer.chunks_exact_mut(size)) {
            unpack(bytes, bits, column);
        }
        for (t, row) in out.chunks_exact_mut(columns).enumerate() {
            for (c, x) in row[n * AT_ONCE..][..count].iter_mut().enumerate() {
                *x = buffer[c * size + t];
            }
        }
    }
}

/// One group.
#[inline(always)]
fn unpack(bytes: &[u8], bits: u32, out: &mut [f32]) {
    let (zero, scale) = (half_at(bytes, 0), half_at(bytes, 2));
    let codes = &bytes[4..];
    match bits {
        4 => unpack_words::<4, 8>(codes, zero, scale, out),
        2 => unpack_words::<2, 16>(codes, zero, scale, out),
        8 => unpack_words::<8, 4>(codes, zero, scale, out),
        _ => {
            let mut source = BitSource::new(codes);
            for x in out {
                *x = zero + source.take(bits) as f32 * scale;
            }
        }
    }
}

/// Codes that 32 bits hold a whole number of.
#[inline(always)]
fn unpack_words<const BITS: u32, const CODES: usize>(bytes: &[u8], zero: f32, scale: f32, out: &mut [f32]) {
    let number = |word: u32, i: usize| {
        let code = (word >> (i as u32 * BITS)) & ((1 << BITS) - 1);
        // As a signed number, which every instruction set converts at once.
        (code as i32 as f32).mul_add(scale, zero)
    };
    let (words, last) = bytes.as_chunks::<4>();
    let (rows, rest) = out.as_chunks_mut::<CODES>();
    for (word, row) in words.iter().zip(&mut *rows) {
        let word = u32::from_le_bytes(*word);
        for (i, x) in row.iter_mut().enumerate() {
            *x = number(word, i);
        }
    }
    if !rest.is_empty() {
        // What is left fills no word, or is the first part of the next.
        let left = words.get(rows.len()).map_or(last, |word| &word[..]);
        let word = left.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
        rest.iter_mut().enumerate().for_each(|(i, x)| *x = number(word, i));
    }
}

#[inline(always)]
fn half_at(bytes: &[u8], at: usize) -> f32 {
    finite(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}
