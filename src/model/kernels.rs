//! The small vector kernels of a decoder: compiled once an instruction set, chosen at run time (multiversion).

use multiversion::multiversion;

/// The instruction set that matrix products and these kernels use on this machine. Sums are rounded otherwise under another one,
/// so results carry it: their last digits are comparable only where it is the same.
pub fn instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return "avx512";
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return "avx2";
        }
    }
    std::env::consts::ARCH
}

/// Whether kernels have fused multiply-adds on this machine, as matrix products do there.
pub fn has_fused_multiply_add() -> bool {
    ["avx512", "avx2"].contains(&instructions())
}

/// Lanes that partial sums are kept in: one AVX-512 register of f32.
const LANES: usize = 16;

/// Inner product in a fixed order of summation.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_lanes.iter().zip(b_lanes) {
        for i in 0..LANES {
            sums[i] = x[i].mul_add(y[i], sums[i]);
        }
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            sums[i] += sums[i + width];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum();
    sums[0] + rest
}

/// `out += factor * x`.
#[inline(always)]
fn add_scaled(out: &mut [f32], factor: f32, x: &[f32]) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = factor.mul_add(x, *o);
    }
}

/// e^x to about 2e-7 relative, without a branch: 2^n * e^r with |r| <= ln(2)/2 and a degree-6 Taylor polynomial.
/// Inputs below -87 give about 1.6e-38, above 88 about 1.7e38.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the integer nearest to x/ln(2) in the low bits of the sum.
    const SHIFTER: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, SHIFTER);
    let n = shifted - SHIFTER;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut p = 1.0 / 720.0;
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = r.mul_add(p, c);
    }
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// Softmax of `scores`, in place.
#[inline(always)]
fn softmax(scores: &mut [f32]) {
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let (lanes, rest) = scores.as_chunks::<LANES>();
    for chunk in lanes {
        for i in 0..LANES {
            maxima[i] = maxima[i].max(chunk[i]);
        }
    }
    let max = maxima.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0f32; LANES];
    let (lanes, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in lanes {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - max);
            sums[i] += chunk[i];
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for x in rest {
        *x = exp(*x - max);
        sum += *x;
    }
    let inverse = 1.0 / sum;
    for x in scores {
        *x *= inverse;
    }
}

/// `scores[t] = scale * <query, key t>` for as many keys as there are scores. The keys of one head lie `stride` apart.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn scores(query: &[f32], keys: &[f32], stride: usize, scale: f32, scores: &mut [f32]) {
    for (t, score) in scores.iter_mut().enumerate() {
        *score = dot(query, &keys[t * stride..][..query.len()]) * scale;
    }
}

/// [`scores`] of keys that lie channel by channel, `stride` apart (`[query.len(), stride]`).
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn scores_by_channel(query: &[f32], keys: &[f32], stride: usize, scale: f32, scores: &mut [f32]) {
    let mut first = 0;
    for scores in scores.chunks_mut(LANES) {
        let mut sums = [0.0f32; LANES];
        if scores.len() == LANES {
            for (q, row) in query.iter().zip(keys.chunks_exact(stride)) {
                if let Some(lanes) = row[first..].first_chunk::<LANES>() {
                    for (sum, k) in sums.iter_mut().zip(lanes) {
                        *sum = q.mul_add(*k, *sum);
                    }
                }
            }
        } else {
            for (q, row) in query.iter().zip(keys.chunks_exact(stride)) {
                for (sum, k) in sums.iter_mut().zip(&row[first..][..scores.len()]) {
                    *sum = q.mul_add(*k, *sum);
                }
            }
        }
        for (score, sum) in scores.iter_mut().zip(&sums) {
            *score = sum * scale;
        }
        first += LANES;
    }
}

/// `out += sum over t of scale * weights[t] * value t`. The values of one head lie `stride` apart.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn weighted_sum(out: &mut [f32], values: &[f32], stride: usize, scale: f32, weights: &[f32]) {
    for (t, weight) in weights.iter().enumerate() {
        add_scaled(out, weight * scale, &values[t * stride..][..out.len()]);
    }
}

/// Softmax of every row of `rows` (`[rows, width]`): of the last `window` of its first `seen + i / group` numbers; the rest
/// becomes zero.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn causal_softmax(rows: &mut [f32], width: usize, seen: usize, group: usize, window: usize) {
    for (i, row) in rows.chunks_exact_mut(width).enumerate() {
        let (past, future) = row.split_at_mut(seen + i / group);
        let (forgotten, past) = past.split_at_mut(past.len().saturating_sub(window));
        forgotten.fill(0.0);
        softmax(past);
        future.fill(0.0);
    }
}

/// Softmax of one row, in place.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn softmax_row(row: &mut [f32]) {
    softmax(row);
}

/// GELU in its tanh form (Hendrycks and Gimpel 2016), gating: for each row `[gate, up]` of `gate_up`, `gelu(gate) * up`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn gelu_product(gate_up: &[f32], width: usize) -> Vec<f32> {
    // sqrt(2 / pi), and twice it: 0.5 (1 + tanh z) = 1 / (1 + e^-2z).
    const TWICE: f32 = 2.0 * 0.797_884_6;
    let mut out = vec![0.0; gate_up.len() / 2];
    for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
        let (gate, up) = row.split_at(width);
        for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            let z = TWICE * (g + 0.044_715 * g * g * g);
            *o = g / (1.0 + exp(-z)) * u;
        }
    }
    out
}

/// Root-mean-square norm of every row of `x` (`[rows, gain.len()]`).
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn rms_norm(x: &[f32], gain: &[f32], epsilon: f32) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for (row, out) in x.chunks_exact(gain.len()).zip(out.chunks_exact_mut(gain.len())) {
        let mean_square = dot(row, row) / gain.len() as f32;
        let factor = 1.0 / (mean_square + epsilon).sqrt();
        for ((o, &x), &g) in out.iter_mut().zip(row).zip(gain) {
            *o = x * factor * g;
        }
    }
    out
}

/// SwiGLU: for each row `[gate, up]` of `gate_up`, `silu(gate) * up`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn silu_product(gate_up: &[f32], width: usize) -> Vec<f32> {
    let mut out = vec![0.0; gate_up.len() / 2];
    for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
        let (gate, up) = row.split_at(width);
        for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            *o = g / (1.0 + exp(-g)) * u;
        }
    }
    out
}

/// Chains of fused multiply-adds that depend on nothing but themselves, as separate arrays, so that they stay in registers.
macro_rules! fma_chains {
    ($name:ident: $($chain:ident)+) => {
        #[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
        fn $name(rounds: usize, factor: f32, summand: f32) -> (u64, f32) {
            $(let mut $chain = [factor; LANES];)+
            for _ in 0..rounds {
                $(
                    for lane in &mut $chain {
                        *lane = lane.mul_add(factor, summand);
                    }
                )+
            }
            let all = [$($chain),+];
            ((rounds * all.len() * LANES * 2) as u64, all.iter().flatten().sum())
        }
    };
}

// As many as hide the latency and still fit into registers of 32 and of 64 bytes.
fma_chains!(six: a b c d e f);
fma_chains!(twelve: a b c d e f g h i j k l);

/// Nothing but fused multiply-adds in registers, `rounds` times, in six chains and in twelve: what a core can do at most. Returns the
/// number of floating-point operations, and a number that depends on all of them.
pub const FMA_CHAINS: [FmaChains; 2] = [six, twelve];

pub type FmaChains = fn(rounds: usize, factor: f32, summand: f32) -> (u64, f32);

/// Inner product of two vectors of equal length.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn inner(a: &[f32], b: &[f32]) -> f32 {
    dot(a, b)
}

/// Cosine of two vectors of equal length; 0 if one is zero.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let norm = f64::from(inner(a, a)).sqrt() * f64::from(inner(b, b)).sqrt();
    if norm > 0.0 { f64::from(inner(a, b)) / norm } else { 0.0 }
}

/// `out += factor * x`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn add_multiple(out: &mut [f32], factor: f32, x: &[f32]) {
    add_scaled(out, factor, x);
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn exp_is_accurate(x in -86.0f32..87.0) {
            let exact = f64::from(x).exp();
            prop_assert!((f64::from(exp(x)) / exact - 1.0).abs() < 4e-7);
        }

        #[test]
        fn softmax_sums_to_one_and_keeps_order(mut x in prop::collection::vec(-30.0f32..30.0, 1..70)) {
            let before = x.clone();
            softmax(&mut x);
            prop_assert!((x.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            for i in 1..x.len() {
                prop_assert!((before[i] > before[i - 1]) <= (x[i] >= x[i - 1]));
            }
        }

        #[test]
        fn both_layouts_of_keys_score_alike(tokens in 1usize..40, d in 1usize..70, spare in 0usize..3, seed in 0usize..99) {
            let number = |i: usize| ((i * 37 + seed * 11) % 29) as f32 / 14.0 - 1.0;
            let query: Vec<f32> = (0..d).map(number).collect();
            let stride = tokens + spare;
            let rows: Vec<f32> = (0..tokens * d).map(|i| number(i + d)).collect();
            let mut channels = vec![0.0; d * stride];
            for t in 0..tokens {
                for c in 0..d {
                    channels[c * stride + t] = rows[t * d + c];
                }
            }
            let (mut a, mut b) = (vec![0.0; tokens], vec![0.0; tokens]);
            scores(&query, &rows, d, 0.5, &mut a);
            scores_by_channel(&query, &channels, stride, 0.5, &mut b);
            for (a, b) in a.iter().zip(&b) {
                prop_assert!((a - b).abs() < 1e-4, "{} {}", a, b);
            }
        }

        #[test]
        fn dot_equals_the_plain_sum(a in prop::collection::vec(-2.0f32..2.0, 0..70)) {
            let exact: f64 = a.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            prop_assert!((f64::from(dot(&a, &a)) - exact).abs() < 1e-4);
        }
    }
}
