//! Hugging Face folders: `config.json`, `tokenizer.json` and one or more `*.safetensors`.

use super::config::ModelConfig;
use super::hf_config;
use super::weights::{Numbers, TensorSource};
use crate::error::{Error, IoAt, Result};
use crate::files;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

pub struct HfFolder {
    path: PathBuf,
    shards: Vec<PathBuf>,
    tensors: HashMap<String, Stored>,
    config: ModelConfig,
}

/// Where a tensor lies. Its bytes are read when they are wanted, not mapped: mapped pages would count as memory in use
/// long after they were copied.
struct Stored {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
    bytes: usize,
}

impl HfFolder {
    pub fn open(path: &Path) -> Result<Self> {
        let config = hf_config::read(&path.join("config.json"))?;
        let mut shards: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(path).at(path)? {
            let file = entry.at(path)?.path();
            if file.extension().is_some_and(|e| e == "safetensors") {
                shards.push(file);
            }
        }
        shards.sort();
        if shards.is_empty() {
            return Err(Error::file(path, "no *.safetensors file in this model folder"));
        }
        let mut tensors = HashMap::new();
        for (i, shard) in shards.iter().enumerate() {
            let map = files::map(shard)?;
            let parsed = SafeTensors::deserialize(&map).map_err(|e| {
                Error::file(shard, format!("damaged or truncated safetensors ({e}); fetch the file again"))
            })?;
            for (name, view) in parsed.iter() {
                let data = view.data();
                let stored = Stored {
                    shard: i,
                    dtype: view.dtype(),
                    shape: view.shape().to_vec(),
                    offset: (data.as_ptr() as usize - map.as_ptr() as usize) as u64,
                    bytes: data.len(),
                };
                tensors.insert(name.to_owned(), stored);
            }
        }
        Ok(HfFolder { path: path.to_owned(), shards, tensors, config })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn tokenizer_path(&self) -> PathBuf {
        self.path.join("tokenizer.json")
    }

    /// The files that make up the model's identity, in a fixed order.
    pub fn files(&self) -> Vec<PathBuf> {
        let fixed = [self.path.join("config.json"), self.tokenizer_path()];
        fixed.into_iter().chain(self.shards.iter().cloned()).collect()
    }
}

impl TensorSource for HfFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn has(&self, name: &str) -> bool {
        // A head that the configuration ties to the embedding may lie in the file all the same.
        self.tensors.contains_key(name)
    }

    fn tensor(&self, name: &str) -> Result<(Vec<usize>, Numbers)> {
        let missing = || Error::file(&self.path, format!("tensor {name} is missing"));
        let stored = self.tensors.get(name).ok_or_else(missing)?;
        let path = &self.shards[stored.shard];
        let mut file = File::open(path).at(path)?;
        file.seek(SeekFrom::Start(stored.offset)).at(path)?;
        let mut bytes = file.take(stored.bytes as u64);
        let numbers = match stored.dtype {
            Dtype::F32 => Numbers::F32(read_numbers(&mut bytes, f32::from_le_bytes).at(path)?),
            Dtype::F16 => Numbers::F16(read_numbers(&mut bytes, f16::from_le_bytes).at(path)?),
            Dtype::BF16 => Numbers::Bf16(read_numbers(&mut bytes, bf16::from_le_bytes).at(path)?),
            other => {
                let problem = format!("tensor {name} is {other:?}; f32, f16 and bf16 are supported");
                return Err(Error::file(path, problem));
            }
        };
        if self.config.traits().gains_less_one && name.ends_with("norm.weight") {
            let gains = numbers.into_f32().into_iter().map(|g| g + 1.0).collect();
            return Ok((stored.shape.clone(), Numbers::F32(gains)));
        }
        Ok((stored.shape.clone(), numbers))
    }
}

/// All numbers of a reader, piece by piece.
fn read_numbers<T, const N: usize>(
    reader: &mut dyn Read,
    number: fn([u8; N]) -> T,
) -> std::io::Result<Vec<T>> {
    let mut numbers = Vec::new();
    // A multiple of every width.
    let mut piece = vec![0u8; 1 << 20];
    loop {
        let mut filled = 0;
        while filled < piece.len() {
            match reader.read(&mut piece[filled..])? {
                0 => break,
                n => filled += n,
            }
        }
        numbers.extend(piece[..filled].as_chunks::<N>().0.iter().map(|b| number(*b)));
        if filled < piece.len() {
            return Ok(numbers);
        }
    }
}

/// Little-endian safetensors bytes as f32; `None` for a type that is no floating-point storage of weights.
pub fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let (pairs, _) = bytes.as_chunks::<2>();
    match dtype {
        Dtype::F32 => Some(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        Dtype::F16 => Some(pairs.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()),
        Dtype::BF16 => Some(pairs.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()),
        _ => None,
    }
}
