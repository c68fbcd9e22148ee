//! Which tokens refer to which: found by an encoder, written for a decoder.

use super::entropy::Coder;
use super::reference::{Index, MATCHES, Match, Place, class_of, sightings};
use crate::codec::CacheBatch;
use crate::codec::columns::Column;

/// What a token is predicted from: a token of an earlier column, and the class of the match.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reference {
    pub column: usize,
    pub token: usize,
    pub class: usize,
}

/// Of each token of a column.
pub type Sources = Vec<Option<Reference>>;

/// What both sides know of a column before its numbers.
pub struct Plan {
    pub tokens: usize,
    /// The first token is the first of its request: it is stored as it is.
    pub raw_first: bool,
    /// The quantiser's step for each token, in eighths of an octave.
    pub steps: Vec<i32>,
    pub sources: Sources,
    /// Of each token's reference, by how much the texts before both agree and for how many sightings it stands; 0 for none.
    pub classes: Vec<usize>,
    /// For how many sightings each token stands.
    pub sightings: Vec<u32>,
}

/// Plans of all columns, from the steps and the references of each.
pub fn plans(columns: &[Column], steps: Vec<Vec<i32>>, references: Vec<Sources>) -> Vec<Plan> {
    let mut plans: Vec<Plan> = Vec::with_capacity(columns.len());
    for ((column, steps), sources) in columns.iter().zip(steps).zip(references) {
        let (mut classes, mut seen) = (Vec::new(), Vec::new());
        for source in &sources {
            let before = source.map(|s| (s.class, plans[s.column].sightings[s.token]));
            classes.push(before.map_or(0, |(matched, before)| class_of(matched, before)));
            seen.push(before.map_or(1, |(matched, before)| sightings(matched, before)));
        }
        let raw_first = column.block == 0;
        plans.push(Plan { tokens: column.tokens, raw_first, steps, sources, classes, sightings: seen });
    }
    plans
}

/// Finds the references of all columns, column by column; only requests of the same group refer to one another.
pub fn references(
    batch: &CacheBatch,
    columns: &[Column],
    of_requests: &[Vec<usize>],
    within_tenant: bool,
) -> Vec<Sources> {
    let size = batch.pool.shape().block_size;
    let group = |request: usize| match within_tenant {
        true => batch.tenants.iter().position(|t| *t == batch.tenants[request]).unwrap_or(0) as u64,
        false => 0,
    };
    let mut index = Index::new(&batch.tokens);
    let column_of = |place: Place| of_requests[place.request].get(place.token / size).copied();
    columns
        .iter()
        .enumerate()
        .map(|(number, column)| {
            let first = column.block * size;
            let group = group(column.request);
            let mut previous = None;
            let own = (first..first + column.tokens).map(|token| {
                // The first token of a request is like no other, and has no components.
                let usable = |p: Place| p.token > 0 && column_of(p).is_some_and(|c| c < number);
                let found = index.find(column.request, token, group, previous, usable);
                let found = found.filter(|m: &Match| usable(m.place) && token > 0);
                previous = found.map(|m| m.place);
                let Match { place, class } = found?;
                let from = column_of(place)?;
                Some(Reference { column: from, token: place.token % size, class })
            });
            let own = own.collect();
            index.add(column.request, first..first + column.tokens, group);
            own
        })
        .collect()
}

/// Codes whether each token has a reference, whether it goes on where the one before it ended, and if not, where it is; or
/// decodes it. Returns what a decoder knows.
pub fn code_references<C: Coder>(coder: &mut C, references: &Sources) -> Sources {
    let mut previous: Option<Reference> = None;
    let mut all = Vec::with_capacity(references.len());
    for own in references {
        let wish = own.unwrap_or_default();
        let known = if coder.bits(1, u32::from(own.is_some())) == 0 {
            None
        } else {
            let next = previous.map(|p| Reference { token: p.token + 1, ..p });
            match next.filter(|_| coder.bits(1, u32::from(next == *own)) == 1) {
                Some(next) => Some(next),
                None => {
                    let low = coder.bits(16, (wish.column & 0xffff) as u32);
                    let high = coder.bits(16, (wish.column >> 16) as u32);
                    let token = coder.bits(16, wish.token as u32) as usize;
                    let class = coder.bits(3, wish.class as u32) as usize;
                    Some(Reference { column: (high << 16 | low) as usize, token, class })
                }
            }
        };
        all.push(known);
        previous = known;
    }
    all
}

/// Whether a reference of a column's that was read can be followed.
pub fn sound(r: &Reference, number: usize, all: &[Column]) -> bool {
    let from = all.get(r.column).filter(|_| r.column < number);
    from.is_some_and(|c| r.token < c.tokens && !(c.block == 0 && r.token == 0))
        && (1..MATCHES).contains(&r.class)
}
