//! All inner products of a layer's blocks: one symmetric matrix product.

use crate::model::gemm::{View, product_into};

/// Rows whose square is not cut any further.
const LEAF: usize = 128;
/// Cuts lie at multiples of the kernel's height.
const CUT: usize = 64;
/// Rows and columns that are mirrored at a time: two such squares fit a core's first-level cache.
const MIRROR: usize = 32;

/// `X * X^T` of `rows` (`[n, width]`): `[n, n]`, exactly symmetric.
///
/// Only the lower half is computed. What is cut where depends on the shape alone, so the same rows give the same bits on
/// any number of threads.
pub fn gram(rows: &[f32], width: usize) -> Vec<f32> {
    let n = rows.len() / width;
    let mut out = vec![0.0; n * n];
    if n > 0 {
        lower(View::row_major(rows, n, width), 0, n, &mut out, n);
    }
    for top in (0..n).step_by(MIRROR) {
        for left in (0..=top).step_by(MIRROR) {
            for i in top..n.min(top + MIRROR) {
                for j in left..i.min(left + MIRROR) {
                    out[j * n + i] = out[i * n + j];
                }
            }
        }
    }
    out
}

/// Products of rows `first..first + n` with each other, on and below the diagonal. `out` begins at row `first`, its rows
/// are `stride` long.
fn lower(x: View, first: usize, n: usize, out: &mut [f32], stride: usize) {
    let part = |first: usize, n: usize| View::row_major(&x.data[first * x.columns..], n, x.columns);
    if n <= LEAF {
        product_into(part(first, n), part(first, n).transposed(), &mut out[first..], stride);
        return;
    }
    // A square below the diagonal, as large as can be, and two halves of the same kind.
    let cut = (n / 2).next_multiple_of(CUT);
    let (top, bottom) = out.split_at_mut(cut * stride);
    rayon::join(
        || lower(x, first, cut, top, stride),
        || {
            let below = part(first + cut, n - cut);
            product_into(below, part(first, cut).transposed(), &mut bottom[first..], stride);
            lower(x, first + cut, n - cut, bottom, stride);
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definition_across_tiles() {
        let (n, width) = (3 * LEAF + 37, 5);
        let rows: Vec<f32> = (0..n * width).map(|i| ((i * 29 % 83) as f32 - 41.0) / 16.0).collect();
        let got = gram(&rows, width);
        for i in 0..n {
            for j in 0..n {
                let (a, b) = (&rows[i * width..][..width], &rows[j * width..][..width]);
                let exact: f32 = a.iter().zip(b).map(|(x, y)| x * y).sum();
                assert!((got[i * n + j] - exact).abs() < 1e-4);
                assert_eq!(got[i * n + j], got[j * n + i]);
            }
        }
    }
}
