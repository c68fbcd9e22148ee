//! Fits a codec to caches: predictors, components, references, tables.
//!
//! Everything that describes residuals is measured out of fold: a token's residual comes from a predictor that has not seen its text. So
//! tables fit new text, not the training text.

mod components;
mod predictor;
mod referring;
mod sums;
mod tables;

pub use components::inverse_root;
pub use sums::means;

use super::book::{LayerBook, TableParts, both_ways};
use super::corpus::Corpus;
use super::layers::side_by_side;
use crate::error::{Error, Result};
use crate::interrupt;
use components::{Roots, components};
use half::f16;
use predictor::{Predictor, predictor};
use referring::{Referred, referred};
use sums::times;
use tables::tables;

/// Parts that the training tokens' texts are dealt into.
pub const FOLDS: usize = 4;

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

/// `below`: the layers under this one as they are rebuilt, the nearest last.
fn layer(
    corpus: &Corpus,
    n: usize,
    below: &[Vec<f32>],
    metric: &Metric,
    training: &Training,
) -> Result<Fitted> {
    let width = corpus.width;
    let x = &corpus.layers[n];
    let nearest: Vec<(&[f32], usize)> =
        below.iter().rev().take(training.taps).map(|layer| (&layer[..], width)).collect();
    let inputs = side_by_side(&nearest);
    let roots = Roots::of(metric, width)?;
    let Predictor { rank, down, up, mean, predicted } = predictor(corpus, x, &inputs, training, &roots)?;
    let residual: Vec<f32> = x.iter().zip(&predicted).map(|(x, p)| x - p).collect();
    let (turn, r) = components(corpus, &residual, &roots, training)?;
    let root = roots.by_head(metric.len());
    let (analysis, synthesis) =
        both_ways(&root, &turn, r).ok_or_else(|| Error::Number("a metric cannot be inverted".into()))?;
    let u = times(&residual, width, &analysis, r);
    let Referred { coded, left, gain, sigma } = referred(corpus, &u, r, training.step);
    let mut rebuilt = predicted;
    let residual = times(&coded, r, &synthesis, width);
    rebuilt.iter_mut().zip(&residual).for_each(|(x, e)| *x += e);
    for (t, raw) in corpus.raw.iter().enumerate() {
        if *raw {
            rebuilt[t * width..][..width].copy_from_slice(&x[t * width..][..width]);
        }
    }
    let book =
        LayerBook { mean, rank, down, up, components: r, root, turn, analysis, synthesis, sigma, gain };
    Ok(Fitted { book, rebuilt, left })
}
