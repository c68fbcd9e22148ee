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
    bits: u64,
    side_bits: u64,
}

impl BitSink {
    /// The lowest `width` bits of `value`, at most 32.
    pub fn put(&mut self, cost: Cost, value: u32, width: u32) {
        for i in 0..width {
            if self.bits.is_multiple_of(8) {
                self.bytes.push(0);
            }
            let at = (self.bits / 8) as usize;
            self.bytes[at] |= (((value >> i) & 1) as u8) << (self.bits % 8);
            self.bits += 1;
        }
        if cost == Cost::Side {
            self.side_bits += u64::from(width);
        }
    }

    /// The bytes, the last one filled up with zeros; bits of codes, and of the rest.
    pub fn finish(self) -> (Vec<u8>, u64, u64) {
        (self.bytes, self.bits - self.side_bits, self.side_bits)
    }
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

    /// The next `width` bits, at most 32; zeros beyond the end.
    pub fn take(&mut self, width: u32) -> u32 {
        let mut value = 0;
        for i in 0..width {
            let byte = self.bytes.get((self.at / 8) as usize).copied().unwrap_or(0);
            value |= u32::from((byte >> (self.at % 8)) & 1) << i;
            self.at += 1;
        }
        value
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
