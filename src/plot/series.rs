//! sweep.csv as the figures want it.

use super::family::Family;
use crate::codec::registry::is_control;
use crate::codec::{Method, Unfused};
use crate::compare::beats;
use crate::error::{Error, Result};
use crate::sweep::{Labelled, labelled, series_labels};
use crate::tables::Columns;
use plotters::style::RGBColor;
use std::path::Path;

/// A number and its 95 % interval; NaN where the table has none.
#[derive(Debug, Clone, Copy)]
pub struct Estimate {
    pub mid: f64,
    pub low: f64,
    pub high: f64,
}

/// One row.
#[derive(Debug, Clone)]
pub struct Point {
    pub method: String,
    /// Name of the point's series.
    pub label: String,
    /// The dial that its series turns and where it stands, if it has one that is a number.
    pub dial: Option<(String, f64)>,
    /// What tells the point from others of its series: where its dials stand, or what a calibration was made for.
    pub name: String,
    pub block_size: u64,
    /// Requests fused together.
    pub batch: u64,
    pub cr_audited: f64,
    pub cr_paper: f64,
    /// In the metric of the table.
    pub score: Estimate,
    pub kl: Estimate,
    pub layer_cr: Vec<f64>,
}

impl Point {
    fn same_packing(&self, other: &Point) -> bool {
        (self.block_size, self.batch) == (other.block_size, other.batch)
    }
}

/// All rows of a sweep, sorted into controls and fusion.
pub struct SweepTable {
    pub title: String,
    /// The metric of the scores.
    pub metric: String,
    pub none: Point,
    /// Exact prefix sharing, one a packing (block size and batch).
    prefixes: Vec<Point>,
    /// Fusing methods, one series a label, in the order of the table.
    pub fusion: Vec<Vec<Point>>,
    /// What each series is, and whether a point of it is beaten by none of another: in ratio and KL at once.
    pub families: Vec<Family>,
    pub on_front: Vec<bool>,
    /// Where each series would lie at the Gaussian bound of its predictors: ratio and KL; empty where that is not known.
    pub bound: Vec<Vec<(f64, f64)>>,
}

impl SweepTable {
    pub fn new(path: &Path, table: &Columns) -> Result<Self> {
        let floats = |name: &str| table.floats(name);
        let strings = |name: &str| table.strings(name);
        let estimates = |name: &str| -> Result<Vec<Estimate>> {
            let (mid, low, high) =
                (floats(name)?, floats(&format!("{name}_low"))?, floats(&format!("{name}_high"))?);
            Ok((0..mid.len()).map(|i| Estimate { mid: mid[i], low: low[i], high: high[i] }).collect())
        };
        let (method, model, data) = (strings("method")?, strings("model")?, strings("data")?);
        let (block_size, requests) = (floats("block_size")?, floats("requests")?);
        let batch = floats("batch")?;
        let rows = labelled(table)?;
        let labels = series_labels(&rows);
        let dial = |row: &Labelled| {
            row.dials().iter().find_map(|(_, dial, at)| Some(((*dial).to_owned(), at.parse().ok()?)))
        };
        let (audited, paper) = (floats("cr_audited")?, floats("cr_paper")?);
        let (score, kl, layers) = (estimates("score")?, estimates("kl")?, strings("layer_cr")?);
        let points: Vec<Point> = (0..method.len())
            .map(|i| Point {
                method: method[i].clone(),
                label: labels[i].clone(),
                dial: dial(&rows[i]),
                name: rows[i].name(),
                block_size: block_size[i] as u64,
                batch: batch[i] as u64,
                cr_audited: audited[i],
                cr_paper: paper[i],
                score: score[i],
                kl: kl[i],
                layer_cr: layers[i].split(';').filter_map(|x| x.parse().ok()).collect(),
            })
            .collect();
        let controls = points.iter().filter(|p| is_control(&p.method));
        let (none, mut shared): (Vec<&Point>, Vec<&Point>) =
            controls.partition(|p| p.method == Unfused::NAME);
        // Of several that share, those that share the most.
        shared.dedup_by(|a, b| a.same_packing(b));
        let missing =
            |name: &str| Error::file(path, format!("has no row of the control '{name}'; sweep again"));
        let none = (*none.first().ok_or_else(|| missing("none"))?).clone();
        let first = *shared.first().ok_or_else(|| missing("prefix"))?;
        let mut prefixes: Vec<Point> = vec![first.clone()];
        for &point in &shared {
            if prefixes.iter().all(|p| !p.same_packing(point)) {
                prefixes.push(point.clone());
            }
        }
        let mut fusion: Vec<Vec<Point>> = Vec::new();
        for point in points.iter().filter(|p| !is_control(&p.method)) {
            match fusion.iter_mut().find(|s| s[0].label == point.label) {
                Some(series) => series.push(point.clone()),
                None => fusion.push(vec![point.clone()]),
            }
        }
        let parts = match prefixes[0].batch as f64 {
            batch if prefixes.len() == 1 && batch < requests[0] => format!(" in batches of {batch}"),
            _ => String::new(),
        };
        let blocks = match block_size.iter().all(|s| *s == block_size[0]) {
            true => format!(", blocks of {}", block_size[0]),
            false => String::new(),
        };
        Ok(SweepTable {
            title: format!("{}, {}, {} requests{parts}{blocks}", model[0], short(&data[0]), requests[0]),
            metric: strings("metric")?[0].clone(),
            none,
            prefixes,
            bound: vec![Vec::new(); fusion.len()],
            families: fusion.iter().map(|s| Family::of(&s[0].method)).collect(),
            on_front: fusion.iter().map(|s| s.iter().any(|p| unbeaten(p, &points))).collect(),
            fusion,
        })
    }
}

impl SweepTable {
    /// Takes the bounds of the chains in a bound.csv.
    pub fn bound_by(&mut self, table: &Columns) -> Result<()> {
        let (method, cr) = (table.strings("method")?, table.floats("cr_bound")?);
        for (bound, series) in self.bound.iter_mut().zip(&self.fusion) {
            let at = |p: &Point| Some((cr[method.iter().position(|m| *m == p.method)?], p.kl.mid));
            *bound = series.iter().filter_map(at).collect();
        }
        Ok(())
    }

    /// Exact prefix sharing, if it is one for all series: caches are packed in one way only.
    pub fn prefix(&self) -> Option<&Point> {
        (self.prefixes.len() == 1).then(|| &self.prefixes[0])
    }

    /// Exact prefix sharing of each packing, with the number of the first series that is packed so where there are several.
    pub fn prefixes(&self) -> Vec<(&Point, Option<usize>)> {
        let series = |p: &Point| self.fusion.iter().position(|s| s[0].same_packing(p));
        let several = self.prefixes.len() > 1;
        self.prefixes.iter().map(|p| (p, series(p).filter(|_| several))).collect()
    }
}

fn unbeaten(point: &Point, all: &[Point]) -> bool {
    let at = |p: &Point| (p.cr_audited, p.kl.mid);
    !all.iter().any(|other| beats(at(other), at(point)))
}

/// A data source without the folders before its file name.
pub fn short(data: &str) -> &str {
    data.rsplit('/').next().unwrap_or(data)
}

/// Colour of exact prefix sharing where it is one for all series.
pub const GREY: RGBColor = RGBColor(110, 110, 110);

/// How a legend names exact prefix sharing.
pub fn prefix_label(table: &SweepTable, remark: &str) -> String {
    match table.prefix() {
        Some(prefix) => format!("exact prefix sharing, {remark} (CR {:.2})", prefix.cr_audited),
        None => format!("dashed: exact prefix sharing, {remark}"),
    }
}
