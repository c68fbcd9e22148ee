//! Eight bits a number with one f16 scale for every token and head: what int8 and fp8 have in common.

use super::{BitSink, BitSource, Cost, PageShape, Quantizer, largest, put_f16, take_f16};
use crate::block::Part;

/// A format of eight bits; the largest number of a head becomes its largest.
pub struct PerHead {
    pub most: f32,
    pub encode: fn(f32) -> u8,
    pub decode: fn(u8) -> f32,
}

/// Goes to what is stored of a head of a token, where every head takes as many bits; keys lie before values.
pub fn seek(source: &mut BitSource, part: Part, shape: PageShape, token: usize, head: usize, head_bits: u64) {
    let heads = shape.tokens * shape.kv_heads;
    let before = if part == Part::Value { heads } else { 0 };
    source.seek((before + token * shape.kv_heads + head) as u64 * head_bits);
}

impl PerHead {
    /// One head of one token.
    fn take(&self, head_dim: usize, source: &mut BitSource, out: &mut Vec<f32>) {
        let scale = take_f16(source);
        out.extend((0..head_dim).map(|_| (self.decode)(source.take(8) as u8) * scale));
    }
}

impl Quantizer for PerHead {
    fn encode(&self, _: Part, page: &[f32], shape: PageShape, sink: &mut BitSink) {
        for head in page.chunks_exact(shape.head_dim) {
            let scale = put_f16(sink, largest(head) / self.most);
            for x in head {
                let code = if scale > 0.0 { (self.encode)(x / scale) } else { 0 };
                sink.put(Cost::Code, u32::from(code), 8);
            }
        }
    }

    fn decode(&self, _: Part, shape: PageShape, source: &mut BitSource) -> Vec<f32> {
        let mut page = Vec::with_capacity(shape.numbers());
        for _ in 0..shape.tokens * shape.kv_heads {
            self.take(shape.head_dim, source, &mut page);
        }
        page
    }

    fn read_head(&self, part: Part, shape: PageShape, head: usize, bytes: &[u8], out: &mut Vec<f32>) -> bool {
        let mut source = BitSource::new(bytes);
        for token in 0..shape.tokens {
            seek(&mut source, part, shape, token, head, 16 + 8 * shape.head_dim as u64);
            self.take(shape.head_dim, &mut source, out);
        }
        true
    }
}
