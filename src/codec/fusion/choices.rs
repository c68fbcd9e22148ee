//! The choices that make up a way of fusing blocks. Names are those of the command line and of sweep.csv.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Which blocks fuse with which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Pairing {
    /// The paper's: requests are halved recursively, all matches of a left block are merged, the last match wins.
    Tree,
    /// Best pair first; a cluster keeps one of its blocks as it is, and all others are above the threshold from it.
    Best,
    /// Connected components of the graph of all pairs above the threshold.
    Components,
    /// As `best`, over candidates that share a band of a random signature: for tens of thousands of blocks.
    Lsh,
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Similarity {
    /// Cosine of the keys (the paper's).
    Keys,
    /// Cosine of the values.
    Values,
    /// The lower of both.
    Lower,
    /// The mean of both.
    Mean,
}

/// Whether keys are compared and shared as cached or without their positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum RopeMode {
    /// As cached, after RoPE (the paper's).
    Keep,
    /// RoPE is taken off before keys are compared and shared, and put on again when they are read.
    Strip,
}

/// Which positions in their requests two blocks may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// Any (the paper's).
    Any,
    /// The same block of their requests.
    Same,
}

/// What a cluster of blocks stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Representative {
    /// The mean direction, one vote a merged row (the paper's).
    Mean,
    /// The mean direction, one vote a block.
    Weighted,
    /// The block most similar to all others, as it is.
    Medoid,
    /// The block that the pairing began with, as it is: of a tree the leftmost, of components the earliest.
    First,
}

impl Representative {
    /// Whether it is one of the blocks, bit for bit.
    pub fn is_verbatim(self) -> bool {
        matches!(self, Representative::Medoid | Representative::First)
    }
}

/// The factors that turn a representative back into a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleRule {
    /// The block keeps its own norm (the paper's).
    Norm,
    /// Least squares: the factor with the smallest error, norm times cosine.
    LeastSquares,
    /// No factor, nothing to store.
    None,
}

/// All choices but the rule. The default is the paper's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choices {
    pub pairing: Pairing,
    pub similarity: Similarity,
    pub rope: RopeMode,
    pub positions: Positions,
    /// Layers left alone at either end of the model.
    pub spare_layers: usize,
    /// Layers that are compared as one and share one block table.
    pub group_layers: usize,
    pub representative: Representative,
    pub scale: ScaleRule,
    /// Whether blocks of different tenants must never meet.
    pub within_tenant: bool,
}

impl Default for Choices {
    fn default() -> Self {
        Choices {
            pairing: Pairing::Tree,
            similarity: Similarity::Keys,
            rope: RopeMode::Keep,
            positions: Positions::Any,
            spare_layers: 2,
            group_layers: 1,
            representative: Representative::Mean,
            scale: ScaleRule::Norm,
            within_tenant: false,
        }
    }
}

impl Choices {
    /// The layers that are not left alone, of a model of so many.
    pub fn touched(&self, layers: usize) -> Range<usize> {
        let first = self.spare_layers.min(layers);
        first..(layers - first).max(first)
    }
}

impl Pairing {
    /// What this pairing stores unless told otherwise: the paper's tree means, the others blocks as they are.
    pub fn usual_representative(self) -> Representative {
        match self {
            Pairing::Tree => Representative::Mean,
            Pairing::Best | Pairing::Lsh => Representative::First,
            Pairing::Components => Representative::Medoid,
        }
    }
}
