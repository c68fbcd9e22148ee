//! Four-bit floating point (E2M1) with an E4M3 scale for every sixteen numbers of a head, below one scale a page for keys and one for values.

use super::minifloat::{E4M3, Minifloat};
use super::{BitSink, BitSource, Cost, PageShape, Quantized, Quantizer, largest, put_f16, take_f16};
use crate::block::Part;
use crate::codec::registry::Method;
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct NvFp4 {}

/// 0, 0.5, 1, 1.5, 2, 3, 4 and 6, either sign.
const E2M1: Minifloat = Minifloat { mantissa: 1, least: 0, most: 6.0, sign: 0x8 };
/// Numbers that share a scale.
const GROUP: usize = 16;

impl Method for NvFp4 {
    const NAME: &'static str = "nvfp4";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "Four-bit floating point (E2M1), an E4M3 scale for every sixteen numbers of a head, an f16 scale for keys and \
                                 for values of every page.";
    const PAPER: &'static str =
        "NVFP4 as in TensorRT-LLM and FlashInfer (nvfp4_kv_quantize), whose scale of scales is one a layer";

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Quantized::new(Groups)))
    }
}

struct Groups;

/// Bits of the scale of scales.
const PAGE_SCALE_BITS: u64 = 16;

/// Bits of one head of one token.
fn head_bits(head_dim: usize) -> u64 {
    (8 * head_dim.div_ceil(GROUP) + 4 * head_dim) as u64
}

fn take_head(head_dim: usize, scale: f32, source: &mut BitSource, out: &mut Vec<f32>) {
    for first in (0..head_dim).step_by(GROUP) {
        let scale = E4M3.decoded(source.take(8) as u8) * scale;
        let codes = GROUP.min(head_dim - first);
        out.extend((0..codes).map(|_| E2M1.decoded(source.take(4) as u8) * scale));
    }
}

impl Quantizer for Groups {
    fn encode(&self, _: Part, page: &[f32], shape: PageShape, sink: &mut BitSink) {
        // The largest scale of a group becomes the largest of E4M3.
        let scale = put_f16(sink, largest(page) / (E2M1.most * E4M3.most));
        for group in page.chunks_exact(shape.head_dim).flat_map(|head| head.chunks(GROUP)) {
            let code = if scale > 0.0 { E4M3.encoded(largest(group) / E2M1.most / scale) } else { 0 };
            sink.put(Cost::Side, u32::from(code), 8);
            let step = E4M3.decoded(code) * scale;
            for x in group {
                let code = if step > 0.0 { E2M1.encoded(x / step) } else { 0 };
                sink.put(Cost::Code, u32::from(code), 4);
            }
        }
    }

    fn decode(&self, _: Part, shape: PageShape, source: &mut BitSource) -> Vec<f32> {
        let scale = take_f16(source);
        let mut page = Vec::with_capacity(shape.numbers());
        for _ in 0..shape.tokens * shape.kv_heads {
            take_head(shape.head_dim, scale, source, &mut page);
        }
        page
    }

    fn read_head(&self, part: Part, shape: PageShape, head: usize, bytes: &[u8], out: &mut Vec<f32>) -> bool {
        let mut source = BitSource::new(bytes);
        let (heads, own) = (shape.tokens * shape.kv_heads, head_bits(shape.head_dim));
        // Keys lie before values.
        let first = if part == Part::Value { PAGE_SCALE_BITS + heads as u64 * own } else { 0 };
        source.seek(first);
        let scale = take_f16(&mut source);
        for token in 0..shape.tokens {
            let before = (token * shape.kv_heads + head) as u64;
            source.seek(first + PAGE_SCALE_BITS + before * own);
            take_head(shape.head_dim, scale, &mut source, out);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_as_the_page_is() {
        // The last group of a head is not full.
        let shape = PageShape { tokens: 3, kv_heads: 2, head_dim: 20, layer: 0, layers: 1 };
        let numbers = |phase: f32| {
            (0..shape.numbers()).map(|i| (i as f32 * 0.7 + phase).sin() * 5.0).collect::<Vec<f32>>()
        };
        let mut sink = BitSink::default();
        Groups.encode(Part::Key, &numbers(0.0), shape, &mut sink);
        Groups.encode(Part::Value, &numbers(1.0), shape, &mut sink);
        let (bytes, code_bits, side_bits) = sink.finish();
        assert_eq!((code_bits, side_bits), (2 * 4 * 120, 2 * (16 + 6 * 2 * 8)));
        let mut source = BitSource::new(&bytes);
        for part in Part::BOTH {
            let page = Groups.decode(part, shape, &mut source);
            for head in 0..2 {
                let mut own = Vec::new();
                assert!(Groups.read_head(part, shape, head, &bytes, &mut own));
                let rows = page.chunks_exact(20).skip(head).step_by(2).flatten().copied();
                assert!(own.into_iter().eq(rows));
            }
        }
    }
}
