//! References: for every token, the earlier token whose preceding text agrees with its own for longest.

use std::collections::HashMap;

/// Classes of references: none; by how many tokens agree, the token itself included; those of the longest agreement by how many
/// tokens have agreed so far.
pub const CLASSES: usize = MATCHES + SEEN - 1;
/// Classes of matches by agreement; class 0 is no match.
pub const MATCHES: usize = 6;
/// The least agreement of classes 1 and up.
const BOUNDS: [usize; MATCHES - 1] = [1, 3, 8, 16, 32];
/// From this class of matches on, a token and its reference are two sightings of the same.
pub const SAME: usize = 4;
/// Sightings that are told apart: one, two, three or more.
const SEEN: usize = 3;
/// Agreement beyond this is as good as any.
const LONGEST: usize = 64;

/// The class of an agreement of so many tokens.
pub fn class(agreement: usize) -> usize {
    BOUNDS.iter().take_while(|b| agreement >= **b).count()
}

/// The class of a reference of a match's class, to a token that stands for so many sightings.
pub fn class_of(matched: usize, sightings: u32) -> usize {
    if matched + 1 == MATCHES { matched + (sightings as usize).clamp(1, SEEN) - 1 } else { matched }
}

/// For how many sightings a token stands that refers to one that stands for so many.
pub fn sightings(matched: usize, before: u32) -> u32 {
    if matched >= SAME { before + 1 } else { 1 }
}

/// A token of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub request: usize,
    pub token: usize,
}

/// A reference and its class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Match {
    pub place: Place,
    pub class: usize,
}

/// Where texts of some lengths were last seen. Linear in tokens: a token adds one entry a length.
pub struct Index<'a> {
    /// Tokens of all requests.
    texts: &'a [Vec<u32>],
    /// One for each of [`BOUNDS`]: group and hash of so many last tokens -> where.
    seen: [HashMap<(u64, u64), Place>; MATCHES - 1],
}

impl<'a> Index<'a> {
    pub fn new(texts: &'a [Vec<u32>]) -> Self {
        Index { texts, seen: Default::default() }
    }

    /// Makes a stretch of a request's tokens known. `group`: requests of other groups never find it.
    pub fn add(&mut self, request: usize, tokens: std::ops::Range<usize>, group: u64) {
        for token in tokens {
            for (length, seen) in BOUNDS.iter().zip(&mut self.seen) {
                if let Some(hash) = hash(&self.texts[request], token, *length) {
                    seen.insert((group, hash), Place { request, token });
                }
            }
        }
    }

    /// The best reference of a token; `previous` is that of the token before it, which goes on if it agrees as well as any.
    pub fn find(
        &self,
        request: usize,
        token: usize,
        group: u64,
        previous: Option<Place>,
        known: impl Fn(Place) -> bool,
    ) -> Option<Match> {
        let next = previous.map(|p| Place { token: p.token + 1, ..p }).filter(|p| known(*p));
        let going_on = next.map(|p| (self.agreement(request, token, p), p));
        let candidates = BOUNDS.iter().zip(&self.seen).rev().filter_map(|(length, seen)| {
            let place = *seen.get(&(group, hash(&self.texts[request], token, *length)?))?;
            Some((self.agreement(request, token, place), place))
        });
        // The latest of equals: it has seen most.
        let (agreement, place) =
            going_on.into_iter().chain(candidates.take(1)).max_by_key(|c| (c.0, c.1.request))?;
        (agreement > 0).then(|| Match { place, class: class(agreement) })
    }

    /// How many tokens up to and with two agree.
    fn agreement(&self, request: usize, token: usize, place: Place) -> usize {
        let (a, b) = (&self.texts[request], &self.texts[place.request]);
        if place.token >= b.len() {
            return 0;
        }
        let (a, b) = (a[..=token].iter().rev(), b[..=place.token].iter().rev());
        a.zip(b).take(LONGEST).take_while(|(a, b)| a == b).count()
    }
}

/// Of the last `length` tokens up to and with one; `None` where there are not so many.
fn hash(text: &[u32], token: usize, length: usize) -> Option<u64> {
    let first = (token + 1).checked_sub(length)?;
    // FNV-1a over whole tokens, mixed: matches are checked against the text.
    let mixed = text[first..=token].iter().fold(0xcbf2_9ce4_8422_2325, |hash, token| {
        (hash ^ u64::from(*token)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
    });
    Some(mixed)
}
