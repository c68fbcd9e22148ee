//! Bits in a row: what a page is written to and read back from.

/// What bits are spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// Codes of numbers.
    Code,
    /// Scales, zero points, norms.
    Side,
}

/// Takes bits, lowest first, and counts them by what they are for.
#[derive(Debug, Default)]
pub struct BitSink {
    bytes: Vec<u8>,
    /// Bits that fill no byte yet, the lowest `bits % 8`.
    pending: u64,
    bits: u64,
    side_bits: u64,
}

impl BitSink {
    /// The lowest `width` bits of `value`, at most 32.
    pub fn put(&mut self, cost: Cost, value: u32, width: u32) {
        let mut held = (self.bits % 8) as u32;
        self.pending |= (u64::from(value) & low(width)) << held;
        held += width;
        while held >= 8 {
            self.bytes.push(self.pending as u8);
            self.pending >>= 8;
            held -= 8;
        }
        self.bits += u64::from(width);
        if cost == Cost::Side {
            self.side_bits += u64::from(width);
        }
    }

    /// The bytes, the last one filled up with zeros; bits of codes, and of the rest.
    pub fn finish(mut self) -> (Vec<u8>, u64, u64) {
        if !self.bits.is_multiple_of(8) {
            self.bytes.push(self.pending as u8);
        }
        (self.bytes, self.bits - self.side_bits, self.side_bits)
    }
}

/// So many ones.
fn low(width: u32) -> u64 {
    (1 << width) - 1
}

/// Gives bits back in the order in which they were put.
#[derive(Debug)]
pub struct BitSource<'a> {
    bytes: &'a [u8],
    at: u64,
}

impl<'a> BitSource<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        BitSource { bytes, at: 0 }
    }

    /// Bytes that bits were taken from.
    pub fn bytes_taken(&self) -> usize {
        self.at.div_ceil(8) as usize
    }

    /// Goes to a bit.
    pub fn seek(&mut self, bit: u64) {
        self.at = bit;
    }

    /// The next `width` bits, at most 32; zeros beyond the end.
    pub fn take(&mut self, width: u32) -> u32 {
        let from = (self.at / 8) as usize;
        let word = match self.bytes.get(from..from + 8) {
            Some(bytes) => bytes.try_into().map_or(0, u64::from_le_bytes),
            None => {
                let left = self.bytes.get(from..).unwrap_or_default();
                left.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
            }
        };
        let value = word >> (self.at % 8) & low(width);
        self.at += u64::from(width);
        value as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bits_come_back(values in prop::collection::vec((any::<u32>(), 1u32..=32), 0..50)) {
            let mut sink = BitSink::default();
            for &(value, width) in &values {
                sink.put(if width > 16 { Cost::Side } else { Cost::Code }, value, width);
            }
            let (bytes, codes, side) = sink.finish();
            let all: u64 = values.iter().map(|v| u64::from(v.1)).sum();
            prop_assert_eq!(codes + side, all);
            prop_assert_eq!(bytes.len() as u64, all.div_ceil(8));
            let mut source = BitSource::new(&bytes);
            for (value, width) in values {
                let mask = if width == 32 { u32::MAX } else { (1 << width) - 1 };
                prop_assert_eq!(source.take(width), value & mask);
            }
        }
    }
}
