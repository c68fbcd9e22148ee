//! Files that `kvfuse train` writes: tensors, and where they come from as JSON in their metadata.

use super::CacheBatch;
use crate::block::halves;
use crate::error::{Error, Result};
use crate::files;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use serde_json::Value;
use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What a trained file holds.
pub trait TrainedFile: Send + Sync + Sized + 'static {
    /// Reads and checks the bytes of a file.
    fn parse(path: &Path, bytes: &[u8]) -> Result<Self>;

    fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &files::map(path)?)
    }
}

/// Files in use by their SHA-256: arms of a grid name the same one each, and a large one is held once.
static IN_USE: Mutex<BTreeMap<String, Weak<dyn Any + Send + Sync>>> = Mutex::new(BTreeMap::new());

/// Numbers that are kept as rows of signed bytes with a factor a column.
pub fn from_bytes(bytes: &[u8], factors: &[f32]) -> Vec<f32> {
    bytes.iter().zip(factors.iter().cycle()).map(|(b, f)| f32::from(*b as i8) * f).collect()
}

/// The file's contents, those that are in use already if they are the same; and its SHA-256.
fn shared<B: TrainedFile>(path: &Path) -> Result<(Arc<B>, String)> {
    let map = files::map(path)?;
    let sha256 = files::sha256_bytes(&map);
    // A panic elsewhere leaves the map as it was.
    let mut in_use = IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
    let known = in_use.get(&sha256).and_then(Weak::upgrade).and_then(|book| book.downcast::<B>().ok());
    if let Some(book) = known {
        return Ok((book, sha256));
    }
    let book = Arc::new(B::parse(path, &map)?);
    let weak: Weak<B> = Arc::downgrade(&book);
    in_use.insert(sha256.clone(), weak);
    Ok((book, sha256))
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
        let (book, sha256) = shared(&path).map_err(|e| e.to_string())?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(TrainedOption { path, book, sha256, name })
    }
}

impl<B> TrainedOption<B> {
    /// Columns of a method with such an option: of two files of one name, each has rows of its own.
    pub fn columns(method: &impl Serialize, chosen: Option<&Self>) -> Result<Value> {
        let mut all = serde_json::to_value(method).map_err(|e| Error::argument(e.to_string()))?;
        if let (Some(trained), Some(fields)) = (chosen, all.as_object_mut()) {
            fields.insert("codec-sha256".to_owned(), trained.sha256[..12].into());
        }
        Ok(all)
    }
}

impl<B> Serialize for TrainedOption<B> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name)
    }
}

/// Whether caches are of the model that a file is for, as far as that can be seen. `what`: "the codec was trained for". `sizes`: layers,
/// key/value heads and numbers of a head.
pub fn check_model(batch: &CacheBatch, what: &str, model: &str, sizes: [usize; 3]) -> Result<()> {
    let shape = batch.pool.shape();
    let layers = batch.caches.first().map_or(sizes[0], |c| c.layers.len());
    if sizes == [layers, shape.kv_heads, shape.head_dim] {
        return Ok(());
    }
    let [layers, heads, dim] = sizes;
    Err(Error::argument(format!(
        "{what} {model} ({layers} layers, {heads} key/value heads of {dim}); these caches are of another model"
    )))
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
    /// Of a file's bytes; with what its metadata say under `kind`, which must be of this schema.
    pub fn open<O: DeserializeOwned>(
        path: &'a Path,
        bytes: &'a [u8],
        kind: &str,
        schema: u32,
    ) -> Result<(O, Self)> {
        let foreign = || Error::file(path, format!("is no file of `kvfuse train` ({kind})"));
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|_| foreign())?;
        let json = header.metadata().as_ref().and_then(|m| m.get(kind)).ok_or_else(foreign)?;
        let value: Value = serde_json::from_str(json).map_err(|_| foreign())?;
        let has = &value["schema"];
        if *has != schema {
            let problem = format!("has schema {has}, this kvfuse reads {schema}; train it again");
            return Err(Error::file(path, problem));
        }
        let origin = serde_json::from_value(value).map_err(|_| foreign())?;
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
        Ok(from_bytes(bytes, &factors))
    }
}
