//! What a GGUF file's metadata say of the model's shape and arithmetic.

use super::metadata::{Metadata, flag};
use super::one_line;
use crate::error::{Error, Result};
use crate::model::config::{
    ARCHITECTURES, GEMMA3_LOCAL_BASE, GEMMA3_PATTERN, ModelConfig, RopeConfig, Sliding, all_but_each,
    check_sizes, unknown_architecture, unknown_scaling,
};
use candle_core::Device;
use candle_core::quantized::gguf_file::Value;
use std::io::Cursor;

/// The configuration of the model in a file, whose bytes are `map`.
pub fn config(metadata: Metadata, map: &[u8]) -> Result<ModelConfig> {
    let Metadata { path, content } = metadata;
    let architecture = metadata.string("general.architecture").unwrap_or_default();
    if !ARCHITECTURES.contains(&architecture) {
        return Err(unknown_architecture(path, architecture));
    }
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| Ok::<_, Error>(metadata.integer(&key(name))?.unwrap_or(0) as usize);
    let float = |name: &str| metadata.float(&key(name));
    refuse_other_models(metadata, architecture)?;
    let heads = size("attention.head_count")?;
    let hidden = size("embedding_length")?;
    let head_dim = match size("attention.key_length")? {
        0 => hidden / heads.max(1),
        n => n,
    };
    let value_dim = size("attention.value_length")?;
    if value_dim != 0 && value_dim != head_dim {
        let problem = format!("keys of {head_dim} and values of {value_dim} numbers are not supported");
        return Err(Error::file(path, problem));
    }
    let embedding = content.tensor_infos.get("token_embd.weight");
    let vocab = embedding.and_then(|t| t.shape.dims().first()).copied().unwrap_or(0);
    let layers = size("block_count")?;
    let dims = match size("rope.dimension_count")? {
        0 => head_dim,
        n => n,
    };
    check_sizes(path, &[("layers", layers), ("head size", head_dim), ("rotated numbers of a head", dims)])?;
    let context = size("context_length")?;
    if context == 0 {
        return Err(Error::file(
            path,
            format!("metadata {} is missing; convert the model again", key("context_length")),
        ));
    }
    let epsilon = float("attention.layer_norm_rms_epsilon")?;
    let epsilon = epsilon.ok_or_else(|| {
        let key = key("attention.layer_norm_rms_epsilon");
        Error::file(path, format!("metadata {key} is missing; convert the model again"))
    })?;
    let base = float("rope.freq_base")?.unwrap_or(10_000.0);
    let rope = scaled(metadata, map, RopeConfig::plain(base, dims), architecture)?;
    let sliding = match architecture {
        "gemma3" => gemma3_sliding(metadata, layers, dims)?,
        // llama.cpp does not read a window of the others, and has switched that of phi3 off.
        _ => None,
    };
    let config = ModelConfig {
        architecture: architecture.to_owned(),
        layers,
        hidden,
        heads,
        kv_heads: match size("attention.head_count_kv")? {
            0 => heads,
            n => n,
        },
        head_dim,
        intermediate: size("feed_forward_length")?,
        vocab,
        context,
        rms_epsilon: epsilon as f32,
        rope,
        sliding,
        // The one Gemma 3 whose queries are scaled otherwise is the 27B, of 62 layers; GGUF files do not say so.
        query_scalar: (architecture == "gemma3" && layers == 62).then(|| hidden as f64 / heads as f64),
    };
    config.check(path)?;
    Ok(config)
}

/// The windows of a Gemma 3, as llama.cpp reads them.
fn gemma3_sliding(metadata: Metadata, layers: usize, dims: usize) -> Result<Option<Sliding>> {
    let Some(window) = metadata.integer("gemma3.attention.sliding_window")?.filter(|w| *w > 0) else {
        return Ok(None);
    };
    let base = metadata.float("gemma3.rope.freq_base_swa")?.unwrap_or(GEMMA3_LOCAL_BASE);
    const PATTERN: &str = "gemma3.attention.sliding_window_pattern";
    let layers = match metadata.value(PATTERN) {
        // Which layers slide, one by one.
        Some(Value::Array(flags)) => {
            let slides: Option<Vec<bool>> = flags.iter().map(flag).collect();
            let slides = slides.filter(|s| s.len() == layers);
            let slides = slides.ok_or_else(|| metadata.wrong(PATTERN, "one flag per layer"))?;
            (0..layers).filter(|&n| slides[n]).collect()
        }
        _ => match metadata.integer(PATTERN)?.unwrap_or(0) {
            0 => all_but_each(GEMMA3_PATTERN, layers),
            n => all_but_each(n as usize, layers),
        },
    };
    let rope = Some(RopeConfig::plain(base, dims));
    Ok(Some(Sliding { window: window as usize, layers, rope }))
}

/// Metadata of variants that share an architecture's name and compute something else.
fn refuse_other_models(metadata: Metadata, architecture: &str) -> Result<()> {
    // (key, the value that changes nothing)
    const NEUTRAL: [(&str, f64); 12] = [
        ("expert_count", 0.0),
        ("attention.scale", 0.0),
        ("logit_scale", 0.0),
        ("residual_scale", 0.0),
        ("embedding_scale", 0.0),
        ("attn_logit_softcapping", 0.0),
        ("final_logit_softcapping", 0.0),
        ("attention.clamp_kqv", 0.0),
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.0),
        ("attention.temperature_scale", 0.0),
        ("nextn_predict_layers", 0.0),
    ];
    for (name, neutral) in NEUTRAL {
        let key = format!("{architecture}.{name}");
        if metadata.float(&key)?.is_some_and(|x| x != neutral) {
            return Err(Error::file(
                metadata.path,
                format!("metadata {key} is not supported; use another model"),
            ));
        }
    }
    let causal = metadata.value(&format!("{architecture}.attention.causal"));
    if causal.is_some_and(|v| v.to_bool().ok() != Some(true)) {
        let problem =
            format!("{architecture}.attention.causal: attention that is not causal is not supported");
        return Err(Error::file(metadata.path, problem));
    }
    Ok(())
}

/// RoPE with the scaling a file asks for: divisors of its own (llama 3), or one for all. A factor without a type is linear,
/// as is the key of 2023 (llama.cpp, src/llama-model.cpp, `load_hparams`).
fn scaled(metadata: Metadata, map: &[u8], rope: RopeConfig, architecture: &str) -> Result<RopeConfig> {
    const DIVISORS: &str = "rope_freqs.weight";
    let Metadata { path, content } = metadata;
    let key = |name: &str| format!("{architecture}.rope.{name}");
    if content.tensor_infos.contains_key("rope_factors_long.weight") {
        return Err(unknown_scaling(path, "longrope"));
    }
    let kind = metadata.text(&key("scaling.type"))?;
    let factor = match metadata.float(&key("scaling.factor"))? {
        Some(factor) => Some(factor),
        None => metadata.float(&key("scale_linear"))?,
    };
    // 0 stands for none.
    let factor = factor.filter(|f| *f != 0.0).unwrap_or(1.0);
    let rope = match kind {
        Some("none") => rope,
        None | Some("linear") if factor == 1.0 => rope,
        None | Some("linear") => rope.linear(factor),
        Some(other) => return Err(unknown_scaling(path, other)),
    };
    if !content.tensor_infos.contains_key(DIVISORS) {
        return Ok(rope);
    }
    let read = || -> candle_core::Result<Vec<f32>> {
        let tensor = content.tensor(&mut Cursor::new(map), DIVISORS, &Device::Cpu)?;
        tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()
    };
    let bad = |e| Error::file(path, format!("tensor {DIVISORS} cannot be read: {}", one_line(&e)));
    let own: Vec<f64> = read().map_err(bad)?.into_iter().map(f64::from).collect();
    if own.len() != rope.dims / 2 {
        let problem = format!("tensor {DIVISORS} has {} numbers for {} pairs", own.len(), rope.dims / 2);
        return Err(Error::file(path, problem));
    }
    let divisors = match rope.divisors.is_empty() {
        true => own,
        false => own.iter().zip(&rope.divisors).map(|(a, b)| a * b).collect(),
    };
    Ok(RopeConfig { divisors, ..rope })
}
