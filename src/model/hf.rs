//! Hugging Face folders: `config.json`, `tokenizer.json` and one or more `*.safetensors`.

use super::config::ModelConfig;
use super::generation::Generation;
use super::hf_config;
use super::numbers::Numbers;
use super::weights::TensorSource;
use crate::block::halves;
use crate::error::{Error, IoAt, Result};
use crate::files;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

pub struct HfFolder {
    path: PathBuf,
    shards: Vec<PathBuf>,
    tensors: HashMap<String, Stored>,
    config: ModelConfig,
    /// The head is the embedding.
    tied: bool,
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

const INDEX: &str = "model.safetensors.index.json";

/// Tensor -> file, of an index.
type Index = HashMap<String, String>;

/// The files of a model's weights, as transformers chooses them: `model.safetensors`, else those of the index. Any other file
/// is not the model's.
fn shards(folder: &Path) -> Result<(Vec<PathBuf>, Option<Index>)> {
    let whole = folder.join("model.safetensors");
    if whole.exists() {
        return Ok((vec![whole], None));
    }
    let path = folder.join(INDEX);
    if !path.exists() {
        let problem =
            "holds neither model.safetensors nor model.safetensors.index.json; a model folder needs one";
        return Err(Error::file(folder, problem));
    }
    #[derive(Deserialize)]
    struct Raw {
        weight_map: Index,
    }
    let index: Raw = serde_json::from_str(&files::read_text(&path)?)
        .map_err(|e| Error::file(&path, format!("not an index of weights: {e}")))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    let outside = |name: &&&String| Path::new(name).components().count() != 1 || name.contains("..");
    if let Some(name) = names.iter().find(outside) {
        return Err(Error::file(&path, format!("names '{name}', which is not a file of its folder")));
    }
    let shards: Vec<PathBuf> = names.into_iter().map(|name| folder.join(name)).collect();
    match shards.iter().find(|s| !s.exists()) {
        Some(missing) => {
            Err(Error::file(missing, format!("missing, though {INDEX} lists it; fetch the model again")))
        }
        None => Ok((shards, Some(index.weight_map))),
    }
}

impl HfFolder {
    pub fn open(path: &Path) -> Result<Self> {
        let config = hf_config::read(&path.join("config.json"))?;
        let (shards, index) = shards(path)?;
        let mut tensors = HashMap::new();
        for (i, shard) in shards.iter().enumerate() {
            let map = files::map(shard)?;
            let parsed = SafeTensors::deserialize(&map).map_err(|e| {
                Error::file(shard, format!("damaged or truncated safetensors ({e}); fetch the file again"))
            })?;
            for (name, view) in parsed.iter() {
                // What the index places elsewhere, or nowhere, is not the model's.
                if index.as_ref().is_some_and(|index| index.get(name).is_none_or(|f| path.join(f) != *shard))
                {
                    continue;
                }
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
        if let Some(name) = index.iter().flatten().map(|(name, _)| name).find(|n| !tensors.contains_key(*n)) {
            let problem =
                format!("tensor {name}, which {INDEX} lists, is in none of its files; fetch the model again");
            return Err(Error::file(path, problem));
        }
        // A head of its own goes before what the configuration says, as in transformers 5.
        let tied = hf_config::is_tied(&path.join("config.json"))? && !tensors.contains_key("lm_head.weight");
        Ok(HfFolder { path: path.to_owned(), shards, tensors, config, tied })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn tokenizer_path(&self) -> PathBuf {
        self.path.join("tokenizer.json")
    }

    /// What `generation_config.json` says of greedy answers; nothing where there is none.
    pub fn generation(&self) -> Result<Generation> {
        let path = self.path.join("generation_config.json");
        let value = if path.exists() { files::read_json(&path)? } else { serde_json::Value::Null };
        Generation::read(&value, &path)
    }

    /// Checksum of the model's files.
    pub fn sha256(&self) -> Result<String> {
        let sums: Vec<String> = self.files().iter().map(|f| files::sha256(f)).collect::<Result<_>>()?;
        Ok(files::sha256_bytes(sums.concat().as_bytes()))
    }

    /// The files that make up the model's identity, in a fixed order.
    fn files(&self) -> Vec<PathBuf> {
        let names = [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "chat_template.jinja",
            INDEX,
        ];
        let small = names.iter().map(|name| self.path.join(name)).filter(|path| path.exists());
        small.chain(self.shards.iter().cloned()).collect()
    }
}

impl TensorSource for HfFolder {
    fn path(&self) -> &Path {
        &self.path
    }

    fn is_tied(&self) -> bool {
        self.tied
    }

    fn unread(&self, read: &BTreeSet<String>) -> Vec<String> {
        // Old files carry tables of RoPE that follow from config.json.
        let follows = |n: &str| n.ends_with("rotary_emb.inv_freq");
        self.tensors.keys().filter(|n| !read.contains(*n) && !follows(n)).cloned().collect()
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
        Dtype::F16 => Some(halves::from_bytes(bytes)),
        Dtype::BF16 => Some(pairs.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()),
        _ => None,
    }
}
