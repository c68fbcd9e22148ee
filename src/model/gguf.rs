//! GGUF files: metadata, tokenizer vocabulary and (de-quantised) tensors, read with candle.

use super::coded::Coded;
use super::config::{
    ARCHITECTURES, GEMMA3_LOCAL_BASE, GEMMA3_PATTERN, ModelConfig, RopeConfig, Sliding, all_but_each,
    check_sizes, unknown_architecture, unknown_scaling,
};
use super::numbers::Numbers;
use super::weights::TensorSource;
use crate::error::{Error, Result};
use crate::files;
use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use half::{bf16, f16};
use memchr::memmem;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};

pub struct Gguf {
    path: PathBuf,
    content: Content,
    config: ModelConfig,
}

impl Gguf {
    /// Opens and checks a file: magic, architecture, and that every tensor lies inside it.
    pub fn open(path: &Path) -> Result<Self> {
        let map = files::map(path)?;
        if !map.starts_with(b"GGUF") {
            return Err(Error::file(path, "not a GGUF file (it does not begin with 'GGUF')"));
        }
        if alignment_is_zero(&map) {
            return Err(Error::file(
                path,
                "damaged GGUF header (general.alignment is 0); fetch the file again",
            ));
        }
        // The version, which a machine of the other byte order wrote the other way round.
        if matches!(map.get(4..8), Some([0, 0, _, _])) {
            return Err(Error::file(path, "is a big-endian GGUF file; convert the model to little-endian"));
        }
        let content = Content::read(&mut Cursor::new(&map[..])).map_err(|e| {
            let words = one_line(&e);
            let kind = words.split_once("unknown dtype for tensor ").and_then(|(_, n)| n.trim().parse().ok());
            let problem = match kind.map(quantization) {
                Some(name) => format!(
                    "holds weights of quantisation {name}, which is not supported; use a file in Q4_0 to Q8_0, Q2_K to Q6_K, F16, \
                     BF16 or F32"
                ),
                None => format!("damaged or truncated GGUF header ({words}); fetch the file again"),
            };
            Error::file(path, problem)
        })?;
        let metadata = Metadata { path, content: &content };
        if let Some(parts) = metadata.integer("split.count")?.filter(|n| *n > 1) {
            let problem = format!(
                "is one of {parts} files of a split model; join them first (llama-gguf-split --merge FIRST-FILE OUT)"
            );
            return Err(Error::file(path, problem));
        }
        let end = content.tensor_infos.values().map(|t| {
            let numbers = t.shape.dims().iter().fold(1u128, |n, d| n.saturating_mul(*d as u128));
            let blocks = numbers / t.ggml_dtype.block_size() as u128;
            let bytes = blocks.saturating_mul(t.ggml_dtype.type_size() as u128);
            bytes.saturating_add(u128::from(content.tensor_data_offset) + u128::from(t.offset))
        });
        let (needed, have) = (end.max().unwrap_or(0), map.len() as u128);
        if have < needed {
            let problem = format!("truncated: {have} bytes of at least {needed}; fetch the file again");
            return Err(Error::file(path, problem));
        }
        let config = config(path, &map, &content)?;
        Ok(Gguf { path: path.to_owned(), content, config })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// A metadata string.
    pub fn string(&self, key: &str) -> Option<&str> {
        self.content.metadata.get(key)?.to_string().ok().map(String::as_str)
    }

    /// A metadata array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.list(key, "texts", |v| v.to_string().ok().cloned())
    }

    /// A metadata array of integers of any width.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.list(key, "integers", signed)
    }

    /// A metadata array of floating-point numbers of any width.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.list(key, "numbers", |v| number(v).map(|x| x as f32))
    }

    /// A metadata flag.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        let flag = match value {
            Value::Bool(flag) => Some(*flag),
            other => signed(other).map(|n| n != 0),
        };
        flag.map(Some).ok_or_else(|| wrong(&self.path, key, "a flag"))
    }

    /// A metadata integer of any width.
    pub fn integer(&self, key: &str) -> Result<Option<u64>> {
        Metadata { path: &self.path, content: &self.content }.integer(key)
    }

    fn list<T>(&self, key: &str, what: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<Vec<T>>> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        let list = value.to_vec().ok().and_then(|values| values.iter().map(read).collect());
        list.map(Some).ok_or_else(|| wrong(&self.path, key, &format!("a list of {what}")))
    }
}

/// A metadata entry of another type than its meaning asks for.
fn wrong(path: &Path, key: &str, wanted: &str) -> Error {
    Error::file(path, format!("metadata {key} is not {wanted}; convert the model again"))
}

/// An integer of any width.
fn signed(value: &Value) -> Option<i64> {
    match value {
        Value::U8(n) => Some(i64::from(*n)),
        Value::U16(n) => Some(i64::from(*n)),
        Value::U32(n) => Some(i64::from(*n)),
        Value::U64(n) => i64::try_from(*n).ok(),
        Value::I8(n) => Some(i64::from(*n)),
        Value::I16(n) => Some(i64::from(*n)),
        Value::I32(n) => Some(i64::from(*n)),
        Value::I64(n) => Some(*n),
        _ => None,
    }
}

/// A number of any width; integers count.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::F32(x) => Some(f64::from(*x)),
        Value::F64(x) => Some(*x),
        other => signed(other).map(|n| n as f64),
    }
}

/// Metadata by key. What is there in another type than its meaning asks for is an error, never passed over.
struct Metadata<'a> {
    path: &'a Path,
    content: &'a Content,
}

impl Metadata<'_> {
    fn integer(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        // Per layer in some files: one number if all layers have the same.
        let one = match value {
            Value::Array(layers) => {
                let numbers: Vec<Option<i64>> = layers.iter().map(signed).collect();
                if numbers.windows(2).any(|w| w[0] != w[1]) {
                    let problem =
                        format!("{key} differs between layers, which is not supported; use another model");
                    return Err(Error::file(self.path, problem));
                }
                numbers.first().copied().flatten()
            }
            other => signed(other),
        };
        let found = one.and_then(|n| u64::try_from(n).ok());
        found.map(Some).ok_or_else(|| wrong(self.path, key, "a whole number"))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        number(value).map(Some).ok_or_else(|| wrong(self.path, key, "a number"))
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        value.to_string().map(|s| Some(&s[..])).map_err(|_| wrong(self.path, key, "a text"))
    }
}

impl TensorSource for Gguf {
    fn path(&self) -> &Path {
        &self.path
    }

    fn is_tied(&self) -> bool {
        // llama.cpp ties the head where a file has none.
        !self.content.tensor_infos.contains_key("output.weight")
    }

    fn unread(&self, read: &BTreeSet<String>) -> Vec<String> {
        let read: BTreeSet<String> =
            read.iter().filter_map(|n| gguf_name(&self.config.architecture, n)).collect();
        let ours = |n: &&String| !read.contains(*n) && *n != "rope_freqs.weight";
        self.content.tensor_infos.keys().filter(ours).cloned().collect()
    }

    fn tensor(&self, name: &str) -> Result<(Vec<usize>, Numbers)> {
        let missing = || Error::file(&self.path, format!("tensor {name} is missing"));
        let stored = gguf_name(&self.config.architecture, name);
        let stored = stored.filter(|n| self.content.tensor_infos.contains_key(n));
        let stored = stored.ok_or_else(missing)?;
        let read = || -> candle_core::Result<(Vec<usize>, Numbers)> {
            // Read, not mapped: what was mapped would stay in memory beside the panels that are made of it.
            let tensor = self.content.tensor(&mut File::open(&self.path)?, &stored, &Device::Cpu)?;
            let shape = tensor.shape().dims().to_vec();
            let numbers = match stored_numbers(tensor.dtype(), &tensor.data()?, &shape) {
                Some(numbers) => numbers,
                None => Numbers::F32(tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?),
            };
            Ok((shape, numbers))
        };
        let (shape, data) = read().map_err(|e| {
            Error::file(&self.path, format!("tensor {stored} cannot be read: {}", one_line(&e)))
        })?;
        let c = &self.config;
        // Only llama files are stored interleaved.
        let turned = [("q_proj.weight", c.heads), ("k_proj.weight", c.kv_heads)];
        let own =
            |(part, heads): &(&str, usize)| name.ends_with(part) && shape == [heads * c.head_dim, c.hidden];
        let Some((_, heads)) = turned.into_iter().find(own).filter(|_| c.architecture == "llama") else {
            return Ok((shape, data));
        };
        let data = data.with_rows(c.hidden, &rotate_half_rows(shape[0], heads));
        Ok((shape, data))
    }
}

/// Numbers in the precision in which a file has them, of the types whose rows can be read so.
fn stored_numbers(dtype: GgmlDType, bytes: &[u8], shape: &[usize]) -> Option<Numbers> {
    let halves = || bytes.as_chunks::<2>().0.iter().copied();
    match dtype {
        GgmlDType::F16 => Some(Numbers::F16(halves().map(f16::from_le_bytes).collect())),
        GgmlDType::BF16 => Some(Numbers::Bf16(halves().map(bf16::from_le_bytes).collect())),
        other => {
            let whole = |c: &Coded| shape.last().is_some_and(|width| width.is_multiple_of(c.group));
            Coded::read(other, bytes).filter(whole).map(Numbers::Coded)
        }
    }
}

/// Name of a tensor type that candle does not read (ggml.h, `enum ggml_type`).
fn quantization(kind: u32) -> String {
    let name = match kind {
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        other => return format!("number {other}"),
    };
    name.to_owned()
}

/// Whether the metadata align tensors to multiples of nothing, by which candle divides.
fn alignment_is_zero(map: &[u8]) -> bool {
    // Metadata come first; the largest vocabularies take some 20 MB.
    let head = &map[..map.len().min(64 << 20)];
    let key = b"general.alignment\x04\0\0\0";
    memmem::find(head, key).is_some_and(|at| head[at + key.len()..].starts_with(&[0; 4]))
}

/// llama GGUF files interleave the two halves of every query and key head: row 2i+j holds row j*d/2+i of the Hugging Face
/// layout. The rows in the order in which that has them.
fn rotate_half_rows(rows: usize, heads: usize) -> Vec<usize> {
    let head_dim = rows / heads;
    let half = head_dim / 2;
    let of = |head: usize| (0..2).flat_map(move |j| (0..half).map(move |i| head * head_dim + 2 * i + j));
    (0..heads).flat_map(of).collect()
}

fn config(path: &Path, map: &[u8], content: &Content) -> Result<ModelConfig> {
    let architecture = content.metadata.get("general.architecture");
    let architecture = architecture.and_then(|v| v.to_string().ok()).map_or("", String::as_str);
    if !ARCHITECTURES.contains(&architecture) {
        return Err(unknown_architecture(path, architecture));
    }
    let metadata = Metadata { path, content };
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| Ok::<_, Error>(metadata.integer(&key(name))?.unwrap_or(0) as usize);
    let float = |name: &str| metadata.float(&key(name));
    refuse_other_models(&metadata, architecture)?;
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
    let rope = scaled(path, map, content, RopeConfig::plain(base, dims), architecture)?;
    let sliding = match architecture {
        "gemma3" => gemma3_sliding(&metadata, layers, dims)?,
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
fn gemma3_sliding(metadata: &Metadata, layers: usize, dims: usize) -> Result<Option<Sliding>> {
    let Some(window) = metadata.integer("gemma3.attention.sliding_window")?.filter(|w| *w > 0) else {
        return Ok(None);
    };
    let base = metadata.float("gemma3.rope.freq_base_swa")?.unwrap_or(GEMMA3_LOCAL_BASE);
    const PATTERN: &str = "gemma3.attention.sliding_window_pattern";
    let layers = match metadata.content.metadata.get(PATTERN) {
        // Which layers slide, one by one.
        Some(Value::Array(flags)) => {
            let slides = |v: &Value| v.to_bool().ok().or_else(|| signed(v).map(|n| n != 0));
            let slides: Option<Vec<bool>> = flags.iter().map(slides).collect();
            let slides = slides.filter(|s| s.len() == layers);
            let slides = slides.ok_or_else(|| wrong(metadata.path, PATTERN, "one flag per layer"))?;
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
fn refuse_other_models(metadata: &Metadata, architecture: &str) -> Result<()> {
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
    let causal = metadata.content.metadata.get(&format!("{architecture}.attention.causal"));
    if causal.is_some_and(|v| v.to_bool().ok() != Some(true)) {
        let problem =
            format!("{architecture}.attention.causal: attention that is not causal is not supported");
        return Err(Error::file(metadata.path, problem));
    }
    Ok(())
}

/// RoPE with the scaling a file asks for: divisors of its own (llama 3), or one for all. A factor without a type is linear,
/// as is the key of 2023 (llama.cpp, src/llama-model.cpp, `load_hparams`).
fn scaled(
    path: &Path,
    map: &[u8],
    content: &Content,
    rope: RopeConfig,
    architecture: &str,
) -> Result<RopeConfig> {
    const DIVISORS: &str = "rope_freqs.weight";
    let metadata = Metadata { path, content };
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

/// The GGUF name of a Hugging Face tensor of an architecture.
fn gguf_name(architecture: &str, name: &str) -> Option<String> {
    let top = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "model.norm.weight" => Some("output_norm.weight"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(top) = top {
        return Some(top.to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    let part = match part {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" if architecture == "gemma3" => "post_attention_norm",
        "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "mlp.gate_proj" => "ffn_gate",
        // phi3 files keep gate and up under the name of up.
        "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.{kind}"))
}

/// candle's errors can carry a backtrace; only their first line is for people.
fn one_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_become_halves() {
        // Two heads of four rows; the file's row r holds this row of the HF layout.
        let file = [0, 2, 1, 3, 4, 6, 5, 7];
        let back: Vec<usize> = rotate_half_rows(8, 2).into_iter().map(|row| file[row]).collect();
        assert_eq!(back, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn names_are_mapped() {
        let name = |name: &str| gguf_name("qwen2", name);
        assert_eq!(name("model.layers.12.mlp.up_proj.weight").unwrap(), "blk.12.ffn_up.weight");
        assert_eq!(name("lm_head.weight").unwrap(), "output.weight");
        assert_eq!(name("model.layers.1.self_attn.q_proj.bias").unwrap(), "blk.1.attn_q.bias");
        assert_eq!(name("model.layers.1.self_attn.rotary_emb.inv_freq"), None);
        let norm = "model.layers.3.post_attention_layernorm.weight";
        assert_eq!(name(norm).unwrap(), "blk.3.ffn_norm.weight");
        assert_eq!(gguf_name("gemma3", norm).unwrap(), "blk.3.post_attention_norm.weight");
    }
}
