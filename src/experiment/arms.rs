//! The arms of a sweep: a method, its choices, and the codec they name.

use super::evaluate::FirstToken;
use crate::codec::fusion::{
    Choices, ChunkFusion, Fusion, Pairing, Positions, Representative, RopeMode, Rule, ScaleRule, Similarity,
    Thresholds,
};
use crate::codec::{Codec, Coverage, Prefix, PrefixFusion, Unfused};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A way of encoding a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// The caches as they are.
    None,
    /// Exact prefix sharing.
    Prefix,
    /// Fusion of blocks of different requests (the paper's batch fast-fusion).
    Bff,
    /// Exact prefix sharing in all layers, then [`Method::Bff`] of the blocks that are left.
    #[serde(rename = "prefix+bff")]
    #[value(name = "prefix+bff")]
    PrefixBff,
    /// Fusion of blocks of different chunks of one prompt, while it is prefilled (the paper's chunks fast-fusion).
    Cff,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Method::None => "none",
            Method::Prefix => "prefix",
            Method::Bff => "bff",
            Method::PrefixBff => "prefix+bff",
            Method::Cff => "cff",
        }
    }
}

/// Chunked prefill of CFF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunking {
    pub chunk_tokens: usize,
    pub fuse_chunks: usize,
}

/// How caches are cut and put together before anything is fused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Tokens a block.
    pub block_size: usize,
    /// Requests fused and decoded together.
    pub batch: usize,
    /// Which cache the first answer token is computed from.
    pub first_token: FirstToken,
}

/// One line of a sweep.
#[derive(Debug, Clone, PartialEq)]
pub struct Arm {
    pub method: Method,
    pub packing: Packing,
    /// Of [`Method::None`] and [`Method::Prefix`], only `within_tenant` means anything.
    pub choices: Choices,
    /// When blocks fuse, where the method fuses.
    pub rule: Option<Rule>,
    /// Of [`Method::Cff`].
    pub chunking: Option<Chunking>,
}

/// What an arm does with a batch.
pub enum Encoder {
    /// Edits finished caches.
    Codec(Box<dyn Codec>),
    /// Prefills anew.
    Chunks(ChunkFusion),
}

impl Encoder {
    pub fn coverage(&self, layers: usize) -> Coverage {
        match self {
            Encoder::Codec(codec) => codec.coverage(layers),
            Encoder::Chunks(chunks) => chunks.coverage(layers),
        }
    }
}

impl Arm {
    /// A control of one packing.
    pub fn control(method: Method, packing: Packing, within_tenant: bool) -> Self {
        let choices = Choices { within_tenant, ..Choices::default() };
        Arm { method, packing, choices, rule: None, chunking: None }
    }

    pub fn encoder(&self) -> Result<Encoder> {
        let fusion = || {
            let rule = self.rule.clone().ok_or_else(|| Error::argument("fusion needs a threshold: --tau"))?;
            Fusion::new(self.choices, rule)
        };
        Ok(match self.method {
            Method::None => Encoder::Codec(Box::new(Unfused)),
            Method::Prefix => Encoder::Codec(Box::new(Prefix { within_tenant: self.choices.within_tenant })),
            Method::Bff => Encoder::Codec(Box::new(fusion()?)),
            Method::PrefixBff => Encoder::Codec(Box::new(PrefixFusion::new(fusion()?))),
            Method::Cff => {
                let chunking = self.chunking.ok_or_else(|| Error::argument("method cff needs --chunk"))?;
                let Chunking { chunk_tokens, fuse_chunks } = chunking;
                Encoder::Chunks(ChunkFusion::new(
                    fusion()?,
                    chunk_tokens,
                    fuse_chunks,
                    self.packing.block_size,
                )?)
            }
        })
    }

    /// The arm as columns of a table.
    pub fn columns(&self) -> ArmColumns {
        let fuses = self.rule.is_some();
        let choices = &self.choices;
        let rule = self.rule.as_ref();
        ArmColumns {
            method: self.method,
            tau: rule.and_then(|r| if let Rule::Tau(tau) = r { Some(*tau) } else { None }),
            max_error: rule.and_then(|r| if let Rule::MaxError(error) = r { Some(*error) } else { None }),
            thresholds: rule
                .and_then(|r| if let Rule::Thresholds(t) = r { Some(t.name.clone()) } else { None }),
            block_size: self.packing.block_size,
            batch: self.packing.batch,
            first_token: self.packing.first_token,
            pairing: fuses.then_some(choices.pairing),
            similarity: fuses.then_some(choices.similarity),
            rope: fuses.then_some(choices.rope),
            positions: fuses.then_some(choices.positions),
            spare_layers: fuses.then_some(choices.spare_layers),
            group_layers: fuses.then_some(choices.group_layers),
            representative: fuses.then_some(choices.representative),
            scale: fuses.then_some(choices.scale),
            within_tenant: choices.within_tenant,
            chunk_tokens: self.chunking.map(|c| c.chunk_tokens),
            fuse_chunks: self.chunking.map(|c| c.fuse_chunks),
        }
    }
}

/// An arm as columns of a table; empty where a column means nothing to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArmColumns {
    pub method: Method,
    pub tau: Option<f64>,
    pub max_error: Option<f64>,
    /// Name of the thresholds file and the first digits of its checksum.
    pub thresholds: Option<String>,
    pub block_size: usize,
    pub batch: usize,
    pub first_token: FirstToken,
    pub pairing: Option<Pairing>,
    pub similarity: Option<Similarity>,
    pub rope: Option<RopeMode>,
    pub positions: Option<Positions>,
    pub spare_layers: Option<usize>,
    pub group_layers: Option<usize>,
    pub representative: Option<Representative>,
    pub scale: Option<ScaleRule>,
    pub within_tenant: bool,
    pub chunk_tokens: Option<usize>,
    pub fuse_chunks: Option<usize>,
}

impl ArmColumns {
    /// The arm that has these columns; `thresholds` are the files of its sweep.
    pub fn arm(&self, thresholds: &[Arc<Thresholds>]) -> Result<Arm> {
        let usual = Choices::default();
        let rule = match (self.tau, self.max_error, &self.thresholds) {
            (Some(tau), ..) => Some(Rule::Tau(tau)),
            (_, Some(error), _) => Some(Rule::MaxError(error)),
            (.., Some(name)) => {
                let file = thresholds.iter().find(|t| t.name == *name);
                let missing =
                    || Error::argument(format!("the thresholds file {name} has changed or is gone"));
                Some(Rule::Thresholds(Arc::clone(file.ok_or_else(missing)?)))
            }
            _ => None,
        };
        Ok(Arm {
            method: self.method,
            packing: Packing {
                block_size: self.block_size,
                batch: self.batch,
                first_token: self.first_token,
            },
            choices: Choices {
                pairing: self.pairing.unwrap_or(usual.pairing),
                similarity: self.similarity.unwrap_or(usual.similarity),
                rope: self.rope.unwrap_or(usual.rope),
                positions: self.positions.unwrap_or(usual.positions),
                spare_layers: self.spare_layers.unwrap_or(usual.spare_layers),
                group_layers: self.group_layers.unwrap_or(usual.group_layers),
                representative: self.representative.unwrap_or(usual.representative),
                scale: self.scale.unwrap_or(usual.scale),
                within_tenant: self.within_tenant,
            },
            rule,
            chunking: self
                .chunk_tokens
                .zip(self.fuse_chunks)
                .map(|(chunk_tokens, fuse_chunks)| Chunking { chunk_tokens, fuse_chunks }),
        })
    }
}

/// All combinations that a sweep runs at each of its packings.
#[derive(Debug, Clone, Default)]
pub struct Grid {
    pub methods: Vec<Method>,
    pub taus: Vec<f64>,
    pub max_errors: Vec<f64>,
    pub thresholds: Vec<Arc<Thresholds>>,
    pub pairings: Vec<Pairing>,
    pub similarities: Vec<Similarity>,
    pub ropes: Vec<RopeMode>,
    pub positions: Vec<Positions>,
    pub spare_layers: Vec<usize>,
    pub group_layers: Vec<usize>,
    /// Empty: each pairing's usual one.
    pub representatives: Vec<Representative>,
    pub scales: Vec<ScaleRule>,
    pub within_tenant: Vec<bool>,
    pub chunk_tokens: usize,
    pub fuse_chunks: Vec<usize>,
}

impl Grid {
    /// All arms of one packing, controls first: `none` and `prefix` always run, asked for or not.
    pub fn arms(&self, packing: Packing) -> Vec<Arm> {
        let mut arms = vec![Arm::control(Method::None, packing, false)];
        for &within_tenant in &self.within_tenant {
            let prefix = Arm::control(Method::Prefix, packing, within_tenant);
            if !arms.contains(&prefix) {
                arms.push(prefix);
            }
        }
        let rules = self.taus.iter().map(|&t| Rule::Tau(t));
        let rules: Vec<Rule> = rules.chain(self.max_errors.iter().map(|&e| Rule::MaxError(e))).collect();
        for choices in self.choices() {
            for rule in &rules {
                // The budget compares keys and values, whatever else was asked for.
                let similarity = match rule {
                    Rule::Tau(_) => choices.similarity,
                    _ => Similarity::Lower,
                };
                let choices = Choices { similarity, ..choices };
                self.extend(&mut arms, choices, rule, packing);
            }
        }
        for file in self.thresholds.iter().filter(|t| t.block_size == packing.block_size) {
            for &within_tenant in &self.within_tenant {
                let choices = Choices { within_tenant, similarity: Similarity::Lower, ..file.choices };
                self.extend(&mut arms, choices, &Rule::Thresholds(Arc::clone(file)), packing);
            }
        }
        arms
    }

    /// The arms of all fusing methods with these choices, unless they are there already.
    fn extend(&self, arms: &mut Vec<Arm>, choices: Choices, rule: &Rule, packing: Packing) {
        let mut push = |method, chunking| {
            let arm = Arm { method, packing, choices, rule: Some(rule.clone()), chunking };
            if !arms.contains(&arm) {
                arms.push(arm);
            }
        };
        for method in [Method::Bff, Method::PrefixBff] {
            if self.methods.contains(&method) {
                push(method, None);
            }
        }
        if self.methods.contains(&Method::Cff) {
            for &fuse_chunks in &self.fuse_chunks {
                push(Method::Cff, Some(Chunking { chunk_tokens: self.chunk_tokens, fuse_chunks }));
            }
        }
    }

    fn choices(&self) -> Vec<Choices> {
        let mut all: Vec<Choices> = Vec::new();
        for &pairing in &self.pairings {
            let usual = [pairing.usual_representative()];
            let representatives =
                if self.representatives.is_empty() { &usual[..] } else { &self.representatives };
            all.extend(representatives.iter().map(|&representative| Choices {
                pairing,
                representative,
                ..Choices::default()
            }));
        }
        let all = combine(all, &self.similarities, |c, &similarity| Choices { similarity, ..c });
        let all = combine(all, &self.ropes, |c, &rope| Choices { rope, ..c });
        let all = combine(all, &self.positions, |c, &positions| Choices { positions, ..c });
        let all = combine(all, &self.spare_layers, |c, &spare_layers| Choices { spare_layers, ..c });
        let all = combine(all, &self.group_layers, |c, &group_layers| Choices { group_layers, ..c });
        let all = combine(all, &self.scales, |c, &scale| Choices { scale, ..c });
        combine(all, &self.within_tenant, |c, &within_tenant| Choices { within_tenant, ..c })
    }
}

/// Every choice with every value.
fn combine<T>(all: Vec<Choices>, values: &[T], with: impl Fn(Choices, &T) -> Choices) -> Vec<Choices> {
    all.into_iter().flat_map(|c| values.iter().map(move |v| (c, v))).map(|(c, v)| with(c, v)).collect()
}
