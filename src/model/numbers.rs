//! Numbers of a tensor in the precision they are stored in.

use super::coded::Coded;
use half::{bf16, f16};

/// Numbers in the precision they are stored in.
pub enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Coded(Coded),
}

impl Numbers {
    /// The first number that is NaN or infinite, and its place.
    pub(super) fn first_not_finite(&self) -> Option<(usize, f32)> {
        match self {
            Numbers::F32(x) => x.iter().position(|x| !x.is_finite()).map(|i| (i, x[i])),
            Numbers::F16(x) => x.iter().position(|x| !x.is_finite()).map(|i| (i, x[i].to_f32())),
            Numbers::Bf16(x) => x.iter().position(|x| !x.is_finite()).map(|i| (i, x[i].to_f32())),
            Numbers::Coded(x) => {
                let sum = |group: usize| x.scales[group] + x.offset(group);
                let group = (0..x.scales.len()).find(|&group| !sum(group).is_finite())?;
                Some((group * x.group, sum(group)))
            }
        }
    }

    /// Their rows of `width` numbers in another order.
    pub fn with_rows(self, width: usize, order: &[usize]) -> Self {
        match self {
            Numbers::F32(x) => Numbers::F32(rows(&x, width, order)),
            Numbers::F16(x) => Numbers::F16(rows(&x, width, order)),
            Numbers::Bf16(x) => Numbers::Bf16(rows(&x, width, order)),
            Numbers::Coded(x) => Numbers::Coded(x.with_rows(width, order)),
        }
    }

    /// The numbers in f32; no copy if they are already.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Numbers::F32(x) => x,
            Numbers::F16(x) => x.into_iter().map(f16::to_f32).collect(),
            Numbers::Bf16(x) => x.into_iter().map(bf16::to_f32).collect(),
            Numbers::Coded(x) => x.to_f32(),
        }
    }
}

/// Rows of `width` in another order.
pub(super) fn rows<T: Copy>(all: &[T], width: usize, order: &[usize]) -> Vec<T> {
    order.iter().flat_map(|r| &all[r * width..][..width]).copied().collect()
}
