//! A Hugging Face `config.json` as a [`ModelConfig`].

use super::config::{
    ARCHITECTURES, GEMMA3_LOCAL_BASE, GEMMA3_PATTERN, Llama3Scaling, ModelConfig, RopeConfig, Sliding,
    all_but_each, check_sizes, unknown_architecture, unknown_scaling,
};
use crate::error::{Error, Result};
use crate::files;
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

/// The fields of `config.json` that kvfuse reads.
#[derive(Deserialize)]
struct RawConfig {
    num_hidden_layers: usize,
    hidden_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f32>,
    rope_theta: Option<f64>,
    /// Of gemma3's sliding layers.
    rope_local_base_freq: Option<f64>,
    rope_scaling: Option<Value>,
    /// Where transformers 5 puts the three above: one object, or one a kind of layer.
    rope_parameters: Option<Value>,
    partial_rotary_factor: Option<f64>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    sliding_window: Option<usize>,
    #[serde(alias = "_sliding_window_pattern")]
    sliding_window_pattern: Option<usize>,
    /// Where layers are not listed, a qwen's first layers that do not slide.
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    query_pre_attn_scalar: Option<f64>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    use_bidirectional_attention: Option<bool>,
    /// Of llama 3 scaling, where it stands outside; transformers 5 then takes it before the one inside.
    original_max_position_embeddings: Option<usize>,
}

/// `max_window_layers` where a qwen's file names none.
const QWEN_FULL_LAYERS: usize = 28;

/// What transformers 5 takes where a field is missing (configuration_*.py); `None`: what follows from the others.
struct Defaults {
    context: usize,
    /// Tokens of the sliding window.
    window: Option<usize>,
    kv_heads: Option<usize>,
    head_dim: Option<usize>,
    epsilon: f32,
}

impl Defaults {
    fn of(architecture: &str) -> Self {
        let llama = Defaults { context: 2048, window: None, kv_heads: None, head_dim: None, epsilon: 1e-6 };
        let long = 131_072;
        match architecture {
            "mistral" => Defaults { context: long, window: Some(4096), kv_heads: Some(8), ..llama },
            "qwen2" => Defaults { context: 32_768, window: Some(4096), kv_heads: Some(32), ..llama },
            "qwen3" => Defaults {
                context: 32_768,
                window: Some(4096),
                kv_heads: Some(32),
                head_dim: Some(128),
                ..llama
            },
            "gemma3" => Defaults {
                context: long,
                window: Some(4096),
                kv_heads: Some(4),
                head_dim: Some(256),
                ..llama
            },
            "phi3" => Defaults { context: 4096, epsilon: 1e-5, ..llama },
            _ => llama,
        }
    }
}

/// `query_pre_attn_scalar` where a Gemma 3 names none.
const GEMMA3_QUERY_SCALAR: f64 = 256.0;

fn value_of(path: &Path) -> Result<Value> {
    let bad = |e: serde_json::Error| Error::file(path, format!("not a model configuration: {e}"));
    serde_json::from_str(&files::read_text(path)?).map_err(bad)
}

/// Whether a `config.json` ties the head to the embedding: transformers' default is yes for Gemma 3, no for the others.
pub fn is_tied(path: &Path) -> Result<bool> {
    let value = value_of(path)?;
    let gemma = value["model_type"].as_str().is_some_and(|t| t.starts_with("gemma"));
    Ok(value["tie_word_embeddings"].as_bool().unwrap_or(gemma))
}

/// Fields of variants that compute something else, each with the values that change nothing.
fn refuse_other_models(path: &Path, value: &Value) -> Result<()> {
    const OFF: [&str; 6] = [
        "quantization_config",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "num_local_experts",
        "embedding_multiplier",
        "logits_scaling",
    ];
    let set = |name: &&str| value.get(*name).is_some_and(|v| !v.is_null());
    match OFF.iter().find(|n| set(n)) {
        Some(name) => Err(Error::file(path, format!("{name} is not supported; use another model"))),
        None => Ok(()),
    }
}

/// Reads and checks a `config.json`.
pub fn read(path: &Path) -> Result<ModelConfig> {
    let bad = |e: serde_json::Error| Error::file(path, format!("not a model configuration: {e}"));
    let value = value_of(path)?;
    let named = value.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let architecture = match named {
        "gemma3_text" => "gemma3",
        "gemma3" => {
            let problem = "a Gemma 3 that reads images is not supported; use a text model (gemma3_text)";
            return Err(Error::file(path, problem));
        }
        other => other,
    }
    .to_owned();
    if !ARCHITECTURES.contains(&&architecture[..]) {
        return Err(unknown_architecture(path, &architecture));
    }
    refuse_other_models(path, &value)?;
    let names_window = value.get("sliding_window").is_some();
    let mut raw: RawConfig = serde_json::from_value(value).map_err(bad)?;
    if !names_window {
        raw.sliding_window = Defaults::of(&architecture).window;
    }
    if raw.rope_scaling.is_some() && raw.rope_parameters.is_some() && raw.rope_scaling != raw.rope_parameters
    {
        return Err(Error::file(path, "rope_scaling and rope_parameters differ; leave one out"));
    }
    // qwen2 has its three biases whether its configuration says so or not.
    let on = |flag: Option<bool>| flag == Some(true);
    if on(raw.attention_bias) && architecture != "qwen2" || on(raw.mlp_bias) {
        return Err(Error::file(path, "attention biases but qwen2's, and MLP biases, are not supported"));
    }
    let defaults = Defaults::of(&architecture);
    let head_dim = raw.head_dim.or(defaults.head_dim);
    let head_dim = head_dim.unwrap_or(raw.hidden_size / raw.num_attention_heads.max(1));
    // transformers' llama has no window, whatever the file says.
    raw.sliding_window = raw.sliding_window.filter(|_| architecture != "llama");
    check_sizes(path, &[("layers", raw.num_hidden_layers), ("head size", head_dim)])?;
    let gemma = architecture == "gemma3";
    // Per kind of layer, in transformers 5 (gemma3).
    let given = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
    if gemma && raw.rope_parameters.as_ref().is_some_and(|p| p.get("full_attention").is_none()) {
        return Err(Error::file(
            path,
            "rope_parameters of a Gemma 3 must name full_attention and sliding_attention",
        ));
    }
    let part = |kind: &str| given.map(|p| p.get(kind).unwrap_or(p));
    let rotated = |p: &Value| p.get("partial_rotary_factor").and_then(Value::as_f64);
    let partial =
        [part("full_attention"), part("sliding_attention")].into_iter().flatten().filter_map(rotated);
    if raw.partial_rotary_factor.into_iter().chain(partial).any(|f| f != 1.0) {
        return Err(Error::file(path, "RoPE on a part of each head is not supported; use another model"));
    }
    let (activation, own) = match gemma {
        true => (&raw.hidden_activation, "gelu_pytorch_tanh"),
        false => (&raw.hidden_act, "silu"),
    };
    if let Some(other) = activation.as_ref().filter(|a| *a != own) {
        let problem =
            format!("activation '{other}' is not supported ({own} is, in {architecture}); use another model");
        return Err(Error::file(path, problem));
    }
    if on(raw.use_bidirectional_attention) {
        return Err(Error::file(
            path,
            "bidirectional attention is not supported: use a model that generates text",
        ));
    }
    if raw.layer_types.as_ref().is_some_and(|kinds| kinds.len() != raw.num_hidden_layers) {
        return Err(Error::file(path, "layer_types lists another number of layers than num_hidden_layers"));
    }
    let base = |own: Option<&Value>| own.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
    let general = part("full_attention");
    let default = if gemma { 1_000_000.0 } else { 10_000.0 };
    // What stands inside goes before what stands beside it (transformers, modeling_rope_utils.py).
    let plain = RopeConfig::plain(base(general).or(raw.rope_theta).unwrap_or(default), head_dim);
    // transformers 5 passes over the old spelling in a Gemma 3, where others honour it.
    if gemma && general.is_some_and(|p| p.get("type").is_some() && p.get("rope_type").is_none()) {
        return Err(Error::file(path, "rope_scaling of a Gemma 3 names a type; write it as rope_type"));
    }
    let inside = general.and_then(|p| p.get("original_max_position_embeddings")).and_then(Value::as_u64);
    let outside = raw.original_max_position_embeddings.map(|n| n as u64);
    if inside.is_some() && outside.is_some() && inside != outside {
        let problem = "original_max_position_embeddings differs from that of rope_scaling; leave one out";
        return Err(Error::file(path, problem));
    }
    let rope = scaled(path, plain, general)?;
    let sliding = sliding(&raw, &architecture, || {
        let own = given.and_then(|p| p.get("sliding_attention"));
        let local = base(own).or(raw.rope_local_base_freq);
        RopeConfig::plain(local.unwrap_or(GEMMA3_LOCAL_BASE), head_dim)
    });
    let config = ModelConfig {
        layers: raw.num_hidden_layers,
        hidden: raw.hidden_size,
        heads: raw.num_attention_heads,
        kv_heads: raw.num_key_value_heads.or(defaults.kv_heads).unwrap_or(raw.num_attention_heads),
        head_dim,
        intermediate: raw.intermediate_size,
        vocab: raw.vocab_size,
        context: raw.max_position_embeddings.unwrap_or(defaults.context),
        rms_epsilon: raw.rms_norm_eps.unwrap_or(defaults.epsilon),
        rope,
        sliding,
        query_scalar: gemma
            .then(|| raw.query_pre_attn_scalar.unwrap_or(GEMMA3_QUERY_SCALAR))
            .filter(|s| *s != head_dim as f64),
        architecture,
    };
    config.check(path)?;
    Ok(config)
}

/// The layers that slide, if any do.
fn sliding(raw: &RawConfig, architecture: &str, local: impl Fn() -> RopeConfig) -> Option<Sliding> {
    // The qwens name a window that they use only when told to.
    if architecture.starts_with("qwen") && raw.use_sliding_window != Some(true) {
        return None;
    }
    let window = raw.sliding_window?;
    let gemma = architecture == "gemma3";
    let layers = match &raw.layer_types {
        Some(kinds) => (0..kinds.len()).filter(|&n| kinds[n] == "sliding_attention").collect(),
        None if gemma => {
            all_but_each(raw.sliding_window_pattern.unwrap_or(GEMMA3_PATTERN), raw.num_hidden_layers)
        }
        None if architecture.starts_with("qwen") => {
            (raw.max_window_layers.unwrap_or(QWEN_FULL_LAYERS)..raw.num_hidden_layers).collect()
        }
        None => (0..raw.num_hidden_layers).collect(),
    };
    Some(Sliding { window, layers, rope: gemma.then(local) })
}

/// RoPE with the scaling that a `rope_scaling` or `rope_parameters` object asks for.
fn scaled(path: &Path, rope: RopeConfig, scaling: Option<&Value>) -> Result<RopeConfig> {
    let Some(scaling) = scaling else { return Ok(rope) };
    let kind = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str);
    let bad = |e: serde_json::Error| Error::file(path, format!("rope_scaling: {e}"));
    match kind {
        None if scaling.get("factor").is_some() => {
            Err(Error::file(path, "RoPE scaling has a factor but no rope_type; say which scaling it is"))
        }
        None | Some("default") => Ok(rope),
        Some("linear") => {
            let factor = scaling.get("factor").and_then(Value::as_f64);
            let factor = factor.ok_or_else(|| Error::file(path, "linear RoPE scaling without a factor"))?;
            Ok(rope.linear(factor))
        }
        Some("llama3") => {
            let scaling: Llama3Scaling = serde_json::from_value(scaling.clone()).map_err(bad)?;
            Ok(rope.llama3(scaling))
        }
        Some(other) => Err(unknown_scaling(path, other)),
    }
}
