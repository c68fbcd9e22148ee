//! Matrix products: a safe, thread-count-independent face on the `gemm` crate.
//!
//! Every product is cut into tiles that depend on the operands' shapes only; each tile is computed by one thread. So the
//! same product has the same bits whatever the number of threads.

use super::kernels::has_fused_multiply_add;
use super::numbers::Numbers;
use super::panels::{PANEL, Panels};
use gemm::Parallelism;
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// A read-only matrix view: element (i, j) lies at `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> View<'a> {
    /// `[rows, columns]`, row-major and dense.
    pub fn row_major(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert!(data.len() >= rows * columns);
        View { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// The same elements read as `[columns, rows]`.
    pub fn transposed(self) -> Self {
        View {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn check(&self) {
        if self.rows > 0 && self.columns > 0 {
            let last = (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride;
            assert!(last < self.data.len(), "matrix view reaches past its data");
        }
    }
}

/// `out[m, n] = a[m, k] * b[k, n]`, row-major `out`, on the calling thread.
pub fn product(a: View, b: View, out: &mut [f32]) {
    let (m, k, n) = (a.rows, a.columns, b.columns);
    assert_eq!(k, b.rows);
    assert!(out.len() >= m * n);
    a.check();
    b.check();
    if m == 0 || n == 0 {
        return;
    }
    // SAFETY: both views were checked to lie within their slices, `out` holds m*n elements, is written through
    // (row stride n, column stride 1) only, and cannot alias `a` or `b` because it is borrowed mutably.
    unsafe { product_raw(a, b, out.as_mut_ptr(), n) }
}

/// # Safety
/// `a` and `b` are in bounds, and `out` is valid for writes at `i * out_stride + j` for all i < a.rows, j < b.columns.
unsafe fn product_raw(a: View, b: View, out: *mut f32, out_stride: usize) {
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out,
            1,
            out_stride as isize,
            false,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        )
    }
}

/// Rows of a tile of [`for_tiles`].
pub const ROWS: usize = 128;

/// Tile after tile of `[rows, columns]`, in parallel: `change` gets a tile's rows and their numbers.
pub fn for_tiles(numbers: &mut [f32], columns: usize, change: impl Fn(Range<usize>, &mut [f32]) + Sync) {
    let rows = numbers.len() / columns.max(1);
    let tiles = numbers.par_chunks_mut((ROWS * columns).max(1)).enumerate();
    tiles.for_each(|(tile, numbers)| change(tile * ROWS..((tile + 1) * ROWS).min(rows), numbers));
}

/// `[rows, columns]`, made tile after tile as by [`for_tiles`].
pub fn by_tiles(rows: usize, columns: usize, make: impl Fn(Range<usize>, &mut [f32]) + Sync) -> Vec<f32> {
    let mut out = vec![0.0f32; rows * columns];
    for_tiles(&mut out, columns, make);
    out
}

/// A tile's rows, `[at most ROWS, k]`, times `b [k, n]`. All tiles are multiplied in the same shape, filled up with zeros: what a row rounds
/// to depends neither on its company nor on threads.
pub fn tile_product(a: &[f32], b: View, out: &mut [f32]) {
    let (k, n) = (b.rows, b.columns);
    if a.len() == ROWS * k {
        return product(View::row_major(a, ROWS, k), b, out);
    }
    let mut padded = a.to_vec();
    padded.resize(ROWS * k, 0.0);
    let mut tile = vec![0.0f32; ROWS * n];
    product(View::row_major(&padded, ROWS, k), b, &mut tile);
    out.copy_from_slice(&tile[..out.len()]);
}

/// `a [rows, k]` times `b [k, n]`, by tiles.
pub fn tiled(a: &[f32], b: View) -> Vec<f32> {
    let k = b.rows;
    let tile = |rows: Range<usize>, out: &mut [f32]| tile_product(&a[rows.start * k..rows.end * k], b, out);
    by_tiles(a.len() / k.max(1), b.columns, tile)
}

/// The weight of a linear layer, cut along its outputs into panels of 64, each `[inputs, panel outputs]`.
///
/// A panel is read from one end to the other, output-contiguous: the kernel needs no packing and the memory no seeking,
/// which is what a decode step of a few sequences spends its time on. Weights stored in 16 or fewer bits stay so; a panel of
/// them is turned into f32 when it is multiplied.
pub struct Linear {
    weight: Panels,
    inputs: usize,
    outputs: usize,
}

/// Rows of one tile: more tiles when there are many rows.
const TILE_ROWS: usize = 256;

thread_local! {
    /// Where a panel is unpacked.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct OutPointer(*mut f32);
// SAFETY: tiles write disjoint parts of the output; see `Linear::apply`.
unsafe impl Sync for OutPointer {}

impl OutPointer {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

impl Linear {
    /// From `[outputs, inputs]`, the order of model files. Several such matrices are stacked along the outputs.
    pub fn from_rows(parts: &[&[f32]], inputs: usize) -> Self {
        Self::stack(parts.iter().map(|p| Numbers::F32(p.to_vec())).collect(), inputs)
    }

    /// [`Linear::from_rows`] in the precision the numbers have; in f32 if they differ in it.
    pub fn stack(parts: Vec<Numbers>, inputs: usize) -> Self {
        let weight = Panels::stack(parts, inputs);
        let outputs = weight.len() / inputs;
        Linear { weight, inputs, outputs }
    }

    /// Appends the weights of one output (`[inputs]`).
    pub fn extend_with_row(&self, output: usize, out: &mut Vec<f32>) {
        let shape = (self.outputs, self.inputs);
        out.extend((0..self.inputs).map(|i| self.weight.get(output, i, shape)));
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of weights.
    pub fn parameters(&self) -> usize {
        self.weight.len()
    }

    /// `x [rows, inputs]` times the weight: `[rows, outputs]`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        assert_eq!(x.len() % self.inputs, 0);
        let rows = x.len() / self.inputs;
        let mut out = vec![0.0; rows * self.outputs];
        if let Panels::Coded(panels) = &self.weight
            && rows == 1
            && has_fused_multiply_add()
        {
            // Panels in f32 would be written and read for one row; sums are those of the `gemm` crate, which adds one row up input by input.
            out.par_chunks_mut(PANEL).enumerate().for_each(|(panel, out)| {
                out.copy_from_slice(&panels.times_row(x, panel)[..out.len()]);
            });
            return out;
        }
        let pointer = OutPointer(out.as_mut_ptr());
        let row_tiles = rows.div_ceil(TILE_ROWS);
        let column_tiles = self.outputs.div_ceil(PANEL);
        (0..row_tiles * column_tiles).into_par_iter().for_each(|tile| {
            let row = tile % row_tiles * TILE_ROWS;
            let column = tile / row_tiles * PANEL;
            let tile_rows = TILE_ROWS.min(rows - row);
            let tile_columns = PANEL.min(self.outputs - column);
            let a = View::row_major(&x[row * self.inputs..], tile_rows, self.inputs);
            SCRATCH.with_borrow_mut(|scratch| {
                let (data, row_stride) = self.weight.read(column, tile_columns, self.inputs, scratch);
                let b = View { data, rows: self.inputs, columns: tile_columns, row_stride, column_stride: 1 };
                a.check();
                b.check();
                // SAFETY: the views were checked. Tile (row, column) writes rows row..row+tile_rows and columns
                // column..column+tile_columns of `out`, which lies inside its rows*outputs elements; no two tiles share
                // an element and `out` outlives the loop.
                unsafe {
                    let corner = pointer.get().add(row * self.outputs + column);
                    product_raw(a, b, corner, self.outputs);
                }
            });
        });
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use proptest::prelude::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i * 31 + seed * 17) % 23) as f32 - 11.0) / 8.0).collect()
    }

    fn naive(a: &[f32], w: &[f32], rows: usize, inputs: usize, outputs: usize) -> Vec<f32> {
        let mut out = vec![0.0; rows * outputs];
        for r in 0..rows {
            for o in 0..outputs {
                out[r * outputs + o] = (0..inputs).map(|i| a[r * inputs + i] * w[o * inputs + i]).sum();
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn linear_equals_the_naive_product(rows in 1usize..300, inputs in 1usize..40, outputs in 1usize..420) {
            let (x, w) = (numbers(rows * inputs, 1), numbers(outputs * inputs, 2));
            let got = Linear::from_rows(&[&w], inputs).apply(&x);
            for (g, e) in got.iter().zip(naive(&x, &w, rows, inputs, outputs)) {
                prop_assert!((g - e).abs() < 1e-3, "{} {}", g, e);
            }
        }
    }

    /// 16-bit weights multiply as their values in f32 do, to the bit, and every row can be read back.
    #[test]
    fn stored_precision_changes_no_product() {
        let (x, w) = (numbers(5 * 24, 1), numbers(150 * 24, 2));
        let exact = Linear::from_rows(&[&w], 24);
        let halves = Numbers::F16(w.iter().map(|&x| f16::from_f32(x)).collect());
        let brains = Numbers::Bf16(w.iter().map(|&x| bf16::from_f32(x)).collect());
        for stored in [halves, brains] {
            let linear = Linear::stack(vec![stored], 24);
            assert!(matches!(linear.weight, Panels::F16(_) | Panels::Bf16(_)));
            // These numbers are eighths below 2: exact in both formats.
            assert_eq!(linear.apply(&x), exact.apply(&x));
            for output in [0, 63, 64, 127, 128, 149] {
                let mut row = Vec::new();
                linear.extend_with_row(output, &mut row);
                assert_eq!(row, &w[output * 24..][..24]);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// A row's product is the same to the bit whatever rows stand beside it.
        #[test]
        fn tiled_rows_do_not_know_their_company(first in 0usize..200, rows in 1usize..200, k in 1usize..90, n in 1usize..90) {
            let (a, b) = (numbers((first + rows) * k, 1), numbers(k * n, 2));
            let b = View::row_major(&b, k, n);
            let all = tiled(&a, b);
            let alone = tiled(&a[first * k..], b);
            prop_assert_eq!(&all[first * n..], &alone[..]);
        }
    }

    #[test]
    fn strided_views_multiply_like_dense_ones() {
        let (x, w) = (numbers(3 * 4, 1), numbers(5 * 4, 2));
        let mut out = vec![0.0; 15];
        product(View::row_major(&x, 3, 4), View::row_major(&w, 5, 4).transposed(), &mut out);
        assert_eq!(out, naive(&x, &w, 3, 4, 5));
    }

    #[test]
    fn one_thread_and_two_give_the_same_bits() {
        let linear = Linear::from_rows(&[&numbers(500 * 64, 3)], 64);
        let x = numbers(300 * 64, 4);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| linear.apply(&x))
        };
        assert_eq!(on(1), on(2));
    }
}
