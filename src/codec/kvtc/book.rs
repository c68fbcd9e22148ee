//! The trained file of KVTC: mean and principal directions of keys and of values, and what quantising groups of them costs.

use super::widths::{Costs, GROUPS, WIDTHS};
use crate::block::halves;
use crate::codec::trained::{Stored, Tensors, TrainedFile, f32_bytes, write_tensors};
use crate::error::Result;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Raised whenever a file of an older version would decode to something else.
pub const SCHEMA: u32 = 1;

/// What the file's metadata call it.
const KIND: &str = "kvfuse_kvtc";

/// Where a transform comes from and what it fits.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Origin {
    pub schema: u32,
    pub kvfuse_version: String,
    pub model: String,
    pub model_sha256: String,
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub training_tokens: usize,
    pub dumps: Vec<serde_json::Value>,
    /// Directions that were asked for.
    pub directions: usize,
}

/// Keys, or values, of all layers and heads of a token as one vector.
#[derive(Debug, Clone)]
pub struct Transform {
    /// `[width]`.
    pub mean: Vec<f32>,
    /// Orthonormal columns, the most of the variance first: `[width, directions]`.
    pub basis: Vec<f32>,
    pub directions: usize,
    /// Of tokens that the basis was not fitted to.
    pub costs: Costs,
}

pub struct Book {
    pub origin: Origin,
    /// Of keys and of values.
    pub parts: [Transform; 2],
    /// Bits of the whole file.
    pub bits: u64,
}

const PARTS: [&str; 2] = ["keys", "values"];

impl Book {
    /// Numbers of a vector.
    pub fn width(origin: &Origin) -> usize {
        origin.layers * origin.kv_heads * origin.head_dim
    }

    pub fn write(path: &Path, origin: &Origin, parts: &[Transform; 2]) -> Result<()> {
        let width = Self::width(origin);
        let mut tensors: Vec<Stored> = Vec::new();
        for (name, part) in PARTS.iter().zip(parts) {
            let mut add = |of: &str, dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>| {
                tensors.push((format!("{name}.{of}"), dtype, shape, bytes));
            };
            let r = part.directions;
            add("mean", Dtype::F32, vec![width], f32_bytes(&part.mean));
            add("basis", Dtype::F16, vec![width, r], halves::to_bytes(&part.basis));
            add("errors", Dtype::F32, vec![r, GROUPS.len(), WIDTHS.len()], f32_bytes(&part.costs.errors));
            add("tail", Dtype::F32, vec![r + 1], f32_bytes(&part.costs.tail));
        }
        write_tensors(path, KIND, origin, &tensors)
    }
}

impl TrainedFile for Book {
    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let (origin, tensors): (Origin, _) = Tensors::open(path, bytes, KIND, SCHEMA)?;
        let width = Self::width(&origin);
        let part = |name: &str| -> Result<Transform> {
            let name = |of: &str| format!("{name}.{of}");
            let directions = tensors.shape(&name("basis")).get(1).copied().unwrap_or(0);
            if width == 0 || directions == 0 {
                return Err(tensors.bad("is for a model without a cache"));
            }
            Ok(Transform {
                mean: tensors.f32(&name("mean"), &[width])?,
                basis: tensors.f16(&name("basis"), &[width, directions])?,
                directions,
                costs: Costs {
                    errors: tensors.f32(&name("errors"), &[directions, GROUPS.len(), WIDTHS.len()])?,
                    tail: tensors.f32(&name("tail"), &[directions + 1])?,
                },
            })
        };
        let parts = [part(PARTS[0])?, part(PARTS[1])?];
        Ok(Book { origin, parts, bits: 8 * bytes.len() as u64 })
    }
}
