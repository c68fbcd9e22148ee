//! Thresholds of single layers, as `kvfuse calibrate` writes them and `bff:thresholds=FILE` reads them.

use super::choices::Choices;
use crate::error::{Error, Result};
use crate::files;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Raised when older readers would misread the file.
const SCHEMA: u32 = 2;

/// A calibration: the choices it was made for, the thresholds, and the questions it has seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    pub schema: u32,
    /// Name for tables: the file's stem and the first digits of its checksum.
    #[serde(skip)]
    pub name: String,
    pub model: String,
    pub model_sha256: String,
    pub block_size: usize,
    pub seed: u64,
    /// What was asked for, as typed: `kl 0.02`, `error 0.1`, or, predicted and not measured, `model cr 4` or `model error 0.1`.
    pub target: String,
    /// Quantile of the similarity of unrelated blocks below which no threshold lies; absent if not asked for.
    pub floor: Option<f64>,
    /// On the calibration questions with these thresholds: KL in nats a token (absent if not measured), and audited
    /// compression ratio (measured, or predicted where the target begins with `model`).
    pub calibration_kl: Option<f64>,
    pub calibration_cr_audited: f64,
    /// Ids of the questions seen.
    pub questions: Vec<String>,
    /// Checksums of the texts that these are about; a sweep with this file leaves out all questions about any of them, of
    /// whatever file and id.
    pub contexts: Vec<String>,
    pub choices: Choices,
    pub layers: Vec<LayerThresholds>,
}

/// A pair of blocks fuses if both cosines lie above these.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerThresholds {
    pub layer: usize,
    /// 1: only exact duplicates fuse.
    pub key: f64,
    /// -1: values are not looked at.
    pub value: f64,
}

impl Thresholds {
    pub fn read(path: &Path) -> Result<Self> {
        let text = files::read_text(path)?;
        let mut thresholds: Thresholds = toml::from_str(&text).map_err(|e| {
            let problem = format!("not a thresholds file of `kvfuse calibrate`: {}", e.message());
            Error::file(path, problem.replace('\n', " "))
        })?;
        if thresholds.schema != SCHEMA {
            let problem =
                format!("has schema {}, this kvfuse reads {SCHEMA}; calibrate again", thresholds.schema);
            return Err(Error::file(path, problem));
        }
        for l in &thresholds.layers {
            let valid = |t: f64| (-1.0..=1.0).contains(&t);
            if !valid(l.key) || !valid(l.value) {
                let problem = format!("layer {}: thresholds must lie in [-1, 1]", l.layer);
                return Err(Error::file(path, problem));
            }
        }
        let stem = path.file_stem().map_or("thresholds".into(), |s| s.to_string_lossy());
        thresholds.name = format!("{stem}-{}", &files::sha256_bytes(text.as_bytes())[..8]);
        Ok(thresholds)
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self).map_err(|e| Error::file(path, e.to_string()))?;
        files::write_atomically(path, |out| out.write_all(text.as_bytes()))
    }

    pub const fn schema() -> u32 {
        SCHEMA
    }

    /// Thresholds on the cosines of keys and of values in a layer; a layer that is not listed fuses exact duplicates only.
    pub fn layer(&self, layer: usize) -> (f32, f32) {
        let own = self.layers.iter().find(|l| l.layer == layer);
        own.map_or((1.0, -1.0), |l| (l.key as f32, l.value as f32))
    }
}
