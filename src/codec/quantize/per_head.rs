//! Eight bits a number with one f16 scale for every token and head: what int8 and fp8 have in common.

use super::{BitSink, BitSource, Cost, PageShape, Quantizer, put_f16, take_f16};
use crate::codec::fusion::Part;

/// A format of eight bits; the largest number of a head becomes its largest.
pub struct PerHead {
    pub most: f32,
    pub encode: fn(f32) -> u8,
    pub decode: fn(u8) -> f32,
}

impl Quantizer for PerHead {
    fn encode(&self, _: Part, page: &[f32], shape: PageShape, sink: &mut BitSink) {
        for head in page.chunks_exact(shape.head_dim) {
            let most = head.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let scale = put_f16(sink, most / self.most);
            for x in head {
                let code = if scale > 0.0 { (self.encode)(x / scale) } else { 0 };
                sink.put(Cost::Code, u32::from(code), 8);
            }
        }
    }

    fn decode(&self, _: Part, shape: PageShape, source: &mut BitSource) -> Vec<f32> {
        let mut page = Vec::with_capacity(shape.numbers());
        for _ in 0..shape.tokens * shape.kv_heads {
            let scale = take_f16(source);
            page.extend((0..shape.head_dim).map(|_| (self.decode)(source.take(8) as u8) * scale));
        }
        page
    }
}
