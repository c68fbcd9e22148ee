//! All inner products of a layer's blocks: one symmetric matrix product.

use faer::linalg::matmul::{matmul, triangular};
use faer::{Accum, MatMut, MatRef, Par};

/// Rows whose products with each other are computed on one thread.
const LEAF: usize = 2048;
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
    lower(MatRef::from_row_major_slice(rows, n, width), MatMut::from_row_major_slice_mut(&mut out, n, n));
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

/// `out = x * x^T`, on and below the diagonal.
fn lower(x: MatRef<f32>, out: MatMut<f32>) {
    let n = x.nrows();
    if n <= LEAF {
        use triangular::BlockStructure::{Rectangular, TriangularLower};
        let (add, transposed) = (Accum::Replace, x.transpose());
        triangular::matmul(out, TriangularLower, add, x, Rectangular, transposed, Rectangular, 1.0, Par::Seq);
        return;
    }
    // A square below the diagonal, as large as can be, and two halves of the same kind.
    let cut = (n / 2).next_multiple_of(CUT);
    let (above, _, square, below) = out.split_at_mut(cut, cut);
    let (first, second) = x.split_at_row(cut);
    rayon::join(
        || lower(first, above),
        || {
            matmul(square, Accum::Replace, second, first.transpose(), 1.0, Par::Seq);
            lower(second, below);
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definition_across_tiles() {
        let (n, width) = (LEAF + 137, 3);
        let rows: Vec<f32> = (0..n * width).map(|i| ((i * 29 % 83) as f32 - 41.0) / 16.0).collect();
        let got = gram(&rows, width);
        for i in (0..n).step_by(7).chain(LEAF - 2..n) {
            for j in 0..n {
                let (a, b) = (&rows[i * width..][..width], &rows[j * width..][..width]);
                let exact: f32 = a.iter().zip(b).map(|(x, y)| x * y).sum();
                assert!((got[i * n + j] - exact).abs() < 1e-4);
                assert_eq!(got[i * n + j], got[j * n + i]);
            }
        }
    }
}
