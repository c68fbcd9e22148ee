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
    /// Another number of requests of the same kind, each adding so many distinct blocks to the common ones.
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
    /// Share of the blocks in the giant component of the threshold graph: runaway fusion. By position: of the graph of pairs
    /// at different positions, after fusion within each.
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
        Size::Of { requests, own_blocks } => (requests, own_blocks, law.common + requests * own_blocks),
    };
    let measured = size == Size::Measured;
    let all_pairs = if measured { law.measured(tau, across) } else { law.at(tau, requests, own, across) };
    // A single block has no pairs, and nothing to fuse.
    let e = match all_pairs {
        Some(e) => e,
        None if distinct <= 1.0 => Exceedance::none(tau),
        None => return None,
    };
    let outcome = match model {
        Model::Uniform => uniform(law, pairing, requests, distinct, &e),
        Model::ByPosition => by_position(law, pairing, (requests, own, distinct), &e),
    };
    let pairs = if across {
        0.5 * distinct * distinct * (1.0 - 1.0 / requests.max(1.0))
    } else {
        0.5 * distinct * (distinct - 1.0)
    };
    // Full blocks of the batch: of another size, each request has as many as were measured, or as many more as it adds.
    let all = if measured {
        law.blocks
    } else {
        requests * (law.blocks / law.requests.max(1.0) - law.own_blocks() + own)
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
        blocks: outcome.blocks,
        blocks_low: outcome.blocks_low,
        blocks_high: outcome.blocks_high,
        cr: if outcome.blocks > 0.0 { all / outcome.blocks } else { 1.0 },
        giant_share: outcome.giant_share,
        key_error: outcome.key_error.map(|error| error * share),
        value_error: outcome.value_error.map(|error| error * share),
    })
}

/// What becomes of the distinct blocks. Errors are squared ones summed over blocks of unit norm.
struct Outcome {
    blocks: f64,
    blocks_low: f64,
    blocks_high: f64,
    giant_share: f64,
    key_error: Option<f64>,
    value_error: Option<f64>,
}

/// All pairs alike.
fn uniform(law: &LayerLaw, pairing: Pairing, requests: f64, distinct: f64, e: &Exceedance) -> Outcome {
    let meeting = |q: f64| Meeting { pairing, requests, distinct, q };
    let whole = meeting(e.q);
    let blocks = whole.blocks();
    let error = |s: Option<f64>, common: f64| {
        if blocks < distinct { s.map(|s| whole.error(s, common)) } else { Some(0.0) }
    };
    Outcome {
        blocks,
        blocks_low: meeting(e.high).blocks(),
        blocks_high: meeting(e.low).blocks(),
        giant_share: giant_share(distinct, e.q),
        key_error: error(e.mean_above, law.class(Class::All).mean),
        value_error: error(e.value_above, law.value_mean),
    }
}

/// First within each position, then among what is left of all. Values are known of all pairs together only.
fn by_position(
    law: &LayerLaw,
    pairing: Pairing,
    (requests, own, distinct): (f64, f64, f64),
    e: &Exceedance,
) -> Outcome {
    let across = pairing == Pairing::Tree;
    let held: f64 = law.positions.iter().map(|p| p.distinct).sum();
    let factor = if held > 0.0 { distinct / held } else { 1.0 };
    let common = law.class(Class::SamePosition).mean;
    let value = e.value_above.unwrap_or(0.0);
    let (mut left, mut key_error, mut value_error) = (0.0, 0.0, 0.0);
    for position in &law.positions {
        let (q, s) = position.at(e.tau);
        let here = Meeting { pairing, requests, distinct: position.distinct * factor, q };
        left += here.blocks();
        key_error += here.error(s, common);
        value_error += here.error(value, law.value_mean);
    }
    let rest = law.elsewhere(e.tau, requests, own, across).unwrap_or(Exceedance::none(e.tau));
    let again = |q: f64| Meeting { pairing, requests, distinct: left, q };
    let blocks = again(rest.q).blocks();
    key_error += again(rest.q).error(rest.mean_above.unwrap_or(1.0), law.class(Class::Other).mean);
    value_error += again(rest.q).error(rest.value_above.unwrap_or(0.0), law.value_mean);
    let value_known = e.value_above.is_some() || blocks >= distinct;
    Outcome {
        blocks,
        blocks_low: again(rest.high).blocks(),
        blocks_high: again(rest.low).blocks(),
        giant_share: giant_share(left, rest.q),
        key_error: Some(key_error),
        value_error: value_known.then_some(value_error),
    }
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

/// Requests at which a layer gets a giant component, by bisection on a log scale between 2 and 2^40. `None` if it never does.
pub fn percolation_requests(law: &LayerLaw, model: Model, tau: f64, own_blocks: f64) -> Option<f64> {
    let percolates = |log: f64| {
        let size = Size::Of { requests: log.exp2(), own_blocks };
        predict(law, model, Pairing::Best, tau, size).is_some_and(|p| p.giant_share > 0.0)
    };
    let (mut low, mut high) = (1.0f64, 40.0f64);
    if percolates(low) {
        return Some(low.exp2());
    }
    percolates(high).then_some(())?;
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if percolates(middle) { high = middle } else { low = middle }
    }
    Some(high.exp2())
}
