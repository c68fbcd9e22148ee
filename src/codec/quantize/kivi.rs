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

    fn read_head(
        &self,
        part: Part,
        shape: PageShape,
        head: usize,
        bytes: &[u8],
        out: &mut Vec<f32>,
    ) -> bool {
        let (width, d) = (shape.width(), shape.head_dim);
        let mut source = BitSource::new(bytes);
        let from = out.len();
        out.resize(from + shape.tokens * d, 0.0);
        let out = &mut out[from..];
        let group_bits = |numbers: usize| u64::from(affine::SIDE_BITS + self.bits * numbers as u32);
        // Keys: channel after channel, a range of tokens each.
        let mut at = 0;
        let mut codes = vec![0.0; self.group];
        for tokens in ranges(shape.tokens, self.group) {
            let own = group_bits(tokens.len());
            if part == Part::Key {
                source.seek(at + (head * d) as u64 * own);
                for channel in 0..d {
                    affine::take_run(&mut source, &mut codes[..tokens.len()], self.bits);
                    for (t, code) in tokens.clone().zip(&codes) {
                        out[t * d + channel] = *code;
                    }
                }
            }
            at += width as u64 * own;
        }
        if part == Part::Value {
            // Token after token, head after head, a range of channels each.
            let head_bits: u64 = ranges(d, self.group).map(|c| group_bits(c.len())).sum();
            for (token, row) in out.chunks_exact_mut(d).enumerate() {
                source.seek(at + (token * shape.kv_heads + head) as u64 * head_bits);
                for channels in row.chunks_mut(self.group) {
                    affine::take_run(&mut source, channels, self.bits);
                }
            }
        }
        true
    }

    fn raw_tokens(&self) -> usize {
        self.residual
    }

    fn takes_partial(&self) -> bool {
        false
    }
}
