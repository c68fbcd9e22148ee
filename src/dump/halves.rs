//! Requests of a dump in parts that share no text, so that what is fitted on one can be tested on another.

use super::manifest::Manifest;
use crate::error::{Error, Result};
use crate::task::Half;
use std::collections::HashMap;
use std::path::Path;

impl Manifest {
    /// The requests of a half, or all, in the order of the dump. Groups of requests that share texts go to the half that has
    /// fewer requests yet, largest first: both halves then have about as many duplicates.
    ///
    /// # Errors
    /// If all requests share texts; `dump` is named.
    pub fn half(&self, half: Option<Half>, dump: &Path) -> Result<Vec<usize>> {
        let all = self.requests.len();
        let Some(half) = half else { return Ok((0..all).collect()) };
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let mut groups = self.by_context();
        groups.sort_by_key(|group| std::cmp::Reverse(group.len()));
        for group in groups {
            let smaller = if first.len() <= second.len() { &mut first } else { &mut second };
            smaller.extend(group);
        }
        if second.is_empty() {
            return Err(Error::file(dump, "has no two halves that share no text; dump more requests"));
        }
        let mut requests = if half == Half::First { first } else { second };
        requests.sort_unstable();
        Ok(requests)
    }

    /// Requests in groups of which no two share a context, in the order of their first requests.
    pub fn by_context(&self) -> Vec<Vec<usize>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        let mut of: HashMap<&str, usize> = HashMap::new();
        for (i, entry) in self.requests.iter().enumerate() {
            let contexts = &entry.request.contexts;
            let mut known: Vec<usize> = contexts.iter().filter_map(|c| of.get(&c[..]).copied()).collect();
            known.sort_unstable();
            known.dedup();
            let home = known.first().copied().unwrap_or(groups.len());
            if home == groups.len() {
                groups.push(Vec::new());
            }
            groups[home].push(i);
            // A request with contexts of several groups joins them.
            for &other in known.iter().skip(1) {
                let moved = std::mem::take(&mut groups[other]);
                groups[home].extend(moved);
                of.values_mut().filter(|g| **g == other).for_each(|g| *g = home);
            }
            contexts.iter().for_each(|c| {
                of.insert(c, home);
            });
        }
        groups.retain(|g| !g.is_empty());
        groups
    }

    /// Checksums of the texts that some requests are about, each once, in order.
    pub fn contexts(&self, requests: &[usize]) -> Vec<&str> {
        let mut all: Vec<&str> =
            requests.iter().flat_map(|&i| &self.requests[i].request.contexts).map(String::as_str).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}
