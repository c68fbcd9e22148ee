//! Weights as a GGUF file stores them: whole codes in groups of 32 along a row, each group with a scale and, in some types, an
//! offset (ggml's block types Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0).

use candle_core::quantized::GgmlDType;
use half::f16;

/// Numbers that share a scale.
pub const GROUP: usize = 32;

/// Rows of codes: number = code * scale + offset, rounded twice as ggml does it.
pub struct Coded {
    /// Row after row.
    pub codes: Vec<i8>,
    /// Of each group.
    pub scales: Vec<f32>,
    pub offsets: Vec<f32>,
    /// The least code there can be, if sixteen codes are all there are.
    pub nibbles_from: Option<i8>,
}

impl Coded {
    /// Reads blocks of a type; `None` if it is none of those above.
    pub fn read(dtype: GgmlDType, bytes: &[u8]) -> Option<Self> {
        let (block, from) = match dtype {
            GgmlDType::Q4_0 => (18, Some(-8)),
            GgmlDType::Q4_1 => (20, Some(0)),
            GgmlDType::Q5_0 => (22, None),
            GgmlDType::Q5_1 => (24, None),
            GgmlDType::Q8_0 => (34, None),
            _ => return None,
        };
        let groups = bytes.len() / block;
        let mut coded = Coded {
            codes: Vec::with_capacity(groups * GROUP),
            scales: Vec::with_capacity(groups),
            offsets: Vec::with_capacity(groups),
            nibbles_from: from,
        };
        for block in bytes.chunks_exact(block) {
            let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
            let has_offset = matches!(dtype, GgmlDType::Q4_1 | GgmlDType::Q5_1);
            coded.scales.push(half(0));
            coded.offsets.push(if has_offset { half(2) } else { 0.0 });
            let rest = &block[if has_offset { 4 } else { 2 }..];
            match dtype {
                GgmlDType::Q8_0 => coded.codes.extend(rest.iter().map(|&b| b as i8)),
                GgmlDType::Q4_0 => coded.nibbles(rest, 0, 8),
                GgmlDType::Q4_1 => coded.nibbles(rest, 0, 0),
                _ => {
                    let high = u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]);
                    let least = if dtype == GgmlDType::Q5_0 { 16 } else { 0 };
                    coded.nibbles(&rest[4..], high, least);
                }
            }
        }
        Some(coded)
    }

    /// Low nibbles are the first half of a group, high ones the second; `high` holds each code's fifth bit.
    fn nibbles(&mut self, bytes: &[u8], high: u32, minus: i8) {
        let fifth = |i: usize| ((high >> i & 1) << 4) as i8;
        self.codes.extend(bytes.iter().enumerate().map(|(i, b)| ((b & 15) as i8 | fifth(i)) - minus));
        self.codes.extend(bytes.iter().enumerate().map(|(i, b)| ((b >> 4) as i8 | fifth(i + 16)) - minus));
    }

    pub fn len(&self) -> usize {
        self.codes.len()
    }

    /// One number.
    pub fn get(&self, i: usize) -> f32 {
        f32::from(self.codes[i]) * self.scales[i / GROUP] + self.offsets[i / GROUP]
    }

    pub fn to_f32(&self) -> Vec<f32> {
        (0..self.len()).map(|i| self.get(i)).collect()
    }

    /// Its rows of `width` numbers in another order.
    pub fn with_rows(&self, width: usize, order: impl Iterator<Item = usize> + Clone) -> Self {
        let groups = width / GROUP;
        Coded {
            codes: order.clone().flat_map(|row| &self.codes[row * width..][..width]).copied().collect(),
            scales: order.clone().flat_map(|row| &self.scales[row * groups..][..groups]).copied().collect(),
            offsets: order.flat_map(|row| &self.offsets[row * groups..][..groups]).copied().collect(),
            nibbles_from: self.nibbles_from,
        }
    }
}
