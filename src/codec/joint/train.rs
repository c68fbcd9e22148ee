//! Fits a codec to caches: predictors, components, references, tables.
//!
//! Everything that describes residuals is measured out of fold: a token's residual comes from a predictor that has not seen its text. So
//! tables fit new text, not the training text.

use super::book::{LayerBook, TableParts, both_ways, flat, in_bytes};
use super::corpus::Corpus;
use super::entropy::{Counts, Neighbours, Tables, Width, eighths, from_eighths};
use super::layers::side_by_side;
use super::reference::{CLASSES, class_of};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::gemm::{View, product, tiled};
use faer::linalg::solvers::Solve;
use faer::{Mat, Side};
use half::f16;
use rayon::prelude::*;

/// Parts that the training tokens' texts are dealt into.
pub const FOLDS: usize = 4;
/// Components whose standard deviation is below this share of the step are not kept.
const LEAST: f64 = 0.16;
/// Tables count numbers as rounded with this price of a bit, though encoders round to the nearest: so numbers are rebuilt a little further
/// out than their centroids. That costs squared error and saves KL, to which a bias towards the prediction is worse than noise.
const OUTWARD: f32 = 0.1;
/// Rows that are multiplied at a time.
const ROWS: usize = 512;

/// How to train.
#[derive(Debug, Clone, Copy)]
pub struct Training {
    /// Step of the quantiser while training, in eighths of an octave.
    pub step: i32,
    /// Layers below that a layer is predicted from.
    pub taps: usize,
    /// Turn residuals into uncorrelated components.
    pub klt: bool,
    /// Ridge, as a share of each input's variance.
    pub ridge: f64,
    /// Most numbers between the factors of a predictor.
    pub rank: usize,
}

/// The weight of errors in one layer, head by head: `[2 * kv_heads][head_dim, head_dim]`, keys first; symmetric. A squared error
/// is what it adds to the KL.
pub type Metric = Vec<Vec<f64>>;

/// One layer while it is trained.
struct Fitted {
    book: LayerBook,
    /// As decoders would rebuild it, out of fold: `[tokens, width]`.
    rebuilt: Vec<f32>,
    /// What is left of components after references, in steps: `[tokens, components]`.
    left: Vec<f16>,
}

/// Trains all layers; `progress` is called after each.
///
/// # Errors
/// Singular matrices; Ctrl-C.
pub fn train(
    corpus: &Corpus,
    metrics: &[Metric],
    training: &Training,
    mut progress: impl FnMut(),
) -> Result<(Vec<LayerBook>, TableParts)> {
    let mut books: Vec<LayerBook> = Vec::new();
    let mut below: Vec<Vec<f32>> = Vec::new();
    let mut left = Vec::new();
    for (n, metric) in metrics.iter().enumerate() {
        interrupt::check()?;
        let fitted = layer(corpus, n, &below, metric, training)?;
        below.push(fitted.rebuilt);
        if below.len() > training.taps {
            below.remove(0);
        }
        progress();
        books.push(fitted.book);
        left.push(fitted.left);
    }
    let tables = tables(corpus, &books, &left, training)?;
    Ok((books, tables))
}

fn layer(
    corpus: &Corpus,
    n: usize,
    below: &[Vec<f32>],
    metric: &Metric,
    training: &Training,
) -> Result<Fitted> {
    let (width, tokens) = (corpus.width, corpus.tokens());
    let x = &corpus.layers[n];
    let nearest: Vec<(&[f32], usize)> =
        below.iter().rev().take(training.taps).map(|layer| (&layer[..], width)).collect();
    let inputs = side_by_side(&nearest);
    let (root, inverse) = roots(metric, width)?;
    let Predictor { rank, down, up, mean, predicted } =
        predictor(corpus, x, &inputs, training, (&root, &inverse))?;
    let residual: Vec<f32> = x.iter().zip(&predicted).map(|(x, p)| x - p).collect();
    let (turn, components) = components(corpus, &residual, &root, training)?;
    let r = components;
    let d = width / metric.len();
    let block =
        |h: usize| (0..d * d).map(|i| root[(h * d + i / d, h * d + i % d)] as f32).collect::<Vec<f32>>();
    let root: Vec<Vec<f32>> = (0..metric.len()).map(block).collect();
    let (analysis, synthesis) =
        both_ways(&root, &turn, r).ok_or_else(|| Error::Number("a metric cannot be inverted".into()))?;
    let u = times(&residual, width, &analysis, r);

    // What a reference says: from components that are quantised without one.
    let step = from_eighths(training.step);
    let plain: Vec<f32> = u.iter().map(|x| quantised(x / step) * step).collect();
    let seen_by = corpus.sightings();
    let gain = gains(corpus, &seen_by, &u, &plain, r, step);
    // Means of sightings, as later tokens find them.
    let mut means = vec![0.0f32; tokens * r];
    let mut coded = vec![0.0f32; tokens * r];
    let mut left = vec![f16::ZERO; tokens * r];
    let mut energy = vec![0.0f64; CLASSES * r];
    let mut seen = [0.0f64; CLASSES];
    for t in 0..tokens {
        if corpus.raw[t] {
            continue;
        }
        let own = &mut coded[t * r..][..r];
        let (past, mean) = means.split_at_mut(t * r);
        let from = corpus.source[t].map(|(s, _)| &past[s * r..][..r]);
        let class = corpus.source[t].map_or(0, |(s, matched)| class_of(matched, seen_by[s]));
        seen[class] += 1.0;
        for k in 0..r {
            let base = from.map_or(0.0, |from| gain[class * r + k] * from[k]);
            let rest = (u[t * r + k] - base) / step;
            energy[class * r + k] += f64::from(rest * rest);
            left[t * r + k] = f16::from_f32(rest);
            own[k] = base + quantised(rest) * step;
            let before = from.filter(|_| seen_by[t] > 1).map_or(own[k], |from| from[k]);
            mean[k] = before + (own[k] - before) / seen_by[t] as f32;
        }
    }
    let mut rebuilt = predicted;
    let residual = times(&coded, r, &synthesis, width);
    rebuilt.iter_mut().zip(&residual).for_each(|(x, e)| *x += e);
    for (t, raw) in corpus.raw.iter().enumerate() {
        if *raw {
            rebuilt[t * width..][..width].copy_from_slice(&x[t * width..][..width]);
        }
    }
    let sigma = sigmas(&energy, &seen, r, training.step);
    let book = LayerBook { mean, rank, down, up, components, root, turn, analysis, synthesis, sigma, gain };
    Ok(Fitted { book, rebuilt, left })
}

/// A number of steps as a plain quantiser with a dead zone rebuilds it.
fn quantised(x: f32) -> f32 {
    let magnitude = (x.abs() + 0.4).floor();
    if magnitude > 0.0 { (magnitude - 0.03).copysign(x) } else { 0.0 }
}

/// Standard deviations by class, in eighths of an octave; where a class was seldom seen, as those of the class before it.
fn sigmas(energy: &[f64], seen: &[f64; CLASSES], r: usize, step: i32) -> Vec<i16> {
    const PRIOR: f64 = 50.0;
    let all: f64 = seen.iter().sum::<f64>().max(1.0);
    let mut before: Vec<f64> =
        (0..r).map(|k| (0..CLASSES).map(|c| energy[c * r + k]).sum::<f64>() / all).collect();
    let mut sigma = Vec::with_capacity(CLASSES * r);
    for class in 0..CLASSES {
        for (k, before) in before.iter_mut().enumerate() {
            *before = (energy[class * r + k] + PRIOR * *before) / (seen[class] + PRIOR);
            sigma.push((step + eighths(before.sqrt())).clamp(-30_000, 30_000) as i16);
        }
    }
    sigma
}

/// For every class and component, what of a reference's component is expected again.
fn gains(corpus: &Corpus, seen_by: &[u32], u: &[f32], plain: &[f32], r: usize, step: f32) -> Vec<f32> {
    let mut means = plain.to_vec();
    let (mut both, mut own) = (vec![0.0f64; CLASSES * r], vec![0.0f64; CLASSES * r]);
    for (t, source) in corpus.source.iter().enumerate() {
        let Some((s, matched)) = *source else { continue };
        if corpus.raw[t] {
            continue;
        }
        let class = class_of(matched, seen_by[s]);
        for k in 0..r {
            let from = means[s * r + k];
            if seen_by[t] > 1 {
                means[t * r + k] = from + (plain[t * r + k] - from) / seen_by[t] as f32;
            }
            let from = f64::from(from);
            both[class * r + k] += from * f64::from(u[t * r + k]);
            own[class * r + k] += from * from;
        }
    }
    let prior = 30.0 * f64::from(step).powi(2);
    both.iter().zip(&own).map(|(b, o)| (b / (o + prior)).clamp(0.0, 1.0) as f32).collect()
}

/// `[rows, inner] * [inner, columns]`.
fn times(a: &[f32], inner: usize, b: &[f32], columns: usize) -> Vec<f32> {
    tiled(a, View::row_major(b, inner, columns))
}

/// `a^T * b` over some rows, in f64: `[a columns, b columns]`. Sums of [`ROWS`] rows are f32, the rest is not.
fn gram(a: &[f32], a_columns: usize, b: &[f32], b_columns: usize, rows: &[usize]) -> Mat<f64> {
    let part = |rows: &[usize]| {
        let pick = |x: &[f32], columns: usize| -> Vec<f32> {
            rows.iter().flat_map(|r| &x[r * columns..][..columns]).copied().collect()
        };
        let (a, b) = (pick(a, a_columns), pick(b, b_columns));
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

/// Mean of each column over some rows.
pub fn means(x: &[f32], columns: usize, rows: &[usize]) -> Vec<f64> {
    let mut sum = vec![0.0f64; columns];
    for r in rows {
        sum.iter_mut().zip(&x[r * columns..][..columns]).for_each(|(s, x)| *s += f64::from(*x));
    }
    sum.iter().map(|s| s / rows.len().max(1) as f64).collect()
}

/// A ridge regression of few numbers in between.
struct Predictor {
    rank: usize,
    /// `[inputs, rank]` and `[rank, width]`, of all tokens.
    down: Vec<f32>,
    up: Vec<f32>,
    /// What is added.
    mean: Vec<f32>,
    /// Predictions out of fold: `[tokens, width]`.
    predicted: Vec<f32>,
}

/// Reduced-rank ridge regression of `x` on `inputs`: directions of the prediction that matter less than the quantiser's error, by
/// the metric's root (and its inverse), are left out.
fn predictor(
    corpus: &Corpus,
    x: &[f32],
    inputs: &[f32],
    training: &Training,
    (root, inverse): (&Mat<f64>, &Mat<f64>),
) -> Result<Predictor> {
    let (width, tokens) = (corpus.width, corpus.tokens());
    let d = inputs.len() / tokens.max(1);
    let rows: Vec<usize> = (0..tokens).filter(|t| !corpus.raw[*t]).collect();
    let mean = means(x, width, &rows);
    let mean32: Vec<f32> = mean.iter().map(|m| *m as f32).collect();
    if d == 0 {
        let predicted = (0..tokens).flat_map(|_| mean32.iter().copied()).collect();
        return Ok(Predictor { rank: 0, down: Vec::new(), up: Vec::new(), mean: mean32, predicted });
    }
    let input_mean = means(inputs, d, &rows);
    let centred = |x: &[f32], mean: &[f64]| -> Vec<f32> {
        x.par_chunks_exact(mean.len())
            .flat_map_iter(|row| row.iter().zip(mean).map(|(x, m)| x - *m as f32))
            .collect()
    };
    let (z, y) = (centred(inputs, &input_mean), centred(x, &mean));
    let folds: Vec<Vec<usize>> = (0..FOLDS)
        .map(|f| rows.iter().copied().filter(|t| usize::from(corpus.fold[*t]) == f).collect())
        .collect();
    let grams: Vec<(Mat<f64>, Mat<f64>)> =
        folds.iter().map(|rows| (gram(&z, d, &z, d, rows), gram(&z, d, &y, width, rows))).collect();
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
            zz[(i, i)] += training.ridge * zz[(i, i)] + 1e-9;
        }
        let factor = zz
            .llt(Side::Lower)
            .map_err(|_| Error::Number("the layers below are singular; train on more text".into()))?;
        Ok(factor.solve(&zy))
    };
    let mut solved: Vec<Mat<f64>> =
        (0..=FOLDS).into_par_iter().map(|f| solve((f < FOLDS).then_some(f))).collect::<Result<_>>()?;
    let full = solved.pop().unwrap_or_else(|| Mat::zeros(d, width));
    // Covariance of weighted predictions; its leading directions are kept.
    let weighted = &full * root;
    let spread = weighted.transpose() * total(None).0 * &weighted;
    let eigen = spread
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| Error::Number("predictions are not finite".into()))?;
    let least = rows.len() as f64 * (0.12 * f64::from(from_eighths(training.step))).powi(2);
    let kept: Vec<usize> = (0..width).rev().filter(|&k| eigen.S()[k] > least).take(training.rank).collect();
    let rank = kept.len().max(1);
    let leading = Mat::from_fn(width, rank, |i, k| eigen.U()[(i, kept.get(k).copied().unwrap_or(width - 1))]);
    let into = root * &leading;
    let back = leading.transpose() * inverse;
    // As files hold them: the mean below makes up for just these, and means of keys can be a hundred times what varies.
    let (down, up) = (in_bytes(&flat(&(&full * &into)), rank), in_bytes(&flat(&back), width));
    let solved: Vec<Vec<f32>> = solved.iter().map(|a| flat(&(a * &into * &back))).collect();
    let mut predicted: Vec<f32> = (0..tokens).flat_map(|_| mean32.iter().copied()).collect();
    for (rows, a) in folds.iter().zip(&solved) {
        for rows in rows.chunks(8 * ROWS) {
            let own: Vec<f32> = rows.iter().flat_map(|r| &z[r * d..][..d]).copied().collect();
            let out = times(&own, d, a, width);
            for (r, out) in rows.iter().zip(out.chunks_exact(width)) {
                predicted[r * width..][..width].iter_mut().zip(out).for_each(|(p, o)| *p += o);
            }
        }
    }
    // As decoders use it: predictions of inputs that are not centred.
    let input_mean32: Vec<f32> = input_mean.iter().map(|m| *m as f32).collect();
    let mut shift = vec![0.0; width];
    let mut between = vec![0.0; rank];
    product(View::row_major(&input_mean32, 1, d), View::row_major(&down, d, rank), &mut between);
    product(View::row_major(&between, 1, rank), View::row_major(&up, rank, width), &mut shift);
    let mean = mean32.iter().zip(&shift).map(|(m, s)| m - s).collect();
    Ok(Predictor { rank, down, up, mean, predicted })
}

/// The directions of weighted residuals that matter: `[width, r]`, and how many they are.
fn components(
    corpus: &Corpus,
    residual: &[f32],
    root: &Mat<f64>,
    training: &Training,
) -> Result<(Vec<f32>, usize)> {
    let width = corpus.width;
    let weighted = times(residual, width, &flat(root), width);
    let rows: Vec<usize> = (0..corpus.tokens()).filter(|t| !corpus.raw[*t]).collect();
    let mut covariance = gram(&weighted, width, &weighted, width, &rows);
    let scale = 1.0 / rows.len().max(1) as f64;
    for i in 0..width {
        for j in 0..width {
            covariance[(i, j)] *= scale;
        }
    }
    if !training.klt {
        let diagonal = Mat::from_fn(width, width, |i, j| if i == j { covariance[(i, j)] } else { 0.0 });
        covariance = diagonal;
    }
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

/// The symmetric root of a metric and its inverse, `[width, width]`.
fn roots(metric: &Metric, width: usize) -> Result<(Mat<f64>, Mat<f64>)> {
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
    Ok((root, inverse))
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

/// Tables of what is left, at steps around the trained one; twice, since rounding and contexts depend on the tables.
fn tables(
    corpus: &Corpus,
    books: &[LayerBook],
    left: &[Vec<f16>],
    training: &Training,
) -> Result<TableParts> {
    let parts = |counts: &Counts| TableParts {
        probabilities: counts.probabilities(),
        means: counts.means(),
        centroids: counts.centroids(),
    };
    let seen_by = corpus.sightings();
    let mut now = parts(&Counts::default());
    for _ in 0..2 {
        interrupt::check()?;
        let tables = Tables::new(&now.probabilities, &now.means, &now.centroids)
            .ok_or_else(|| Error::Number("tables of a codec are not finite".into()))?;
        let count = |tokens: std::ops::Range<usize>| {
            let mut counts = Counts::default();
            for t in tokens.filter(|t| !corpus.raw[*t]) {
                let class = corpus.source[t].map_or(0, |(s, matched)| class_of(matched, seen_by[s]));
                for offset in [-16, -8, -4, 0, 4, 8] {
                    let scale = 1.0 / from_eighths(offset);
                    let mut neighbours = Neighbours::default();
                    for (book, left) in books.iter().zip(left) {
                        let r = book.components;
                        for k in 0..r {
                            let sigma = i32::from(book.sigma[class * r + k]);
                            let Some(width) = Width::of(sigma, training.step + offset) else { continue };
                            let x = left[t * r + k].to_f32() * scale;
                            let context = neighbours.context();
                            let q = tables.quantise(width, context, x, OUTWARD);
                            counts.see(width, context, q, x);
                            tables.pass(width, &mut neighbours, q);
                        }
                    }
                }
            }
            counts
        };
        let chunks: Vec<std::ops::Range<usize>> =
            (0..corpus.tokens()).step_by(1024).map(|t| t..(t + 1024).min(corpus.tokens())).collect();
        let mut sum = Counts::default();
        for part in chunks.into_par_iter().map(count).collect::<Vec<_>>() {
            sum.add(&part);
        }
        now = parts(&sum);
    }
    Ok(now)
}
