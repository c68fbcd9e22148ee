//! The Poisson-process model in closed form. Derivations, assumptions and references: docs/theory.md.
//!
//! `q` is the probability that a pair of distinct blocks lies above the threshold; all pairs are taken as independent.

/// Upper bound on the total-variation distance between the number of exceedances and a Poisson law of the same mean `lambda`
/// (Arratia, Goldstein and Gordon 1989). `b1`: sum of p_i p_j over pairs i and their neighbours j, themselves included; `b2`:
/// expected exceedances of both of two neighbours, over ordered such pairs of pairs. (docs/theory.md, 2)
pub fn poisson_error(lambda: f64, b1: f64, b2: f64) -> f64 {
    if lambda <= 0.0 {
        return 0.0;
    }
    ((1.0f64).min(1.0 / lambda) * (b1 + b2)).min(1.0)
}

/// Blocks in groups, by position: their number, and the probability that two of one group are above the threshold.
/// `elsewhere`: that of two of different groups.
///
/// b1 = sum over blocks of r^2 - sum over pairs of p^2, r being the exceedances that a block expects: a pair is a neighbour of
/// itself and of those that share either of its blocks. (docs/theory.md, 2)
pub fn b1_of_groups(groups: &[(f64, f64)], elsewhere: f64) -> f64 {
    let all: f64 = groups.iter().map(|g| g.0).sum();
    let within: f64 = groups.iter().map(|g| g.0 * (g.0 - 1.0).max(0.0) / 2.0).sum();
    let between = all * (all - 1.0).max(0.0) / 2.0 - within;
    let own = groups.iter().map(|&(n, p)| {
        let expected = (n - 1.0).max(0.0) * p + (all - n) * elsewhere;
        n * expected * expected - n * (n - 1.0).max(0.0) / 2.0 * p * p
    });
    own.sum::<f64>() - between * elsewhere * elsewhere
}

/// Blocks expected at the root of the paper's tree over `blocks` blocks of `requests` requests: a right block stays if none of
/// the left ones matches it, n = l + r (1 - q)^l. With fewer blocks than requests, leaves without a block do not count.
/// (docs/theory.md, 3)
pub fn tree_blocks(requests: usize, blocks: f64, q: f64) -> f64 {
    // Subtrees of equal size have equal expectations, and there are two sizes on every level.
    fn node(requests: usize, leaf: f64, q: f64, known: &mut Vec<(usize, f64)>) -> f64 {
        if requests <= 1 {
            return requests as f64 * leaf;
        }
        if let Some((_, blocks)) = known.iter().find(|(n, _)| *n == requests) {
            return *blocks;
        }
        let left = node(requests / 2, leaf, q, known);
        let right = node(requests - requests / 2, leaf, q, known);
        let blocks = left + right * (1.0 - q).powf(left);
        known.push((requests, blocks));
        blocks
    }
    let leaves = requests.min(blocks as usize).max(1);
    node(leaves, blocks / leaves as f64, q.clamp(0.0, 1.0), &mut Vec::new())
}

/// Blocks up to which components are counted exactly.
const FEW: f64 = 20.0;

/// Connected components expected of `n` blocks. Few are counted exactly (Gilbert 1959); of many (Erdos and Renyi 1960), with
/// c = (n - 1) q and c' <= 1 the other solution of c' e^-c' = c e^-c, the small ones number n (c' - c'^2/2) / c, and beyond
/// c = 1 there is a giant one beside them. (docs/theory.md, 4)
pub fn component_count(n: f64, q: f64) -> f64 {
    if n <= 1.0 || q <= 0.0 {
        return n;
    }
    if q >= 1.0 {
        return 1.0;
    }
    if n <= FEW {
        // Between two whole numbers on a straight line.
        let (low, share) = (n.floor(), n.fract());
        return few_components(low as usize, q) * (1.0 - share) + few_components(low as usize + 1, q) * share;
    }
    let c = (n - 1.0) * q;
    let dual = dual_degree(c);
    let small = n * (dual - 0.5 * dual * dual) / c;
    (small + giant_share(n, q)).clamp(1.0, n)
}

/// Sum over k of the expected components of k blocks: C(n, k) P(k connected) (1 - q)^(k (n - k)).
fn few_components(n: usize, q: f64) -> f64 {
    let choose = |n: usize, k: usize| (0..k).fold(1.0, |c, i| c * (n - i) as f64 / (i + 1) as f64);
    let apart = |a: usize, b: usize| (1.0 - q).powi((a * b) as i32);
    // Not connected: the component of the first block has j < k blocks.
    let mut connected = vec![1.0; n + 1];
    for k in 2..=n {
        let split: f64 = (1..k).map(|j| choose(k - 1, j - 1) * connected[j] * apart(j, k - j)).sum();
        connected[k] = (1.0 - split).max(0.0);
    }
    (1..=n).map(|k| choose(n, k) * connected[k] * apart(k, n - k)).sum()
}

/// Share of all blocks in the giant component: 0 up to c = (n - 1) q = 1, then 1 - c'/c.
pub fn giant_share(n: f64, q: f64) -> f64 {
    let c = (n - 1.0) * q;
    if c > 1.0 { 1.0 - dual_degree(c) / c } else { 0.0 }
}

/// c' <= 1 with c' e^-c' = c e^-c.
fn dual_degree(c: f64) -> f64 {
    if c <= 1.0 {
        return c;
    }
    let target = c * (-c).exp();
    // x -> x e^-x rises from 0 to 1.
    let (mut low, mut high) = (0.0f64, 1.0f64);
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        if middle * (-middle).exp() < target { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// Blocks up to which representatives are counted one by one.
const ONE_BY_ONE: usize = 256;

/// Representatives expected when blocks come one by one and join any representative above the threshold: k grows by
/// (1 - q)^k a block; for many blocks, with a = -ln(1 - q), e^(a k) grows by a. (docs/theory.md, 5)
pub fn leader_count(n: f64, q: f64) -> f64 {
    if n <= 1.0 || q <= 0.0 {
        return n;
    }
    if q >= 1.0 {
        return 1.0;
    }
    let (mut k, mut seen) = (1.0f64, 1.0);
    while seen < n && seen < ONE_BY_ONE as f64 {
        k += (n - seen).min(1.0) * (1.0 - q).powf(k);
        seen += 1.0;
    }
    let a = -(1.0 - q).ln();
    // ln(e^(a k) + a m) without the overflow.
    let rest = (n - seen).max(0.0);
    k + (a * rest * (-a * k).exp()).ln_1p() / a
}

/// Relative squared error of a block that is replaced by another at cosine `s`, its own norm restored. (docs/theory.md, 6)
pub fn verbatim_error(s: f64) -> f64 {
    2.0 * (1.0 - s)
}

/// The same, averaged over the `m` blocks of a cluster, for their mean direction: all have cosine `s` to one of them, and the
/// others `others` between each other. The mean cosine of the members to their mean is the mean's own length. (6)
pub fn star_error(s: f64, others: f64, m: f64) -> f64 {
    let square = (m + 2.0 * (m - 1.0) * s + (m - 1.0) * (m - 2.0) * others) / (m * m);
    2.0 * (1.0 - square.clamp(0.0, 1.0).sqrt())
}

/// Cosine expected between two blocks that both have cosine `s` to a third, if beyond a common component (`common`: the mean
/// cosine) nothing ties them: s' = common + (s - common)^2 / (1 - common). (6)
pub fn second_hand_cosine(s: f64, common: f64) -> f64 {
    if common < 1.0 { common + (s - common).powi(2) / (1.0 - common) } else { s }
}

/// Cosine between two mean directions of `m` blocks each, all 2m with common pairwise cosine `s`: it rises with m, which is
/// why means drift together. (docs/theory.md, 7)
pub fn mean_cosine(s: f64, m: f64) -> f64 {
    m * s / (1.0 + (m - 1.0) * s)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use statrs::distribution::{Binomial, Discrete, Poisson};
    use std::collections::HashSet;

    /// One pair alone is a Bernoulli variable, whose distance from its Poisson law is q (1 - e^-q) <= q^2 = the bound; sums of
    /// independent pairs stay below it.
    #[test]
    fn the_poisson_error_bounds_exact_distances() {
        for (n, q) in [(1u64, 0.05), (10, 0.01), (40, 0.1)] {
            let (binomial, poisson) = (Binomial::new(q, n).unwrap(), Poisson::new(n as f64 * q).unwrap());
            let apart: f64 = (0..200u64)
                .map(|k| (if k <= n { binomial.pmf(k) } else { 0.0 } - poisson.pmf(k)).abs())
                .sum();
            let bound = poisson_error(n as f64 * q, n as f64 * q * q, 0.0);
            assert!(0.5 * apart <= bound && bound < 10.0 * apart, "{n} {q}: {apart} {bound}");
        }
        // All pairs above together or not at all: the count is no Poisson variable, and the bound says nothing.
        assert_eq!(poisson_error(10.0, 100.0, 990.0), 1.0);
        assert_eq!(poisson_error(0.0, 0.0, 0.0), 0.0);
    }

    /// Against the sum over pairs of pairs that share a block, one by one.
    #[test]
    fn b1_counts_every_neighbour() {
        let groups = [(3.0, 0.5), (1.0, 0.9), (4.0, 0.125)];
        let of: Vec<usize> = vec![0, 0, 0, 1, 2, 2, 2, 2];
        let pairs: Vec<(usize, usize)> = (0..8).flat_map(|a| (0..a).map(move |b| (b, a))).collect();
        let p = |&(a, b): &(usize, usize)| if of[a] == of[b] { groups[of[a]].1 } else { 0.25 };
        let touch =
            |x: &(usize, usize), y: &(usize, usize)| x.0 == y.0 || x.0 == y.1 || x.1 == y.0 || x.1 == y.1;
        let expected: f64 =
            pairs.iter().flat_map(|x| pairs.iter().filter(|y| touch(x, y)).map(|y| p(x) * p(y))).sum();
        assert!((b1_of_groups(&groups, 0.25) - expected).abs() < 1e-12);
        // One probability for all: N (M + 1) q^2.
        let uniform = 28.0 * (2.0 * 6.0 + 1.0) * 0.25 * 0.25;
        assert!((b1_of_groups(&[(8.0, 0.25)], 0.25) - uniform).abs() < 1e-12);
    }

    #[test]
    fn limits_of_the_tree() {
        assert_eq!(tree_blocks(8, 40.0, 0.0), 40.0);
        assert_eq!(tree_blocks(8, 40.0, 1.0), 5.0);
        assert_eq!(tree_blocks(1, 5.0, 0.3), 5.0);
        assert_eq!(tree_blocks(0, 0.0, 0.3), 0.0);
        // Two leaves of one block: the second stays with probability 1 - q.
        assert!((tree_blocks(2, 2.0, 0.3) - 1.7).abs() < 1e-12);
        // Three: 1 | (1, 1).
        let right = 1.7;
        assert!((tree_blocks(3, 3.0, 0.3) - (1.0 + right * 0.7)).abs() < 1e-12);
        // Three blocks of 64 requests are three leaves.
        assert_eq!(tree_blocks(64, 3.0, 0.3), tree_blocks(3, 3.0, 0.3));
    }

    /// Below c = 1 the components of a random graph are trees: n - edges. At c = 2 the dual is 0.40637, the giant component has
    /// a share of 0.79681 (tabulated).
    #[test]
    fn erdos_renyi_limits() {
        assert!((component_count(1e6, 0.5e-6) / 1e6 - 0.75).abs() < 1e-6);
        assert_eq!(component_count(100.0, 0.0), 100.0);
        assert_eq!(giant_share(1e6, 0.9e-6), 0.0);
        assert!((giant_share(1e6, 2e-6) - 0.796_812).abs() < 1e-5);
        let small = 0.406_375_74 - 0.5 * 0.406_375_74f64.powi(2);
        assert!((component_count(1e6, 2e-6) / 1e6 - small / 2.0).abs() < 2e-6);
        assert_eq!(component_count(50.0, 1.0), 1.0);
        // Two blocks: 2 - q. Three: 3 - 3q + q^3.
        assert!((component_count(2.0, 0.3) - 1.7).abs() < 1e-12);
        assert!((component_count(3.0, 0.3) - (3.0 - 0.9 + 0.027)).abs() < 1e-12);
        assert!((leader_count(2.0, 0.3) - 1.7).abs() < 1e-12);
    }

    /// Graphs of independent pairs, drawn and counted.
    #[test]
    fn components_and_leaders_of_drawn_graphs() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (n, q) in
            [(400usize, 0.5 / 400.0), (400, 2.0 / 400.0), (300, 0.05), (5, 0.2), (15, 0.1), (30, 0.05)]
        {
            let (mut components, mut leaders, draws) = (0.0, 0.0, if n < 100 { 2000 } else { 60 });
            for _ in 0..draws {
                let mut edges: HashSet<(usize, usize)> = HashSet::new();
                let pairs = (0..n).flat_map(|i| (0..i).map(move |j| (i, j)));
                edges.extend(pairs.filter(|_| rng.random_bool(q)));
                let mut label: Vec<usize> = (0..n).collect();
                for &(i, j) in &edges {
                    let (from, to) = (label[i], label[j]);
                    label.iter_mut().filter(|l| **l == from).for_each(|l| *l = to);
                }
                label.sort_unstable();
                label.dedup();
                components += label.len() as f64 / f64::from(draws);
                let mut found: Vec<usize> = Vec::new();
                for i in 0..n {
                    if found.iter().all(|&leader| !edges.contains(&(i, leader))) {
                        found.push(i);
                    }
                }
                leaders += found.len() as f64 / f64::from(draws);
            }
            let (predicted, led) = (component_count(n as f64, q), leader_count(n as f64, q));
            assert!((components / predicted - 1.0).abs() < 0.05, "{n} {q}: {components} {predicted}");
            assert!((leaders / led - 1.0).abs() < 0.05, "{n} {q}: {leaders} {led}");
        }
    }

    /// More pairs above the threshold never leave more blocks, and never fewer than one.
    #[test]
    fn blocks_fall_with_q() {
        for n in [1.0, 1.5, 2.0, 5.3, 19.9, 20.1, 60.0, 700.0, 1e5] {
            for count in [component_count, leader_count, |n, q| tree_blocks(16, n, q)] {
                let mut last = n;
                for i in 0..400 {
                    let q = (f64::from(i) / 400.0).powi(3);
                    let now = count(n, q);
                    assert!(now <= last * (1.0 + 1e-3) + 1e-9 && now >= 1.0 - 1e-9, "{n} {q}: {last} {now}");
                    last = now;
                }
            }
        }
    }

    /// Errors of real vectors with one common cosine: simplex directions plus a common component.
    #[test]
    fn errors_of_means() {
        let (m, s) = (5usize, 0.6f64);
        // x_i = sqrt(s) e_0 + sqrt(1 - s) e_i.
        let x = |i: usize| -> Vec<f64> {
            (0..=m)
                .map(|k| {
                    if k == 0 {
                        s.sqrt()
                    } else if k == i + 1 {
                        (1.0 - s).sqrt()
                    } else {
                        0.0
                    }
                })
                .collect()
        };
        let sum: Vec<f64> = (0..=m).map(|k| (0..m).map(|i| x(i)[k]).sum()).collect();
        let norm = sum.iter().map(|v| v * v).sum::<f64>().sqrt();
        let error: f64 = x(0).iter().zip(&sum).map(|(a, b)| (a - b / norm).powi(2)).sum();
        assert!((error - star_error(s, s, m as f64)).abs() < 1e-12);
        // A star: the leaves' own cosine is s^2 with no common component.
        assert_eq!(second_hand_cosine(0.5, 0.0), 0.25);
        assert!(star_error(s, s * s, 3.0) > star_error(s, s, 3.0));
        assert_eq!(verbatim_error(1.0), 0.0);
        assert!(mean_cosine(s, 8.0) > mean_cosine(s, 2.0) && mean_cosine(s, 1.0) == s);
    }
}
