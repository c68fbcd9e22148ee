//! GGUF files: metadata, tokenizer vocabulary and (de-quantised) tensors, read with candle.

use super::config::{
    ARCHITECTURES, GEMMA3_LOCAL_BASE, GEMMA3_PATTERN, ModelConfig, RopeConfig, Sliding, all_but_each,
    check_sizes, unknown_architecture, unknown_scaling,
};
use super::weights::{Numbers, TensorSource};
use crate::error::{Error, Result};
use crate::files;
use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use memchr::memmem;
use memmap2::Mmap;
use std::io::Cursor;
use std::path::{Path, PathBuf};

pub struct Gguf {
    path: PathBuf,
    map: Mmap,
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
        let content = Content::read(&mut Cursor::new(&map[..])).map_err(|e| {
            let problem =
                format!("damaged or truncated GGUF header ({}); fetch the file again", one_line(&e));
            Error::file(path, problem)
        })?;
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
        Ok(Gguf { path: path.to_owned(), map, content, config })
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
        let found = signed(value).and_then(|n| u64::try_from(n).ok());
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

    /// Whether a key is there.
    fn has(&self, key: &str) -> bool {
        self.content.metadata.contains_key(key)
    }
}

impl TensorSource for Gguf {
    fn path(&self) -> &Path {
        &self.path
    }

    fn has(&self, name: &str) -> bool {
        gguf_name(&self.config.architecture, name).is_some_and(|n| self.content.tensor_infos.contains_key(&n))
    }

    fn tensor(&self, name: &str) -> Result<(Vec<usize>, Numbers)> {
        let missing = || Error::file(&self.path, format!("tensor {name} is missing"));
        let stored = gguf_name(&self.config.architecture, name);
        let stored = stored.filter(|n| self.content.tensor_infos.contains_key(n));
        let stored = stored.ok_or_else(missing)?;
        let read = || -> candle_core::Result<(Vec<usize>, Vec<f32>)> {
            let tensor = self.content.tensor(&mut Cursor::new(&self.map[..]), &stored, &Device::Cpu)?;
            let tensor = tensor.dequantize(&Device::Cpu)?;
            Ok((tensor.dims().to_vec(), tensor.flatten_all()?.to_vec1()?))
        };
        let (shape, mut data) = read().map_err(|e| {
            Error::file(&self.path, format!("tensor {stored} cannot be read: {}", one_line(&e)))
        })?;
        let c = &self.config;
        // Only llama files are stored interleaved.
        if c.architecture != "llama" {
            return Ok((shape, Numbers::F32(data)));
        }
        if name.ends_with("q_proj.weight") && shape == [c.heads * c.head_dim, c.hidden] {
            data = rotate_half_rows(&data, c.heads, c.hidden);
        } else if name.ends_with("k_proj.weight") && shape == [c.kv_heads * c.head_dim, c.hidden] {
            data = rotate_half_rows(&data, c.kv_heads, c.hidden);
        }
        Ok((shape, Numbers::F32(data)))
    }
}

/// Whether the metadata align tensors to multiples of nothing, by which candle divides.
fn alignment_is_zero(map: &[u8]) -> bool {
    // Metadata come first; the largest vocabularies take some 20 MB.
    let head = &map[..map.len().min(64 << 20)];
    let key = b"general.alignment\x04\0\0\0";
    memmem::find(head, key).is_some_and(|at| head[at + key.len()..].starts_with(&[0; 4]))
}

/// llama GGUF files interleave the two halves of every query and key head (row 2i+j holds row j*d/2+i of the Hugging
/// Face layout); this puts the rows back.
fn rotate_half_rows(rows: &[f32], heads: usize, inputs: usize) -> Vec<f32> {
    let head_dim = rows.len() / inputs / heads;
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(head_dim * inputs) {
        for j in 0..2 {
            for i in 0..half {
                let row = 2 * i + j;
                out.extend_from_slice(&head[row * inputs..(row + 1) * inputs]);
            }
        }
    }
    out
}

fn config(path: &Path, map: &[u8], content: &Content) -> Result<ModelConfig> {
    let architecture = content.metadata.get("general.architecture");
    let architecture = architecture.and_then(|v| v.to_string().ok()).map_or("", String::as_str);
    if !ARCHITECTURES.contains(&architecture) {
        return Err(unknown_architecture(path, architecture));
    }
    let key = |name: &str| format!("{architecture}.{name}");
    let size = |name: &str| integer(content, &key(name)).unwrap_or(0) as usize;
    let float = |name: &str| content.metadata.get(&key(name)).and_then(|v| v.to_f32().ok());
    let heads = size("attention.head_count");
    let head_dim = match size("attention.key_length") {
        0 => size("embedding_length") / heads.max(1),
        n => n,
    };
    let vocab = content
        .tensor_infos
        .get("token_embd.weight")
        .and_then(|t| t.shape.dims().first())
        .copied()
        .unwrap_or(0);
    let layers = size("block_count");
    let dims = match size("rope.dimension_count") {
        0 => head_dim,
        n => n,
    };
    check_sizes(path, &[("layers", layers), ("head size", head_dim), ("rotated numbers of a head", dims)])?;
    let base = float("rope.freq_base").map_or(10_000.0, f64::from);
    let rope = scaled(path, map, content, RopeConfig::plain(base, dims), &key("rope.scaling"))?;
    let window = size("attention.sliding_window");
    let sliding = match architecture {
        _ if window == 0 => None,
        "gemma3" => {
            let base = float("rope.freq_base_swa").map_or(GEMMA3_LOCAL_BASE, f64::from);
            let pattern = match size("attention.sliding_window_pattern") {
                0 => GEMMA3_PATTERN,
                n => n,
            };
            let rope = Some(RopeConfig::plain(base, dims));
            Some(Sliding { window, layers: all_but_each(pattern, layers), rope })
        }
        _ => Some(Sliding { window, layers: (0..layers).collect(), rope: None }),
    };
    ModelConfig {
        architecture: architecture.to_owned(),
        layers,
        hidden: size("embedding_length"),
        heads,
        kv_heads: match size("attention.head_count_kv") {
            0 => heads,
            n => n,
        },
        head_dim,
        intermediate: size("feed_forward_length"),
        vocab,
        context: size("context_length"),
        rms_epsilon: float("attention.layer_norm_rms_epsilon").unwrap_or(1e-5),
        rope,
        sliding,
        // The one Gemma 3 whose queries are scaled otherwise is the 27B, of 62 layers; GGUF files do not say so.
        query_scalar: (architecture == "gemma3" && layers == 62)
            .then(|| size("embedding_length") as f64 / heads as f64),
    }
    .checked(path)
}

/// RoPE with the scaling a file asks for: divisors of its own (llama 3), or one for all.
fn scaled(path: &Path, map: &[u8], content: &Content, rope: RopeConfig, key: &str) -> Result<RopeConfig> {
    const DIVISORS: &str = "rope_freqs.weight";
    if content.tensor_infos.contains_key(DIVISORS) {
        let read = || -> candle_core::Result<Vec<f32>> {
            let tensor = content.tensor(&mut Cursor::new(map), DIVISORS, &Device::Cpu)?;
            tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()
        };
        let bad = |e| Error::file(path, format!("tensor {DIVISORS} cannot be read: {}", one_line(&e)));
        let divisors = read().map_err(bad)?.into_iter().map(f64::from).collect();
        return Ok(RopeConfig { divisors, ..rope });
    }
    if content.tensor_infos.contains_key("rope_factors_long.weight") {
        return Err(unknown_scaling(path, "longrope"));
    }
    let kind = content.metadata.get(&format!("{key}.type")).and_then(|v| v.to_string().ok());
    match kind.map(String::as_str) {
        None | Some("none") => Ok(rope),
        Some("linear") => {
            let factor = content.metadata.get(&format!("{key}.factor")).and_then(|v| v.to_f32().ok());
            Ok(rope.linear(f64::from(factor.unwrap_or(1.0))))
        }
        Some(other) => Err(unknown_scaling(path, other)),
    }
}

fn integer(content: &Content, key: &str) -> Option<u64> {
    match content.metadata.get(key)? {
        Value::U8(n) => Some(u64::from(*n)),
        Value::U16(n) => Some(u64::from(*n)),
        Value::U32(n) => Some(u64::from(*n)),
        Value::U64(n) => Some(*n),
        Value::I32(n) => u64::try_from(*n).ok(),
        Value::I64(n) => u64::try_from(*n).ok(),
        _ => None,
    }
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
        // Two heads of four rows of one input; row r of the HF layout holds the number r.
        let gguf = [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0];
        assert_eq!(rotate_half_rows(&gguf, 2, 1), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
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
