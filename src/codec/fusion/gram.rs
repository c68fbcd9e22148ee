//! All inner products of a layer's blocks: one symmetric matrix product.

use crate::model::gemm::{View, product};
use rayon::prelude::*;

/// Rows and columns of a tile: buffers stay small for any number of blocks, and tiles above the diagonal are not
/// computed. Tiles depend on the shape only, so the same rows give the same bits on any number of threads.
const TILE: usize = 512;
/// Rows and columns that are mirrored at a time: two such squares fit a core's first-level cache.
const MIRROR: usize = 32;

/// `X * X^T` of `rows` (`[n, width]`): `[n, n]`, exactly symmetric.
pub fn gram(rows: &[f32], width: usize) -> Vec<f32> {
    let n = rows.len() / width;
    let mut out = vec![0.0; n * n];
    out.par_chunks_mut(TILE * n.max(1)).enumerate().for_each(|(band, out)| {
        let top = band * TILE;
        let height = out.len() / n;
        let a = View::row_major(&rows[top * width..], height, width);
        let mut tile = vec![0.0; height * TILE.min(n)];
        for left in (0..=top).step_by(TILE) {
            let across = TILE.min(n - left);
            let b = View::row_major(&rows[left * width..], across, width).transposed();
            product(a, b, &mut tile);
            for (row, out) in tile.chunks_exact(across).zip(out.chunks_exact_mut(n)) {
                out[left..left + across].copy_from_slice(row);
            }
        }
    });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definition_across_tiles() {
        let (n, width) = (TILE + 37, 5);
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
