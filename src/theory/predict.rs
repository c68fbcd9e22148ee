//! Rate and distortion of one layer by the closed forms, from its measured statistics.

use super::closed::{
    b1_of_groups, component_count, giant_share, leader_count, poisson_error, second_hand_cosine, star_error,
    tree_blocks, verbatim_error,
};
use super::law::{Exceedance, Extent, LayerLaw};
use crate::codec::fusion::{Pairing, Representative};
use crate::stats::Class;
use serde::Serialize;

/// Which pairs are taken to be alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Model {
    /// The paper's: all pairs have the same probability of lying above the threshold.
    Uniform,
    /// Ours: pairs at one position have that position's, all others their own; blocks fuse within positions first.
    ByPosition,
}

impl Model {
    pub const ALL: [Model; 2] = [Model::Uniform, Model::ByPosition];

    /// Every model with every pairing that has a closed form.
    pub fn with_pairings() -> impl Iterator<Item = (Model, Pairing)> {
        const PAIRINGS: [Pairing; 3] = [Pairing::Tree, Pairing::Best, Pairing::Components];
        Self::ALL.into_iter().flat_map(|model| PAIRINGS.into_iter().map(move |pairing| (model, pairing)))
    }
}

/// What the model says of one layer, pairing and threshold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    /// Distinct blocks before fusion; exact duplicates are taken out first.
    pub distinct: f64,
    /// Share of pairs above the threshold, of those the pairing looks at.
    pub q: f64,
    /// Exceedances among all pairs of the batch measured, and a bound on how far their number is from a Poisson law, in
    /// total variation; absent of other batches, and where there are none.
    pub lambda: Option<f64>,
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

/// A stretch of fusion: blocks of so many requests that meet with one probability.
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
            Pairing::Tree => tree_blocks(self.requests as usize, self.distinct, self.q),
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
        // Every cluster takes one block less away than it has.
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

const ACROSS: [Class; 2] = [Class::SamePosition, Class::Other];
const ANY: [Class; 3] = [Class::SameRequest, Class::SamePosition, Class::Other];

/// Predicts for a batch like the one measured; `None` where the threshold lies outside of those measured, or where one
/// request was measured and more are asked for.
pub fn predict(
    law: &LayerLaw,
    model: Model,
    pairing: Pairing,
    tau: f64,
    extent: Extent,
) -> Option<Prediction> {
    if law.requests < 2.0 && extent.factor > 1.0 {
        return None;
    }
    // Leaves of the tree are requests: what meets are blocks of different ones.
    let classes: &[Class] = if pairing == Pairing::Tree { &ACROSS } else { &ANY };
    let e = law.exceedance(tau, extent, classes)?;
    let outcome = match model {
        Model::Uniform => uniform(law, pairing, extent, &e)?,
        Model::ByPosition => by_position(law, pairing, extent, &e)?,
    };
    let measured = extent == Extent::MEASURED;
    let all = law.all_pairs(tau).filter(|e| measured && e.q > 0.0);
    let pairs = law.class(Class::All).pairs;
    let blocks = law.blocks_of(extent);
    // Blocks that are not full take a share of the energy and have no error.
    let share = match law.tokens.filter(|_| measured) {
        Some(tokens) => law.block_size as f64 / tokens,
        None => 1.0 / blocks,
    };
    // An error is made wherever the block stands: those that are not common stand in so many places on average.
    let own = law.distinct - law.common;
    let places = if own > 0.0 { (law.blocks - law.common_places) / own } else { 1.0 };
    Some(Prediction {
        distinct: law.distinct_of(extent),
        q: e.q,
        lambda: all.map(|e| pairs * e.q),
        poisson_error: all.and_then(|e| {
            let lambda = pairs * e.q;
            let b2 = lambda * 2.0 * (law.distinct - 2.0).max(0.0) * e.rho1?;
            Some(poisson_error(lambda, b1(law, model, &e), b2))
        }),
        blocks: outcome.blocks,
        blocks_low: outcome.blocks_low,
        blocks_high: outcome.blocks_high,
        cr: if outcome.blocks > 0.0 { blocks / outcome.blocks } else { 1.0 },
        giant_share: outcome.giant_share,
        key_error: outcome.key_error.map(|error| error * places * share),
        value_error: outcome.value_error.map(|error| error * places * share),
    })
}

/// The part of the Chen-Stein bound that pairs would have if they were independent.
fn b1(law: &LayerLaw, model: Model, all: &Exceedance) -> f64 {
    match model {
        Model::Uniform => b1_of_groups(&[(law.distinct, all.q)], all.q),
        Model::ByPosition => {
            let usual = law.class(Class::SamePosition).at(all.tau).map_or(0.0, |e| e.q);
            let group = |p: &super::law::PositionLaw| (p.distinct, p.at(all.tau).map_or(usual, |(q, _)| q));
            let groups: Vec<(f64, f64)> = law.positions.iter().map(group).collect();
            let elsewhere = law.exceedance(all.tau, Extent::MEASURED, &[Class::SameRequest, Class::Other]);
            b1_of_groups(&groups, elsewhere.map_or(0.0, |e| e.q))
        }
    }
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
fn uniform(law: &LayerLaw, pairing: Pairing, extent: Extent, e: &Exceedance) -> Option<Outcome> {
    let (requests, distinct) = (law.requests * extent.factor, law.distinct_of(extent));
    let meeting = |q: f64| Meeting { pairing, requests, distinct, q };
    let whole = meeting(e.q);
    let blocks = whole.blocks();
    let error = |s: Option<f64>, common: f64| {
        if blocks < distinct { s.map(|s| whole.error(s, common)) } else { Some(0.0) }
    };
    Some(Outcome {
        blocks,
        blocks_low: meeting(e.high).blocks(),
        blocks_high: meeting(e.low).blocks(),
        giant_share: giant_share(distinct, law.exceedance(e.tau, extent, &ACROSS)?.q),
        key_error: error(e.mean_above, law.class(Class::All).mean),
        value_error: error(e.value_above, law.value_mean),
    })
}

/// First within each position, then among what is left of all. Common blocks are one at their position and stay. Values are
/// known of all pairs together only.
fn by_position(law: &LayerLaw, pairing: Pairing, extent: Extent, e: &Exceedance) -> Option<Outcome> {
    let requests = law.requests * extent.factor;
    let class = law.class(Class::SamePosition);
    // A position that two requests never reached is like the others.
    let usual = class.at(e.tau).map_or((0.0, 1.0), |e| (e.q, e.mean_above.unwrap_or(1.0)));
    let value = e.value_above.unwrap_or(0.0);
    let (mut left, mut key_error, mut value_error) = (0.0, 0.0, 0.0);
    for position in &law.positions {
        let (q, s) = position.at(e.tau).unwrap_or(usual);
        let distinct = (position.distinct - position.common) * extent.factor;
        let here = Meeting { pairing, requests, distinct, q };
        // More blocks a request stand at more positions of the same kind.
        left += here.blocks() * extent.own;
        key_error += here.error(s, class.mean) * extent.own;
        value_error += here.error(value, law.value_mean) * extent.own;
    }
    let (distinct, left) = (law.distinct_of(extent), left + law.common);
    let elsewhere: &[Class] =
        if pairing == Pairing::Tree { &[Class::Other] } else { &[Class::SameRequest, Class::Other] };
    let rest = law.exceedance(e.tau, extent, elsewhere)?;
    let again = |q: f64| Meeting { pairing, requests, distinct: left, q };
    let blocks = again(rest.q).blocks();
    // What is left stands for all that were there.
    let stand_for = if left > 0.0 { distinct / left } else { 1.0 };
    let other = law.class(Class::Other).mean;
    key_error += again(rest.q).error(rest.mean_above.unwrap_or(1.0), other) * stand_for;
    value_error += again(rest.q).error(rest.value_above.unwrap_or(0.0), law.value_mean) * stand_for;
    let value_known = e.value_above.is_some() || blocks >= distinct;
    Some(Outcome {
        blocks,
        blocks_low: again(rest.high).blocks(),
        blocks_high: again(rest.low).blocks(),
        // Chains within a request do not make a giant.
        giant_share: giant_share(left, law.exceedance(e.tau, extent, &[Class::Other])?.q),
        key_error: Some(key_error),
        value_error: value_known.then_some(value_error),
    })
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

/// The lowest power of two requests from which on, up to 2^40, a layer has a giant component at every one. `None` if it has
/// none at 2^40.
pub fn percolation_requests(
    law: &LayerLaw,
    model: Model,
    pairing: Pairing,
    tau: f64,
    own: f64,
) -> Option<f64> {
    let percolates = |requests: &f64| {
        let extent = Extent { factor: requests / law.requests.max(1.0), own };
        predict(law, model, pairing, tau, extent).is_some_and(|p| p.giant_share > 0.0)
    };
    (1..=40).rev().map(|log| f64::from(log).exp2()).take_while(percolates).last()
}
