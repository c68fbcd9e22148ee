//! What errors do: noise is added to the keys, or the values, of one layer at a time, and the KL is measured.

use super::{asked, metric};
use crate::block::Part;
use crate::block::{BlockId, Payload};
use crate::codec::joint::train::{Metric, inverse_root};
use crate::codec::{CacheBatch, Codec, Memo, Prefix};
use crate::dump::Manifest;
use crate::dump::open_model;
use crate::error::Result;
use crate::interrupt;
use crate::model::Model;
use crate::progress::{Progress, Unit};
use crate::sweep::{Base, FirstToken, Prompt, Reference, load, targets};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Noise, as a share of the variance of what it is added to.
const NOISE: f64 = 0.02;
const BLOCK_SIZE: usize = 16;

/// A row of sensitivity.csv.
#[derive(Debug, Clone, Serialize)]
pub struct Sensitivity {
    pub layer: usize,
    /// `key` or `value`.
    pub part: Part,
    /// KL (nats a token) by noise of one unit: a squared error of one in the metric of `metric::base`.
    pub kl_per_unit: f64,
    /// KL that was measured, and the squared error, in units, that made it.
    pub kl: f64,
    pub units: f64,
    /// KL by noise that is as large as the numbers themselves, if it went on in proportion.
    pub kl_per_variance: f64,
}

/// What to measure.
pub struct SensitivityOptions {
    pub dump: PathBuf,
    pub questions: usize,
    pub seed: u64,
}

/// Measures a dump; a row for the keys and one for the values of every layer.
///
/// # Errors
/// Damaged dumps; dumps without questions; Ctrl-C.
pub fn sensitivity(options: &SensitivityOptions) -> Result<Vec<Sensitivity>> {
    let manifest = Manifest::read(&options.dump)?;
    let model = open_model(&options.dump, None, &manifest)?;
    let base = metric::base(&options.dump, &manifest, &model, metric::EVEN)?;
    Bench::new(&options.dump, &manifest, &model, options.questions)?.measure(&base, options.seed)
}

/// Requests with answers, ready to be compared.
pub struct Bench<'a> {
    model: &'a Model,
    base: Base,
    prompts: Vec<Prompt>,
    reference: Reference,
    /// Pages of each layer, but for those of first tokens, with the first position of each.
    pages: Vec<BTreeMap<BlockId, usize>>,
}

impl<'a> Bench<'a> {
    /// Noise on the keys, and on the values, of every layer.
    pub fn measure(&self, metrics: &[Metric], seed: u64) -> Result<Vec<Sensitivity>> {
        each_part(metrics, "measuring sensitivities", |layer, part, own| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream((2 * layer + usize::from(part == Part::Value)) as u64);
            self.run(layer, part, own, &mut rng)
        })
    }

    /// A codec's own errors on one part of one layer at a time; metrics are in nats already, so `kl_per_unit` is 1 where
    /// they are right.
    pub fn own_errors(
        &self,
        metrics: &[Metric],
        rebuild: impl Fn(&mut CacheBatch) -> Result<()>,
    ) -> Result<Vec<Sensitivity>> {
        let mut coded = self.base.batch.clone();
        rebuild(&mut coded)?;
        each_part(metrics, "measuring the codec's errors", |layer, part, own| {
            let mut batch = self.base.batch.clone();
            let d = self.model.decoder.config().head_dim;
            let rope = batch.ropes.clone();
            let mut errors = Vec::new();
            for (&id, &first) in &self.pages[layer] {
                let (before, after) = (self.base.batch.pool.numbers(id, part), coded.pool.numbers(id, part));
                let mut error: Vec<f32> = before.iter().zip(&*after).map(|(x, y)| x - y).collect();
                if part == Part::Key {
                    rope.layer(layer).strip_tokens(&mut error, own.len() * d, first);
                }
                errors.push(error);
                replace(&mut batch, part, id, after.to_vec());
            }
            // Errors have no mean to speak of.
            let units = weighted_variance(&errors, own, d);
            let kl = self.kl(&mut batch)?;
            // Halfway, within bounds: one measurement is noisy, and errors change with their weights.
            let unit = if units > 0.0 { (kl / units).clamp(0.0625, 16.0).sqrt() } else { 1.0 };
            Ok(Sensitivity { layer, part, kl_per_unit: unit, kl, units, kl_per_variance: 0.0 })
        })
    }

    /// KL of a batch, nats a token, mean over requests.
    fn kl(&self, batch: &mut CacheBatch) -> Result<f64> {
        let compared = self.reference.compare(self.model, &self.base.spared, batch, &self.prompts)?;
        let kl: Vec<f64> = compared
            .targets
            .iter()
            .map(|t| t.iter().map(|d| d.kl).sum::<f64>() / t.len().max(1) as f64)
            .collect();
        Ok(crate::stats::mean(&kl))
    }

    pub fn new(dump: &Path, manifest: &Manifest, model: &'a Model, questions: usize) -> Result<Self> {
        let requests = asked(dump, manifest, questions)?;
        let (mut batch, mut prompts) = load(dump, model, manifest, &requests, BLOCK_SIZE)?;
        Prefix::default().encode(&mut batch, &Memo::default())?;
        for (&i, prompt) in requests.iter().zip(&mut prompts) {
            (prompt.targets, prompt.answer) = targets(model, manifest, i, &[])?;
        }
        let mut base = Base::new(model, batch, &prompts, FirstToken::Fused)?;
        let reference = Reference::of(model, &mut base, &prompts)?;
        let mut pages = vec![BTreeMap::new(); model.decoder.config().layers];
        for cache in &base.batch.caches {
            for (table, pages) in cache.layers.iter().zip(&mut pages) {
                for (i, entry) in table.entries.iter().enumerate() {
                    pages.insert(entry.block, i * BLOCK_SIZE);
                }
            }
        }
        Ok(Bench { model, base, prompts, reference, pages })
    }

    /// Noise of the metric's shape on one part of one layer.
    fn run(
        &self,
        layer: usize,
        part: Part,
        metric: &[Vec<f64>],
        rng: &mut ChaCha8Rng,
    ) -> Result<Sensitivity> {
        let mut batch = self.base.batch.clone();
        let d = self.model.decoder.config().head_dim;
        let width = metric.len() * d;
        let inverses: Vec<Vec<f32>> = metric.iter().map(|m| inverse_root(m)).collect::<Result<_>>()?;
        let ropes = std::sync::Arc::clone(&batch.ropes);
        let rope = ropes.layer(layer);
        let read = |id: BlockId, first: usize| {
            let mut numbers = batch.pool.numbers(id, part).into_owned();
            if part == Part::Key {
                rope.strip_tokens(&mut numbers, width, first);
            }
            numbers
        };
        let numbers: Vec<Vec<f32>> = self.pages[layer].iter().map(|(id, first)| read(*id, *first)).collect();
        let energy = weighted_variance(&numbers, metric, d);
        let amplitude = (NOISE * energy / width as f64).sqrt() as f32;
        for ((&id, &first), mut numbers) in self.pages[layer].iter().zip(numbers) {
            for (t, row) in numbers.chunks_exact_mut(width).enumerate() {
                // First tokens are never touched by the codec either.
                let quiet = first + t == 0;
                for (head, inverse) in row.chunks_exact_mut(d).zip(&inverses) {
                    let noise: Vec<f32> = (0..d).map(|_| StandardNormal.sample(rng)).collect();
                    for (x, row) in head.iter_mut().zip(inverse.chunks_exact(d)) {
                        let turned: f32 = row.iter().zip(&noise).map(|(a, b)| a * b).sum();
                        *x += if quiet { 0.0 } else { amplitude * turned };
                    }
                }
            }
            if part == Part::Key {
                rope.rotate_tokens(&mut numbers, width, first);
            }
            replace(&mut batch, part, id, numbers);
        }
        let kl = self.kl(&mut batch)?;
        let units = f64::from(amplitude).powi(2) * width as f64;
        let unit = if units > 0.0 { kl / units } else { 0.0 };
        Ok(Sensitivity { layer, part, kl_per_unit: unit, kl, units, kl_per_variance: kl / NOISE })
    }
}

/// Puts others in their place, for all that point at the page.
fn replace(batch: &mut CacheBatch, part: Part, id: BlockId, numbers: Vec<f32>) {
    let (keys, values) = match part {
        Part::Key => (numbers, batch.pool.values(id).into_owned()),
        Part::Value => (batch.pool.keys(id).into_owned(), numbers),
    };
    batch.pool.recode(id, keys, values, Payload::default(), None);
}

/// Runs the keys and the values of every layer, with their part of the metric.
fn each_part(
    metrics: &[Metric],
    label: &str,
    mut run: impl FnMut(usize, Part, &[Vec<f64>]) -> Result<Sensitivity>,
) -> Result<Vec<Sensitivity>> {
    let progress = Progress::new(label, 2 * metrics.len() as u64, Unit::Items("runs"));
    let mut rows = Vec::new();
    for (layer, metric) in metrics.iter().enumerate() {
        for part in [Part::Key, Part::Value] {
            interrupt::check()?;
            let half = metric.len() / 2;
            let own = if part == Part::Key { &metric[..half] } else { &metric[half..] };
            rows.push(run(layer, part, own)?);
            progress.increment();
        }
    }
    progress.finish();
    Ok(rows)
}

/// Mean over tokens of the squared distance from the mean, in a metric.
fn weighted_variance(pages: &[Vec<f32>], metric: &[Vec<f64>], d: usize) -> f64 {
    let width = metric.len() * d;
    let rows = || pages.iter().flat_map(|p| p.chunks_exact(width));
    let n = rows().count().max(1) as f64;
    let mut mean = vec![0.0f64; width];
    rows().for_each(|row| mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x) / n));
    let mut sum = 0.0;
    for row in rows() {
        for (h, metric) in metric.iter().enumerate() {
            let e: Vec<f64> = (0..d).map(|i| f64::from(row[h * d + i]) - mean[h * d + i]).collect();
            for (a, row) in e.iter().zip(metric.chunks_exact(d)) {
                sum += a * row.iter().zip(&e).map(|(m, b)| m * b).sum::<f64>();
            }
        }
    }
    sum / n
}
