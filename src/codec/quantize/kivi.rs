//! KIVI: keys by channel, values by token, few bits, the latest tokens raw.

use super::{BitSink, BitSource, PageShape, Quantized, Quantizer, affine};
use crate::block::Part;
use crate::codec::registry::{Method, Scale, Search};
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::ops::Range;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct Kivi {
    /// Bits of a number
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=8))]
    bits: u32,
    /// Tokens (of keys) and channels (of values) that share a scale and a zero point; of tokens at most a block's
    #[arg(long, default_value_t = 32, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=4096))]
    group: usize,
    /// Last tokens of every request that stay in 16 bits
    #[arg(long, default_value_t = 32)]
    residual: usize,
}

impl Method for Kivi {
    const NAME: &'static str = "kivi";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "Asymmetric quantisation of keys per channel over groups of tokens and of values per token over groups of channels, f16 scale and zero \
                                 point each; the last tokens of a request stay raw.";
    const PAPER: &'static str = "Liu et al. 2024, KIVI (arXiv 2402.02750)";
    const DIALS: &'static [&'static str] = &["bits"];
    const SEARCH: Option<Search> =
        Some(Search { option: "bits", fine: 8.0, coarse: 1.0, scale: Scale::Whole });

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Quantized::new(*self)))
    }
}

/// `0..n` in ranges of at most `size`.
fn ranges(n: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n).step_by(size).map(move |from| from..n.min(from + size))
}

/// Indices of the numbers of each group, in the order in which they are written: of keys a channel over so many tokens, of values a
/// token over so many channels.
pub fn groups(part: Part, shape: PageShape, size: usize) -> Vec<Vec<usize>> {
    let width = shape.width();
    match part {
        Part::Key => ranges(shape.tokens, size)
            .flat_map(|tokens| (0..width).map(move |c| tokens.clone().map(|t| t * width + c).collect()))
            .collect(),
        Part::Value => (0..shape.tokens * shape.kv_heads)
            .flat_map(|head| {
                ranges(shape.head_dim, size).map(move |c| c.map(|c| head * shape.head_dim + c).collect())
            })
            .collect(),
    }
}

impl Quantizer for Kivi {
    fn encode(&self, part: Part, page: &[f32], shape: PageShape, sink: &mut BitSink) {
        for group in groups(part, shape, self.group) {
            affine::put(sink, page, &group, self.bits);
        }
    }

    fn decode(&self, part: Part, shape: PageShape, source: &mut BitSource) -> Vec<f32> {
        let mut page = vec![0.0; shape.numbers()];
        for group in groups(part, shape, self.group) {
            affine::take(source, &mut page, &group, self.bits);
        }
        page
    }

    fn read_head(&self, part: Part, shape: PageShape, head: usize, bytes: &[u8], out: &mut Vec<f32>) -> bool {
        let (width, d) = (shape.width(), shape.head_dim);
        let of = |size| affine::Groups { bits: self.bits, size };
        let sizes = [of(shape.tokens.min(self.group)), of(d.min(self.group))];
        let ([Some(keys), Some(values)], true, true) = (
            sizes.map(|groups| groups.bytes()),
            shape.tokens.is_multiple_of(sizes[0].size.max(1)),
            d.is_multiple_of(sizes[1].size),
        ) else {
            return false;
        };
        let from = out.len();
        out.resize(from + shape.tokens * d, 0.0);
        let out = &mut out[from..];
        // Keys: channel after channel, a range of tokens each. Values: head after head, a range of channels each.
        match part {
            Part::Key => {
                for (bytes, out) in
                    bytes.chunks_exact(width * keys).zip(out.chunks_exact_mut(sizes[0].size * d))
                {
                    sizes[0].read_columns(&bytes[head * d * keys..], d, out);
                }
            }
            Part::Value => {
                let first = shape.tokens / sizes[0].size.max(1) * width * keys;
                let head_bytes = d / sizes[1].size * values;
                let heads = bytes[first..].chunks_exact(head_bytes).skip(head).step_by(shape.kv_heads);
                for (bytes, out) in heads.zip(out.chunks_exact_mut(d)) {
                    sizes[1].read_rows(bytes, out);
                }
            }
        }
        true
    }

    fn read_by_channel(&self, shape: PageShape, head: usize, bytes: &[u8], out: &mut Vec<f32>) -> bool {
        // Every channel one group of all tokens: the page's first part as it lies.
        let groups = affine::Groups { bits: self.bits, size: shape.tokens };
        let (Some(own), true) = (groups.bytes(), shape.tokens > 0 && shape.tokens <= self.group) else {
            return false;
        };
        let from = out.len();
        out.resize(from + shape.head_dim * shape.tokens, 0.0);
        groups.read_rows(&bytes[head * shape.head_dim * own..], &mut out[from..]);
        true
    }

    fn raw_tokens(&self) -> usize {
        self.residual
    }

    fn takes_partial(&self) -> bool {
        false
    }
}
