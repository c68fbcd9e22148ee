//! How often columns come back whose pages went: what decides whether a cold column is worth coding.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

/// A column comes back as one of so many at least, if it is to be coded. Coding takes a fifth to a third of what computing takes, decoding
/// an eighth to a sixth (results/migration, results/serve-turns): it pays from one in five, or from one in two.
const WORTH: u64 = 3;
/// Columns that are coded before anything is known.
const TRIAL: u64 = 256;
/// Columns that are remembered when their pages have gone; beyond as many, what was counted weighs half.
const MEMORY: usize = 1 << 14;

/// Names a column by its tenant, what stands before it and its tokens, beyond its life.
pub type Chain = u64;

/// The name of a column after another, or of a first one.
pub fn chain(tenant: usize, before: Option<Chain>, tokens: &[u32]) -> Chain {
    let mut hasher = DefaultHasher::new();
    (tenant, before, tokens).hash(&mut hasher);
    hasher.finish()
}

/// Columns whose pages went, coded or not, and how many of them were asked for again.
#[derive(Debug, Default)]
pub struct Returns {
    gone: u64,
    back: u64,
    /// When they went, counted in columns.
    away: HashMap<Chain, u64>,
    order: VecDeque<(Chain, u64)>,
    clock: u64,
}

impl Returns {
    /// Whether coding cold columns pays, by what came back so far.
    pub fn pays(&self) -> bool {
        WORTH * self.back + TRIAL >= self.gone
    }

    /// A column's pages go.
    pub fn went(&mut self, chain: Chain) {
        self.clock += 1;
        if self.away.insert(chain, self.clock).is_none() {
            self.gone += 1;
        }
        self.order.push_back((chain, self.clock));
        if self.order.len() > MEMORY
            && let Some((oldest, when)) = self.order.pop_front()
            && self.away.get(&oldest) == Some(&when)
        {
            self.away.remove(&oldest);
        }
        if self.gone > MEMORY as u64 {
            self.gone /= 2;
            self.back /= 2;
        }
    }

    /// A request asks for a column.
    pub fn asked(&mut self, chain: Chain) {
        self.back += u64::from(self.away.remove(&chain).is_some());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn coding_pays_while_enough_comes_back() {
        let mut returns = Returns::default();
        let names: Vec<Chain> = (0..1000).map(|i| chain(0, Some(i), &[1, 2])).collect();
        names[..256].iter().for_each(|c| returns.went(*c));
        assert!(returns.pays(), "on trial");
        names[256..700].iter().for_each(|c| returns.went(*c));
        assert!(!returns.pays(), "nothing came back");
        names[..150].iter().for_each(|c| returns.asked(*c));
        names[..150].iter().for_each(|c| returns.asked(*c));
        assert!(returns.pays(), "enough came back");
        assert_eq!(returns.back, 150, "nobody comes back twice from going once");
        for round in 0..3 * MEMORY as u64 {
            returns.went(chain(1, Some(round), &[3]));
        }
        assert!(!returns.pays() && returns.away.len() <= MEMORY && returns.order.len() <= MEMORY);
    }

    #[test]
    fn names_tell_tenants_and_what_stands_before() {
        let of = |tenant, before| chain(tenant, before, &[7, 8]);
        let all = [of(0, None), of(1, None), of(0, Some(1)), of(0, Some(2)), chain(0, None, &[7])];
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
    }
}
