//! CacheGen-like: differences to an anchor token, coarser in later layers, entropy coded.

use super::{BitSink, BitSource, Cost, PageShape, Quantized, Quantizer, largest, put_f16, take_f16};
use crate::block::Part;
use crate::codec::registry::{Method, Scale, Search, number};
use crate::codec::{Codec, Role};
use crate::error::Result;
use constriction::stream::model::DefaultContiguousCategoricalEntropyModel as Table;
use constriction::stream::queue::{DefaultRangeDecoder, DefaultRangeEncoder};
use constriction::stream::{Decode, Encode};
use serde::Serialize;
use std::ops::Bound;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct CacheGen {
    /// Width of a bin in the first layers, in deviations of the page's differences
    #[arg(long, default_value_t = 0.5, value_parser = number("it", Bound::Included(0.01), Bound::Included(100.0)))]
    bin: f64,
    /// By how much bins are wider in the last layers
    #[arg(long, default_value_t = 2.0, value_parser = number("it", Bound::Included(0.01), Bound::Included(100.0)))]
    growth: f64,
}

impl Method for CacheGen {
    const NAME: &'static str = "cachegen";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "The first token of a page is the anchor (8 bits a number), the others are differences to it, in bins that grow with the layer, range coded with a table of each channel's spread in the page (5 bits).";
    const PAPER: &'static str = "after Liu et al. 2023, CacheGen (arXiv 2310.07240)";
    const DIALS: &'static [&'static str] = &["bin"];
    const SEARCH: Option<Search> =
        Some(Search { option: "bin", fine: 0.02, coarse: 20.0, scale: Scale::Logarithmic });

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        let tables = (0..SPREADS).map(table).collect();
        Ok(Arc::new(Quantized::new(Coding { options: *self, tables })))
    }
}

/// Spreads of channels that are told apart, by half octaves of bins; the first is a sixteenth of a bin.
const SPREADS: usize = 28;
/// The largest difference, in bins.
const MOST: i32 = 511;

/// Probabilities of differences under a Laplace distribution of this spread. From one number on, rounded to 2^-20, all is multiplication
/// and square roots: the same on every machine.
fn table(spread: usize) -> Table {
    let octaves = f64::from(1u32 << (spread / 2)) / 16.0;
    let scale =
        octaves * if spread % 2 == 1 { std::f64::consts::SQRT_2 } else { 1.0 } / std::f64::consts::SQRT_2;
    let rounded = |x: f64| (x * f64::from(1 << 20)).round() / f64::from(1 << 20);
    // From one magnitude to the next.
    let decay = rounded((-1.0 / scale).exp());
    let beyond = decay.sqrt();
    let mut p = vec![0.0; 2 * MOST as usize + 1];
    p[MOST as usize] = 1.0 - beyond;
    let mut tail = 0.5 * beyond;
    for q in 1..=MOST as usize {
        let own = tail * (1.0 - decay);
        (p[MOST as usize + q], p[MOST as usize - q]) = (own, own);
        tail *= decay;
    }
    // Whole numbers that sum to 2^24, none zero.
    let room = f64::from((1u32 << 24) - p.len() as u32);
    let mut whole: Vec<u32> = p.iter().map(|p| 1 + (p * room).floor() as u32).collect();
    let left = (1u32 << 24) - whole.iter().sum::<u32>();
    whole[MOST as usize] += left;
    match Table::from_nonzero_fixed_point_probabilities(whole, false) {
        Ok(table) => table,
        // They are positive and sum to what they must.
        Err(()) => unreachable!("probabilities fit"),
    }
}

/// [`CacheGen`] with its tables.
struct Coding {
    options: CacheGen,
    tables: Vec<Table>,
}

impl Coding {
    /// Bin width, in deviations.
    fn bin(&self, shape: PageShape) -> f32 {
        let depth = shape.layer as f64 / shape.layers.saturating_sub(1).max(1) as f64;
        (self.options.bin * self.options.growth.powf(depth)) as f32
    }
}

impl Quantizer for Coding {
    fn encode(&self, _: Part, page: &[f32], shape: PageShape, sink: &mut BitSink) {
        let width = shape.width();
        let (anchor, rest) = page.split_at(width);
        let scale = put_f16(sink, largest(anchor) / 127.0);
        let code = |x: &f32| if scale > 0.0 { (x / scale).round().clamp(-127.0, 127.0) as i8 } else { 0 };
        let codes: Vec<i8> = anchor.iter().map(code).collect();
        codes.iter().for_each(|c| sink.put(Cost::Code, u32::from(*c as u8), 8));
        let anchor: Vec<f32> = codes.iter().map(|c| f32::from(*c) * scale).collect();
        let differences: Vec<f32> = rest.iter().enumerate().map(|(i, x)| x - anchor[i % width]).collect();
        let n = differences.len().max(1) as f32;
        let deviation = (differences.iter().map(|x| x * x).sum::<f32>() / n).sqrt();
        let bin = put_f16(sink, deviation * self.bin(shape));
        let quantised: Vec<i32> = differences
            .iter()
            .map(|x| if bin > 0.0 { ((x / bin).round() as i32).clamp(-MOST, MOST) } else { 0 })
            .collect();
        let rows = shape.tokens.saturating_sub(1).max(1) as f64;
        let mut coder = DefaultRangeEncoder::new();
        let spreads: Vec<usize> = (0..width)
            .map(|c| {
                let power: f64 = quantised.iter().skip(c).step_by(width).map(|q| f64::from(q * q)).sum();
                let octaves = 0.5 * (power / rows).max(1e-9).log2();
                (2.0 * (octaves + 4.0)).round().clamp(0.0, SPREADS as f64 - 1.0) as usize
            })
            .collect();
        spreads.iter().for_each(|s| sink.put(Cost::Side, *s as u32, 5));
        for (i, q) in quantised.iter().enumerate() {
            let symbol = (q + MOST) as usize;
            // Every symbol has a probability; writing to memory does not fail.
            let _ = coder.encode_symbol(symbol, self.tables[spreads[i % width]].as_view());
        }
        let Ok(words) = coder.into_compressed();
        sink.put(Cost::Side, words.len() as u32, 32);
        words.iter().for_each(|w| sink.put(Cost::Code, *w, 32));
    }

    fn decode(&self, _: Part, shape: PageShape, source: &mut BitSource) -> Vec<f32> {
        let width = shape.width();
        let scale = take_f16(source);
        let mut page: Vec<f32> = (0..width).map(|_| f32::from(source.take(8) as u8 as i8) * scale).collect();
        let bin = take_f16(source);
        let spreads: Vec<usize> = (0..width).map(|_| (source.take(5) as usize).min(SPREADS - 1)).collect();
        let words = (source.take(32) as usize).min(shape.numbers() + 2);
        let words: Vec<u32> = (0..words).map(|_| source.take(32)).collect();
        let Ok(mut coder) = DefaultRangeDecoder::from_compressed(words);
        for i in 0..shape.numbers().saturating_sub(width) {
            let table = &self.tables[spreads[i % width]];
            // A damaged page: the checksum of a file finds it first.
            let symbol = coder.decode_symbol(table.as_view()).unwrap_or(MOST as usize);
            page.push(page[i % width] + (symbol as i32 - MOST) as f32 * bin);
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coded(options: CacheGen, page: &[f32], shape: PageShape) -> (f64, Vec<f32>) {
        let codec = Coding { options, tables: (0..SPREADS).map(table).collect() };
        let mut sink = BitSink::default();
        codec.encode(Part::Key, page, shape, &mut sink);
        let (bytes, code, side) = sink.finish();
        let read = codec.decode(Part::Key, shape, &mut BitSource::new(&bytes));
        ((code + side) as f64 / page.len() as f64, read)
    }

    #[test]
    fn tokens_like_their_anchor_cost_little_and_later_layers_less() {
        let shape = |layer| PageShape { tokens: 32, kv_heads: 2, head_dim: 16, layer, layers: 5 };
        // Channels of different size, tokens that differ by a tenth of it.
        let page: Vec<f32> = (0..32 * 32)
            .map(|i| ((i % 32) as f32 - 15.0) * (1.0 + 0.1 * ((i * 7919 % 101) as f32 / 101.0 - 0.5)))
            .collect();
        let options = CacheGen { bin: 0.25, growth: 2.0 };
        let (bits, read) = coded(options, &page, shape(0));
        let error: f32 = page.iter().zip(&read).map(|(a, b)| (a - b).powi(2)).sum();
        let energy: f32 = page.iter().map(|x| x * x).sum();
        assert!(bits < 5.0 && error < 1e-4 * energy, "{bits} {}", error / energy);
        let (later, _) = coded(options, &page, shape(4));
        assert!(later < bits - 0.7, "twice as wide bins save almost a bit: {bits} {later}");
    }
}
