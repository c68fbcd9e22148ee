//! Eight-bit integers with one scale for every token and head: what serving engines offer as a quantised KV cache.

use super::{PerHead, Quantized};
use crate::codec::registry::Method;
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct Int8 {}

impl Method for Int8 {
    const NAME: &'static str = "int8";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "Eight-bit integers, symmetric, with one f16 scale for every token and head.";
    const PAPER: &'static str = "as in vLLM and TensorRT-LLM (per-token quantised KV cache)";

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Quantized::new(PerHead { most: MOST, encode: encoded, decode: decoded })))
    }
}

/// The largest code, either sign.
const MOST: f32 = 127.0;

fn encoded(x: f32) -> u8 {
    x.round().clamp(-MOST, MOST) as i8 as u8
}

fn decoded(code: u8) -> f32 {
    f32::from(code as i8)
}
