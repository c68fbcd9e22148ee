//! Rate and distortion of one layer by the closed forms, from its measured statistics.

use super::closed::{
    component_count, giant_share, leader_count, poisson_error, second_hand_cosine, star_error, tree_blocks,
    verbatim_error,
};
use super::law::{Exceedance, LayerLaw};
use crate::codec::fusion::{Pairing, Representative};
use crate::stats::Class;
use serde::Serialize;

/// A batch to predict for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Size {
    /// The one that was measured.
    Measured,
    /// Another number of requests of the same kind, each with so many blocks that no other holds.
    Of { requests: f64, own_blocks: f64 },
}

/// Which pairs are taken to be alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Model {
    /// The paper's: all pairs have the same probability of lying above the threshold.
    Uniform,
    /// Ours: pairs at one position have that position's, all others their own; blocks fuse within positions first.
    ByPosition,
}

/// What the model says of one layer, pairing and threshold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    /// Distinct blocks before fusion; exact duplicates are taken out first.
    pub distinct: f64,
    pub q: f64,
    /// Exceedances expected among all pairs.
    pub lambda: f64,
    /// Bound on how far their number is from a Poisson law, in total variation.
    pub poisson_error: Option<f64>,
    /// Blocks left, and the range that the interval of q leaves; by position only that of pairs at different ones.
    pub blocks: f64,
    pub blocks_low: f64,
    pub blocks_high: f64,
    /// Full blocks before / after, duplicates included: the paper's count.
    pub cr: f64,
    /// Share of the distinct blocks in the giant component of the threshold graph: runaway fusion.
    pub giant_share: f64,
    /// Relative squared error of the layer's keys and values; absent where nothing is known of pairs above the threshold.
    pub key_error: Option<f64>,
    pub value_error: Option<f64>,
}

/// A stretch of fusion: blocks of `requests` requests that meet with one probability.
pub(super) struct Meeting {
    pub pairing: Pairing,
    pub requests: f64,
    pub distinct: f64,
    pub q: f64,
}

impl Meeting {
    /// Blocks left.
    pub fn blocks(&self) -> f64 {
        match self.pairing {
            Pairing::Tree => tree_blocks(self.requests as usize, self.distinct / self.requests.max(1.0), self.q),
            Pairing::Components => component_count(self.distinct, self.q),
            Pairing::Best | Pairing::Lsh => leader_count(self.distinct, self.q),
        }
    }

    /// Squared error summed over distinct blocks of unit norm, if pairs above the threshold have cosine `s` and any two
    /// blocks `common` on average. The tree and components restore from a mean of all members of a cluster, `best` and
    /// `lsh` from one of them.
    pub fn error(&self, s: f64, common: f64) -> f64 {
        let joined = self.distinct - self.blocks();
        if joined <= 0.0 {
            return 0.0;
        }
        if matches!(self.pairing, Pairing::Best | Pairing::Lsh) {
            return joined * verbatim_error(s);
        }
        let own = if self.pairing == Pairing::Tree { self.distinct / self.requests.max(1.0) } else { 1.0 };
        let fused = self.distinct * (1.0 - (1.0 - self.q).powf((self.distinct - own).max(0.0)));
        // Every cluster but the fused blocks' joins none away.
        let clusters = (fused - joined).max(1.0);
        let members = (fused / clusters).max(2.0);
        fused * star_error(s, second_hand_cosine(s, common), members)
    }
}

/// Representative that the closed forms of a pairing speak of: for connected components a mean, since a verbatim block
/// below the threshold from its representative would leave its component.
pub fn representative(pairing: Pairing) -> Representative {
    match pairing {
        Pairing::Tree | Pairing::Components => Representative::Mean,
        Pairing::Best | Pairing::Lsh => Representative::First,
    }
}

/// Predicts; `None` where the threshold lies outside of those measured.
pub fn predict(law: &LayerLaw, model: Model, pairing: Pairing, tau: f64, size: Size) -> Option<Prediction> {
    // Leaves of the tree are requests: what meets are blocks of different ones.
    let across = pairing == Pairing::Tree;
    let (requests, own, distinct) = match size {
        Size::Measured => (law.requests, law.own_blocks(), law.distinct),
        Size::Of { requests, own_blocks } => (requests, own_blocks, law.shared + requests * own_blocks),
    };
    let measured = size == Size::Measured;
    let all_pairs = if measured { law.measured(tau, across) } else { law.at(tau, requests, own, across) };
    // A single block has no pairs, and nothing to fuse.
    let e = match all_pairs {
        Some(e) => e,
        None if distinct <= 1.0 => Exceedance::none(tau),
        None => return None,
    };
    let meeting = |distinct: f64, q: f64| Meeting { pairing, requests, distinct, q };
    let (blocks, blocks_low, blocks_high, errors) = match model {
        Model::Uniform => {
            let whole = meeting(distinct, e.q);
            let common = law.class(Class::All).mean;
            let of = |s: Option<f64>, common: f64| s.map(|s| whole.error(s, common));
            let blocks = whole.blocks();
            let errors = if blocks < distinct {
                (of(e.mean_above, common), of(e.value_above, law.value_mean))
            } else {
                (Some(0.0), Some(0.0))
            };
            (blocks, meeting(distinct, e.high).blocks(), meeting(distinct, e.low).blocks(), errors)
        }
        Model::ByPosition => by_position(law, pairing, tau, (requests, own, distinct), &e)?,
    };
    let pairs = if across {
        0.5 * distinct * distinct * (1.0 - 1.0 / requests.max(1.0))
    } else {
        0.5 * distinct * (distinct - 1.0)
    };
    // Full blocks of the batch: of another size, those that are shared count once a request.
    let all = if measured {
        law.blocks
    } else {
        let held_by_many = law.blocks / law.requests.max(1.0) - law.own_blocks();
        requests * (own + held_by_many.max(0.0))
    };
    // Blocks that are not full take a share of the energy and have no error.
    let share = match law.tokens.filter(|_| measured) {
        Some(tokens) => law.block_size as f64 / tokens,
        None => 1.0 / all,
    };
    Some(Prediction {
        distinct,
        q: e.q,
        lambda: pairs * e.q,
        poisson_error: e.rho1.map(|rho1| poisson_error(pairs, 2.0 * (distinct - 2.0).max(0.0), e.q, rho1)),
        blocks,
        blocks_low,
        blocks_high,
        cr: if blocks > 0.0 { all / blocks } else { 1.0 },
        giant_share: giant_share(distinct, e.q),
        key_error: errors.0.map(|error| error * share),
        value_error: errors.1.map(|error| error * share),
    })
}

/// Blocks left, fewest and most of them, and squared errors of keys and values summed over unit blocks.
type Outcome = (f64, f64, f64, (Option<f64>, Option<f64>));

/// Blocks left (with the range from the interval of q elsewhere) and squared errors of keys and values: first within each
/// position, then among what is left of all. Values are known of all pairs together only.
fn by_position(
    law: &LayerLaw,
    pairing: Pairing,
    tau: f64,
    (requests, own, distinct): (f64, f64, f64),
    e: &Exceedance,
) -> Option<Outcome> {
    let across = pairing == Pairing::Tree;
    let held: f64 = law.positions.iter().map(|p| p.distinct).sum();
    let factor = if held > 0.0 { distinct / held } else { 1.0 };
    let common = law.class(Class::SamePosition).mean;
    let (mut left, mut key_error, mut value_error) = (0.0, 0.0, 0.0);
    let value = e.value_above.unwrap_or(0.0);
    for position in &law.positions {
        let (q, s) = position.at(tau);
        let here = Meeting { pairing, requests, distinct: position.distinct * factor, q };
        left += here.blocks();
        key_error += here.error(s, common);
        value_error += here.error(value, law.value_mean);
    }
    let rest = law.elsewhere(tau, requests, own, across).unwrap_or(Exceedance::none(tau));
    let again = |q: f64| Meeting { pairing, requests, distinct: left, q };
    key_error += again(rest.q).error(rest.mean_above.unwrap_or(1.0), law.class(Class::Other).mean);
    value_error += again(rest.q).error(rest.value_above.unwrap_or(0.0), law.value_mean);
    let errors = (Some(key_error), e.value_above.map(|_| value_error).or((left >= distinct).then_some(0.0)));
    Some((again(rest.q).blocks(), again(rest.high).blocks(), again(rest.low).blocks(), errors))
}

/// Audited ratio of a layer that keeps so many full blocks: blocks and partial blocks at 16 bits a number, a table entry and
/// two factors for every block of every request. `None` of a sample, which does not know the partial blocks.
pub fn layer_cr(law: &LayerLaw, blocks: f64) -> Option<f64> {
    let (tokens, partial, width) = (law.tokens?, law.partial_blocks?, law.token_width?);
    let token_bits = 2.0 * width * 16.0;
    let size = law.block_size as f64;
    let kept = blocks * size + (tokens - law.blocks * size);
    let side = 32.0 * (law.blocks + partial) + 64.0 * law.blocks;
    Some(tokens * token_bits / (kept * token_bits + side))
}

/// Requests at which the threshold graph of a layer gets a giant component: n q = 1, by bisection on a log scale between 2
/// and 2^40. `None` if it never does.
pub fn percolation_requests(law: &LayerLaw, tau: f64, own_blocks: f64) -> Option<f64> {
    let degree = |requests: f64| {
        let e = law.at(tau, requests, own_blocks, false)?;
        Some((law.shared + requests * own_blocks) * e.q)
    };
    let (mut low, mut high) = (1.0f64, 40.0f64);
    if degree(low.exp2())? >= 1.0 {
        return Some(low.exp2());
    }
    (degree(high.exp2())? >= 1.0).then_some(())?;
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if degree(middle.exp2())? >= 1.0 { high = middle } else { low = middle }
    }
    Some(high.exp2())
}
