//! What of a residual matters: directions weighted by the metric.

use super::sums::{gram, times};
use super::{Metric, Training};
use crate::codec::joint::book::{flat, in_bytes};
use crate::codec::joint::corpus::Corpus;
use crate::codec::joint::entropy::from_eighths;
use crate::error::{Error, Result};
use faer::{Mat, Side};

/// Components whose standard deviation is below this share of the step are not kept.
const LEAST: f64 = 0.16;

/// The symmetric root of a metric and its inverse, `[width, width]`.
pub struct Roots {
    pub root: Mat<f64>,
    pub inverse: Mat<f64>,
}

impl Roots {
    pub fn of(metric: &Metric, width: usize) -> Result<Self> {
        let d = width / metric.len().max(1);
        let (mut root, mut inverse) = (Mat::zeros(width, width), Mat::zeros(width, width));
        for (h, block) in metric.iter().enumerate() {
            for (out, block) in [(&mut root, power(block, 0.5)?), (&mut inverse, power(block, -0.5)?)] {
                for i in 0..d {
                    for j in 0..d {
                        out[(h * d + i, h * d + j)] = block[(i, j)];
                    }
                }
            }
        }
        Ok(Roots { root, inverse })
    }

    /// The root head by head: `[heads][head_dim, head_dim]`.
    pub fn by_head(&self, heads: usize) -> Vec<Vec<f32>> {
        let d = self.root.nrows() / heads;
        let number = |h: usize, i: usize| self.root[(h * d + i / d, h * d + i % d)] as f32;
        (0..heads).map(|h| (0..d * d).map(|i| number(h, i)).collect()).collect()
    }
}

/// The directions of weighted residuals that matter: `[width, r]`, and how many they are.
pub fn components(
    corpus: &Corpus,
    residual: &[f32],
    roots: &Roots,
    training: &Training,
) -> Result<(Vec<f32>, usize)> {
    let width = corpus.width;
    let weighted = times(residual, width, &flat(&roots.root), width);
    let rows = corpus.coded();
    let sums = gram(&weighted, width, &weighted, width, &rows);
    let scale = 1.0 / rows.len().max(1) as f64;
    let covariance =
        Mat::from_fn(width, width, |i, j| if training.klt || i == j { sums[(i, j)] * scale } else { 0.0 });
    let eigen = covariance
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| Error::Number("residuals of a layer are not finite".into()))?;
    let (vectors, values) = (eigen.U(), eigen.S());
    // Rising; the largest first. Components far below the step are left out.
    let least = f64::from(from_eighths(training.step)) * LEAST;
    let kept: Vec<usize> = (0..width).rev().filter(|&k| values[k] > least * least).collect();
    let r = kept.len().max(1);
    let turn = Mat::from_fn(width, r, |i, k| vectors[(i, kept.get(k).copied().unwrap_or(width - 1))]);
    Ok((in_bytes(&flat(&turn), r), r))
}

/// A power of a symmetric matrix without negative eigenvalues. Directions in which no error was seen to matter are not free
/// altogether.
fn power(block: &[f64], exponent: f64) -> Result<Mat<f64>> {
    let d = block.len().isqrt();
    let block = Mat::from_fn(d, d, |i, j| block[i * d + j]);
    let eigen =
        block.self_adjoint_eigen(Side::Lower).map_err(|_| Error::Number("a metric is not finite".into()))?;
    let (u, s) = (eigen.U(), eigen.S());
    let trace: f64 = (0..d).map(|k| s[k].max(0.0)).sum();
    let floor = (trace / d as f64 * 1e-3).max(1e-30);
    let scaled = Mat::from_fn(d, d, |i, k| u[(i, k)] * (s[k].max(0.0) + floor).powf(exponent));
    Ok(&scaled * u.transpose())
}

/// The inverse of the symmetric root of one head's metric, `[head_dim, head_dim]`: what turns white noise into noise of which every
/// direction matters as much.
pub fn inverse_root(block: &[f64]) -> Result<Vec<f32>> {
    Ok(flat(&power(block, -0.5)?))
}
