//! Which bits each direction gets: dynamic programming over groups of neighbouring directions.

/// Directions that share a scale and an offset, of each token.
pub const GROUPS: [usize; 3] = [16, 64, 256];
/// Bits of a code.
pub const WIDTHS: [u32; 3] = [2, 4, 8];
/// Bits of a group's scale and offset.
const SIDE: u32 = 32;
/// Bits of a direction that is stored as it is.
const RAW: u32 = 16;

/// What quantising costs, in squared error a token.
#[derive(Debug, Clone)]
pub struct Costs {
    /// Of the group that begins at a direction, by its size and its bits: `[directions, GROUPS, WIDTHS]`.
    pub errors: Vec<f32>,
    /// Of leaving out a direction and all behind it, what lies outside of all directions included: `[directions + 1]`.
    pub tail: Vec<f32>,
}

/// Neighbouring directions that are stored alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// One direction in f16.
    Raw,
    /// So many, in so many bits each, with a scale and an offset.
    Coded { size: usize, bits: u32 },
}

impl Group {
    pub fn size(self) -> usize {
        match self {
            Group::Raw => 1,
            Group::Coded { size, .. } => size,
        }
    }

    /// Of a token.
    fn bits(self) -> u32 {
        match self {
            Group::Raw => RAW,
            Group::Coded { size, bits } => SIDE + size as u32 * bits,
        }
    }
}

/// Groups from the first direction on; those behind them are left out. `bits` a token are not exceeded, and as much of them is used
/// as some price of a bit makes worthwhile (the lower convex hull of what there is).
pub fn allocate(costs: &Costs, bits: f64) -> Vec<Group> {
    let of = |price: f64| {
        let groups = cheapest(costs, price);
        let used: u32 = groups.iter().map(|g| g.bits()).sum();
        (groups, f64::from(used))
    };
    let scale = f64::from(costs.tail[0]).max(f64::MIN_POSITIVE);
    // Prices by halving an interval of logarithms: the dearer end always keeps to the bits.
    let (mut cheap, mut dear) = (scale * 1e-12, scale);
    for _ in 0..60 {
        let middle = (cheap * dear).sqrt();
        if of(middle).1 <= bits {
            dear = middle;
        } else {
            cheap = middle;
        }
    }
    let (groups, used) = of(dear);
    if used <= bits { groups } else { Vec::new() }
}

/// The groups of least error plus price times bits.
fn cheapest(costs: &Costs, price: f64) -> Vec<Group> {
    let n = costs.tail.len() - 1;
    let mut best: Vec<(f64, Option<Group>)> = vec![(f64::from(costs.tail[n]), None); n + 1];
    for i in (0..n).rev() {
        let mut own = (f64::from(costs.tail[i]), None);
        // What lies outside of all directions is in every end's tail.
        let mut offer = |group: Group, error: f64| {
            let cost = error + price * f64::from(group.bits()) + best[i + group.size()].0;
            if cost < own.0 {
                own = (cost, Some(group));
            }
        };
        offer(Group::Raw, 0.0);
        for (g, &size) in GROUPS.iter().enumerate().filter(|(_, size)| i + **size <= n) {
            for (w, &bits) in WIDTHS.iter().enumerate() {
                let error = costs.errors[(i * GROUPS.len() + g) * WIDTHS.len() + w];
                offer(Group::Coded { size, bits }, f64::from(error));
            }
        }
        best[i] = own;
    }
    let mut groups = Vec::new();
    let mut at = 0;
    while let Some(group) = best[at].1 {
        groups.push(group);
        at += group.size();
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Costs of directions with these variances, uniform codes over four deviations of the widest of a group.
    fn costs(variances: &[f32]) -> Costs {
        let n = variances.len();
        let mut errors = Vec::new();
        for i in 0..n {
            for size in GROUPS {
                let own = &variances[i..(i + size).min(n)];
                let most = own.iter().copied().fold(0.0, f32::max);
                errors.extend(WIDTHS.map(|bits| {
                    let step = 4.0 * most.sqrt() / ((1u32 << bits) - 1) as f32;
                    own.len() as f32 * step * step / 12.0
                }));
            }
        }
        let tail = (0..=n).map(|i| variances[i..].iter().sum()).collect();
        Costs { errors, tail }
    }

    proptest! {
        /// More bits are never worse, and never more are used than there are.
        #[test]
        fn bits_are_kept_to_and_used(n in 1usize..300, decay in 0.9f32..0.999, more in 1.0f64..4.0, bits in 1.0f64..3000.0) {
            let variances: Vec<f32> = (0..n as i32).map(|i| decay.powi(i)).collect();
            let costs = costs(&variances);
            let error = |groups: &[Group]| {
                let mut at = 0;
                let mut sum = 0.0;
                for group in groups {
                    if let Group::Coded { size, bits } = group {
                        let g = GROUPS.iter().position(|s| s == size).unwrap();
                        let w = WIDTHS.iter().position(|b| b == bits).unwrap();
                        sum += costs.errors[(at * GROUPS.len() + g) * WIDTHS.len() + w];
                    }
                    at += group.size();
                }
                assert!(at <= n);
                sum + costs.tail[at]
            };
            let (few, many) = (allocate(&costs, bits), allocate(&costs, bits * more));
            let used = |groups: &[Group]| groups.iter().map(|g| f64::from(g.bits())).sum::<f64>();
            prop_assert!(used(&few) <= bits && used(&many) <= bits * more);
            prop_assert!(error(&many) <= error(&few) * (1.0 + 1e-5));
        }
    }
}
