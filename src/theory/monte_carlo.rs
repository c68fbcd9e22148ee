//! The sweep's own fusion code on synthetic caches, beside the closed forms at what was drawn.

use super::law::LayerLaw;
use super::predict::{Meeting, representative};
use super::worlds::{Recipe, World};
use crate::block::{BlockShape, BlockTable, RequestCache, Storage};
use crate::codec::fusion::{Choices, Fusion, Pairing, Rule};
use crate::codec::{CacheBatch, Codec, Memo, distortion};
use crate::error::Result;
use crate::interrupt;
use crate::model::{Rope, RopeConfig, Ropes};
use crate::stats::{Class, Home, count_pairs, distinct_blocks, mean, rounded};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;
use std::sync::Arc;

/// How much to draw.
#[derive(Debug, Clone, Serialize)]
pub struct Draws {
    pub worlds: Vec<World>,
    pub requests: usize,
    /// Blocks a request.
    pub blocks: usize,
    pub draws: usize,
    pub seed: u64,
}

/// One row of monte_carlo.csv. Intervals are 95 % of the mean over draws.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MonteCarloRow {
    pub layer: usize,
    pub world: World,
    pub pairing: Pairing,
    pub tau: f64,
    /// The threshold that stands for tau in this world.
    pub tau_world: f64,
    pub requests: usize,
    pub blocks: usize,
    pub draws: usize,
    /// Share of pairs above the threshold, of those that the pairing looks at.
    pub q: f64,
    /// Variance / mean, over draws, of the number of pairs above the threshold: 1 for a Poisson variable.
    pub dispersion: Option<f64>,
    /// Full blocks before / after.
    pub cr: f64,
    pub cr_low: f64,
    pub cr_high: f64,
    /// The closed form at this q.
    pub cr_model: f64,
    pub key_error: f64,
    pub key_error_low: f64,
    pub key_error_high: f64,
    /// The closed form at this q and the mean cosine of the pairs above the threshold; absent where there are none.
    pub key_error_model: Option<f64>,
}

const PAIRINGS: [Pairing; 4] = [Pairing::Tree, Pairing::Best, Pairing::Components, Pairing::Lsh];

/// What one draw gives at one threshold: exceedances (all pairs, pairs of different requests), their cosines, and blocks
/// left and key error of every pairing.
struct Drawn {
    above: [(f64, f64); 2],
    fused: Vec<(f64, f64)>,
}

/// Draws caches like one layer's and fuses them at every threshold by every pairing.
pub fn monte_carlo(law: &LayerLaw, taus: &[f64], draws: &Draws) -> Result<Vec<MonteCarloRow>> {
    let (b, p) = (draws.requests, draws.blocks);
    let n = (b * p) as f64;
    let mut rows = Vec::new();
    for &world in &draws.worlds {
        let recipe = Recipe::new(world, law);
        let common = Recipe::new(World::Common, law).common;
        let thresholds: Vec<f64> = taus.iter().map(|&tau| Recipe::threshold(world, tau, common)).collect();
        let one = |i: usize| draw_one(&recipe, &thresholds, draws, i as u64);
        let drawn: Vec<Vec<Drawn>> = (0..draws.draws).into_par_iter().map(one).collect::<Result<Vec<_>>>()?;
        let pairs = [0.5 * n * (n - 1.0), 0.5 * (n * n - n * p as f64)];
        for (t, (&tau, &tau_world)) in taus.iter().zip(&thresholds).enumerate() {
            for (k, pairing) in PAIRINGS.into_iter().enumerate() {
                let across = usize::from(pairing == Pairing::Tree);
                let counts: Vec<f64> = drawn.iter().map(|d| d[t].above[across].0).collect();
                let cosines: f64 = drawn.iter().map(|d| d[t].above[across].1).sum();
                let total: f64 = counts.iter().sum();
                let q = if pairs[across] > 0.0 { mean(&counts) / pairs[across] } else { 0.0 };
                let cr = interval(drawn.iter().map(|d| n / d[t].fused[k].0));
                let error = interval(drawn.iter().map(|d| d[t].fused[k].1));
                let meeting = Meeting { pairing, requests: b as f64, distinct: n, q };
                let model = meeting.blocks();
                let common_here = if world == World::Iid { 0.0 } else { common };
                let error_model = (total > 0.0).then(|| meeting.error(cosines / total, common_here) / n);
                rows.push(MonteCarloRow {
                    layer: law.layer,
                    world,
                    pairing,
                    tau,
                    tau_world: rounded(tau_world),
                    requests: b,
                    blocks: p,
                    draws: draws.draws,
                    q: rounded(q),
                    dispersion: dispersion(&counts).map(rounded),
                    cr: rounded(cr.0),
                    cr_low: rounded(cr.1),
                    cr_high: rounded(cr.2),
                    cr_model: rounded(n / model),
                    key_error: rounded(error.0),
                    key_error_low: rounded(error.1),
                    key_error_high: rounded(error.2),
                    key_error_model: error_model.map(rounded),
                });
            }
        }
    }
    Ok(rows)
}

fn draw_one(recipe: &Recipe, thresholds: &[f64], draws: &Draws, draw: u64) -> Result<Vec<Drawn>> {
    interrupt::check()?;
    // A stream a draw: the same draws on any number of threads.
    let mut rng = ChaCha8Rng::seed_from_u64(draws.seed);
    rng.set_stream(draw);
    let caches: Vec<(Vec<f32>, Vec<f32>)> = recipe
        .draw(draws.requests, draws.blocks, &mut rng)
        .into_iter()
        .map(|keys| (keys.clone(), keys))
        .collect();
    let width = recipe.width();
    let home = |i: usize| Home { request: (i / draws.blocks) as u32, position: (i % draws.blocks) as u32 };
    let places: Vec<Home> = (0..draws.requests * draws.blocks).map(home).collect();
    let read = |requests: &[u32]| Ok(requests.iter().map(|&r| caches[r as usize].clone()).collect());
    let blocks = distinct_blocks(&read, &places, 1, width, None)?;
    let mut order: Vec<usize> = (0..thresholds.len()).collect();
    order.sort_by(|&a, &b| thresholds[a].total_cmp(&thresholds[b]));
    let rising: Vec<f64> = order.iter().map(|&t| thresholds[t]).collect();
    let sums = count_pairs(&blocks, &rising, draws.requests)?.keys;

    let batch = batch_of(&caches, width);
    let memo = Memo::default();
    let mut found: Vec<Drawn> = Vec::new();
    for (t, &tau) in thresholds.iter().enumerate() {
        let level = order.iter().position(|&o| o == t).unwrap_or(0);
        let of = |classes: &[Class]| {
            let above = classes.iter().map(|&c| &sums[c as usize].above[level]);
            above.fold((0.0, 0.0), |(k, s), a| (k + a.pairs as f64 / 2.0, s + a.cosine / 2.0))
        };
        let mut fused = Vec::new();
        for pairing in PAIRINGS {
            let choices = Choices {
                pairing,
                representative: representative(pairing),
                spare_layers: 0,
                ..Choices::default()
            };
            let mut encoded = batch.clone();
            Fusion::new(choices, Rule::Tau(tau))?.encode(&mut encoded, &memo)?;
            let error = distortion(&batch, &encoded).0.keys();
            fused.push((encoded.pool.live_blocks() as f64, error));
        }
        let above = [of(&[Class::All]), of(&[Class::SamePosition, Class::Other])];
        found.push(Drawn { above, fused });
    }
    Ok(found)
}

/// Caches of one layer, a block a token.
fn batch_of(caches: &[(Vec<f32>, Vec<f32>)], width: usize) -> CacheBatch {
    let shape = BlockShape { block_size: 1, kv_heads: 1, head_dim: width };
    let rope = Ropes::same(Rope::new(&RopeConfig::plain(10_000.0, width), 1));
    let mut batch = CacheBatch::empty(shape, Storage::F32, Arc::new(rope));
    for (keys, values) in caches {
        let table = BlockTable::of(&mut batch.pool, keys, values);
        let tokens = keys.len() / width;
        batch.push(RequestCache { layers: vec![table], tokens }, vec![0; tokens], "");
    }
    batch
}

/// Mean and 95 % interval of the mean.
fn interval(x: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    let x: Vec<f64> = x.collect();
    let middle = mean(&x);
    let n = x.len() as f64;
    let variance = x.iter().map(|v| (v - middle).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let half = 1.96 * (variance / n).sqrt();
    (middle, middle - half, middle + half)
}

/// Variance / mean; `None` without exceedances or with one draw.
fn dispersion(counts: &[f64]) -> Option<f64> {
    let middle = mean(counts);
    (counts.len() > 1 && middle > 0.0).then(|| {
        counts.iter().map(|k| (k - middle).powi(2)).sum::<f64>() / (counts.len() as f64 - 1.0) / middle
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::theory::law::ClassLaw;

    fn law(mean: f64, sd: f64) -> LayerLaw {
        let class = ClassLaw { pairs: 1000.0, mean, sd, ..ClassLaw::default() };
        LayerLaw { block_size: 16, requests: 8.0, classes: vec![class; 4], ..LayerLaw::default() }
    }

    fn draws(worlds: &[World]) -> Draws {
        Draws { worlds: worlds.to_vec(), requests: 16, blocks: 8, draws: 24, seed: 3 }
    }

    /// In the model's own world tree and components do what the closed forms say, up to the threshold at which the graph
    /// percolates; greedy clusters are fewer than leaders, but not by more than a tenth.
    #[test]
    fn closed_forms_hold_in_their_own_world() {
        let rows = monte_carlo(&law(0.0, 0.15), &[0.45, 0.4, 0.36], &draws(&[World::Iid])).unwrap();
        for row in rows.iter().filter(|r| r.pairing != Pairing::Lsh) {
            let within = row.cr_model >= row.cr_low && row.cr_model <= row.cr_high;
            let error = (row.cr_model / row.cr - 1.0).abs();
            let allowed = if row.pairing == Pairing::Best { 0.1 } else { 0.01 };
            assert!(within || error < allowed, "{row:?}");
            // 24 draws of a Poisson variable: var / mean has a standard error of 0.3.
            assert!(row.dispersion.is_some_and(|d| (0.2..2.0).contains(&d)), "{row:?}");
        }
        // Errors too, while clusters are pairs and triples.
        for row in rows.iter().filter(|r| r.pairing != Pairing::Lsh && r.cr < 1.3) {
            let model = row.key_error_model.unwrap();
            assert!((model / row.key_error - 1.0).abs() < 0.2, "{row:?}");
        }
        let most = |pairing| rows.iter().filter(|r| r.pairing == pairing).map(|r| r.cr).fold(0.0, f64::max);
        assert!(most(Pairing::Tree) > 1.2 && most(Pairing::Components) > 1.5, "nothing fused");
    }

    /// The same pairs lie above the threshold in both worlds, so all but the tree's means do the same.
    #[test]
    fn a_common_component_moves_means_only() {
        let taus = [0.76, 0.74];
        let rows = monte_carlo(&law(0.6, 0.08), &taus, &draws(&[World::Iid, World::Common])).unwrap();
        let cr = |world: World, pairing: Pairing, tau: f64| {
            rows.iter().find(|r| r.world == world && r.pairing == pairing && r.tau == tau).unwrap().cr
        };
        for tau in taus {
            for pairing in [Pairing::Best, Pairing::Components] {
                assert!((cr(World::Iid, pairing, tau) / cr(World::Common, pairing, tau) - 1.0).abs() < 0.01);
            }
            assert!(
                cr(World::Common, Pairing::Tree, tau) > 1.05 * cr(World::Iid, Pairing::Tree, tau),
                "{tau}"
            );
        }
    }
}
