//! What a sweep will hold in memory, worked out before it runs.

use super::arms::Arm;
use super::lot::{MOST_TARGETS, Source, targets};
use crate::block::BlockShape;
use crate::codec::fusion::{Pairing, keep_tables};
use crate::codec::{Role, repeated};
use crate::dump::Shard;
use crate::error::{Error, Result};
use crate::memory::{Bytes, resident};

/// Of a page beside its numbers, as a share of them: its own fields, its place in pool and table, the allocator's.
const OVERHEAD: f64 = 0.06;
/// What is held for moments: buffers of threads, pages of mapped files, memory that the allocator keeps.
const MARGIN: usize = 288 << 20;
/// Rows of logits that an arm holds at a time, about.
const LOGIT_ROWS: usize = 192;

/// One lot, as far as its size goes.
#[derive(Debug, Default, Clone, Copy)]
struct Size {
    /// f16 caches of all tokens.
    caches: usize,
    /// Those of blocks that exact prefix sharing leaves.
    distinct: usize,
    /// The no-fusion arm's logits and attention outputs.
    reference: usize,
    /// What loading or scoring holds besides.
    passing: usize,
    /// Inner products of all blocks of a layer, keys' and values', and one layer's numbers that they are made of.
    tables: usize,
}

/// Checks that lots of these requests fit, and gives what is left to tables of similarities.
///
/// # Errors
/// If they do not: with the memory that this lot size needs and, if there is one, the lot size that fits.
pub fn check(source: Source, questions: &[usize], grid: &[Arm], most: Bytes) -> Result<()> {
    let model = resident().0;
    let costs = Costs::of(source, questions)?;
    let need = |batch: usize, block_size: usize, arms: &[Held]| -> usize {
        let lots = costs.requests.chunks(batch).map(|lot| costs.lot(lot, block_size));
        let needs = |lot: Size| model + MARGIN + lot.needs(arms);
        lots.map(needs).max().unwrap_or(0)
    };
    let mut left = usize::MAX;
    for packing in source.options.packings() {
        let here = grid.iter().filter(|arm| arm.packing == packing);
        let arms: Vec<Held> = here.map(|arm| Held::of(arm, costs.shape)).collect();
        let needed = need(packing.batch, packing.block_size, &arms);
        if needed > most.0 {
            let fitting = |batch: &usize| need(*batch, packing.block_size, &arms) <= most.0;
            let smaller = match (1..packing.batch.min(questions.len())).rev().find(fitting) {
                Some(batch) => format!(" or fuse fewer requests together, --batch {batch}"),
                None => String::new(),
            };
            let message = format!(
                "--memory {most}: lots of {} requests need {}; pass --memory {}{smaller}",
                packing.batch,
                Bytes(needed),
                Bytes(needed),
            );
            return Err(Error::argument(message));
        }
        left = left.min(most.0 - needed);
    }
    keep_tables(left);
    Ok(())
}

/// One request's sizes.
struct Request {
    tokens: Vec<u32>,
    rows: usize,
}

/// What the sizes of lots follow from.
struct Costs {
    requests: Vec<Request>,
    layers: usize,
    /// For blocks of any size.
    shape: BlockShape,
    /// Numbers of a token in keys and values of all layers.
    token_numbers: usize,
    /// Numbers of logits, and of attention outputs of all layers, that a row has.
    row_numbers: (usize, usize),
}

impl Costs {
    fn of(source: Source, questions: &[usize]) -> Result<Self> {
        let Source { model, options, manifest } = source;
        let config = model.decoder.config();
        let request = |&i: &usize| {
            let asked = !manifest.requests[i].request.references.is_empty();
            let rows = match asked {
                true => targets(model, manifest, i, &[])?.0.len(),
                false => MOST_TARGETS.min(options.answer_limit(manifest, i)) + 1,
            };
            // Whether it is the shard that the manifest lists is checked when it is loaded.
            let shard = Shard::open(&manifest.shard_path(&options.dump, i), config)?;
            Ok(Request { tokens: shard.tokens().to_vec(), rows })
        };
        Ok(Costs {
            requests: questions.iter().map(request).collect::<Result<_>>()?,
            layers: config.layers,
            shape: BlockShape { block_size: 1, kv_heads: config.kv_heads, head_dim: config.head_dim },
            token_numbers: 2 * config.layers * config.kv_heads * config.head_dim,
            row_numbers: (config.vocab, config.layers * config.heads * config.head_dim),
        })
    }

    fn lot(&self, requests: &[Request], block_size: usize) -> Size {
        let page =
            |numbers: usize| (numbers as f64 * size_of::<half::f16>() as f64 * (1.0 + OVERHEAD)) as usize;
        let longest = requests.iter().map(|r| r.tokens.len()).max().unwrap_or(0);
        let tokens: usize = requests.iter().map(|r| r.tokens.len()).sum();
        let rows: usize = requests.iter().map(|r| r.rows).sum();
        let full: usize = requests.iter().map(|r| r.tokens.len() / block_size).sum();
        let shared = repeated(requests.iter().map(|r| ("", &r.tokens[..])), block_size).len();
        let blocks = full - shared;
        let layer = blocks * block_size * self.token_numbers / self.layers;
        let (logits, attention) = self.row_numbers;
        // A request's f32 numbers and its mapped file; or logits and attention outputs of an arm.
        let loading = longest * self.token_numbers * 6;
        let scoring = 2 * LOGIT_ROWS * logits * 4 + rows * attention * 4;
        Size {
            caches: page(tokens * self.token_numbers),
            distinct: page((tokens - shared * block_size) * self.token_numbers),
            reference: rows * (logits + attention) * 4,
            passing: loading.max(scoring),
            tables: 2 * blocks * blocks * size_of::<f32>() + layer * size_of::<f32>(),
        }
    }
}

/// What an arm holds besides the unfused caches, whose pages it shares as far as it leaves them alone.
struct Held {
    role: Role,
    /// Blocks are shared before the last stage, or by it.
    shares: bool,
    /// Every block of a layer is compared with every other.
    compares_all: bool,
    /// Coded pages are bytes alone.
    packs: bool,
    /// Prefills caches of its own.
    prefills: bool,
}

impl Held {
    fn of(arm: &Arm, shape: BlockShape) -> Self {
        let shape = BlockShape { block_size: arm.packing.block_size, ..shape };
        let stages = arm.chain.stages();
        let pairing = arm.chain.fusion().map(|f| f.choices().pairing);
        Held {
            role: arm.chain.role(),
            shares: stages.iter().any(|s| s.role == Role::Share || s.role == Role::Fuse),
            compares_all: pairing.is_some_and(|p| p != Pairing::Lsh),
            packs: stages.last().is_some_and(|s| s.codec.reads_in_place(shape)),
            prefills: arm.chain.chunks().is_some(),
        }
    }
}

impl Size {
    /// The most that any arm needs beside the model.
    fn needs(&self, arms: &[Held]) -> usize {
        let arm = arms.iter().map(|arm| self.arm(arm)).max().unwrap_or(0);
        self.caches + self.reference + arm + self.passing
    }

    fn arm(&self, arm: &Held) -> usize {
        let coded = if arm.shares { self.distinct } else { self.caches };
        let pages = match arm.role {
            Role::Nothing | Role::Share => 0,
            // Means of at least two blocks each.
            Role::Fuse => self.distinct / 2,
            Role::Evict | Role::Whole => self.caches,
            // Bytes alone where they are read in place; else numbers as they were decoded too, in 32 bits.
            Role::Code => coded / 2 + if arm.packs { 0 } else { 2 * coded },
        };
        pages + if arm.compares_all { self.tables } else { 0 } + if arm.prefills { self.caches } else { 0 }
    }
}
