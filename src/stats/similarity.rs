//! `kvfuse stats`: how alike the blocks of a dump are, layer by layer, as rows of one long table (docs/statistics.md).

use super::alone::{Shards, fused_alone};
use super::blocks::{Class, DistinctBlocks, Home, distinct_blocks};
use super::fit::{Gaussian, Pareto};
use super::histogram::Histogram;
use super::pairs::{Above, PairSums, Share, count_pairs};
use super::recall::{Recall, lsh_recall};
use super::{mean, rounded};
use crate::block::Part;
use crate::codec::fusion::RopeMode;
use crate::codec::{Chain, Distortion, LayerRate};
use crate::dump::Manifest;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::Ropes;
use crate::progress::{Progress, Unit};
use rand::SeedableRng;
use rand::seq::index;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize, Serializer};
use statrs::distribution::{ContinuousCDF, StudentsT};
use std::path::Path;

/// What to measure.
#[derive(Debug, Clone, Serialize)]
pub struct SimilarityOptions {
    pub block_sizes: Vec<usize>,
    /// Compare keys as cached, or without their positions.
    pub rope: RopeMode,
    /// Look at so many blocks of a layer only, drawn by seed; the same in all layers.
    pub sample: Option<usize>,
    pub seed: u64,
    /// Thresholds, rising.
    pub taus: Vec<f64>,
    /// Layers to look at, if not all.
    pub layers: Option<Vec<usize>>,
    /// How many of the pairs above a threshold `pairing=lsh` finds, read off so many blocks and all others.
    pub lsh_recall: Option<usize>,
    /// Fusions of one layer alone.
    #[serde(serialize_with = "names")]
    pub fuse: Vec<Chain>,
}

fn names<S: Serializer>(chains: &[Chain], to: S) -> std::result::Result<S::Ok, S::Error> {
    to.collect_seq(chains.iter().map(Chain::name))
}

/// One number of stats.csv. Numbers are rounded to six significant digits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatRow {
    pub block_size: usize,
    pub layer: usize,
    /// `key` or `value`; `both` for what is counted once.
    pub part: String,
    pub rope: RopeMode,
    /// Which pairs ([`Class::name`]).
    pub class: String,
    pub statistic: String,
    /// Threshold, probability or cosine that the number is of.
    pub at: Option<f64>,
    pub value: f64,
    /// 95 % interval over requests.
    pub low: Option<f64>,
    pub high: Option<f64>,
}

impl StatRow {
    /// Whether this is a part's and a class's number of that name, at `at`.
    pub fn is(&self, part: &str, class: &str, statistic: &str, at: Option<f64>) -> bool {
        self.part == part && self.class == class && self.statistic == statistic && self.at == at
    }
}

/// Probabilities whose quantiles are written.
const QUANTILES: [f64; 13] = [0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 0.9999, 1.0];
/// Bins of the written density over [-1, 1].
const DENSITY_BINS: usize = 100;

/// Statistics of some requests of a dump: by block size, then layer.
///
/// The blocks are those a sweep fuses: full ones of all prompt tokens but the last. One layer is in memory at a time.
pub fn similarities(
    dump: &Path,
    manifest: &Manifest,
    requests: &[usize],
    options: &SimilarityOptions,
) -> Result<Vec<StatRow>> {
    let config = &manifest.model.config;
    let shards = Shards::open(dump, manifest, requests)?;
    let longest = shards.tokens.iter().map(Vec::len).max().unwrap_or(0);
    let ropes = Ropes::new(config, longest.max(1));
    let width = config.kv_heads * config.head_dim;
    let layers: Vec<usize> = options.layers.clone().unwrap_or_else(|| (0..config.layers).collect());
    if let Some(layer) = layers.iter().find(|layer| **layer >= config.layers) {
        let message = format!("--layers {layer}: the model has layers 0 to {}", config.layers - 1);
        return Err(Error::argument(message));
    }
    let progress = Progress::new("measuring", layers.len() as u64, Unit::Items("layers"));
    let mut found: Vec<Vec<StatRow>> = vec![Vec::new(); options.block_sizes.len()];
    for &layer in &layers {
        interrupt::check()?;
        let caches =
            |requests: &[u32]| requests.par_iter().map(|&r| shards.layer(r as usize, layer)).collect();
        for (&size, found) in options.block_sizes.iter().zip(&mut found) {
            let places = places(&shards.tokens, size, options);
            let strip = (options.rope == RopeMode::Strip).then_some(ropes.layer(layer));
            let blocks = distinct_blocks(&caches, &places, size, width, strip)?;
            let sums = count_pairs(&blocks, &options.taus, shards.tokens.len())?;
            let mut sheet = Sheet { block_size: size, layer, rope: options.rope, rows: Vec::new() };
            // Those that fill a block.
            let requests = holders(&places);
            sheet.blocks(&blocks, &places, requests);
            if options.sample.is_none() {
                sheet.tokens(&shards.tokens, size, width);
            }
            for (part, sums) in [(Part::Key, &sums.keys), (Part::Value, &sums.values)] {
                let norms = if part == Part::Key { &blocks.key_norms } else { &blocks.value_norms };
                sheet.norms(part, norms, &sums[Class::All as usize]);
                for class in Class::ALL {
                    sheet.pairs(part, class, sums, &options.taus);
                }
            }
            let level = &sums.keys[Class::SamePosition as usize];
            sheet.positions(&blocks, requests, level, &options.taus);
            if let Some(count) = options.lsh_recall {
                let rows = drawn(blocks.len(), count, options.seed);
                sheet.recall(&lsh_recall(&blocks, layer, &rows, &options.taus)?);
            }
            drop((blocks, sums));
            if !options.fuse.is_empty() {
                let unfused = shards.batch(layer, size)?;
                for chain in &options.fuse {
                    sheet.fused(&chain.name(), fused_alone(&unfused, layer, chain)?);
                }
            }
            found.append(&mut sheet.rows);
        }
        progress.increment();
    }
    progress.finish();
    if found.iter().flatten().all(|r| r.statistic != "distinct" || r.value == 0.0) {
        let largest = options.block_sizes.iter().max().copied().unwrap_or(0);
        return Err(Error::file(dump, format!("no request fills a block of {largest} tokens or fewer")));
    }
    Ok(found.concat())
}

/// The full blocks of all requests, or a sample of them, in request and token order.
fn places(prompts: &[Vec<u32>], size: usize, options: &SimilarityOptions) -> Vec<Home> {
    let of = |(request, tokens): (usize, &Vec<u32>)| {
        let full = (tokens.len() - 1) / size;
        (0..full).map(move |position| Home { request: request as u32, position: position as u32 })
    };
    let all: Vec<Home> = prompts.iter().enumerate().flat_map(of).collect();
    match options.sample {
        Some(n) if n < all.len() => drawn(all.len(), n, options.seed).into_iter().map(|i| all[i]).collect(),
        _ => all,
    }
}

/// So many numbers below `count`, or all if there are fewer, drawn by seed, rising.
fn drawn(count: usize, wanted: usize, seed: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut drawn = index::sample(&mut rng, count, wanted.min(count)).into_vec();
    drawn.sort_unstable();
    drawn
}

/// Rows of one layer and block size.
struct Sheet {
    block_size: usize,
    layer: usize,
    rope: RopeMode,
    rows: Vec<StatRow>,
}

impl Sheet {
    fn put(&mut self, part: &str, class: Class, statistic: &str, at: Option<f64>, value: Option<f64>) {
        self.put_interval(part, class.name(), statistic, at, value, None);
    }

    /// Leaves out what has no value.
    fn put_interval(
        &mut self,
        part: &str,
        class: &str,
        statistic: &str,
        at: Option<f64>,
        value: Option<f64>,
        interval: Option<(f64, f64)>,
    ) {
        let Some(value) = value.filter(|v| v.is_finite()) else { return };
        self.rows.push(StatRow {
            block_size: self.block_size,
            layer: self.layer,
            part: part.to_owned(),
            rope: self.rope,
            class: class.to_owned(),
            statistic: statistic.to_owned(),
            at: at.map(rounded),
            value: rounded(value),
            low: interval.map(|(low, _)| rounded(low)),
            high: interval.map(|(_, high)| rounded(high)),
        });
    }

    /// Keys at one and the same position, position by position: exceedances are not spread evenly over these. The class is
    /// `position_N`; of the thresholds that no pair exceeds only the lowest is written.
    fn positions(&mut self, blocks: &DistinctBlocks, requests: usize, sums: &PairSums, taus: &[f64]) {
        for (position, share) in sums.by_position.iter().enumerate() {
            let class = format!("position_{position}");
            let here = || blocks.homes.iter().filter(|h| h[0].position as usize == position);
            let mut put = |statistic: &str, at: Option<f64>, value: f64| {
                self.put_interval("key", &class, statistic, at, Some(value), None);
            };
            put("distinct", None, here().count() as f64);
            put("common", None, here().filter(|h| is_common(h, requests)).count() as f64);
            put("pairs", None, share.pairs as f64 / 2.0);
            let exceeded = share.above.iter().take_while(|a| a.0 > 0).count();
            for (t, (&tau, &(above, cosine))) in taus.iter().zip(&share.above).enumerate().take(exceeded + 1)
            {
                if share.pairs > 0 {
                    put("exceedance", Some(tau), above as f64 / share.pairs as f64);
                }
                if above > 0 {
                    put("mean_above", Some(tau), cosine / above as f64);
                    // Variance over mean of a block's number of exceedances, here alone.
                    let (k, blocks) = (above as f64, share.blocks as f64);
                    put("dispersion", Some(tau), (share.squares[t] as f64 - k * k / blocks) / k);
                }
            }
        }
    }

    fn blocks(&mut self, blocks: &DistinctBlocks, places: &[Home], requests: usize) {
        let zero = blocks.key_norms.iter().zip(&blocks.value_norms).filter(|(k, v)| **k * **v == 0.0).count();
        let common = || blocks.homes.iter().filter(|h| is_common(h, requests));
        for (statistic, count) in [
            ("requests", requests),
            ("blocks", places.len()),
            ("distinct", blocks.len()),
            ("shared", blocks.homes.iter().filter(|h| holders(h) > 1).count()),
            ("common", common().count()),
            ("common_places", common().map(Vec::len).sum()),
            ("zero_norm", zero),
        ] {
            self.put("both", Class::All, statistic, None, Some(count as f64));
        }
    }

    /// What the ratio of the whole layer needs beside full blocks.
    fn tokens(&mut self, prompts: &[Vec<u32>], size: usize, width: usize) {
        let cached = || prompts.iter().map(|tokens| tokens.len() - 1);
        let partial = cached().filter(|tokens| tokens % size > 0).count();
        for (statistic, count) in
            [("tokens", cached().sum()), ("partial_blocks", partial), ("token_width", width)]
        {
            self.put("both", Class::All, statistic, None, Some(count as f64));
        }
    }

    /// Norms, and how many directions the blocks fill.
    fn norms(&mut self, part: Part, norms: &[f64], all: &PairSums) {
        let name = part_name(part);
        let mut put = |statistic: &str, value: f64| self.put(name, Class::All, statistic, None, Some(value));
        if norms.is_empty() {
            return;
        }
        let middle = mean(norms);
        put("norm_mean", middle);
        put("norm_sd", mean(&norms.iter().map(|x| (x - middle).powi(2)).collect::<Vec<_>>()).sqrt());
        put("norm_min", norms.iter().copied().fold(f64::INFINITY, f64::min));
        put("norm_max", norms.iter().copied().fold(0.0, f64::max));
        // Participation ratio (sum of eigenvalues)^2 / sum of squares of the Gram matrix of unit blocks; then of the
        // blocks less their mean.
        let n = norms.len() as f64;
        let ones = norms.iter().filter(|x| **x > 0.0).count() as f64;
        let squares = ones + all.powers[1];
        put("effective_dimension", ones * ones / squares);
        let total = ones + all.powers[0];
        let rows = all.row_squares + 2.0 * all.powers[0] + ones;
        let centred = squares - 2.0 / n * rows + total * total / (n * n);
        put("effective_dimension_centred", (ones - total / n).powi(2) / centred);
    }

    /// How many of the pairs above each threshold `pairing=lsh` finds.
    fn recall(&mut self, found: &[Recall]) {
        for r in found.iter().filter(|r| r.pairs > 0) {
            self.put("key", Class::All, "lsh_pairs", Some(r.tau), Some(r.pairs as f64));
            self.put("key", Class::All, "lsh_recall", Some(r.tau), Some(r.met as f64 / r.pairs as f64));
        }
    }

    /// What a fusion makes of this layer alone; the class is the method.
    fn fused(&mut self, method: &str, (rate, error): (LayerRate, Distortion)) {
        for (part, statistic, value) in [
            ("both", "fused_blocks", rate.logical_blocks as f64),
            ("both", "fused_left", rate.physical_blocks as f64),
            ("both", "fused_cr", rate.cr()),
            ("key", "fused_error", error.keys()),
            ("value", "fused_error", error.values()),
        ] {
            self.put_interval(part, method, statistic, None, Some(value), None);
        }
    }

    /// `all`: sums by class.
    fn pairs(&mut self, part: Part, class: Class, all: &[PairSums], taus: &[f64]) {
        let name = part_name(part);
        let sums = &all[class as usize];
        let n = sums.pairs as f64;
        self.put(name, class, "pairs", None, Some(n / 2.0));
        if sums.pairs == 0 {
            return;
        }
        let jackknife = |of: &dyn Fn(&Share) -> f64, total: f64| jackknife(sums, of, total);
        let [s1, s2, s3, s4] = sums.powers.map(|p| p / n);
        let variance = (s2 - s1 * s1).max(0.0);
        let interval = jackknife(&|r| r.cosine, sums.powers[0]);
        self.put_interval(name, class.name(), "mean", None, Some(s1), interval);
        self.put(name, class, "sd", None, Some(variance.sqrt()));
        if variance > 1e-12 {
            let third = s3 - 3.0 * s1 * s2 + 2.0 * s1.powi(3);
            let fourth = s4 - 4.0 * s1 * s3 + 6.0 * s1 * s1 * s2 - 3.0 * s1.powi(4);
            self.put(name, class, "skewness", None, Some(third / variance.powf(1.5)));
            self.put(name, class, "excess_kurtosis", None, Some(fourth / (variance * variance) - 3.0));
            // Correlation of two pairs that share a block: 0 in the model's world. Blocks with many pairs are in many
            // such pairs of pairs, so mean and variance are taken over these.
            let wedges = sums.size_squares as f64 - n;
            let mean = sums.wedge_cosines / wedges;
            let covariance = (sums.row_squares - sums.powers[1]) / wedges - mean * mean;
            let spread = sums.wedge_squares / wedges - mean * mean;
            let correlation = (spread > 1e-12).then(|| covariance / spread);
            self.put(name, class, "neighbour_correlation", None, correlation);
        }
        for p in QUANTILES {
            self.put(name, class, "quantile", Some(p), sums.histogram.quantile(p));
        }
        let mut density = vec![0u64; DENSITY_BINS];
        for (x, count) in sums.histogram.filled() {
            density[(((x + 1.0) / 2.0 * DENSITY_BINS as f64) as usize).min(DENSITY_BINS - 1)] += count;
        }
        let bin = 2.0 / DENSITY_BINS as f64;
        for (i, &count) in density.iter().enumerate().filter(|(_, c)| **c > 0) {
            let at = -1.0 + (i as f64 + 0.5) * bin;
            self.put(name, class, "density", Some(at), Some(count as f64 / n / bin));
        }

        let gaussian = Gaussian::of_body(&sums.histogram);
        if let Some(g) = gaussian {
            let cdf = |x: f64| 1.0 - g.exceedance(x);
            self.put(name, class, "gaussian_mean", None, Some(g.mean));
            self.put(name, class, "gaussian_sd", None, Some(g.sd));
            self.put(name, class, "gaussian_ks", None, Some(sums.histogram.kolmogorov_smirnov(cdf)));
            self.put(name, class, "gaussian_ad", None, Some(sums.histogram.anderson_darling(cdf)));
        }
        let pareto = Pareto::of_tail(&sums.histogram);
        if let Some(p) = pareto {
            self.put(name, class, "pareto_threshold", None, Some(p.threshold));
            self.put(name, class, "pareto_rate", None, Some(p.rate));
            self.put(name, class, "pareto_shape", None, Some(p.shape));
            self.put(name, class, "pareto_scale", None, Some(p.scale));
            self.put(name, class, "pareto_ks", None, Some(p.distance));
            let tail = sums.histogram.above(Histogram::bin_of(p.threshold));
            let distance = tail.anderson_darling(|x| 1.0 - p.survival(x));
            self.put(name, class, "pareto_ad", None, Some(distance));
        }
        for (t, (&tau, above)) in taus.iter().zip(&sums.above).enumerate() {
            let q = above.pairs as f64 / n;
            let interval = jackknife(&|r| r.above[t].0 as f64, above.pairs as f64).map(|(low, high)| {
                // None of n independent pairs: up to 3/n. These are not independent, so it is the least it can be.
                let high = if above.pairs == 0 { 6.0 / n } else { high };
                (low.max(0.0), high.min(1.0))
            });
            let mut put = |statistic: &str, value: Option<f64>| {
                self.put(name, class, statistic, Some(tau), value);
            };
            put("gaussian_exceedance", gaussian.map(|g| g.exceedance(tau)));
            put("pareto_exceedance", pareto.and_then(|p| p.exceedance(tau)));
            if above.pairs > 0 {
                let Above { pairs, squares, cross, neighbours, cosine, other, gaps } = above;
                let k = *pairs as f64;
                // Sum over blocks of (k - m q)^2 / sum of m q; with equal m, variance / mean.
                let spread = *squares as f64 - 2.0 * q * *cross as f64 + q * q * sums.size_squares as f64;
                put("dispersion", Some(spread / (q * n)));
                put("rho1", (*neighbours > 0).then(|| (*squares as f64 - k) / *neighbours as f64));
                put("gap_ks", gaps.distance());
                put("extremal_index", gaps.extremal_index());
                put("mean_above", Some(cosine / k));
                if part == Part::Key {
                    put("value_above", Some(other / k));
                }
            }
            self.put_interval(name, class.name(), "exceedance", Some(tau), Some(q), interval);
        }
    }
}

/// Requests among the homes of a block; homes rise by request.
fn holders(homes: &[Home]) -> usize {
    homes.chunk_by(|a, b| a.request == b.request).count()
}

/// Whether a block belongs to a shared preamble: several requests hold it, and at least half of all.
fn is_common(homes: &[Home], requests: usize) -> bool {
    let holders = holders(homes);
    holders > 1 && 2 * holders >= requests
}

fn part_name(part: Part) -> &'static str {
    match part {
        Part::Key => "key",
        Part::Value => "value",
    }
}

/// 95 % interval of a mean over pairs from leaving out one request at a time, with the blocks that it alone holds: pairs that
/// share a request are not independent, requests are taken to be. Student's t, as requests are few. `None` with one request.
fn jackknife(sums: &PairSums, of: &dyn Fn(&Share) -> f64, total: f64) -> Option<(f64, f64)> {
    let pairs = sums.pairs as f64;
    let left: Vec<f64> = sums
        .by_request
        .iter()
        .filter(|share| share.pairs > 0)
        .map(|share| {
            let kept = pairs - share.pairs as f64;
            (kept > 0.0).then(|| ((total - of(share)) / kept).clamp(-1.0, 1.0))
        })
        .collect::<Option<_>>()?;
    let n = left.len() as f64;
    (left.len() > 1).then_some(())?;
    let middle = mean(&left);
    let error = ((n - 1.0) / n * left.iter().map(|x| (x - middle).powi(2)).sum::<f64>()).sqrt();
    let t = StudentsT::new(0.0, 1.0, n - 1.0).ok()?.inverse_cdf(0.975);
    let share = total / pairs;
    Some((share - t * error, share + t * error))
}
