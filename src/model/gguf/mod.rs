//! GGUF files: metadata, tokenizer vocabulary and (de-quantised) tensors, read with candle.

mod config;
mod metadata;

use super::coded::Coded;
use super::config::ModelConfig;
use super::numbers::Numbers;
use super::weights::TensorSource;
use crate::error::{Error, Result};
use crate::files;
use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Content;
use half::{bf16, f16};
use memchr::memmem;
pub use metadata::Metadata;
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
        let config = config::config(Metadata { path, content: &content }, &map)?;
        Ok(Gguf { path: path.to_owned(), content, config })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn metadata(&self) -> Metadata<'_> {
        Metadata { path: &self.path, content: &self.content }
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
