//! Floating-point numbers of a few bits, without infinities: a sign above an exponent above a mantissa.

/// A format. Codes rise with the numbers; the highest bit that is used is the sign.
#[derive(Debug, Clone, Copy)]
pub struct Minifloat {
    /// Bits of the mantissa.
    pub mantissa: i32,
    /// Exponent of the smallest normal number.
    pub least: i32,
    /// The largest number.
    pub most: f32,
    /// The sign's bit.
    pub sign: u8,
}

/// Micikevicius et al. 2022 (arXiv 2209.05433): up to 1.75 * 2^8, no infinity, one NaN of either sign.
pub const E4M3: Minifloat = Minifloat { mantissa: 3, least: -6, most: 448.0, sign: 0x80 };

impl Minifloat {
    /// The nearest number's code, ties to even; what is beyond the largest becomes it.
    pub fn encoded(&self, x: f32) -> u8 {
        let size = x.abs().min(self.most);
        // Numbers of one exponent stand 2^(exponent - mantissa) apart, subnormal ones as those of the least.
        let exponent = if size > 0.0 { (size.log2().floor() as i32).max(self.least) } else { self.least };
        let steps = (size / f32::powi(2.0, exponent - self.mantissa)).round_ties_even() as u8;
        // As many steps as there are codes of an exponent: the first number of the next one, which is the next code as well.
        let code = steps + ((exponent - self.least) << self.mantissa) as u8;
        if x.is_sign_negative() { self.sign | code } else { code }
    }

    pub fn decoded(&self, code: u8) -> f32 {
        let (size, first) = (code & !self.sign, 1 << self.mantissa);
        let (exponent, steps) = match size / first {
            0 => (self.least, size),
            e => (self.least + i32::from(e) - 1, first + size % first),
        };
        let size = f32::from(steps) * f32::powi(2.0, exponent - self.mantissa);
        if code & self.sign == 0 { size } else { -size }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_format() {
        for (x, code) in [
            (0.0, 0x00),
            (1.0, 0x38),
            (-2.0, 0xc0),
            (448.0, 0x7e),
            (1e9, 0x7e),
            (0.001_953_125, 0x01),
            (0.015_625, 0x08),
        ] {
            assert_eq!(E4M3.encoded(x), code, "{x}");
        }
        // Every code but the two NaNs comes back, and what lies between two goes to the nearer.
        for code in (0..=0x7eu8).chain(0x81..=0xfe) {
            assert_eq!(E4M3.encoded(E4M3.decoded(code)), code);
        }
        for code in 0..0x7eu8 {
            let (low, high) = (E4M3.decoded(code), E4M3.decoded(code + 1));
            assert_eq!(E4M3.encoded(low + 0.4 * (high - low)), code);
            assert_eq!(E4M3.encoded(low + 0.6 * (high - low)), code + 1);
        }
    }
}
