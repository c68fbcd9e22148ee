//! Products and sums over the rows of a corpus.

use crate::model::gemm::{View, product, tiled};
use faer::Mat;
use rayon::prelude::*;

/// Rows that are multiplied at a time.
pub const ROWS: usize = 512;

/// `[rows, inner] * [inner, columns]`.
pub fn times(a: &[f32], inner: usize, b: &[f32], columns: usize) -> Vec<f32> {
    tiled(a, View::row_major(b, inner, columns))
}

/// `a^T * b` over some rows, in f64: `[a columns, b columns]`. Sums of [`ROWS`] rows are f32, the rest is not.
pub fn gram(a: &[f32], a_columns: usize, b: &[f32], b_columns: usize, rows: &[usize]) -> Mat<f64> {
    let part = |rows: &[usize]| {
        let (a, b) = (pick(a, a_columns, rows), pick(b, b_columns, rows));
        let mut out = vec![0.0; a_columns * b_columns];
        let a = View::row_major(&a, rows.len(), a_columns).transposed();
        product(a, View::row_major(&b, rows.len(), b_columns), &mut out);
        out
    };
    let mut sum = Mat::zeros(a_columns, b_columns);
    // Few at a time: each is as large as the result.
    for rows in rows.chunks(8 * ROWS) {
        let parts: Vec<Vec<f32>> = rows.par_chunks(ROWS).map(part).collect();
        for part in parts {
            for (i, row) in part.chunks_exact(b_columns).enumerate() {
                for (j, x) in row.iter().enumerate() {
                    sum[(i, j)] += f64::from(*x);
                }
            }
        }
    }
    sum
}

/// Some rows, one after the other.
pub fn pick(x: &[f32], columns: usize, rows: &[usize]) -> Vec<f32> {
    rows.iter().flat_map(|r| &x[r * columns..][..columns]).copied().collect()
}

/// Mean of each column over some rows.
pub fn means(x: &[f32], columns: usize, rows: &[usize]) -> Vec<f64> {
    let mut sum = vec![0.0f64; columns];
    for r in rows {
        sum.iter_mut().zip(&x[r * columns..][..columns]).for_each(|(s, x)| *s += f64::from(*x));
    }
    sum.iter().map(|s| s / rows.len().max(1) as f64).collect()
}
