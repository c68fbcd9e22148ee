//! Entropy coding of quantised components: tables of magnitudes, chosen by how wide a component is in steps and by how large its
//! neighbours came out. All choices are made in integers, so encoder and decoder agree on any machine.

use crate::error::{Error, Result};
use constriction::stream::model::{DecoderModel, EncoderModel, EntropyModel, UniformModel};
use constriction::stream::queue::{DefaultRangeDecoder, DefaultRangeEncoder};
use constriction::stream::{Decode, Encode};
use std::borrow::Borrow;
use std::num::NonZeroU32;

/// Bits of a probability.
const PRECISION: usize = 16;
/// Magnitudes that a table names; the last stands for all that are larger.
pub const SYMBOLS: usize = 16;
const ESCAPE: usize = SYMBOLS - 1;
/// Ratios of a component's standard deviation to the step, in quarters of an octave; the first is an eighth.
pub const WIDTHS: usize = 40;
/// The narrowest that is coded, in eighths of an octave of standard deviation / step: narrower ones are always zero.
const NARROWEST: i32 = -20;
/// How large neighbours came out against what was expected of them.
pub const CONTEXTS: usize = 7;
/// Bounds of these, in sixteenths.
const BOUNDS: [u32; CONTEXTS - 1] = [5, 9, 13, 17, 23, 34];
/// Magnitudes with centroids of their own; larger ones share the last.
pub const CENTROIDS: usize = 3;

/// A width, as a table index and the low bits that are written as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Width {
    pub index: usize,
    shift: u32,
}

impl Width {
    /// Of a component and a step, both in eighths of an octave; `None` if it is so narrow that it is not coded.
    pub fn of(sigma: i32, step: i32) -> Option<Width> {
        let ratio = sigma - step;
        if ratio < NARROWEST {
            return None;
        }
        let index = ((ratio - NARROWEST) / 2).min(WIDTHS as i32 - 1) as usize;
        Some(Width { index, shift: ((ratio - 12).max(0) / 8).min(12) as u32 })
    }
}

/// Eighths of an octave.
pub fn eighths(x: f64) -> i32 {
    (8.0 * x.max(1e-30).log2()).round() as i32
}

/// What [`eighths`] stands for.
pub fn from_eighths(code: i32) -> f32 {
    (f64::from(code) / 8.0).exp2() as f32
}

/// Probabilities as the range coder takes them, each symbol's between two bounds; none is zero, and the last bound is
/// 2^[`PRECISION`]. Most numbers are zero, so a decoder looks from below.
pub struct Model {
    bounds: [u32; SYMBOLS + 1],
}

impl Model {
    /// `None` if these are no probabilities in units of 2^-16.
    fn new(probabilities: &[u16]) -> Option<Self> {
        let mut bounds = [0; SYMBOLS + 1];
        for (s, p) in probabilities.iter().enumerate() {
            *bounds.get_mut(s + 1)? = bounds[s] + u32::from(*p);
        }
        let sound = probabilities.iter().all(|p| *p > 0) && bounds[SYMBOLS] == 1 << PRECISION;
        sound.then_some(Model { bounds })
    }

    fn width(&self, symbol: usize) -> NonZeroU32 {
        NonZeroU32::new(self.bounds[symbol + 1] - self.bounds[symbol]).unwrap_or(NonZeroU32::MIN)
    }
}

impl EntropyModel<PRECISION> for Model {
    type Symbol = usize;
    type Probability = u32;
}

impl EncoderModel<PRECISION> for Model {
    fn left_cumulative_and_probability(&self, symbol: impl Borrow<usize>) -> Option<(u32, NonZeroU32)> {
        let symbol = *symbol.borrow();
        (symbol < SYMBOLS).then(|| (self.bounds[symbol], self.width(symbol)))
    }
}

impl DecoderModel<PRECISION> for Model {
    fn quantile_function(&self, quantile: u32) -> (usize, u32, NonZeroU32) {
        let symbol = self.bounds[1..SYMBOLS].iter().take_while(|bound| quantile >= **bound).count();
        (symbol, self.bounds[symbol], self.width(symbol))
    }
}

struct Table {
    model: Model,
    /// Bits of each symbol, its sign included.
    cost: [f32; SYMBOLS],
}

/// All tables of a codec.
pub struct Tables {
    /// `[WIDTHS][CONTEXTS]`.
    tables: Vec<Table>,
    /// Mean magnitude by width, in 256ths.
    means: [u32; WIDTHS],
    /// Where within its cell a magnitude is rebuilt, in steps: `[WIDTHS][CENTROIDS]`.
    centroids: Vec<[f32; CENTROIDS]>,
}

/// How often each magnitude was seen: `[WIDTHS][CONTEXTS][SYMBOLS]`; and sums for centroids.
pub struct Counts {
    pub symbols: Vec<[[f64; SYMBOLS]; CONTEXTS]>,
    /// Number and sum of (|x|/step - magnitude).
    pub offsets: Vec<[(f64, f64); CENTROIDS]>,
}

impl Default for Counts {
    fn default() -> Self {
        Counts {
            symbols: vec![[[0.0; SYMBOLS]; CONTEXTS]; WIDTHS],
            offsets: vec![[(0.0, 0.0); CENTROIDS]; WIDTHS],
        }
    }
}

impl Counts {
    pub fn add(&mut self, other: &Counts) {
        for (a, b) in
            self.symbols.iter_mut().flatten().flatten().zip(other.symbols.iter().flatten().flatten())
        {
            *a += b;
        }
        for (a, b) in self.offsets.iter_mut().flatten().zip(other.offsets.iter().flatten()) {
            *a = (a.0 + b.0, a.1 + b.1);
        }
    }

    /// Notes a component `x` steps from zero that became `q`.
    pub fn see(&mut self, width: Width, context: usize, q: i16, x: f32) {
        let magnitude = q.unsigned_abs();
        self.symbols[width.index][context][((magnitude >> width.shift) as usize).min(ESCAPE)] += 1.0;
        if magnitude > 0 && width.shift == 0 {
            let cell = &mut self.offsets[width.index][(magnitude as usize).min(CENTROIDS) - 1];
            *cell = (cell.0 + 1.0, cell.1 + f64::from(x.abs()) - f64::from(magnitude));
        }
    }

    /// Probabilities in units of 2^-16, none of them zero: what was seen, over a Laplace distribution of the width as a few
    /// observations.
    pub fn probabilities(&self) -> Vec<u16> {
        let mut all = Vec::with_capacity(WIDTHS * CONTEXTS * SYMBOLS);
        for (width, contexts) in self.symbols.iter().enumerate() {
            let prior = laplace(width);
            let seen: Vec<f64> = (0..SYMBOLS).map(|s| contexts.iter().map(|c| c[s]).sum::<f64>()).collect();
            let total: f64 = seen.iter().sum();
            let marginal: Vec<f64> =
                seen.iter().zip(prior).map(|(n, p)| (n + 30.0 * p) / (total + 30.0)).collect();
            for context in contexts {
                let total: f64 = context.iter().sum();
                let p: Vec<f64> =
                    context.iter().zip(&marginal).map(|(n, p)| (n + 60.0 * p) / (total + 60.0)).collect();
                all.extend(fixed(&p));
            }
        }
        all
    }

    pub fn means(&self) -> Vec<u32> {
        let mean = |(width, contexts): (usize, &[[f64; SYMBOLS]; CONTEXTS])| {
            let prior = laplace(width);
            let sum = |s: usize| contexts.iter().map(|c| c[s]).sum::<f64>() + 30.0 * prior[s];
            let total: f64 = (0..SYMBOLS).map(sum).sum();
            ((0..SYMBOLS).map(|s| s as f64 * sum(s)).sum::<f64>() / total * 256.0).round() as u32
        };
        self.symbols.iter().enumerate().map(mean).collect()
    }

    pub fn centroids(&self) -> Vec<f32> {
        let of = |&(n, sum): &(f64, f64)| (sum / (n + 20.0)) as f32;
        self.offsets.iter().flatten().map(of).collect()
    }
}

/// Probabilities of magnitudes under a Laplace distribution whose width this is.
fn laplace(width: usize) -> [f64; SYMBOLS] {
    let ratio = 2 * width as i32 + NARROWEST;
    let shift = (ratio - 12).max(0) / 8;
    let sigma = (f64::from(ratio) / 8.0).exp2() / f64::from(1 << shift);
    let beyond = |x: f64| (-x * std::f64::consts::SQRT_2 / sigma).exp();
    std::array::from_fn(|s| match s {
        0 => 1.0 - beyond(0.5),
        ESCAPE => beyond(s as f64 - 0.5),
        _ => beyond(s as f64 - 0.5) - beyond(s as f64 + 0.5),
    })
}

/// Probabilities as whole numbers that sum to 2^16, none zero.
fn fixed(p: &[f64]) -> Vec<u16> {
    let total: f64 = p.iter().sum();
    let room = f64::from(1u32 << PRECISION) - SYMBOLS as f64;
    let mut whole: Vec<u32> = p.iter().map(|p| 1 + (p / total * room).floor() as u32).collect();
    let left = (1u32 << PRECISION) - whole.iter().sum::<u32>();
    let most = (0..whole.len()).max_by_key(|&i| whole[i]).unwrap_or(0);
    whole[most] += left;
    // 2^16 itself never occurs: fifteen others have one each.
    whole.into_iter().map(|w| w as u16).collect()
}

impl Tables {
    /// From what [`Counts`] gives. `None` if these are no tables.
    pub fn new(probabilities: &[u16], means: &[u32], centroids: &[f32]) -> Option<Self> {
        let sized = probabilities.len() == WIDTHS * CONTEXTS * SYMBOLS
            && centroids.len() == WIDTHS * CENTROIDS
            && centroids.iter().all(|c| c.is_finite())
            && means.iter().all(|mean| *mean <= (ESCAPE as u32) << 8);
        let table = |p: &[u16]| {
            let model = Model::new(p)?;
            let cost = std::array::from_fn(|s| {
                PRECISION as f32 - f32::from(p[s]).log2() + if s > 0 { 1.0 } else { 0.0 }
            });
            Some(Table { model, cost })
        };
        let tables =
            sized.then(|| probabilities.chunks_exact(SYMBOLS).map(table).collect::<Option<_>>())??;
        let centroids = centroids.as_chunks::<CENTROIDS>().0.to_vec();
        Some(Tables { tables, means: means.try_into().ok()?, centroids })
    }

    fn table(&self, width: Width, context: usize) -> &Table {
        &self.tables[width.index * CONTEXTS + context]
    }

    /// The number, in steps, that a quantised one stands for.
    pub fn rebuild(&self, width: Width, q: i16) -> f32 {
        if q == 0 {
            return 0.0;
        }
        let magnitude = q.unsigned_abs() as usize;
        let offset =
            if width.shift == 0 { self.centroids[width.index][magnitude.min(CENTROIDS) - 1] } else { 0.0 };
        (magnitude as f32 + offset).copysign(f32::from(q))
    }

    /// The whole number whose rebuilt one is nearest to `x` (in steps).
    pub fn nearest(&self, width: Width, x: f32) -> i16 {
        // Where bits are worth nothing, contexts do not matter.
        self.quantise(width, 0, x, 0.0)
    }

    /// [`Tables::nearest`], or a smaller one if that saves more bits than it costs error at `lambda` squared steps a bit.
    pub fn quantise(&self, width: Width, context: usize, x: f32, lambda: f32) -> i16 {
        // Most are.
        if x.abs() < 0.5 {
            return 0;
        }
        let nearest = x.abs().round().min(30_000.0) as i16;
        if width.shift > 0 {
            return if x < 0.0 { -nearest } else { nearest };
        }
        let table = self.table(width, context);
        let price = |m: i16| {
            let error = x.abs() - self.rebuild(width, m);
            error * error + lambda * table.cost[(m as usize).min(ESCAPE)]
        };
        let mut best = (nearest, price(nearest));
        for m in [nearest - 1, 0] {
            let price = price(m);
            if price < best.1 {
                best = (m, price);
            }
        }
        if x < 0.0 { -best.0 } else { best.0 }
    }

    /// Codes one quantised component and moves `neighbours` on.
    pub fn code<C: Coder>(&self, coder: &mut C, width: Width, neighbours: &mut Neighbours, q: i16) -> i16 {
        let table = self.table(width, neighbours.context());
        let magnitude = u32::from(q.unsigned_abs());
        let symbol = coder.symbol(&table.model, ((magnitude >> width.shift) as usize).min(ESCAPE));
        coder.spend(table.cost[symbol] + width.shift as f32);
        neighbours.see(symbol as u32, self.means[width.index]);
        let mut high = symbol as u32;
        if symbol == ESCAPE {
            high += coder.escape((magnitude >> width.shift).wrapping_sub(ESCAPE as u32));
        }
        let low = coder.bits(width.shift, magnitude & ((1 << width.shift) - 1));
        let magnitude = (high << width.shift) | low;
        if magnitude == 0 {
            return 0;
        }
        let magnitude = magnitude.min(i16::MAX as u32) as i16;
        if coder.bits(1, u32::from(q < 0)) == 1 { -magnitude } else { magnitude }
    }

    /// Moves `neighbours` on without coding.
    pub fn pass(&self, width: Width, neighbours: &mut Neighbours, q: i16) {
        let symbol = (u32::from(q.unsigned_abs()) >> width.shift).min(ESCAPE as u32);
        neighbours.see(symbol, self.means[width.index]);
    }
}

/// Magnitudes seen lately and those that were expected, with exponential forgetting, in 256ths.
#[derive(Debug, Clone, Copy)]
pub struct Neighbours {
    seen: u32,
    expected: u32,
}

impl Default for Neighbours {
    fn default() -> Self {
        Neighbours { seen: 512, expected: 512 }
    }
}

impl Neighbours {
    pub fn context(&self) -> usize {
        let (seen, expected) = ((self.seen + 32) * 16, self.expected + 32);
        BOUNDS.iter().map(|bound| usize::from(seen >= bound * expected)).sum()
    }

    fn see(&mut self, symbol: u32, mean: u32) {
        self.seen = self.seen - self.seen / 16 + (symbol << 8);
        self.expected = self.expected - self.expected / 16 + mean;
    }
}

/// Writes symbols, or reads them: one path does both, so what is read is what was written.
pub trait Coder {
    /// Notes what a symbol costs by its table.
    fn spend(&mut self, _bits: f32) {}

    /// The sum of it.
    fn spent(&self) -> f64 {
        0.0
    }

    fn symbol(&mut self, model: &Model, symbol: usize) -> usize;

    /// At most 16 bits.
    fn bits(&mut self, count: u32, value: u32) -> u32;

    /// A whole number of unknown size: the number of its bits in unary, then these.
    fn escape(&mut self, value: u32) -> u32 {
        let value = value.wrapping_add(1);
        let wanted = 31 - value.max(1).leading_zeros();
        let mut length = 0;
        while length < 15 && self.bits(1, u32::from(length < wanted)) == 1 {
            length += 1;
        }
        let low = self.bits(length, value & ((1 << length) - 1));
        ((1 << length) | low) - 1
    }
}

#[derive(Default)]
pub struct Encoder {
    sink: DefaultRangeEncoder,
    spent: f64,
}

impl Encoder {
    pub fn finish(self) -> Vec<u8> {
        let Ok(words) = self.sink.into_compressed();
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        // The decoder reads zeros behind the end.
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        bytes
    }
}

impl Coder for Encoder {
    fn spend(&mut self, bits: f32) {
        self.spent += f64::from(bits);
    }

    fn spent(&self) -> f64 {
        self.spent
    }

    fn symbol(&mut self, model: &Model, symbol: usize) -> usize {
        // Every symbol has a probability; writing to memory does not fail.
        let _ = self.sink.encode_symbol(symbol, model);
        symbol
    }

    fn bits(&mut self, count: u32, value: u32) -> u32 {
        if count == 0 {
            return 0;
        }
        let _ = self.sink.encode_symbol(value as usize, UniformModel::<u32, 24>::new(1 << count));
        value
    }
}

pub struct Decoder {
    source: DefaultRangeDecoder,
    /// The bytes were not written by an [`Encoder`].
    failed: bool,
}

impl Decoder {
    pub fn new(bytes: &[u8]) -> Result<Self> {
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().div_ceil(4) * 4 + 8, 0);
        let words: Vec<u32> = padded.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let source = DefaultRangeDecoder::from_compressed(words)
            .map_err(|_| Error::argument("a coded block that cannot be read"))?;
        Ok(Decoder { source, failed: false })
    }

    pub fn failed(&self) -> bool {
        self.failed
    }
}

impl Coder for Decoder {
    fn symbol(&mut self, model: &Model, _symbol: usize) -> usize {
        self.source.decode_symbol(model).unwrap_or_else(|_| {
            self.failed = true;
            0
        })
    }

    fn bits(&mut self, count: u32, _value: u32) -> u32 {
        if count == 0 {
            return 0;
        }
        match self.source.decode_symbol(UniformModel::<u32, 24>::new(1 << count)) {
            Ok(value) => value as u32,
            Err(_) => {
                self.failed = true;
                0
            }
        }
    }
}
