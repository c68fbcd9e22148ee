//! The trained file of a joint codec.

use super::entropy::{CENTROIDS, CONTEXTS, SYMBOLS, Tables, WIDTHS};
use super::reference::CLASSES;
use crate::block::{BlockShape, halves};
use crate::codec::trained::{Tensors, TrainedFile, f32_bytes, from_bytes, write_tensors};
use crate::error::{Error, Result};
use crate::model::gemm::{View, product};
use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, Side};
use rayon::prelude::*;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Raised whenever a file of an older version would decode to something else.
pub const SCHEMA: u32 = 3;

/// What the file's metadata call it.
const KIND: &str = "kvfuse_joint";

/// Where a codec comes from and what it fits.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Origin {
    pub schema: u32,
    pub kvfuse_version: String,
    pub command: Vec<String>,
    pub model: String,
    pub model_sha256: String,
    pub layers: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// The step it was trained at, in eighths of an octave.
    pub step: i32,
    pub training_tokens: usize,
    /// Checksums of the texts that it was trained on.
    pub contexts: Vec<String>,
    pub dumps: Vec<serde_json::Value>,
    /// All else that the file depends on, as far as a user chooses it.
    pub settings: serde_json::Value,
}

/// One layer: how to predict it and how to turn what the prediction misses.
#[derive(Debug, Clone)]
pub struct LayerBook {
    /// `[width]`.
    pub mean: Vec<f32>,
    /// Numbers between the two factors of the predictor.
    pub rank: usize,
    /// `[taps * width, rank]`, and `[rank, width]`: numbers of the layers below, the nearest first, to a prediction.
    pub down: Vec<f32>,
    pub up: Vec<f32>,
    pub components: usize,
    /// Symmetric roots of the metric, head by head: `[2 * kv_heads][head_dim, head_dim]`, keys first.
    pub root: Vec<Vec<f32>>,
    /// Columns that are orthonormal but for their rounding to bytes: `[width, components]`.
    pub turn: Vec<f32>,
    /// `[width, components]`: what is missed to components; follows from `root` and `turn`. Only encoders need it.
    pub analysis: Vec<f32>,
    /// `[components, width]`: back, from them too.
    pub synthesis: Vec<f32>,
    /// Standard deviations of components that are left by a reference of each class, in eighths of an octave:
    /// `[CLASSES, components]`.
    pub sigma: Vec<i16>,
    /// What of a reference's component is expected again: `[CLASSES, components]`.
    pub gain: Vec<f32>,
}

impl LayerBook {
    /// Layers below that it is predicted from.
    pub fn taps(&self, width: usize) -> usize {
        self.down.len().checked_div(self.rank * width).unwrap_or(0)
    }
}

pub struct Book {
    pub origin: Origin,
    pub layers: Vec<LayerBook>,
    pub tables: Tables,
    /// Bits of the whole file.
    pub bits: u64,
}

impl Book {
    /// Of parts, without a file.
    pub fn of(layers: &[LayerBook], tables: &TableParts, step: i32, shape: BlockShape) -> Result<Self> {
        let origin = Origin {
            schema: SCHEMA,
            kvfuse_version: String::new(),
            command: Vec::new(),
            model: String::new(),
            model_sha256: String::new(),
            layers: layers.len(),
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            step,
            training_tokens: 0,
            contexts: Vec::new(),
            dumps: Vec::new(),
            settings: serde_json::Value::Null,
        };
        let tables = Tables::new(&tables.probabilities, &tables.means, &tables.centroids)
            .ok_or_else(|| Error::Number("tables of a codec are not finite".into()))?;
        Ok(Book { origin, layers: layers.to_vec(), tables, bits: 0 })
    }

    /// Numbers of a token in one layer: keys and values.
    pub fn width(&self) -> usize {
        2 * self.origin.kv_heads * self.origin.head_dim
    }
}

/// What the entropy coder's tables are made of.
pub struct TableParts {
    pub probabilities: Vec<u16>,
    pub means: Vec<u32>,
    pub centroids: Vec<f32>,
}

/// Rows of numbers as signed bytes, each column with a factor of its own.
fn bytes_by_column(numbers: &[f32], columns: usize) -> (Vec<u8>, Vec<f32>) {
    let mut factors = vec![0.0f32; columns];
    for row in numbers.chunks_exact(columns) {
        factors.iter_mut().zip(row).for_each(|(f, x)| *f = f.max(x.abs() / 127.0));
    }
    let byte = |(x, f): (&f32, &f32)| if *f > 0.0 { (x / f).round() as i8 as u8 } else { 0 };
    let bytes = numbers.chunks_exact(columns).flat_map(|row| row.iter().zip(&factors).map(byte)).collect();
    (bytes, factors)
}

/// Rows of numbers as a file gives them back. What is made up for elsewhere, as a predictor's mean input is by what is added to its
/// prediction, has to be made up for by these.
pub fn in_bytes(numbers: &[f32], columns: usize) -> Vec<f32> {
    let (bytes, factors) = bytes_by_column(numbers, columns);
    from_bytes(&bytes, &factors)
}

/// Adds rows of numbers as bytes, and the factors of their columns; what [`Tensors::i8`] reads.
fn add_bytes(
    add: &mut impl FnMut(&str, Dtype, Vec<usize>, Vec<u8>),
    name: &str,
    numbers: &[f32],
    columns: usize,
) {
    let (bytes, factors) = bytes_by_column(numbers, columns);
    add(name, Dtype::I8, vec![numbers.len() / columns, columns], bytes);
    add(&format!("{name}_factors"), Dtype::F32, vec![columns], f32_bytes(&factors));
}

/// Writes a codec; what is read back is what encoders and decoders use.
pub fn write(path: &Path, origin: &Origin, layers: &[LayerBook], tables: &TableParts) -> Result<()> {
    let width = 2 * origin.kv_heads * origin.head_dim;
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (n, layer) in layers.iter().enumerate() {
        let r = layer.components;
        let mut add = |name: &str, dtype: Dtype, shape: Vec<usize>, bytes: Vec<u8>| {
            tensors.push((format!("layers.{n}.{name}"), dtype, shape, bytes));
        };
        add("mean", Dtype::F32, vec![width], f32_bytes(&layer.mean));
        if layer.rank > 0 {
            add_bytes(&mut add, "down", &layer.down, layer.rank);
            add_bytes(&mut add, "up", &layer.up, width);
        }
        let root: Vec<f32> = layer.root.concat();
        let scale = root.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
        let scaled: Vec<f32> = root.iter().map(|x| x / scale).collect();
        let d = origin.head_dim;
        add("root", Dtype::F16, vec![2 * origin.kv_heads, d, d], halves::to_bytes(&scaled));
        add("root_factor", Dtype::F32, vec![1], f32_bytes(&[scale]));
        add_bytes(&mut add, "turn", &layer.turn, r);
        let sigma = layer.sigma.iter().flat_map(|s| s.to_le_bytes()).collect();
        add("sigma", Dtype::I16, vec![CLASSES, r], sigma);
        add("gain", Dtype::F16, vec![CLASSES, r], halves::to_bytes(&layer.gain));
    }
    let probabilities = tables.probabilities.iter().flat_map(|p| p.to_le_bytes()).collect();
    tensors.push(("tables.probabilities".into(), Dtype::U16, vec![WIDTHS, CONTEXTS, SYMBOLS], probabilities));
    let means = tables.means.iter().flat_map(|p| p.to_le_bytes()).collect();
    tensors.push(("tables.means".into(), Dtype::U32, vec![WIDTHS], means));
    let centroids = f32_bytes(&tables.centroids);
    tensors.push(("tables.centroids".into(), Dtype::F32, vec![WIDTHS, CENTROIDS], centroids));
    write_tensors(path, KIND, origin, &tensors)
}

/// Reads one layer.
fn layer(tensors: &Tensors, n: usize, heads: usize, d: usize) -> Result<LayerBook> {
    let width = heads * d;
    let name = |part: &str| format!("layers.{n}.{part}");
    let shape = |part: &str| tensors.shape(&name(part));
    let components = shape("turn").get(1).copied().unwrap_or(0);
    let (inputs, rank) = match shape("down")[..] {
        [inputs, rank] => (inputs, rank),
        _ => (0, 0),
    };
    let (down, up) = if rank == 0 {
        (Vec::new(), Vec::new())
    } else {
        if inputs % width != 0 || inputs / width > n {
            return Err(tensors.bad(&format!("layer {n} is predicted from {inputs} numbers")));
        }
        (tensors.i8(&name("down"), inputs, rank)?, tensors.i8(&name("up"), rank, width)?)
    };
    let scale = tensors.f32(&name("root_factor"), &[1])?[0];
    let root = tensors.f16(&name("root"), &[heads, d, d])?;
    let root: Vec<Vec<f32>> =
        root.chunks_exact(d * d).map(|block| block.iter().map(|x| x * scale).collect()).collect();
    let turn = tensors.i8(&name("turn"), width, components)?;
    let (analysis, synthesis) = both_ways(&root, &turn, components).ok_or_else(|| {
        tensors
            .bad(&format!("layer {n} has a metric that cannot be inverted, or components that are not apart"))
    })?;
    let sigma = tensors.bytes(&name("sigma"), Dtype::I16, &[CLASSES, components])?;
    Ok(LayerBook {
        mean: tensors.f32(&name("mean"), &[width])?,
        rank,
        down,
        up,
        components,
        root,
        turn,
        analysis,
        synthesis,
        sigma: sigma.as_chunks::<2>().0.iter().map(|b| i16::from_le_bytes(*b)).collect(),
        gain: tensors.f16(&name("gain"), &[CLASSES, components])?,
    })
}

/// Rows one after the other.
pub fn flat(a: &Mat<f64>) -> Vec<f32> {
    (0..a.nrows()).flat_map(|i| (0..a.ncols()).map(move |j| a[(i, j)] as f32)).collect()
}

/// The orthonormal columns that are nearest to given ones, `[rows, columns]`: `turn (turn^T turn)^-1/2`. So large components leave
/// nothing of themselves in others, where roots of a metric would make much of it. `None` if they are dependent.
fn orthonormal(turn: &[f32], columns: usize) -> Option<Vec<f32>> {
    let rows = turn.len() / columns.max(1);
    let turn = Mat::from_fn(rows, columns, |i, k| f64::from(turn[i * columns + k]));
    let eigen = (turn.transpose() * &turn).self_adjoint_eigen(Side::Lower).ok()?;
    let (vectors, values) = (eigen.U(), eigen.S());
    let scaled = Mat::from_fn(columns, columns, |i, k| vectors[(i, k)] / values[k].sqrt());
    let nearest = &turn * (&scaled * vectors.transpose());
    let numbers = flat(&nearest);
    numbers.iter().all(|x| x.is_finite()).then_some(numbers)
}

/// `root * turn` and `turn^T * root^-1`, for roots head by head and a turn made orthonormal. `None` if a root has no inverse, or the turn's
/// columns are dependent.
pub fn both_ways(root: &[Vec<f32>], turn: &[f32], components: usize) -> Option<(Vec<f32>, Vec<f32>)> {
    let d = root.first()?.len().isqrt();
    let turn = &orthonormal(turn, components)?[..];
    let (mut analysis, mut synthesis) = (Vec::new(), vec![0.0; turn.len()]);
    let width = root.len() * d;
    for (h, block) in root.iter().enumerate() {
        let own = &turn[h * d * components..][..d * components];
        let mut out = vec![0.0; d * components];
        product(View::row_major(block, d, d), View::row_major(own, d, components), &mut out);
        analysis.extend(out);
        let matrix = Mat::from_fn(d, d, |i, j| f64::from(block[i * d + j]));
        let inverse = matrix.llt(Side::Lower).ok()?.inverse();
        for k in 0..components {
            for j in 0..d {
                let sum: f64 = (0..d).map(|i| f64::from(own[i * components + k]) * inverse[(i, j)]).sum();
                synthesis[k * width + h * d + j] = sum as f32;
            }
        }
    }
    synthesis.iter().all(|x| x.is_finite()).then_some((analysis, synthesis))
}

impl TrainedFile for Book {
    fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let (origin, tensors): (Origin, _) = Tensors::open(path, bytes, KIND, SCHEMA)?;
        let width = 2 * origin.kv_heads * origin.head_dim;
        if width == 0 {
            return Err(tensors.bad("is for a model without a cache"));
        }
        let layers = (0..origin.layers)
            .into_par_iter()
            .map(|n| layer(&tensors, n, 2 * origin.kv_heads, origin.head_dim))
            .collect::<Result<_>>()?;
        let probabilities =
            tensors.bytes("tables.probabilities", Dtype::U16, &[WIDTHS, CONTEXTS, SYMBOLS])?;
        let probabilities: Vec<u16> =
            probabilities.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
        let means = tensors.bytes("tables.means", Dtype::U32, &[WIDTHS])?;
        let means: Vec<u32> = means.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let centroids = tensors.f32("tables.centroids", &[WIDTHS, CENTROIDS])?;
        let tables = Tables::new(&probabilities, &means, &centroids)
            .ok_or_else(|| tensors.bad("has invalid tables"))?;
        Ok(Book { origin, layers, tables, bits: 8 * bytes.len() as u64 })
    }
}
