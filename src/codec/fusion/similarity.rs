//! Cosine similarities between blocks.

use crate::model::gemm::{View, product};

/// Rows of the left matrix that one tile of similarities covers: memory stays bounded for any number of blocks.
const TILE_ROWS: usize = 512;

/// For every row i of `left`, ascending: calls `visit(i, js)` with the rows j of `right`, ascending, for which
/// <left_i, right_j> > tau. Both are `[rows, width]` of unit vectors; rows without a match are not visited.
pub fn pairs_above(
    left: &[f32],
    right: &[f32],
    width: usize,
    tau: f32,
    mut visit: impl FnMut(usize, &[usize]),
) {
    let (left_rows, right_rows) = (left.len() / width, right.len() / width);
    let mut similarities = vec![0.0; TILE_ROWS.min(left_rows) * right_rows];
    let mut matches = Vec::new();
    for first in (0..left_rows).step_by(TILE_ROWS) {
        let rows = TILE_ROWS.min(left_rows - first);
        let tile = View::row_major(&left[first * width..], rows, width);
        product(tile, View::row_major(right, right_rows, width).transposed(), &mut similarities);
        for i in 0..rows {
            let row = &similarities[i * right_rows..][..right_rows];
            matches.clear();
            matches.extend(row.iter().enumerate().filter(|(_, s)| **s > tau).map(|(j, _)| j));
            if !matches.is_empty() {
                visit(first + i, &matches);
            }
        }
    }
}
