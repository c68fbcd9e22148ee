//! What a decoder needs to know of a model, read from GGUF metadata or from a HF `config.json`.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Rotary position embedding, rotate-half layout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RopeConfig {
    /// Wavelength base (theta).
    pub base: f64,
    /// Numbers of a head that are rotated; all of them in the architectures there are.
    pub dims: usize,
    /// What each of the `dims / 2` frequencies is divided by (RoPE scaling); empty for none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub divisors: Vec<f64>,
}

/// Llama 3's RoPE scaling, as a `config.json` gives it.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: f64,
}

impl RopeConfig {
    /// No scaling.
    pub fn plain(base: f64, dims: usize) -> Self {
        RopeConfig { base, dims, divisors: Vec::new() }
    }

    /// The `dims / 2` frequencies in radians a token, before scaling.
    pub fn frequencies(&self) -> Vec<f64> {
        (0..self.dims / 2).map(|i| self.base.powf(-2.0 * i as f64 / self.dims as f64)).collect()
    }

    /// Every frequency divided by `factor` (position interpolation, Chen et al. 2023).
    pub fn linear(self, factor: f64) -> Self {
        let divisors = vec![factor; self.dims / 2];
        RopeConfig { divisors, ..self }
    }

    /// Long wavelengths divided by `factor`, short ones left, those between blended (Llama 3 herd of models, 2024; the
    /// rule is that of the published model code).
    pub fn llama3(self, scaling: Llama3Scaling) -> Self {
        let Llama3Scaling { factor, low_freq_factor: low, high_freq_factor: high, .. } = scaling;
        let turns = |frequency: f64| {
            frequency * scaling.original_max_position_embeddings / (2.0 * std::f64::consts::PI)
        };
        let divisor = |frequency: f64| {
            let smooth = ((turns(frequency) - low) / (high - low)).clamp(0.0, 1.0);
            1.0 / ((1.0 - smooth) / factor + smooth)
        };
        let divisors = self.frequencies().into_iter().map(divisor).collect();
        RopeConfig { divisors, ..self }
    }
}

/// Layers that look back a limited number of tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sliding {
    /// Tokens a query sees, its own among them.
    pub window: usize,
    /// The layers that slide, ascending.
    pub layers: Vec<usize>,
    /// Their position embedding, if it is not that of the other layers (gemma3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope: Option<RopeConfig>,
}

/// Sizes and constants of a decoder (docs/models.md).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub architecture: String,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub intermediate: usize,
    pub vocab: usize,
    /// Longest sequence the model was trained for, in tokens.
    pub context: usize,
    pub rms_epsilon: f32,
    pub rope: RopeConfig,
    /// Layers with a sliding window, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding: Option<Sliding>,
    /// Queries are divided by the root of this; `head_dim` if none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query_scalar: Option<f64>,
}

/// How the decoders of one architecture differ from llama's.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Traits {
    /// Biases on queries, keys and values.
    pub qkv_bias: bool,
    /// RMS norms of each head's query and key, before they are rotated.
    pub qk_norm: bool,
    /// Queries, keys and values, and gate and up, lie in the file as one matrix each.
    pub fused_projections: bool,
    /// Norms after attention and MLP too, before they are added to the stream.
    pub post_norms: bool,
    /// The MLP's gate is GELU (tanh form), not SiLU.
    pub gelu: bool,
    /// Embeddings are multiplied by the root of the hidden size.
    pub scaled_embedding: bool,
    /// HF files store the norms' gains less 1 (GGUF files do not).
    pub gains_less_one: bool,
}

/// The architectures this version decodes.
pub const ARCHITECTURES: [&str; 6] = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"];

/// The traits of one of [`ARCHITECTURES`].
pub fn traits(architecture: &str) -> Traits {
    let llama = Traits::default();
    match architecture {
        "qwen2" => Traits { qkv_bias: true, ..llama },
        "qwen3" => Traits { qk_norm: true, ..llama },
        "phi3" => Traits { fused_projections: true, ..llama },
        "gemma3" => Traits {
            qk_norm: true,
            post_norms: true,
            gelu: true,
            scaled_embedding: true,
            gains_less_one: true,
            ..llama
        },
        _ => llama,
    }
}

impl ModelConfig {
    /// How this architecture differs from llama.
    pub fn traits(&self) -> Traits {
        traits(&self.architecture)
    }

    /// Tokens a query of this layer sees; `None` for all before it.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding.as_ref().filter(|s| s.layers.contains(&layer)).map(|s| s.window)
    }

    /// The position embedding of a layer.
    pub fn layer_rope(&self, layer: usize) -> &RopeConfig {
        let own = self.sliding.as_ref().filter(|s| s.layers.contains(&layer)).and_then(|s| s.rope.as_ref());
        own.unwrap_or(&self.rope)
    }

    /// Factor on the inner products of queries and keys.
    pub fn attention_scale(&self) -> f32 {
        (1.0 / self.query_scalar.unwrap_or(self.head_dim as f64).sqrt()) as f32
    }

    /// Multiply-accumulates a token costs in the linear layers of the decoder, embeddings and output head apart.
    pub fn non_embedding_parameters(&self) -> usize {
        let q = self.heads * self.head_dim;
        let kv = self.kv_heads * self.head_dim;
        let attention = self.hidden * (q + 2 * kv) + q * self.hidden;
        self.layers * (attention + 3 * self.hidden * self.intermediate)
    }

    /// Refuses sizes no decoder can have; `path` is the file that says them.
    pub fn check(&self, path: &Path) -> Result<()> {
        check_sizes(
            path,
            &[
                ("layers", self.layers),
                ("hidden size", self.hidden),
                ("attention heads", self.heads),
                ("key/value heads", self.kv_heads),
                ("head size", self.head_dim),
                ("intermediate size", self.intermediate),
                ("vocabulary size", self.vocab),
            ],
        )?;
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let epsilon = self.rms_epsilon;
        if !(epsilon >= 0.0 && epsilon.is_finite() && self.query_scalar.is_none_or(positive)) {
            let problem = format!(
                "an RMS epsilon of {epsilon} or a query scalar of {:?} makes no sense",
                self.query_scalar
            );
            return Err(Error::file(path, problem));
        }
        let whole = self.heads.is_multiple_of(self.kv_heads) && self.head_dim.is_multiple_of(2);
        let ropes = [Some(&self.rope), self.sliding.as_ref().and_then(|s| s.rope.as_ref())];
        if !whole || ropes.iter().flatten().any(|r| r.dims != self.head_dim) {
            let problem = format!(
                "{} heads over {} key/value heads of size {} with {} rotated are not a decoder of these architectures",
                self.heads, self.kv_heads, self.head_dim, self.rope.dims
            );
            return Err(Error::file(path, problem));
        }
        let usable = |r: &RopeConfig| {
            let fits = r.divisors.is_empty() || r.divisors.len() == r.dims / 2;
            positive(r.base) && fits && r.divisors.iter().all(|d| positive(*d))
        };
        if !ropes.into_iter().flatten().all(usable) {
            return Err(Error::file(path, "its RoPE settings make no sense; fetch the model again"));
        }
        if self.sliding.as_ref().is_some_and(|s| s.window == 0) {
            return Err(Error::file(
                path,
                "a sliding window of 0 tokens sees nothing; fetch the model again",
            ));
        }
        Ok(())
    }
}

/// More than any decoder has of anything but tokens of context; products of a few stay far from overflow.
const MOST: usize = 1 << 24;

/// Refuses sizes that are missing or absurd, before anything is allocated by them.
pub(super) fn check_sizes(path: &Path, sizes: &[(&str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, n)| !(1..=MOST).contains(n)) {
        None => Ok(()),
        Some((name, 0)) => Err(Error::file(path, format!("{name} is missing or zero; not a usable model"))),
        Some((name, n)) => {
            Err(Error::file(path, format!("{name} {n} is beyond reason; fetch the model again")))
        }
    }
}

pub(super) fn unknown_architecture(path: &Path, name: &str) -> Error {
    let known = ARCHITECTURES.join(", ");
    let problem = format!("architecture '{name}' is not supported; use a model of one of these: {known}");
    Error::file(path, problem)
}

pub(super) fn unknown_scaling(path: &Path, kind: &str) -> Error {
    let problem =
        format!("RoPE scaling '{kind}' is not supported (linear and llama3 are); use another model");
    Error::file(path, problem)
}

/// Gemma 3 text models: of every six layers the first five slide. HF files of recent transformers list the kinds; older
/// ones and GGUF files rely on this.
pub(super) const GEMMA3_PATTERN: usize = 6;
/// Base of the sliding layers' RoPE where the file names none.
pub(super) const GEMMA3_LOCAL_BASE: f64 = 10_000.0;

/// All layers but each `pattern`-th.
pub(super) fn all_but_each(pattern: usize, layers: usize) -> Vec<usize> {
    (0..layers).filter(|n| !(n + 1).is_multiple_of(pattern.max(1))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 3.1's own numbers: short wavelengths stay, long ones are divided by 8, and there is something between.
    #[test]
    fn llama3_scaling_leaves_short_wavelengths() {
        let scaling = Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        let rope = RopeConfig::plain(500_000.0, 128).llama3(scaling);
        let waves: Vec<f64> = rope.frequencies().iter().map(|f| 2.0 * std::f64::consts::PI / f).collect();
        for (wave, divisor) in waves.iter().zip(&rope.divisors) {
            if *wave < 8192.0 / 4.0 {
                assert_eq!(*divisor, 1.0);
            } else if *wave > 8192.0 {
                assert!((divisor - 8.0).abs() < 1e-12);
            } else {
                assert!((1.0..8.0).contains(divisor));
            }
        }
        assert!(rope.divisors.iter().any(|d| *d > 1.5 && *d < 7.0));
    }

    #[test]
    fn five_of_six_layers_slide() {
        assert_eq!(all_but_each(6, 8), [0, 1, 2, 3, 4, 6, 7]);
    }
}
