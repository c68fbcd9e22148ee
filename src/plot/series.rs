//! sweep.csv as the figures want it.

use super::family::Family;
use crate::codec::{Method, Unfused};
use crate::error::{Error, Result};
use crate::sweep::named;
use crate::tables::Table;
use plotters::style::RGBColor;
use polars::prelude::{UniqueKeepStrategy, col, cols, lit};
use serde::Deserialize;
use std::path::Path;

/// A number and its 95 % interval; NaN where the table has none.
#[derive(Debug, Clone, Copy)]
pub struct Estimate {
    pub mid: f64,
    pub low: f64,
    pub high: f64,
}

/// One row.
#[derive(Debug, Clone, Deserialize)]
#[serde(from = "Row")]
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
    /// Whether no other row beats it in both ratio and KL.
    pub on_front: bool,
}

/// A row as the table has it, names and front beside it.
#[derive(Deserialize)]
struct Row {
    method: String,
    series: String,
    point: String,
    dial: Option<String>,
    dial_at: Option<f64>,
    on_front: bool,
    block_size: u64,
    batch: u64,
    cr_audited: f64,
    cr_paper: f64,
    score: f64,
    score_low: f64,
    score_high: f64,
    kl: f64,
    kl_low: f64,
    kl_high: f64,
    layer_cr: String,
}

impl From<Row> for Point {
    fn from(row: Row) -> Self {
        Point {
            method: row.method,
            label: row.series,
            dial: row.dial.zip(row.dial_at),
            name: row.point,
            block_size: row.block_size,
            batch: row.batch,
            cr_audited: row.cr_audited,
            cr_paper: row.cr_paper,
            score: Estimate { mid: row.score, low: row.score_low, high: row.score_high },
            kl: Estimate { mid: row.kl, low: row.kl_low, high: row.kl_high },
            layer_cr: row.layer_cr.split(';').filter_map(|x| x.parse().ok()).collect(),
            on_front: row.on_front,
        }
    }
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
    /// What each series is.
    pub families: Vec<Family>,
    /// Where each series would lie at the Gaussian bound of its predictors: ratio and KL; empty where that is not known.
    pub bound: Vec<Vec<(f64, f64)>>,
}

impl SweepTable {
    pub fn new(path: &Path, table: &Table) -> Result<Self> {
        let arms = named(table)?.with_front("cr_audited", "kl")?;
        let missing =
            |name: &str| Error::file(path, format!("has no row of the control '{name}'; sweep again"));
        let is_none = || col("method").eq(lit(Unfused::NAME));
        let none: Vec<Point> = arms.query(|arms| arms.filter(is_none()))?.rows()?;
        let none = none.into_iter().next().ok_or_else(|| missing("none"))?;
        // Of several that share, the first: it shares the most.
        let prefixes: Vec<Point> = arms
            .query(|arms| {
                arms.filter(col("control").and(is_none().not()))
                    .unique_stable(Some(cols(["block_size", "batch"])), UniqueKeepStrategy::First)
            })?
            .rows()?;
        if prefixes.is_empty() {
            return Err(missing("prefix"));
        }
        let fusion = arms.query(|arms| arms.filter(col("control").not()))?.groups("series")?;
        let fusion: Vec<Vec<Point>> = fusion.iter().map(|(_, own)| own.rows()).collect::<Result<_>>()?;
        let (model, data) = (table.strings("model")?, table.strings("data")?);
        let (block_size, requests) = (table.floats("block_size")?, table.floats("requests")?);
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
            metric: table.strings("metric")?[0].clone(),
            none,
            prefixes,
            bound: vec![Vec::new(); fusion.len()],
            families: fusion.iter().map(|s| Family::of(&s[0].method)).collect(),
            fusion,
        })
    }
}

impl SweepTable {
    /// Whether some point of a series is beaten by none of the table: in ratio and KL at once.
    pub fn on_front(&self, series: usize) -> bool {
        self.fusion[series].iter().any(|p| p.on_front)
    }

    /// Takes the bounds of the chains in a bound.csv.
    pub fn bound_by(&mut self, table: &Table) -> Result<()> {
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
