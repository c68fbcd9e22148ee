//! Eight-bit floating point (E4M3) with one scale for every token and head.

use super::{PerHead, Quantized};
use crate::codec::registry::Method;
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct Fp8 {}

/// The largest number of E4M3: 1.75 * 2^8 (Micikevicius et al. 2022).
const MOST: f32 = 448.0;
/// Exponent of the smallest normal number.
const LEAST_EXPONENT: i32 = -6;

impl Method for Fp8 {
    const NAME: &'static str = "fp8";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str =
        "Eight-bit floating point (E4M3) with one f16 scale for every token and head.";
    const PAPER: &'static str =
        "Micikevicius et al. 2022, FP8 Formats for Deep Learning (arXiv 2209.05433); as in vLLM";

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Quantized::new(PerHead { most: MOST, encode: encoded, decode: decoded })))
    }
}

/// The nearest E4M3 number, ties to even; what is beyond the largest becomes it.
fn encoded(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let size = x.abs().min(MOST);
    // Numbers of one exponent stand 2^(exponent - 3) apart, subnormal ones as those of the least.
    let exponent = if size > 0.0 { (size.log2().floor() as i32).max(LEAST_EXPONENT) } else { LEAST_EXPONENT };
    let steps = (size / f32::powi(2.0, exponent - 3)).round_ties_even() as u32;
    // 16 steps are the first number of the next exponent, which is the next code as well.
    let code = steps + ((exponent - LEAST_EXPONENT) as u32) * 8;
    sign | code.min(0x7e) as u8
}

fn decoded(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from((code >> 3) & 0xf), f32::from(code & 7));
    let size = match exponent {
        0 => mantissa * f32::powi(2.0, LEAST_EXPONENT - 3),
        e => (8.0 + mantissa) * f32::powi(2.0, e - 1 + LEAST_EXPONENT - 3),
    };
    if code & 0x80 == 0 { size } else { -size }
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
            assert_eq!(encoded(x), code, "{x}");
        }
        // Every code but the two NaNs comes back, and what lies between two goes to the nearer.
        for code in (0..=0x7eu8).chain(0x81..=0xfe) {
            assert_eq!(encoded(decoded(code)), code);
        }
        for code in 0..0x7eu8 {
            let (low, high) = (decoded(code), decoded(code + 1));
            assert_eq!(encoded(low + 0.4 * (high - low)), code);
            assert_eq!(encoded(low + 0.6 * (high - low)), code + 1);
        }
    }
}
