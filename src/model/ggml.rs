//! ggml's block types as whole codes with scales and offsets (layouts: ggml-common.h; what they mean: ggml-quants.c).

use super::coded::Coded;
use candle_core::quantized::GgmlDType;
use half::f16;

/// How a type stores numbers.
struct Layout {
    /// Bytes of a block.
    bytes: usize,
    /// Numbers that share a scale.
    group: usize,
    /// The least code there can be, if sixteen codes are all there are.
    nibbles_from: Option<i8>,
    has_offsets: bool,
    /// Appends a block's codes, scales and, if there are any, offsets.
    read: fn(&[u8], &mut Coded),
}

fn layout(dtype: GgmlDType) -> Option<Layout> {
    let of = |bytes, group, nibbles_from, has_offsets, read| Layout {
        bytes,
        group,
        nibbles_from,
        has_offsets,
        read,
    };
    Some(match dtype {
        GgmlDType::Q4_0 => of(18, 32, Some(-8), false, q4_0 as fn(&[u8], &mut Coded)),
        GgmlDType::Q4_1 => of(20, 32, Some(0), true, q4_1),
        GgmlDType::Q5_0 => of(22, 32, None, false, q5_0),
        GgmlDType::Q5_1 => of(24, 32, None, true, q5_1),
        GgmlDType::Q8_0 => of(34, 32, None, false, q8_0),
        GgmlDType::Q2K => of(84, 16, Some(0), true, q2_k),
        GgmlDType::Q3K => of(110, 16, Some(-4), false, q3_k),
        GgmlDType::Q4K => of(144, 32, Some(0), true, q4_k),
        GgmlDType::Q5K => of(176, 32, None, true, q5_k),
        GgmlDType::Q6K => of(210, 16, None, false, q6_k),
        _ => return None,
    })
}

impl Coded {
    /// Reads blocks of a type; `None` if it is none of those above.
    pub fn read(dtype: GgmlDType, bytes: &[u8]) -> Option<Self> {
        let Layout { bytes: block, group, nibbles_from, has_offsets, read } = layout(dtype)?;
        let numbers = bytes.len() / block * dtype.block_size();
        let mut coded = Coded {
            codes: Vec::with_capacity(numbers),
            scales: Vec::with_capacity(numbers / group),
            offsets: Vec::with_capacity(if has_offsets { numbers / group } else { 0 }),
            group,
            nibbles_from,
        };
        bytes.chunks_exact(block).for_each(|block| read(block, &mut coded));
        Some(coded)
    }

    /// Low nibbles are the first half of a group, high ones the second; `high` holds each code's fifth bit.
    fn nibbles(&mut self, bytes: &[u8], high: u32, minus: i8) {
        let fifth = |i: usize| ((high >> i & 1) << 4) as i8;
        self.codes.extend(bytes.iter().enumerate().map(|(i, b)| ((b & 15) as i8 | fifth(i)) - minus));
        self.codes.extend(bytes.iter().enumerate().map(|(i, b)| ((b >> 4) as i8 | fifth(i + 16)) - minus));
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn fifth_bits(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

fn q4_0(block: &[u8], out: &mut Coded) {
    out.scales.push(half_at(block, 0));
    out.nibbles(&block[2..], 0, 8);
}

fn q4_1(block: &[u8], out: &mut Coded) {
    out.scales.push(half_at(block, 0));
    out.offsets.push(half_at(block, 2));
    out.nibbles(&block[4..], 0, 0);
}

fn q5_0(block: &[u8], out: &mut Coded) {
    out.scales.push(half_at(block, 0));
    out.nibbles(&block[6..], fifth_bits(block, 2), 16);
}

fn q5_1(block: &[u8], out: &mut Coded) {
    out.scales.push(half_at(block, 0));
    out.offsets.push(half_at(block, 2));
    out.nibbles(&block[8..], fifth_bits(block, 4), 0);
}

fn q8_0(block: &[u8], out: &mut Coded) {
    out.scales.push(half_at(block, 0));
    out.codes.extend(block[2..].iter().map(|&b| b as i8));
}

/// 16 bytes of a scale and a minimum of 4 bits each, 64 bytes of 2-bit codes, the factors of scales and of minima.
fn q2_k(block: &[u8], out: &mut Coded) {
    let (scale, least) = (half_at(block, 80), half_at(block, 82));
    out.scales.extend(block[..16].iter().map(|b| scale * f32::from(b & 15)));
    out.offsets.extend(block[..16].iter().map(|b| -(least * f32::from(b >> 4))));
    for bytes in block[16..80].chunks_exact(32) {
        for shift in [0, 2, 4, 6] {
            out.codes.extend(bytes.iter().map(|b| (b >> shift & 3) as i8));
        }
    }
}

/// 32 bytes of third bits, 64 of 2-bit codes, 12 of 6-bit scales, their factor.
fn q3_k(block: &[u8], out: &mut Coded) {
    let (third, codes, packed, factor) = (&block[..32], &block[32..96], &block[96..108], half_at(block, 108));
    let scale = |i: usize| {
        let low = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
        let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
        (low | high << 4) as i8 - 32
    };
    out.scales.extend((0..16).map(|i| factor * f32::from(scale(i))));
    for (half, bytes) in codes.chunks_exact(32).enumerate() {
        for quarter in 0..4 {
            let bit = 1 << (half * 4 + quarter);
            let code =
                |(b, high): (&u8, &u8)| (b >> (2 * quarter) & 3) as i8 - if high & bit == 0 { 4 } else { 0 };
            out.codes.extend(bytes.iter().zip(third).map(code));
        }
    }
}

/// The eight scales and minima of 6 bits that Q4_K and Q5_K pack into 12 bytes, times their factors.
fn six_bits(block: &[u8], out: &mut Coded) {
    let (scale, least, packed) = (half_at(block, 0), half_at(block, 2), &block[4..16]);
    for i in 0..8 {
        let (s, m) = if i < 4 {
            (packed[i] & 63, packed[i + 4] & 63)
        } else {
            let low = packed[i + 4];
            (low & 15 | packed[i - 4] >> 6 << 4, low >> 4 | packed[i] >> 6 << 4)
        };
        out.scales.push(scale * f32::from(s));
        out.offsets.push(-(least * f32::from(m)));
    }
}

/// Factors and scales, then 128 bytes of nibbles: 32 low ones, 32 high ones, by turns.
fn q4_k(block: &[u8], out: &mut Coded) {
    six_bits(block, out);
    block[16..].chunks_exact(32).for_each(|bytes| out.nibbles(bytes, 0, 0));
}

/// Like Q4_K, with 32 bytes of fifth bits before the nibbles: one bit a group.
fn q5_k(block: &[u8], out: &mut Coded) {
    six_bits(block, out);
    let fifth = &block[16..48];
    for (pair, bytes) in block[48..].chunks_exact(32).enumerate() {
        let high = |b: &u8, group: usize| ((b >> group & 1) << 4) as i8;
        let low = bytes.iter().zip(fifth).map(|(b, h)| (b & 15) as i8 | high(h, 2 * pair));
        out.codes.extend(low);
        let rest = bytes.iter().zip(fifth).map(|(b, h)| (b >> 4) as i8 | high(h, 2 * pair + 1));
        out.codes.extend(rest);
    }
}

/// 128 bytes of low nibbles, 64 of the two bits above them, 16 scales of 8 bits, their factor.
fn q6_k(block: &[u8], out: &mut Coded) {
    let factor = half_at(block, 208);
    out.scales.extend(block[192..208].iter().map(|&b| factor * f32::from(b as i8)));
    for (low, high) in block[..128].chunks_exact(64).zip(block[128..192].chunks_exact(32)) {
        for quarter in 0..4 {
            let nibbles =
                low[quarter % 2 * 32..][..32].iter().map(|b| if quarter < 2 { b & 15 } else { b >> 4 });
            out.codes.extend(nibbles.zip(high).map(|(l, h)| (l | (h >> (2 * quarter) & 3) << 4) as i8 - 32));
        }
    }
}
