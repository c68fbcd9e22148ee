//! Weights panel by panel, in the precision of the file, and how a panel is read in f32.

use super::coded::Coded;
use super::numbers::Numbers;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use multiversion::multiversion;
use std::ops::Range;

/// Outputs of a panel: the height of the AVX-512 kernel, and small enough to share 576 outputs between cores.
pub const PANEL: usize = 64;

/// A weight `[outputs, inputs]`, cut along its outputs into panels of [`PANEL`], each `[inputs, panel outputs]`.
pub enum Panels {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Coded(CodedPanels),
}

/// Panels of codes. The last one is filled up with zeros.
pub struct CodedPanels {
    outputs: usize,
    inputs: usize,
    codes: Codes,
    /// Inputs that share a scale.
    group: usize,
    /// Of each panel, group of inputs and output: `[panels, inputs / group, PANEL]`.
    scales: Vec<f32>,
    /// Like the scales; empty if they are all zero.
    offsets: Vec<f32>,
}

/// Codes of each panel and input: `[panels, inputs, PANEL]`.
enum Codes {
    /// Two in a byte: outputs 0 to 31 of a panel in the low halves, the others in the high ones; less the least code.
    Nibbles {
        bytes: Vec<u8>,
        least: i8,
    },
    Bytes(Vec<i8>),
}

impl Panels {
    /// Several matrices of rows of `inputs` numbers, one after the other, in the precision they have; in f32 if they differ in
    /// it.
    pub fn stack(parts: Vec<Numbers>, inputs: usize) -> Self {
        macro_rules! all {
            ($kind:ident) => {
                parts
                    .iter()
                    .map(|p| if let Numbers::$kind(x) = p { Some(x) } else { None })
                    .collect::<Option<Vec<_>>>()
            };
        }
        if let Some(parts) = all!(F16) {
            return Panels::F16(panels(&parts.iter().map(|p| &p[..]).collect::<Vec<_>>(), inputs));
        }
        if let Some(parts) = all!(Bf16) {
            return Panels::Bf16(panels(&parts.iter().map(|p| &p[..]).collect::<Vec<_>>(), inputs));
        }
        if let Some(parts) = all!(Coded) {
            return Panels::Coded(CodedPanels::stack(&parts, inputs));
        }
        let parts: Vec<Vec<f32>> = parts.into_iter().map(Numbers::into_f32).collect();
        Panels::F32(panels(&parts.iter().map(|p| &p[..]).collect::<Vec<_>>(), inputs))
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        match self {
            Panels::F32(x) => x.len(),
            Panels::F16(x) => x.len(),
            Panels::Bf16(x) => x.len(),
            Panels::Coded(x) => x.outputs * x.inputs,
        }
    }

    /// The panel of outputs from `first` on, of `width` outputs, in f32, `[inputs, stride]`; and its stride. `scratch` is
    /// where it is made if it is not there as it is.
    pub fn read<'a>(
        &'a self,
        first: usize,
        width: usize,
        inputs: usize,
        scratch: &'a mut Vec<f32>,
    ) -> (&'a [f32], usize) {
        let range = first * inputs..(first + width) * inputs;
        match self {
            Panels::F32(x) => (&x[range], width),
            Panels::F16(x) => {
                scratch.resize(range.len(), 0.0);
                x[range].convert_to_f32_slice(scratch);
                (scratch, width)
            }
            Panels::Bf16(x) => {
                scratch.resize(range.len(), 0.0);
                x[range].convert_to_f32_slice(scratch);
                (scratch, width)
            }
            Panels::Coded(x) => {
                scratch.resize(inputs * PANEL, 0.0);
                x.read(first / PANEL, scratch);
                (scratch, PANEL)
            }
        }
    }

    /// One weight: an output's, of an input.
    pub fn get(&self, output: usize, input: usize, (outputs, inputs): (usize, usize)) -> f32 {
        let first = output / PANEL * PANEL;
        let width = PANEL.min(outputs - first);
        let at = first * inputs + input * width + output - first;
        match self {
            Panels::F32(x) => x[at],
            Panels::F16(x) => x[at].to_f32(),
            Panels::Bf16(x) => x[at].to_f32(),
            Panels::Coded(x) => x.get(output, input),
        }
    }
}

impl CodedPanels {
    fn stack(parts: &[&Coded], inputs: usize) -> Self {
        let outputs: usize = parts.iter().map(|p| p.len() / inputs).sum();
        let padded = outputs.next_multiple_of(PANEL);
        // Parts of one matrix may be of several types: scales go by the smallest group, offsets are there if one has them.
        let group = parts.iter().map(|p| p.group).min().unwrap_or(inputs);
        let groups = inputs / group;
        let has_offsets = parts.iter().any(|p| !p.offsets.is_empty());
        // A panel's numbers by place in it.
        let at = |row: usize, i: usize, per_output: usize| {
            row / PANEL * PANEL * per_output + i * PANEL + row % PANEL
        };
        let mut scales = vec![0.0; padded * groups];
        let mut offsets = vec![0.0; if has_offsets { padded * groups } else { 0 }];
        let mut codes = vec![0i8; padded * inputs];
        let rows = parts.iter().flat_map(|p| (0..p.len() / inputs).map(move |r| (*p, r)));
        for (row, (part, own)) in rows.enumerate() {
            for g in 0..groups {
                let its = own * (inputs / part.group) + g * group / part.group;
                scales[at(row, g, groups)] = part.scales[its];
                if has_offsets {
                    offsets[at(row, g, groups)] = part.offset(its);
                }
            }
            for i in 0..inputs {
                codes[at(row, i, inputs)] = part.codes[own * inputs + i];
            }
        }
        let least =
            parts[0].nibbles_from.filter(|_| parts.iter().all(|p| p.nibbles_from == parts[0].nibbles_from));
        let codes = match least {
            None => Codes::Bytes(codes),
            Some(least) => {
                let nibble = |code: i8| code.saturating_sub(least).clamp(0, 15) as u8;
                let pack = |row: &[i8]| -> Vec<u8> {
                    let (low, high) = row.split_at(PANEL / 2);
                    low.iter().zip(high).map(|(l, h)| nibble(*l) | nibble(*h) << 4).collect()
                };
                Codes::Nibbles { bytes: codes.chunks_exact(PANEL).flat_map(pack).collect(), least }
            }
        };
        CodedPanels { outputs, inputs, codes, group, scales, offsets }
    }

    /// A panel's codes, as a range of numbers, and its factors.
    fn panel(&self, panel: usize) -> (Range<usize>, Factors<'_>) {
        let groups = self.inputs / self.group * PANEL;
        let factors = panel * groups..(panel + 1) * groups;
        let offsets = if self.offsets.is_empty() { &[][..] } else { &self.offsets[factors.clone()] };
        let codes = panel * self.inputs * PANEL..(panel + 1) * self.inputs * PANEL;
        (codes, Factors { group: self.group, scales: &self.scales[factors], offsets })
    }

    /// A panel in f32, `[inputs, PANEL]`.
    fn read(&self, panel: usize, out: &mut [f32]) {
        let (range, factors) = self.panel(panel);
        match &self.codes {
            Codes::Nibbles { bytes, least } => {
                unpack_nibbles(&bytes[range.start / 2..range.end / 2], *least, factors, out);
            }
            Codes::Bytes(codes) => unpack_bytes(&codes[range], factors, out),
        }
    }

    /// One row times a panel, straight from its codes, summed input by input.
    pub fn times_row(&self, x: &[f32], panel: usize) -> [f32; PANEL] {
        let (range, factors) = self.panel(panel);
        match &self.codes {
            Codes::Nibbles { bytes, least } => {
                multiply_nibbles(&bytes[range.start / 2..range.end / 2], *least, factors, x)
            }
            Codes::Bytes(codes) => multiply_bytes(&codes[range], factors, x),
        }
    }

    fn get(&self, output: usize, input: usize) -> f32 {
        let (panel, o) = (output / PANEL, output % PANEL);
        let at = (panel * self.inputs + input) * PANEL + o;
        let code = match &self.codes {
            Codes::Bytes(all) => all[at],
            Codes::Nibbles { bytes, least } => {
                let half = PANEL / 2;
                let byte = bytes[(panel * self.inputs + input) * half + o % half];
                (if o < half { byte & 15 } else { byte >> 4 }) as i8 + least
            }
        };
        let factor = (panel * (self.inputs / self.group) + input / self.group) * PANEL + o;
        f32::from(code) * self.scales[factor] + self.offsets.get(factor).unwrap_or(&0.0)
    }
}

/// What turns a panel's codes into numbers.
#[derive(Clone, Copy)]
struct Factors<'a> {
    /// Inputs that share a scale.
    group: usize,
    /// `[groups, PANEL]`.
    scales: &'a [f32],
    /// Like the scales; empty if they are all zero.
    offsets: &'a [f32],
}

/// Offsets of a group that has none.
const NO_OFFSETS: [f32; PANEL] = [0.0; PANEL];

impl<'a> Factors<'a> {
    /// Scales and offsets, group by group.
    #[inline(always)]
    fn groups(self) -> impl Iterator<Item = (&'a [f32; PANEL], &'a [f32; PANEL])> {
        let offsets = self.offsets.as_chunks::<PANEL>().0.iter().chain(std::iter::repeat(&NO_OFFSETS));
        self.scales.as_chunks::<PANEL>().0.iter().zip(offsets)
    }
}

const HALF: usize = PANEL / 2;

/// A row of codes in f32, one input's: low halves, then high ones.
#[inline(always)]
fn nibbles(row: &[u8; HALF], least: i32, scale: &[f32; PANEL], offset: &[f32; PANEL]) -> [f32; PANEL] {
    let mut out = [0.0; PANEL];
    for o in 0..HALF {
        out[o] = (i32::from(row[o] & 15) + least) as f32 * scale[o] + offset[o];
    }
    for o in 0..HALF {
        out[HALF + o] = (i32::from(row[o] >> 4) + least) as f32 * scale[HALF + o] + offset[HALF + o];
    }
    out
}

/// Like [`nibbles`], a byte a code.
#[inline(always)]
fn bytes(row: &[i8; PANEL], scale: &[f32; PANEL], offset: &[f32; PANEL]) -> [f32; PANEL] {
    std::array::from_fn(|o| f32::from(row[o]) * scale[o] + offset[o])
}

#[inline(always)]
fn add_product(sums: &mut [f32; PANEL], weights: &[f32; PANEL], x: f32) {
    for (sum, weight) in sums.iter_mut().zip(weights) {
        *sum = weight.mul_add(x, *sum);
    }
}

/// Rows of codes, one for each input, in f32.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+avx2+fma", "x86_64+avx2+fma"))]
fn unpack_nibbles(codes: &[u8], least: i8, factors: Factors, out: &mut [f32]) {
    let rows = codes.as_chunks::<HALF>().0.chunks_exact(factors.group);
    let outs = out.as_chunks_mut::<PANEL>().0.chunks_exact_mut(factors.group);
    for ((scale, offset), (rows, outs)) in factors.groups().zip(rows.zip(outs)) {
        for (row, out) in rows.iter().zip(outs) {
            *out = nibbles(row, i32::from(least), scale, offset);
        }
    }
}

/// Like [`unpack_nibbles`], a byte a code.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+avx2+fma", "x86_64+avx2+fma"))]
fn unpack_bytes(codes: &[i8], factors: Factors, out: &mut [f32]) {
    let rows = codes.as_chunks::<PANEL>().0.chunks_exact(factors.group);
    let outs = out.as_chunks_mut::<PANEL>().0.chunks_exact_mut(factors.group);
    for ((scale, offset), (rows, outs)) in factors.groups().zip(rows.zip(outs)) {
        for (row, out) in rows.iter().zip(outs) {
            *out = bytes(row, scale, offset);
        }
    }
}

/// The products of one row with rows of codes, one for each input.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+avx2+fma", "x86_64+avx2+fma"))]
fn multiply_nibbles(codes: &[u8], least: i8, factors: Factors, x: &[f32]) -> [f32; PANEL] {
    let mut sums = [0.0; PANEL];
    let rows = codes.as_chunks::<HALF>().0.chunks_exact(factors.group);
    for ((scale, offset), (rows, x)) in factors.groups().zip(rows.zip(x.chunks_exact(factors.group))) {
        for (row, x) in rows.iter().zip(x) {
            add_product(&mut sums, &nibbles(row, i32::from(least), scale, offset), *x);
        }
    }
    sums
}

/// Like [`multiply_nibbles`], a byte a code.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+avx2+fma", "x86_64+avx2+fma"))]
fn multiply_bytes(codes: &[i8], factors: Factors, x: &[f32]) -> [f32; PANEL] {
    let mut sums = [0.0; PANEL];
    let rows = codes.as_chunks::<PANEL>().0.chunks_exact(factors.group);
    for ((scale, offset), (rows, x)) in factors.groups().zip(rows.zip(x.chunks_exact(factors.group))) {
        for (row, x) in rows.iter().zip(x) {
            add_product(&mut sums, &bytes(row, scale, offset), *x);
        }
    }
    sums
}

/// Rows of `inputs` numbers each, of one matrix after the other, rearranged panel by panel.
fn panels<T: Copy + Default>(parts: &[&[T]], inputs: usize) -> Vec<T> {
    let rows: Vec<&[T]> = parts.iter().flat_map(|p| p.chunks_exact(inputs)).collect();
    let mut weight = vec![T::default(); inputs * rows.len()];
    for (panel, rows) in weight.chunks_mut(inputs * PANEL).zip(rows.chunks(PANEL)) {
        for (o, row) in rows.iter().enumerate() {
            for (i, &w) in row.iter().enumerate() {
                panel[i * rows.len() + o] = w;
            }
        }
    }
    weight
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};
    use proptest::prelude::*;

    const KINDS: [GgmlDType; 10] = [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];

    /// A matrix stored in a type, and its numbers as candle reads them.
    fn stored(kind: GgmlDType, (outputs, inputs): (usize, usize), seed: u32) -> (Coded, Vec<f32>) {
        let number =
            |i: u32| ((i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) % 2001) as f32 / 500.0 - 2.0;
        let numbers: Vec<f32> = (0..(outputs * inputs) as u32).map(number).collect();
        let tensor = Tensor::from_vec(numbers, (outputs, inputs), &Device::Cpu).unwrap();
        let stored = QTensor::quantize(&tensor, kind).unwrap();
        let exact = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        (Coded::read(kind, &stored.data().unwrap()).unwrap(), exact)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Every block type is read as candle reads it, but for the sign of zero, as rows, as panels and one by one, by itself and
        /// with a part of another type below it.
        #[test]
        fn codes_are_read_as_candle_reads_them(
            tops in 1usize..150, blocks in 1usize..3, kind in 0usize..10, second in 0usize..20, seed in 0u32..99
        ) {
            let inputs = blocks * 256;
            let (coded, mut exact) = stored(KINDS[kind], (tops, inputs), seed);
            prop_assert_eq!(&coded.to_f32(), &exact);
            let mut parts = vec![Numbers::Coded(coded)];
            let mut outputs = tops;
            if let Some(&kind) = KINDS.get(second) {
                let (below, its) = stored(kind, (33, inputs), seed + 1);
                parts.push(Numbers::Coded(below));
                exact.extend(its);
                outputs += 33;
            }
            let panels = Panels::stack(parts, inputs);
            prop_assert!(matches!(panels, Panels::Coded(_)));
            let mut scratch = Vec::new();
            for first in (0..outputs).step_by(PANEL) {
                let width = PANEL.min(outputs - first);
                let (panel, stride) = panels.read(first, width, inputs, &mut scratch);
                for o in 0..width {
                    for i in 0..inputs {
                        let expected = exact[(first + o) * inputs + i];
                        prop_assert_eq!(panel[i * stride + o], expected);
                    }
                }
                // One row straight from codes: summed input by input.
                let x: Vec<f32> = (0..inputs).map(|i| (i as f32 + seed as f32).sin()).collect();
                let Panels::Coded(coded) = &panels else { unreachable!() };
                for (o, got) in coded.times_row(&x, first / PANEL).into_iter().take(width).enumerate() {
                    let weights = &exact[(first + o) * inputs..][..inputs];
                    let sum = weights.iter().zip(&x).fold(0.0f32, |sum, (w, x)| w.mul_add(*x, sum));
                    prop_assert_eq!(got, sum);
                }
            }
            for at in [0, outputs * inputs / 2, outputs * inputs - 1] {
                let got = panels.get(at / inputs, at % inputs, (outputs, inputs));
                prop_assert_eq!(got, exact[at]);
            }
        }
    }
}
