//! Kitty: KIVI's axes, and more bits for the channels of keys that are largest.

use super::kivi::groups;
use super::{BitSink, BitSource, Cost, PageShape, Quantized, Quantizer, affine};
use crate::block::Part;
use crate::codec::registry::{Method, Scale, Search, number};
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::ops::Bound;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct Kitty {
    /// Bits of most numbers
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=6))]
    bits: u32,
    /// Share of a page's key channels that get two bits more: those with the largest mean absolute value
    #[arg(long, default_value_t = 0.25, value_parser = number("a share", Bound::Included(0.0), Bound::Included(1.0)))]
    boost: f64,
    /// Channels (of values) that share a scale and a zero point; keys share them over a page's tokens
    #[arg(long, default_value_t = 32, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=4096))]
    group: usize,
    /// First tokens of every request that stay in 16 bits
    #[arg(long, default_value_t = 32)]
    sinks: usize,
    /// Last tokens of every request that stay in 16 bits
    #[arg(long, default_value_t = 32)]
    residual: usize,
}

impl Method for Kitty {
    const NAME: &'static str = "kitty";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "KIVI with two bits more for the key channels of each page that are largest (one bit a channel says which), the first tokens and the last raw.";
    const PAPER: &'static str = "Xia et al. 2025, Kitty (arXiv 2511.18643)";
    const DIALS: &'static [&'static str] = &["bits"];
    const SEARCH: Option<Search> =
        Some(Search { option: "bits", fine: 6.0, coarse: 1.0, scale: Scale::Whole });

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Quantized::new(*self)))
    }
}

impl Kitty {
    /// Whether each channel of a page of keys is among the largest.
    fn boosted(&self, page: &[f32], shape: PageShape) -> Vec<bool> {
        let width = shape.width();
        let size = |c: usize| page.iter().skip(c).step_by(width).map(|x| x.abs()).sum::<f32>();
        let mut order: Vec<usize> = (0..width).collect();
        let sizes: Vec<f32> = (0..width).map(size).collect();
        order.sort_by(|&a, &b| sizes[b].total_cmp(&sizes[a]).then(a.cmp(&b)));
        let mut boosted = vec![false; width];
        order.iter().take((self.boost * width as f64).round() as usize).for_each(|&c| boosted[c] = true);
        boosted
    }

    fn channel_bits(&self, boosted: bool) -> u32 {
        self.bits + if boosted { 2 } else { 0 }
    }
}

impl Quantizer for Kitty {
    fn encode(&self, part: Part, page: &[f32], shape: PageShape, sink: &mut BitSink) {
        let boosted = match part {
            Part::Key => self.boosted(page, shape),
            Part::Value => Vec::new(),
        };
        boosted.iter().for_each(|b| sink.put(Cost::Side, u32::from(*b), 1));
        let size = if part == Part::Key { shape.tokens } else { self.group };
        for (i, group) in groups(part, shape, size).iter().enumerate() {
            affine::put(sink, page, group, self.channel_bits(boosted.get(i) == Some(&true)));
        }
    }

    fn decode(&self, part: Part, shape: PageShape, source: &mut BitSource) -> Vec<f32> {
        let mut page = vec![0.0; shape.numbers()];
        let channels = if part == Part::Key { shape.width() } else { 0 };
        let boosted: Vec<bool> = (0..channels).map(|_| source.take(1) == 1).collect();
        let size = if part == Part::Key { shape.tokens } else { self.group };
        for (i, group) in groups(part, shape, size).iter().enumerate() {
            affine::take(source, &mut page, group, self.channel_bits(boosted.get(i) == Some(&true)));
        }
        page
    }

    fn raw_first(&self) -> usize {
        self.sinks
    }

    fn raw_tokens(&self) -> usize {
        self.residual
    }

    fn takes_partial(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The channel that is largest is coded four times as finely as the others.
    #[test]
    fn large_channels_get_more_bits() {
        let shape = PageShape { tokens: 16, kv_heads: 1, head_dim: 8, layer: 0, layers: 1 };
        let page: Vec<f32> =
            (0..128).map(|i| (i / 8 * 7 % 16) as f32 * if i % 8 == 5 { 10.0 } else { 1.0 }).collect();
        let kitty = Kitty { bits: 2, boost: 0.125, group: 32, sinks: 0, residual: 0 };
        let mut sink = BitSink::default();
        kitty.encode(Part::Key, &page, shape, &mut sink);
        let (bytes, code, side) = sink.finish();
        assert_eq!((code, side), (16 * (7 * 2 + 4), 8 + 8 * 32));
        let read = kitty.decode(Part::Key, shape, &mut BitSource::new(&bytes));
        let error = |c: usize| {
            let of = |t: usize| (page[t * 8 + c] - read[t * 8 + c]).abs();
            (0..16).map(of).fold(0.0, f32::max)
        };
        // Steps of 150 / 15 and of 15 / 3, and numbers that lie between.
        assert!(error(5) < 0.1, "sixteen levels hold sixteen numbers: {}", error(5));
        assert!(error(0) > 1.9 && error(0) <= 2.6, "{}", error(0));
    }
}
