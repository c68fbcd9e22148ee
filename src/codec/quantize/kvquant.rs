//! KVQuant-like: levels that are not even, and a few outliers kept apart.

use super::kivi::groups;
use super::rotated::{lloyd_max, nearest};
use super::{BitSink, BitSource, Cost, PageShape, Quantized, Quantizer, put_f16, take_f16};
use crate::block::Part;
use crate::codec::registry::{Method, Scale, Search, number};
use crate::codec::{Codec, Role};
use crate::error::Result;
use serde::Serialize;
use std::ops::Bound;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, Serialize, clap::Args)]
pub struct KvQuant {
    /// Bits of a number
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=8))]
    bits: u32,
    /// Share of a page's numbers that are kept in f16 with their places
    #[arg(long, default_value_t = 0.01, value_parser = number("a share", Bound::Included(0.0), Bound::Included(0.5)))]
    outliers: f64,
}

impl Method for KvQuant {
    const NAME: &'static str = "kvquant";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "Keys per channel and values per token and head, shifted and scaled by their own mean and deviation (f16) to levels of a Gaussian with the least squared error; the largest deviations are kept apart in f16. The paper calibrates its levels with Fisher information and takes keys before RoPE; this does not.";
    const PAPER: &'static str = "after Hooper et al. 2024, KVQuant (arXiv 2401.18079)";
    const DIALS: &'static [&'static str] = &["bits"];
    const SEARCH: Option<Search> =
        Some(Search { option: "bits", fine: 8.0, coarse: 1.0, scale: Scale::Whole });

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        Ok(Arc::new(Quantized::new(Levels { options: *self, levels: lloyd_max(1 << self.bits) })))
    }
}

/// [`KvQuant`] with its levels.
struct Levels {
    options: KvQuant,
    levels: Vec<f32>,
}

/// Mean and deviation of the numbers at these places that are not outliers.
fn moments(page: &[f32], places: &[usize], out: &[bool]) -> (f32, f32) {
    let own = || places.iter().filter(|i| !out[**i]).map(|i| page[*i]);
    let n = own().count().max(1) as f32;
    let mean = own().sum::<f32>() / n;
    (mean, (own().map(|x| (x - mean) * (x - mean)).sum::<f32>() / n).sqrt())
}

impl Levels {
    fn groups(&self, part: Part, shape: PageShape) -> Vec<Vec<usize>> {
        groups(part, shape, if part == Part::Key { shape.tokens } else { shape.head_dim })
    }

    /// The numbers furthest from the mean of their group, in deviations.
    fn outliers(&self, page: &[f32], groups: &[Vec<usize>]) -> Vec<usize> {
        let none = vec![false; page.len()];
        let mut far: Vec<(f32, usize)> = Vec::with_capacity(page.len());
        for group in groups {
            let (mean, deviation) = moments(page, group, &none);
            let scale = if deviation > 0.0 { 1.0 / deviation } else { 0.0 };
            far.extend(group.iter().map(|&i| ((page[i] - mean).abs() * scale, i)));
        }
        far.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let count = (self.options.outliers * page.len() as f64).floor() as usize;
        let mut places: Vec<usize> = far.into_iter().take(count).map(|(_, i)| i).collect();
        places.sort_unstable();
        places
    }
}

impl Quantizer for Levels {
    fn encode(&self, part: Part, page: &[f32], shape: PageShape, sink: &mut BitSink) {
        let groups = self.groups(part, shape);
        let outliers = self.outliers(page, &groups);
        let mut out = vec![false; page.len()];
        sink.put(Cost::Side, outliers.len() as u32, 32);
        for &i in &outliers {
            out[i] = true;
            sink.put(Cost::Side, i as u32, 24);
            put_f16(sink, page[i]);
        }
        for group in &groups {
            let (mean, deviation) = moments(page, group, &out);
            let (mean, deviation) = (put_f16(sink, mean), put_f16(sink, deviation));
            for &i in group.iter().filter(|i| !out[**i]) {
                let x = if deviation > 0.0 { (page[i] - mean) / deviation } else { 0.0 };
                sink.put(Cost::Code, nearest(&self.levels, x), self.options.bits);
            }
        }
    }

    fn decode(&self, part: Part, shape: PageShape, source: &mut BitSource) -> Vec<f32> {
        let mut page = vec![0.0; shape.numbers()];
        let mut out = vec![false; page.len()];
        let count = (source.take(32) as usize).min(page.len());
        for _ in 0..count {
            let i = source.take(24) as usize;
            let x = take_f16(source);
            if let Some(place) = page.get_mut(i) {
                (*place, out[i]) = (x, true);
            }
        }
        for group in self.groups(part, shape) {
            let (mean, deviation) = (take_f16(source), take_f16(source));
            for i in group.into_iter().filter(|i| !out[*i]) {
                let level = self.levels.get(source.take(self.options.bits) as usize);
                page[i] = mean + deviation * level.copied().unwrap_or(0.0);
            }
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number far from all others costs the others nothing.
    #[test]
    fn an_outlier_is_kept_apart() {
        let shape = PageShape { tokens: 25, kv_heads: 1, head_dim: 4, layer: 0, layers: 1 };
        let mut page: Vec<f32> = (0..100).map(|i| (i * 29 % 31) as f32 / 31.0).collect();
        page[42] = 512.0;
        let error = |outliers: f64| {
            let options = KvQuant { bits: 4, outliers };
            let codec = Levels { options, levels: lloyd_max(16) };
            let mut sink = BitSink::default();
            codec.encode(Part::Key, &page, shape, &mut sink);
            let read = codec.decode(Part::Key, shape, &mut BitSource::new(&sink.finish().0));
            let of = |i: usize| (page[i] - read[i]).powi(2);
            (of(42), (0..100).filter(|i| *i != 42).map(of).sum::<f32>())
        };
        let ((own, others), (_, without)) = (error(0.01), error(0.0));
        assert_eq!(own, 0.0);
        assert!(10.0 * others < without, "{others} {without}");
    }
}
