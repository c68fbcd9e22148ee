//! How many of the pairs above a threshold locality-sensitive hashing finds, by exact comparison of some blocks with all others.

use super::blocks::DistinctBlocks;
use crate::block::Part;
use crate::codec::fusion::Signatures;
use crate::error::Result;
use crate::model::gemm::{View, product};
use rayon::prelude::*;

/// Ordered pairs of keys above a threshold, and those of them that are candidates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recall {
    pub tau: f64,
    pub pairs: u64,
    pub met: u64,
}

/// Blocks that are compared with all others at a time, on each thread.
const ROWS: usize = 64;

/// Compares the blocks `rows` of a layer with all others, and asks of each pair whether `pairing=lsh` would have compared it. `taus` rise.
pub fn lsh_recall(
    blocks: &DistinctBlocks,
    layer: usize,
    rows: &[usize],
    taus: &[f64],
) -> Result<Vec<Recall>> {
    let (n, width) = (blocks.len(), blocks.width);
    let signatures = Signatures::new(n, width, &[(layer, Part::Key)], |_, tile, out| {
        out.extend_from_slice(&blocks.keys[tile.start * width..tile.end * width]);
    })?;
    let count = |some: &[usize]| {
        let numbers: Vec<f32> =
            some.iter().flat_map(|&b| &blocks.keys[b * width..][..width]).copied().collect();
        let mut cosines = vec![0.0; some.len() * n];
        let all = View::row_major(&blocks.keys, n, width).transposed();
        product(View::row_major(&numbers, some.len(), width), all, &mut cosines);
        let mut counts = vec![(0, 0); taus.len()];
        for (&a, cosines) in some.iter().zip(cosines.chunks_exact(n)) {
            for (b, &cosine) in cosines.iter().enumerate().filter(|(b, _)| *b != a) {
                let level = taus.partition_point(|&tau| f64::from(cosine) > tau);
                if level > 0 {
                    let met = u64::from(signatures.meet(a, b));
                    counts[..level].iter_mut().for_each(|c| *c = (c.0 + 1, c.1 + met));
                }
            }
        }
        counts
    };
    let counted: Vec<Vec<(u64, u64)>> = rows.par_chunks(ROWS).map(count).collect();
    let of = |(t, &tau): (usize, &f64)| {
        let (pairs, met) = counted.iter().fold((0, 0), |(p, m), c| (p + c[t].0, m + c[t].1));
        Recall { tau, pairs, met }
    };
    Ok(taus.iter().enumerate().map(of).collect())
}
