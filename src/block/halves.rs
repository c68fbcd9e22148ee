//! f16 numbers: as bytes, and read fast: every time a page is attended to, one head of it is turned into f32.

use half::f16;
use half::slice::HalfFloatSliceExt;
use multiversion::multiversion;

/// Numbers as little-endian f16.
pub fn to_bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()
}

/// Numbers of little-endian f16.
pub fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<2>().0.iter().map(|half| f16::from_le_bytes(*half).to_f32()).collect()
}

/// Finite halves of one head, `[tokens, head_dim]` from column `at` of rows of `width`, in f32.
pub fn read_head(rows: &[f16], width: usize, at: usize, head_dim: usize, out: &mut [f32]) {
    convert(rows.reinterpret_cast(), width, at, head_dim, out);
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+avx2+fma", "x86_64+avx2+fma"))]
fn convert(rows: &[u16], width: usize, at: usize, head_dim: usize, out: &mut [f32]) {
    for (row, out) in rows.chunks_exact(width).zip(out.chunks_exact_mut(head_dim)) {
        for (x, &bits) in out.iter_mut().zip(&row[at..at + head_dim]) {
            *x = finite(bits);
        }
    }
}

/// A finite f16 as f32, without a branch: the exponent is moved by a multiplication, which is exact.
#[inline(always)]
pub fn finite(bits: u16) -> f32 {
    const BIAS: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(bits);
    let size = f32::from_bits((bits & 0x7fff) << 13) * BIAS;
    f32::from_bits(size.to_bits() | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finite_halves_are_exact() {
        let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()).collect();
        let mut out = vec![0.0; all.len()];
        read_head(&all, all.len(), 0, all.len(), &mut out);
        assert!(all.iter().zip(&out).all(|(a, b)| a.to_f32().to_bits() == b.to_bits()));
    }
}
