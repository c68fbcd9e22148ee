//! Files that `kvfuse train` writes: tensors, and where they come from as JSON in their metadata.

use crate::block::halves;
use crate::error::{Error, Result};
use crate::files;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a trained file holds.
pub trait TrainedFile: Sized {
    /// Reads and checks a file.
    fn read(path: &Path) -> Result<Self>;
}

/// A trained file as the value of an option: known by its name and checksum.
pub struct TrainedOption<B> {
    pub path: PathBuf,
    pub book: Arc<B>,
    pub sha256: String,
    name: String,
}

impl<B> Clone for TrainedOption<B> {
    fn clone(&self) -> Self {
        TrainedOption {
            path: self.path.clone(),
            book: Arc::clone(&self.book),
            sha256: self.sha256.clone(),
            name: self.name.clone(),
        }
    }
}

impl<B> std::fmt::Debug for TrainedOption<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

impl<B: TrainedFile> TrainedOption<B> {
    pub fn read(path: &str) -> std::result::Result<Self, String> {
        let path = PathBuf::from(path);
        let read = |path: &Path| -> Result<Self> {
            let book = Arc::new(B::read(path)?);
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let sha256 = files::sha256(path)?;
            Ok(TrainedOption { path: path.to_owned(), book, sha256, name: stem })
        };
        read(&path).map_err(|e| e.to_string())
    }
}

impl<B> TrainedOption<B> {
    /// Columns of a method with this option: of two files of one name, each has rows of its own.
    pub fn name_in(&self, mut columns: serde_json::Value) -> serde_json::Value {
        if let Some(fields) = columns.as_object_mut() {
            fields.insert("codec-sha256".to_owned(), self.sha256[..12].into());
        }
        columns
    }
}

impl<B> Serialize for TrainedOption<B> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name)
    }
}

/// A tensor to write: name, type, shape and bytes.
pub type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

pub fn f32_bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Writes a file whose metadata say under `kind` where it comes from.
pub fn write_tensors(path: &Path, kind: &str, origin: &impl Serialize, tensors: &[Stored]) -> Result<()> {
    let unusable = |e: String| Error::file(path, e);
    let views: Vec<(&str, TensorView)> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| Ok((&name[..], TensorView::new(*dtype, shape.clone(), bytes)?)))
        .collect::<std::result::Result<_, safetensors::SafeTensorError>>()
        .map_err(|e| unusable(e.to_string()))?;
    let json = serde_json::to_string(origin).map_err(|e| unusable(e.to_string()))?;
    let metadata = HashMap::from([(kind.to_owned(), json)]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| unusable(e.to_string()))?;
    files::write_atomically(path, |file| file.write_all(&bytes))
}

/// The tensors of a trained file, each checked as it is read.
pub struct Tensors<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
}

impl<'a> Tensors<'a> {
    /// Of a file's bytes; with what its metadata say under `kind`.
    pub fn open<O: DeserializeOwned>(path: &'a Path, bytes: &'a [u8], kind: &str) -> Result<(O, Self)> {
        let foreign = || Error::file(path, format!("is no file of `kvfuse train` ({kind})"));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|_| foreign())?;
        let json = header.metadata().as_ref().and_then(|m| m.get(kind)).ok_or_else(foreign)?;
        let origin = serde_json::from_str(json).map_err(|_| foreign())?;
        let tensors =
            SafeTensors::deserialize(bytes).map_err(|e| Error::file(path, format!("{e}; train it again")))?;
        Ok((origin, Tensors { path, tensors }))
    }

    pub fn bad(&self, what: &str) -> Error {
        Error::file(self.path, format!("{what}; train it again"))
    }

    /// Empty if there is no such tensor.
    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.tensors.tensor(name).map(|t| t.shape().to_vec()).unwrap_or_default()
    }

    pub fn bytes(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8]> {
        let tensor = self.tensors.tensor(name).map_err(|_| self.bad(&format!("has no tensor {name}")))?;
        if tensor.dtype() != dtype || tensor.shape() != shape {
            return Err(self.bad(&format!(
                "tensor {name} is {:?} {:?}, expected {dtype:?} {shape:?}",
                tensor.dtype(),
                tensor.shape()
            )));
        }
        Ok(tensor.data())
    }

    fn finite(&self, name: &str, numbers: Vec<f32>) -> Result<Vec<f32>> {
        match numbers.iter().all(|x| x.is_finite()) {
            true => Ok(numbers),
            false => Err(self.bad(&format!("tensor {name} holds a number that is not finite"))),
        }
    }

    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let bytes = self.bytes(name, Dtype::F32, shape)?;
        self.finite(name, bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    pub fn f16(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.finite(name, halves::from_bytes(self.bytes(name, Dtype::F16, shape)?))
    }

    /// A matrix of signed bytes, each column with a factor.
    pub fn i8(&self, name: &str, rows: usize, columns: usize) -> Result<Vec<f32>> {
        let bytes = self.bytes(name, Dtype::I8, &[rows, columns])?;
        let factors = self.f32(&format!("{name}_factors"), &[columns])?;
        Ok(bytes.iter().zip(factors.iter().cycle()).map(|(b, f)| f32::from(*b as i8) * f).collect())
    }
}
