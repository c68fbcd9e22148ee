//! Eight-bit floating point (E4M3) with one scale for every token and head.

use super::minifloat::E4M3;
use super::{PerHead, Quantized};
use crate::codec::registry::Method;
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct Fp8 {}

impl Method for Fp8 {
    const NAME: &'static str = "fp8";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str =
        "Eight-bit floating point (E4M3) with one f16 scale for every token and head.";
    const PAPER: &'static str =
        "Micikevicius et al. 2022, FP8 Formats for Deep Learning (arXiv 2209.05433); as in vLLM";

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        let (encode, decode) = (|x| E4M3.encoded(x), |code| E4M3.decoded(code));
        Ok(Arc::new(Quantized::new(PerHead { most: E4M3.most, encode, decode })))
    }
}
