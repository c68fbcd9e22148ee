//! What the layers below say of a layer: ridge regression with few numbers in between.

use super::components::Roots;
use super::sums::{ROWS, gram, means, pick, times};
use super::{FOLDS, Training};
use crate::codec::joint::book::{flat, in_bytes};
use crate::codec::joint::corpus::Corpus;
use crate::codec::joint::entropy::from_eighths;
use crate::error::{Error, Result};
use crate::model::gemm::{View, product};
use faer::linalg::solvers::Solve;
use faer::{Mat, Side};
use rayon::prelude::*;

pub struct Predictor {
    pub rank: usize,
    /// `[inputs, rank]` and `[rank, width]`, of all tokens.
    pub down: Vec<f32>,
    pub up: Vec<f32>,
    /// What is added.
    pub mean: Vec<f32>,
    /// Predictions out of fold: `[tokens, width]`.
    pub predicted: Vec<f32>,
}

/// Reduced-rank ridge regression of `x` (`[tokens, width]`) on `inputs` (`[tokens, inputs]`): directions of the prediction that matter
/// less than the quantiser's error, by the metric's root, are left out.
pub fn predictor(
    corpus: &Corpus,
    x: &[f32],
    inputs: &[f32],
    training: &Training,
    roots: &Roots,
) -> Result<Predictor> {
    let (width, rows) = (corpus.width, corpus.coded());
    let mean = means(x, width, &rows);
    let mean32: Vec<f32> = mean.iter().map(|m| *m as f32).collect();
    let mut predicted = mean32.repeat(corpus.tokens());
    let d = inputs.len() / corpus.tokens().max(1);
    if d == 0 {
        return Ok(Predictor { rank: 0, down: Vec::new(), up: Vec::new(), mean: mean32, predicted });
    }
    let input_mean = means(inputs, d, &rows);
    let (z, y) = (centred(inputs, &input_mean), centred(x, &mean));
    let folds: Vec<Vec<usize>> = (0..FOLDS)
        .map(|f| rows.iter().copied().filter(|t| usize::from(corpus.fold[*t]) == f).collect())
        .collect();
    let Ridge { full, without, squares } = ridge(&z, (d, &y, width), &folds, training.ridge)?;
    let least = rows.len() as f64 * (0.12 * f64::from(from_eighths(training.step))).powi(2);
    let (into, back) = leading(&full, &squares, roots, least, training.rank)?;
    let rank = into.ncols();
    // As files hold them: the mean below makes up for just these, and means of keys can be a hundred times what varies.
    let (down, up) = (in_bytes(&flat(&(&full * &into)), rank), in_bytes(&flat(&back), width));
    for (rows, solved) in folds.iter().zip(&without) {
        let solved = flat(&(solved * &into * &back));
        for rows in rows.chunks(8 * ROWS) {
            let out = times(&pick(&z, d, rows), d, &solved, width);
            for (r, out) in rows.iter().zip(out.chunks_exact(width)) {
                predicted[r * width..][..width].iter_mut().zip(out).for_each(|(p, o)| *p += o);
            }
        }
    }
    // As decoders use it: predictions of inputs that are not centred.
    let input_mean: Vec<f32> = input_mean.iter().map(|m| *m as f32).collect();
    let (mut between, mut shift) = (vec![0.0; rank], vec![0.0; width]);
    product(View::row_major(&input_mean, 1, d), View::row_major(&down, d, rank), &mut between);
    product(View::row_major(&between, 1, rank), View::row_major(&up, rank, width), &mut shift);
    let mean = mean32.iter().zip(&shift).map(|(m, s)| m - s).collect();
    Ok(Predictor { rank, down, up, mean, predicted })
}

fn centred(x: &[f32], mean: &[f64]) -> Vec<f32> {
    x.par_chunks_exact(mean.len())
        .flat_map_iter(|row| row.iter().zip(mean).map(|(x, m)| x - *m as f32))
        .collect()
}

/// Regressions of all rows, and of all but those of each fold, `[inputs, width]`; the inputs' squares over all rows.
struct Ridge {
    full: Mat<f64>,
    without: Vec<Mat<f64>>,
    squares: Mat<f64>,
}

/// Of `y` (`[rows, width]`) on `z` (`[rows, d]`).
fn ridge(
    z: &[f32],
    (d, y, width): (usize, &[f32], usize),
    folds: &[Vec<usize>],
    ridge: f64,
) -> Result<Ridge> {
    let grams: Vec<(Mat<f64>, Mat<f64>)> =
        folds.iter().map(|rows| (gram(z, d, z, d, rows), gram(z, d, y, width, rows))).collect();
    let total = |skip: Option<usize>| {
        let (mut zz, mut zy) = (Mat::zeros(d, d), Mat::zeros(d, width));
        for (f, (a, b)) in grams.iter().enumerate() {
            if Some(f) != skip {
                zz += a;
                zy += b;
            }
        }
        (zz, zy)
    };
    let solve = |skip: Option<usize>| -> Result<Mat<f64>> {
        let (mut zz, zy) = total(skip);
        for i in 0..d {
            zz[(i, i)] += ridge * zz[(i, i)] + 1e-9;
        }
        let factor = zz
            .llt(Side::Lower)
            .map_err(|_| Error::Number("the layers below are singular; train on more text".into()))?;
        Ok(factor.solve(&zy))
    };
    let skips: Vec<Option<usize>> = (0..folds.len()).map(Some).chain([None]).collect();
    let mut without: Vec<Mat<f64>> = skips.into_par_iter().map(solve).collect::<Result<_>>()?;
    let full = without.pop().unwrap_or_else(|| Mat::zeros(d, width));
    Ok(Ridge { full, without, squares: total(None).0 })
}

/// The leading directions of weighted predictions, those with at least so much energy: `[width, rank]` into them, `[rank, width]` back.
fn leading(
    full: &Mat<f64>,
    squares: &Mat<f64>,
    roots: &Roots,
    least: f64,
    rank: usize,
) -> Result<(Mat<f64>, Mat<f64>)> {
    let weighted = full * &roots.root;
    let width = weighted.ncols();
    let spread = weighted.transpose() * squares * &weighted;
    let eigen = spread
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| Error::Number("predictions are not finite".into()))?;
    let kept: Vec<usize> = (0..width).rev().filter(|&k| eigen.S()[k] > least).take(rank).collect();
    let rank = kept.len().max(1);
    let leading = Mat::from_fn(width, rank, |i, k| eigen.U()[(i, kept.get(k).copied().unwrap_or(width - 1))]);
    Ok((&roots.root * &leading, leading.transpose() * &roots.inverse))
}
