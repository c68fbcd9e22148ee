//! Pairings that work on a list of pairs: best match first, and connected components.

use super::geometry::{Geometry, Units};
use super::rule::Gate;
use rayon::prelude::*;

/// Units that share a representative.
pub struct Cluster {
    /// The first is the one that the pairing began with.
    pub units: Vec<usize>,
    /// The tree's own mean; other pairings leave it to be made from the units.
    pub centre: Option<Centre>,
}

impl Cluster {
    pub fn of(units: Vec<usize>) -> Self {
        Cluster { units, centre: None }
    }
}

/// A direction as weights of unit vectors: (distinct vector, weight).
pub struct Centre {
    pub key: Vec<(usize, f32)>,
    pub value: Vec<(usize, f32)>,
}

/// Two units above the gate.
#[derive(Debug, Clone, Copy)]
pub struct Edge {
    pub a: usize,
    pub b: usize,
    pub margin: f32,
}

/// All pairs above the gate.
pub fn edges(geometry: &Geometry, units: &Units, gate: &Gate) -> Vec<Edge> {
    let of = |a: usize| {
        let pairs = (0..a).filter(move |&b| units.class[a] == units.class[b]);
        let measured = pairs.map(move |b| Edge {
            a,
            b,
            margin: geometry.margin(gate, units.vector[a], units.vector[b]),
        });
        measured.filter(|e| e.margin > 0.0).collect::<Vec<_>>()
    };
    let rows: Vec<Vec<Edge>> = (0..units.len()).into_par_iter().map(of).collect();
    rows.concat()
}

/// Best pair first: two clusters merge if one of their representatives has all their blocks above the gate.
///
/// Of two that could stay, the larger cluster's representative does, then the one with more pairs, then the one with more
/// energy; only exact ties are broken by the order of requests.
pub fn best(geometry: &Geometry, units: &Units, gate: &Gate, mut edges: Vec<Edge>) -> Vec<Cluster> {
    let mut degree = vec![0usize; units.len()];
    for edge in &edges {
        degree[edge.a] += units.places[edge.b].len();
        degree[edge.b] += units.places[edge.a].len();
    }
    edges.par_sort_unstable_by(|x, y| y.margin.total_cmp(&x.margin).then(x.a.cmp(&y.a)).then(x.b.cmp(&y.b)));
    let energy: Vec<f64> = units.vector.iter().map(|&v| geometry.energy(v)).collect();
    // The units of each representative's cluster; empty for a unit that has joined another.
    let mut members: Vec<Vec<usize>> = (0..units.len()).map(|u| vec![u]).collect();
    let mut blocks: Vec<usize> = units.places.iter().map(Vec::len).collect();
    for edge in edges {
        let (a, b) = (edge.a, edge.b);
        if members[a].is_empty() || members[b].is_empty() {
            continue;
        }
        let rank = |u: usize| (blocks[u], degree[u]);
        let order = rank(a).cmp(&rank(b)).then(energy[a].total_cmp(&energy[b])).then(b.cmp(&a));
        let (stays, joins) = if order.is_ge() { (a, b) } else { (b, a) };
        let covers = |centre: usize, others: &[usize]| {
            others.iter().all(|&u| geometry.margin(gate, units.vector[centre], units.vector[u]) > 0.0)
        };
        let (stays, joins) = if covers(stays, &members[joins]) {
            (stays, joins)
        } else if covers(joins, &members[stays]) {
            (joins, stays)
        } else {
            continue;
        };
        let moved = std::mem::take(&mut members[joins]);
        members[stays].extend(moved);
        blocks[stays] += blocks[joins];
    }
    members.into_iter().filter(|m| !m.is_empty()).map(Cluster::of).collect()
}

/// Connected components of the graph of all pairs above the gate, each in unit order.
pub fn components(units: &Units, edges: &[Edge]) -> Vec<Cluster> {
    let mut parent: Vec<usize> = (0..units.len()).collect();
    fn root(parent: &mut [usize], mut u: usize) -> usize {
        while parent[u] != u {
            parent[u] = parent[parent[u]];
            u = parent[u];
        }
        u
    }
    for edge in edges {
        let (a, b) = (root(&mut parent, edge.a), root(&mut parent, edge.b));
        parent[a.max(b)] = a.min(b);
    }
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); units.len()];
    for u in 0..units.len() {
        members[root(&mut parent, u)].push(u);
    }
    members.into_iter().filter(|m| !m.is_empty()).map(Cluster::of).collect()
}
