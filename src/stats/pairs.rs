//! All pairs of a layer's blocks, read strip by strip: what is counted of them, and nothing else, stays in memory.

use super::blocks::{Class, DistinctBlocks, Home};
use super::gaps::Gaps;
use super::histogram::Histogram;
use crate::error::Result;
use crate::interrupt;
use crate::model::gemm::{View, product};
use rayon::prelude::*;
use std::ops::AddAssign;

/// What is counted of the pairs that lie above one threshold.
#[derive(Debug, Clone, Default)]
pub struct Above {
    /// Ordered pairs: each pair counts for both of its blocks.
    pub pairs: u64,
    /// Over blocks: sum of k^2, k the pairs of a block above the threshold.
    pub squares: u64,
    /// Sum of k m, m the pairs of a block.
    pub cross: u64,
    /// Sum of k (m - 1): what k (k - 1) would be if every neighbour of a pair above the threshold were too.
    pub neighbours: u64,
    /// Sum of the cosines, and of the other part's cosines (values for keys).
    pub cosine: f64,
    pub other: f64,
    pub gaps: Gaps,
}

/// What is counted of the pairs of one class.
#[derive(Debug, Clone, Default)]
pub struct PairSums {
    /// Ordered pairs.
    pub pairs: u64,
    /// Sums of powers 1 to 4 of the cosine.
    pub powers: [f64; 4],
    /// Over blocks: sum of m^2, and of the square of the sum of a block's cosines.
    pub size_squares: u64,
    pub row_squares: f64,
    /// Sums of (m - 1) times a block's cosines, and times their squares: what the pairs of pairs that share a block add up to.
    pub wedge_cosines: f64,
    pub wedge_squares: f64,
    /// Every pair twice.
    pub histogram: Histogram,
    /// One for each threshold.
    pub above: Vec<Above>,
    /// What goes with each request: the ordered pairs of blocks that no other request holds.
    pub by_request: Vec<Share>,
    /// Ordered pairs by the position of their first block.
    pub by_position: Vec<Share>,
}

/// A part of the pairs of [`PairSums`].
#[derive(Debug, Clone, Default)]
pub struct Share {
    /// Ordered pairs.
    pub pairs: u64,
    /// Sum of cosines.
    pub cosine: f64,
    /// Pairs above each threshold, and the sum of their cosines.
    pub above: Vec<(u64, f64)>,
    /// Blocks, and over these the sum of squared numbers of pairs above each threshold.
    pub blocks: u64,
    pub squares: Vec<u64>,
}

impl Share {
    fn empty(taus: usize) -> Self {
        Share { above: vec![(0, 0.0); taus], squares: vec![0; taus], ..Share::default() }
    }
}

impl AddAssign<&Share> for Share {
    fn add_assign(&mut self, other: &Share) {
        self.pairs += other.pairs;
        self.cosine += other.cosine;
        for (a, b) in self.above.iter_mut().zip(&other.above) {
            *a = (a.0 + b.0, a.1 + b.1);
        }
        self.blocks += other.blocks;
        self.squares.iter_mut().zip(&other.squares).for_each(|(a, b)| *a += b);
    }
}

/// How many requests and positions there are.
#[derive(Debug, Clone, Copy)]
struct Extent {
    requests: usize,
    positions: usize,
}

impl PairSums {
    fn empty(taus: usize, extent: Extent) -> Self {
        PairSums {
            above: vec![Above::default(); taus],
            by_request: vec![Share::empty(taus); extent.requests],
            by_position: vec![Share::empty(taus); extent.positions],
            ..PairSums::default()
        }
    }

    /// Adds one block's pairs.
    fn add_row(&mut self, row: &Row, home: Home, single: bool) {
        if row.pairs == 0 {
            return;
        }
        let m = row.pairs;
        self.pairs += m;
        self.size_squares += m * m;
        self.row_squares += row.powers[0] * row.powers[0];
        self.wedge_cosines += (m - 1) as f64 * row.powers[0];
        self.wedge_squares += (m - 1) as f64 * row.powers[1];
        self.powers.iter_mut().zip(row.powers).for_each(|(sum, x)| *sum += x);
        let taus = self.above.len();
        let mut share = Share { pairs: m, cosine: row.powers[0], blocks: 1, ..Share::empty(taus) };
        let mut gone = Share { pairs: 0, cosine: 0.0, ..Share::empty(taus) };
        row.gone.iter().for_each(|g| (gone.pairs, gone.cosine) = (gone.pairs + g.0, gone.cosine + g.1));
        let (mut gone_pairs, mut gone_cosine) = (0, 0.0);
        // Pairs between two thresholds lie above the lower one and all below it.
        let (mut k, mut cosine, mut other) = (0, 0.0, 0.0);
        for (t, above) in self.above.iter_mut().enumerate().rev() {
            let level = &row.levels[t + 1];
            (k, cosine, other) = (k + level.0, cosine + level.1, other + level.2);
            above.pairs += k;
            above.squares += k * k;
            above.cross += k * m;
            above.neighbours += k * (m - 1);
            above.cosine += cosine;
            above.other += other;
            (share.above[t], share.squares[t]) = ((k, cosine), k * k);
            let level = &row.gone[t + 1];
            (gone_pairs, gone_cosine) = (gone_pairs + level.0, gone_cosine + level.1);
            gone.above[t] = (gone_pairs, gone_cosine);
        }
        if single {
            self.by_request[home.request as usize] += &gone;
        }
        self.by_position[home.position as usize] += &share;
    }
}

impl AddAssign<&PairSums> for PairSums {
    fn add_assign(&mut self, other: &PairSums) {
        self.pairs += other.pairs;
        self.size_squares += other.size_squares;
        self.row_squares += other.row_squares;
        self.wedge_cosines += other.wedge_cosines;
        self.wedge_squares += other.wedge_squares;
        self.powers.iter_mut().zip(other.powers).for_each(|(a, b)| *a += b);
        self.histogram += &other.histogram;
        for (a, b) in self.above.iter_mut().zip(&other.above) {
            a.pairs += b.pairs;
            a.squares += b.squares;
            a.cross += b.cross;
            a.neighbours += b.neighbours;
            a.cosine += b.cosine;
            a.other += b.other;
            a.gaps.join(&b.gaps);
        }
        self.by_request.iter_mut().zip(&other.by_request).for_each(|(a, b)| *a += b);
        self.by_position.iter_mut().zip(&other.by_position).for_each(|(a, b)| *a += b);
    }
}

/// One block's pairs of one class.
#[derive(Clone)]
struct Row {
    pairs: u64,
    powers: [f64; 4],
    /// Pairs, their cosines and the other part's, by the number of thresholds they lie above.
    levels: Vec<(u64, f64, f64)>,
    /// Ordered pairs that would go with this block's request, and their cosines, by the same number.
    gone: Vec<(u64, f64)>,
}

impl Row {
    fn empty(taus: usize) -> Self {
        Row {
            pairs: 0,
            powers: [0.0; 4],
            levels: vec![(0, 0.0, 0.0); taus + 1],
            gone: vec![(0, 0.0); taus + 1],
        }
    }

    fn clear(&mut self) {
        self.pairs = 0;
        self.powers = [0.0; 4];
        self.levels.fill((0, 0.0, 0.0));
        self.gone.fill((0, 0.0));
    }

    /// `sides`: how many of the two ordered pairs of these blocks this row stands for if its request goes.
    fn add(&mut self, s: f64, other: f64, level: usize, sides: u64) {
        self.pairs += 1;
        let square = s * s;
        self.powers[0] += s;
        self.powers[1] += square;
        self.powers[2] += square * s;
        self.powers[3] += square * square;
        let at = &mut self.levels[level];
        *at = (at.0 + 1, at.1 + s, at.2 + other);
        let gone = &mut self.gone[level];
        *gone = (gone.0 + sides, gone.1 + sides as f64 * s);
    }
}

/// Sums of keys and of values, by class in the order of [`Class::ALL`].
pub struct LayerSums {
    pub keys: Vec<PairSums>,
    pub values: Vec<PairSums>,
}

/// Rows whose products with all blocks are in memory at a time, on each thread.
const STRIP: usize = 128;
/// Strips whose sums are in memory at a time.
const ROUND: usize = 16;

/// Counts all pairs of a layer's distinct blocks. `taus` rise. Memory: a strip of rows of products a thread, never all.
///
/// Strips are cut by the number of blocks alone and added in order, so the same blocks give the same bits on any number of
/// threads.
pub fn count_pairs(blocks: &DistinctBlocks, taus: &[f64], requests: usize) -> Result<LayerSums> {
    let n = blocks.len();
    let positions = blocks.homes.iter().map(|h| h[0].position as usize + 1).max().unwrap_or(0);
    let extent = Extent { requests, positions };
    // Which blocks one request alone holds.
    let single: Vec<bool> =
        blocks.homes.iter().map(|h| h.iter().all(|x| x.request == h[0].request)).collect();
    let empty = || vec![PairSums::empty(taus.len(), extent); Class::ALL.len()];
    let mut sums = LayerSums { keys: empty(), values: empty() };
    let strips: Vec<usize> = (0..n).step_by(STRIP).collect();
    for round in strips.chunks(ROUND) {
        interrupt::check()?;
        let counted: Vec<LayerSums> = round
            .par_iter()
            .map(|&first| count_strip(blocks, &single, taus, extent, first..n.min(first + STRIP)))
            .collect();
        for strip in &counted {
            for (into, from) in [(&mut sums.keys, &strip.keys), (&mut sums.values, &strip.values)] {
                into.iter_mut().zip(from).for_each(|(a, b)| *a += b);
            }
        }
    }
    // A pair of any class is a pair: only what depends on a block's pairs together was counted for all of them.
    for part in [&mut sums.keys, &mut sums.values] {
        let (all, classes) = part.split_last_mut().unwrap_or_else(|| unreachable!("there are four classes"));
        classes.iter().for_each(|class| all.histogram += &class.histogram);
    }
    Ok(sums)
}

fn count_strip(
    blocks: &DistinctBlocks,
    single: &[bool],
    taus: &[f64],
    extent: Extent,
    rows: std::ops::Range<usize>,
) -> LayerSums {
    let (n, width) = (blocks.len(), blocks.width);
    let times_all = |numbers: &[f32]| {
        let mut out = vec![0.0; rows.len() * n];
        let strip = View::row_major(&numbers[rows.start * width..rows.end * width], rows.len(), width);
        product(strip, View::row_major(numbers, n, width).transposed(), &mut out);
        out
    };
    let (key_products, value_products) = (times_all(&blocks.keys), times_all(&blocks.values));
    let mut counters = [Counter::new(taus, extent), Counter::new(taus, extent)];
    let mut classes = vec![Class::All; n];
    for (i, row) in rows.clone().enumerate() {
        classes.iter_mut().enumerate().for_each(|(j, class)| *class = blocks.class(row, j));
        let keys = &key_products[i * n..][..n];
        let values = &value_products[i * n..][..n];
        let home = blocks.homes[row][0];
        let [key_counter, value_counter] = &mut counters;
        key_counter.row((row, home), &classes, single, keys, values);
        value_counter.row((row, home), &classes, single, values, keys);
    }
    let [keys, values] = counters.map(Counter::finish);
    LayerSums { keys, values }
}

/// Counts the rows of one strip, of one part.
struct Counter<'a> {
    taus: &'a [f64],
    sums: Vec<PairSums>,
    rows: Vec<Row>,
    /// Pairs read in reading order, each once.
    seen: Vec<u64>,
}

impl<'a> Counter<'a> {
    fn new(taus: &'a [f64], extent: Extent) -> Self {
        let classes = Class::ALL.len();
        Counter {
            taus,
            sums: vec![PairSums::empty(taus.len(), extent); classes],
            rows: vec![Row::empty(taus.len()); classes],
            seen: vec![0; classes],
        }
    }

    /// Reads the pairs of block `row` with all others. `single`: which blocks one request alone holds; `other`: the cosines
    /// of the other part.
    fn row(
        &mut self,
        (row, home): (usize, Home),
        classes: &[Class],
        single: &[bool],
        cosines: &[f32],
        other: &[f32],
    ) {
        self.rows.iter_mut().for_each(Row::clear);
        for (j, ((&class, &s), &o)) in classes.iter().zip(cosines).zip(other).enumerate() {
            if j == row {
                continue;
            }
            // Rounding may leave a cosine just outside.
            let s = f64::from(s).clamp(-1.0, 1.0);
            let level = self.taus.partition_point(|&tau| s > tau);
            self.sums[class as usize].histogram.add(s);
            // Both blocks of a pair within a request have a row; of any other pair that goes only one counts.
            let sides = if class == Class::SameRequest && single[j] { 1 } else { 2 };
            for c in [class as usize, Class::All as usize] {
                self.rows[c].add(s, f64::from(o), level, sides);
                if j > row {
                    self.seen[c] += 1;
                    for above in &mut self.sums[c].above[..level] {
                        above.gaps.exceeds_at(self.seen[c]);
                    }
                }
            }
        }
        let single_row = single[row];
        for (sums, row) in self.sums.iter_mut().zip(&self.rows) {
            sums.add_row(row, home, single_row);
        }
    }

    fn finish(mut self) -> Vec<PairSums> {
        for (sums, seen) in self.sums.iter_mut().zip(self.seen) {
            sums.above.iter_mut().for_each(|a| a.gaps.end(seen));
        }
        self.sums
    }
}
