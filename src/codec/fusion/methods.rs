//! The paper's two methods as `--method` has them.

use super::choices::{Choices, Pairing, Positions, Representative, RopeMode, ScaleRule, Similarity};
use super::rule::Rule;
use super::thresholds::Thresholds;
use super::{ChunkFusion, Fusion};
use crate::codec::registry::{Entry, Method, Scale, Search, entry};
use crate::codec::{Codec, Role};
use crate::error::{Error, Result};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// Rows of the registry.
pub const METHODS: &[Entry] = &[entry::<Bff>(), entry::<Cff>()];

/// Fusion of blocks of different requests.
#[derive(Debug, Clone, Serialize, clap::Args)]
pub struct Bff {
    #[command(flatten)]
    #[serde(flatten)]
    when: When,
    #[command(flatten)]
    #[serde(flatten)]
    how: How,
}

/// Fusion of blocks of different chunks of one prompt.
#[derive(Debug, Clone, Serialize, clap::Args)]
pub struct Cff {
    #[command(flatten)]
    #[serde(flatten)]
    fusion: Bff,
    /// Tokens of a chunk: whole blocks
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    chunk: usize,
    /// Chunks that are fused at a time
    #[arg(long, default_value_t = 4, value_name = "N")]
    fuse: usize,
}

/// When blocks fuse: one of the three.
#[derive(Debug, Clone, PartialEq, Serialize, clap::Args)]
#[serde(rename_all = "kebab-case")]
struct When {
    /// Blocks fuse if their similarity lies above this, in (-1, 1]
    #[arg(long, allow_hyphen_values = true, value_parser = finite)]
    tau: Option<f64>,
    /// Blocks fuse only if the relative squared error of each, of keys and of values, stays below this
    #[arg(long, value_name = "E", value_parser = finite)]
    max_error: Option<f64>,
    /// Thresholds of single layers from `kvfuse calibrate`, with the choices they were made for; the questions it saw are left out
    /// of the sweep
    #[arg(long, value_name = "FILE", value_parser = Calibrated::read, value_hint = clap::ValueHint::FilePath)]
    thresholds: Option<Calibrated>,
}

/// How blocks fuse.
#[derive(Debug, Clone, PartialEq, Serialize, clap::Args)]
#[serde(rename_all = "kebab-case")]
struct How {
    /// Which blocks fuse with which
    #[arg(long, value_enum, default_value_t = Pairing::Tree)]
    pairing: Pairing,
    /// What is compared; with max-error and thresholds the lower of both
    #[arg(long, value_enum, default_value_t = Similarity::Keys)]
    similarity: Similarity,
    /// Compare and share keys as cached, or without their positions
    #[arg(long, value_enum, default_value_t = RopeMode::Keep)]
    rope: RopeMode,
    /// Positions that two blocks may have
    #[arg(long, value_enum, default_value_t = Positions::Any)]
    positions: Positions,
    /// Layers left alone at either end of the model
    #[arg(long, value_name = "N", default_value_t = 2)]
    spare_layers: usize,
    /// Layers that are compared as one and share one block table
    #[arg(long, value_name = "G", default_value_t = 1, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    group_layers: usize,
    /// What a cluster stores; unless given, mean for tree, first for best and lsh, medoid for components
    #[arg(long, value_enum)]
    representative: Option<Representative>,
    /// Factors that restore a block from its representative
    #[arg(long, value_enum, default_value_t = ScaleRule::Norm)]
    scale: ScaleRule,
    /// Never share a block between tenants
    #[arg(long, action = clap::ArgAction::Set, default_value_t = false, value_name = "BOOL")]
    within_tenant: bool,
}

/// A thresholds file, known by its name and checksum.
#[derive(Debug, Clone, PartialEq)]
struct Calibrated(Arc<Thresholds>);

impl Calibrated {
    fn read(path: &str) -> std::result::Result<Self, String> {
        Thresholds::read(Path::new(path)).map(|t| Calibrated(Arc::new(t))).map_err(|e| e.to_string())
    }
}

impl Serialize for Calibrated {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0.name)
    }
}

/// A number that can be written to a table.
fn finite(text: &str) -> std::result::Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite()).ok_or_else(|| "is not a finite number".to_owned())
}

impl When {
    fn rule(&self) -> Option<Rule> {
        match (self.tau, self.max_error, &self.thresholds) {
            (Some(tau), None, None) => Some(Rule::Tau(tau)),
            (None, Some(error), None) => Some(Rule::MaxError(error)),
            (None, None, Some(file)) => Some(Rule::Thresholds(Arc::clone(&file.0))),
            _ => None,
        }
    }
}

impl How {
    /// Options that only repeat what follows from the others are taken out.
    fn normal(self, when: &When) -> Self {
        let similarity = if when.tau.is_some() { self.similarity } else { Similarity::Keys };
        let usual = self.pairing.usual_representative();
        How { similarity, representative: self.representative.filter(|r| *r != usual), ..self }
    }

    fn choices(&self, when: &When) -> Choices {
        if let Some(file) = &when.thresholds {
            return Choices {
                within_tenant: self.within_tenant,
                similarity: Similarity::Lower,
                ..file.0.choices
            };
        }
        Choices {
            pairing: self.pairing,
            similarity: if when.tau.is_some() { self.similarity } else { Similarity::Lower },
            rope: self.rope,
            positions: self.positions,
            spare_layers: self.spare_layers,
            group_layers: self.group_layers,
            representative: self.representative.unwrap_or(self.pairing.usual_representative()),
            scale: self.scale,
            within_tenant: self.within_tenant,
        }
    }

    fn fusion(&self, when: &When) -> Result<Fusion> {
        let rule =
            when.rule().ok_or_else(|| Error::argument("tau, max-error and thresholds: give one of them"))?;
        let plain = How { within_tenant: false, ..self.clone() }
            == How { representative: None, ..How::of(&Choices::default()) };
        if when.thresholds.is_some() && !plain {
            return Err(Error::argument(
                "thresholds bring the choices they were made for; leave the other options out",
            ));
        }
        Fusion::new(self.choices(when), rule)
    }

    fn of(choices: &Choices) -> Self {
        How {
            pairing: choices.pairing,
            similarity: choices.similarity,
            rope: choices.rope,
            positions: choices.positions,
            spare_layers: choices.spare_layers,
            group_layers: choices.group_layers,
            representative: Some(choices.representative),
            scale: choices.scale,
            within_tenant: choices.within_tenant,
        }
    }

    /// All of it with what follows from the others, as columns.
    fn effective(&self, when: &When) -> Result<Value> {
        let to_value = |x: serde_json::Result<Value>| x.map_err(|e| Error::argument(e.to_string()));
        let mut columns = to_value(serde_json::to_value(when))?;
        columns["target"] = json!(when.thresholds.as_ref().map(|t| &t.0.target));
        let how = to_value(serde_json::to_value(How::of(&self.choices(when))))?;
        for (name, value) in how.as_object().into_iter().flatten() {
            columns[name] = value.clone();
        }
        Ok(columns)
    }
}

const PAPER: &str =
    "Kampeas and Haleva 2026, Joint Encoding of KV-Cache Blocks for Scalable LLM Serving (arXiv 2601.03067)";
const DIALS: &[&str] = &["tau", "max-error", "thresholds"];
const GRID: Option<(&str, &str)> = Some(("tau", "0.95:0.60:0.05"));

impl Method for Bff {
    const NAME: &'static str = "bff";
    const ROLE: Role = Role::Fuse;
    const ABOUT: &'static str = "Batch fast-fusion: similar blocks of different requests are replaced by one that they share, layer by layer, each with \
                                 factors of its own. The defaults are the paper's (docs/fusion.md).";
    const PAPER: &'static str = PAPER;
    const DIALS: &'static [&'static str] = DIALS;
    const SEARCH: Option<Search> =
        Some(Search { option: "tau", fine: 0.995, coarse: 0.3, scale: Scale::Linear });
    const GRID: Option<(&'static str, &'static str)> = GRID;

    fn normal(self) -> Self {
        Bff { how: self.how.normal(&self.when), when: self.when }
    }

    fn effective(&self) -> Result<Value> {
        self.how.effective(&self.when)
    }

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(self.how.fusion(&self.when)?))
    }
}

impl Method for Cff {
    const NAME: &'static str = "cff";
    const ROLE: Role = Role::Fuse;
    const ABOUT: &'static str = "Chunks fast-fusion: similar blocks of different chunks of one prompt are fused while it is prefilled; later chunks and the answer \
                                 attend to the fused cache.";
    const PAPER: &'static str = PAPER;
    const DIALS: &'static [&'static str] = DIALS;
    const GRID: Option<(&'static str, &'static str)> = GRID;

    fn normal(self) -> Self {
        Cff { fusion: self.fusion.normal(), ..self }
    }

    fn effective(&self) -> Result<Value> {
        let mut columns = self.fusion.effective()?;
        columns["chunk"] = json!(self.chunk);
        columns["fuse"] = json!(self.fuse);
        Ok(columns)
    }

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(ChunkFusion::new(self.fusion.how.fusion(&self.fusion.when)?, self.chunk, self.fuse)?))
    }
}
