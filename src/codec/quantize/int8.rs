//! Eight-bit integers with one scale for every token and head: what serving engines offer as a quantised KV cache.

use super::{BitSink, BitSource, Cost, PageShape, Quantized, Quantizer, put_f16, take_f16};
use crate::codec::Codec;
use crate::codec::fusion::Part;
use crate::codec::registry::Method;
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct Int8 {}

impl Method for Int8 {
    const NAME: &'static str = "int8";
    const ABOUT: &'static str = "Eight-bit integers, symmetric, with one f16 scale for every token and head.";
    const PAPER: &'static str = "as in vLLM and TensorRT-LLM (per-token quantised KV cache)";

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Quantized(*self)))
    }
}

impl Quantizer for Int8 {
    fn encode(&self, _: Part, page: &[f32], shape: PageShape, sink: &mut BitSink) {
        for head in page.chunks_exact(shape.head_dim) {
            let most = head.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let scale = put_f16(sink, most / 127.0);
            for x in head {
                let code = if scale > 0.0 { (x / scale).round().clamp(-127.0, 127.0) as i8 } else { 0 };
                sink.put(Cost::Code, u32::from(code as u8), 8);
            }
        }
    }

    fn decode(&self, _: Part, shape: PageShape, source: &mut BitSource) -> Vec<f32> {
        let mut page = Vec::with_capacity(shape.numbers());
        for _ in 0..shape.tokens * shape.kv_heads {
            let scale = take_f16(source);
            page.extend((0..shape.head_dim).map(|_| f32::from(source.take(8) as u8 as i8) * scale));
        }
        page
    }
}
