//! sweep.csv as the figures want it.

use crate::error::{Error, Result};
use crate::experiment::{Columns, label_columns, series_labels};
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
    /// NaN where there is none.
    pub tau: f64,
    /// Error budget; NaN where there is none.
    pub max_error: f64,
    /// What tells the point from others of its series: the threshold, the budget, or the name of a thresholds file.
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
        let (tau, budget) = (floats("tau")?, floats("max_error")?);
        let (block_size, requests) = (floats("block_size")?, floats("requests")?);
        let batch = floats("batch")?;
        let thresholds = strings("thresholds")?;
        let cells: Vec<Vec<String>> = label_columns().map(strings).collect::<Result<_>>()?;
        let rows: Vec<Vec<String>> =
            (0..table.rows()).map(|i| cells.iter().map(|column| column[i].clone()).collect()).collect();
        let labels = series_labels(&rows);
        let (audited, paper) = (floats("cr_audited")?, floats("cr_paper")?);
        let (score, kl, layers) = (estimates("score")?, estimates("kl")?, strings("layer_cr")?);
        let points: Vec<Point> = (0..method.len())
            .map(|i| Point {
                method: method[i].clone(),
                label: labels[i].clone(),
                tau: tau[i],
                max_error: budget[i],
                name: match (tau[i].is_finite(), budget[i].is_finite()) {
                    (true, _) => tau[i].to_string(),
                    (_, true) => budget[i].to_string(),
                    _ => file_name(&thresholds[i]),
                },
                block_size: block_size[i] as u64,
                batch: batch[i] as u64,
                cr_audited: audited[i],
                cr_paper: paper[i],
                score: score[i],
                kl: kl[i],
                layer_cr: layers[i].split(';').filter_map(|x| x.parse().ok()).collect(),
            })
            .collect();
        let control = |name: &str| {
            let found = points.iter().find(|p| p.method == name).cloned();
            found.ok_or_else(|| Error::file(path, format!("has no row of the control '{name}'; sweep again")))
        };
        let mut prefixes: Vec<Point> = vec![control("prefix")?];
        for point in points.iter().filter(|p| p.method == "prefix") {
            if prefixes.iter().all(|p| !p.same_packing(point)) {
                prefixes.push(point.clone());
            }
        }
        let mut fusion: Vec<Vec<Point>> = Vec::new();
        for point in points.iter().filter(|p| !["none", "prefix"].contains(&&p.method[..])) {
            match fusion.iter_mut().find(|s| s[0].label == point.label) {
                Some(series) => series.push(point.clone()),
                None => fusion.push(vec![point.clone()]),
            }
        }
        let parts = match prefixes[0].batch as f64 {
            batch if prefixes.len() == 1 && batch < requests[0] => format!(" in batches of {batch}"),
            _ => String::new(),
        };
        Ok(SweepTable {
            title: format!("{}, {}, {} requests{parts}", model[0], short(&data[0]), requests[0]),
            metric: strings("metric")?[0].clone(),
            none: control("none")?,
            prefixes,
            fusion,
        })
    }
}

impl SweepTable {
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

/// `qa-kl-0.02-1a2b3c4d`, a stem with a checksum, as a label: the target if the stem ends with one.
fn file_name(thresholds: &str) -> String {
    let stem = thresholds.rsplit_once('-').map_or("", |(stem, _)| stem);
    for (kind, label) in
        [("-model-cr-", "CR"), ("-model-error-", "error"), ("-kl-", "KL"), ("-error-", "error")]
    {
        if let Some((_, target)) = stem.rsplit_once(kind) {
            return format!("{label} {target}");
        }
    }
    stem.to_owned()
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

/// Name of a point's series in a legend.
pub fn series_name(point: &Point) -> String {
    if point.label == point.method {
        format!("{}, block {}", point.method, point.block_size)
    } else {
        point.label.clone()
    }
}
