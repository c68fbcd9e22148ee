//! One request's keys and values in one safetensors file.

use crate::block::halves;
use crate::error::{Error, Result};
use crate::files;
use crate::model::{ModelConfig, to_f32};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// How a dump stores a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DumpDtype {
    F32,
    F16,
    Bf16,
}

impl DumpDtype {
    fn safetensors(self) -> Dtype {
        match self {
            DumpDtype::F32 => Dtype::F32,
            DumpDtype::F16 => Dtype::F16,
            DumpDtype::Bf16 => Dtype::BF16,
        }
    }

    /// The largest number, either sign, that is stored as a finite one.
    fn most(self) -> f32 {
        match self {
            DumpDtype::F32 => f32::MAX,
            DumpDtype::F16 => f16::MAX.to_f32(),
            DumpDtype::Bf16 => bf16::MAX.to_f32(),
        }
    }

    fn bytes(self, numbers: &[f32]) -> Vec<u8> {
        match self {
            DumpDtype::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            DumpDtype::F16 => halves::to_bytes(numbers),
            DumpDtype::Bf16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        }
    }
}

/// What a shard's metadata call the plan of its dump ([`super::Manifest::plan`]).
const PLAN: &str = "kvfuse.plan";

/// Writes `layers` (keys and values, each `[tokens, kv_heads, head_dim]`) and the token ids; returns the file's SHA-256.
///
/// # Errors
/// If `dtype` cannot hold a number.
pub fn write_shard(
    path: &Path,
    tokens: &[u32],
    layers: &[(Vec<f32>, Vec<f32>)],
    config: &ModelConfig,
    dtype: DumpDtype,
    plan: &str,
) -> Result<String> {
    let shape = vec![tokens.len(), config.kv_heads, config.head_dim];
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (n, (keys, values)) in layers.iter().enumerate() {
        for (name, numbers) in [("key", keys), ("value", values)] {
            if let Some(number) = numbers.iter().find(|x| x.is_nan() || x.abs() > dtype.most()) {
                let problem = format!(
                    "layer {n}: a {name} of {number} does not fit into {}; dump with --dtype bf16 or f32",
                    format!("{dtype:?}").to_lowercase()
                );
                return Err(Error::file(path, problem));
            }
            let name = format!("layer.{n}.{name}");
            tensors.push((name, dtype.safetensors(), shape.clone(), dtype.bytes(numbers)));
        }
    }
    let ids = tokens.iter().flat_map(|&t| i64::from(t).to_le_bytes()).collect();
    tensors.push(("tokens".to_owned(), Dtype::I64, vec![tokens.len()], ids));
    let bad = |e: safetensors::SafeTensorError| Error::file(path, e.to_string());
    let views: Vec<(&str, TensorView)> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).map_err(bad)?))
        })
        .collect::<Result<_>>()?;
    let metadata = [(PLAN.to_owned(), plan.to_owned())].into();
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(bad)?;
    files::write_atomically(path, |out| out.write_all(&bytes))?;
    Ok(files::sha256_bytes(&bytes))
}

/// A shard mapped into memory, its header checked against the model.
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    tokens: Vec<u32>,
    layers: usize,
}

impl Shard {
    /// Opens a shard of a model of these sizes. Names the file in every error.
    pub fn open(path: &Path, config: &ModelConfig) -> Result<Self> {
        if !path.exists() {
            return Err(Error::file(path, "missing; run the same dump command again to complete the dump"));
        }
        let map = files::map(path)?;
        let (tokens, layers) = {
            let tensors = parse(path, &map)?;
            let ids = tensors.tensor("tokens").map_err(|_| Error::file(path, "has no tensor 'tokens'"))?;
            if ids.dtype() != Dtype::I64 || ids.shape().len() != 1 {
                return Err(Error::file(path, "tensor 'tokens' is not a list of 64-bit integers"));
            }
            let ids: Vec<i64> =
                ids.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
            let valid =
                ids.iter().map(|&id| u32::try_from(id).ok().filter(|&id| (id as usize) < config.vocab));
            let tokens: Option<Vec<u32>> = valid.collect();
            let tokens = tokens.ok_or_else(|| Error::file(path, "holds token ids beyond the vocabulary"))?;
            if tokens.is_empty() {
                return Err(Error::file(path, "holds no tokens"));
            }
            let expected = [tokens.len(), config.kv_heads, config.head_dim];
            for n in 0..config.layers {
                for part in ["key", "value"] {
                    let name = format!("layer.{n}.{part}");
                    let tensor = tensors.tensor(&name);
                    let tensor = tensor.map_err(|_| Error::file(path, format!("has no tensor '{name}'")))?;
                    if tensor.shape() != expected {
                        let problem = format!(
                            "tensor '{name}' has shape {:?}, the manifest's model needs {expected:?}",
                            tensor.shape()
                        );
                        return Err(Error::file(path, problem));
                    }
                }
            }
            (tokens, config.layers)
        };
        Ok(Shard { path: path.to_owned(), map, tokens, layers })
    }

    /// SHA-256 of the whole file.
    pub fn sha256(&self) -> String {
        files::sha256_bytes(&self.map)
    }

    /// The plan of the dump that the shard was written for, if it says so.
    pub fn plan(&self) -> Option<String> {
        let (_, header) = SafeTensors::read_metadata(&self.map).ok()?;
        header.metadata().as_ref()?.get(PLAN).cloned()
    }

    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Keys and values of one layer, `[tokens, kv_heads, head_dim]` each, as f32. Refuses NaN and infinity.
    pub fn layer(&self, n: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let tensors = parse(&self.path, &self.map)?;
        let read = |part: &str| {
            let name = format!("layer.{n}.{part}");
            let bad = |problem: String| Error::file(&self.path, format!("tensor '{name}' {problem}"));
            let tensor = tensors.tensor(&name).map_err(|e| bad(e.to_string()))?;
            let numbers = to_f32(tensor.dtype(), tensor.data());
            let numbers =
                numbers.ok_or_else(|| bad(format!("is {:?}, not f32, f16 or bf16", tensor.dtype())))?;
            match numbers.iter().position(|x| !x.is_finite()) {
                Some(i) => {
                    Err(bad(format!("holds {} at element {i}; delete the file and dump again", numbers[i])))
                }
                None => Ok(numbers),
            }
        };
        Ok((read("key")?, read("value")?))
    }
}

fn parse<'a>(path: &Path, map: &'a Mmap) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(map).map_err(|e| {
        Error::file(path, format!("damaged or cut short ({e}); delete the file and run the dump again"))
    })
}
