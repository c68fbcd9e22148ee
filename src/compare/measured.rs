//! What sweeps measured, as series of points.

use crate::codec::registry::is_control;
use crate::error::{Error, Result};
use crate::sweep::{labelled, series_labels};
use crate::tables::{Columns, REQUESTS_CSV, SWEEP_CSV};
use std::collections::HashMap;
use std::path::Path;

/// One arm.
#[derive(Debug, Clone)]
pub struct Point {
    pub method: String,
    pub cr: f64,
    pub bits_per_element: f64,
    /// Nats a token, mean over requests.
    pub kl: f64,
    /// Difference of the score from no encoding, and the low end of its interval.
    pub score_diff: f64,
    pub score_low: f64,
    /// Of each request, in the order of requests.csv; empty without that table.
    pub kl_of_requests: Vec<f64>,
}

/// Arms that differ in dials alone.
#[derive(Debug, Clone)]
pub struct Series {
    pub name: String,
    pub points: Vec<Point>,
}

/// All series of a sweep's folder, in the order of its table; controls stay out.
///
/// # Errors
/// Folders without a sweep.csv; tables that are none of a sweep.
pub fn read(folder: &Path) -> Result<Vec<Series>> {
    let path = folder.join(SWEEP_CSV);
    let table = Columns::read(&path)?;
    let rows = labelled(&table)?;
    let labels = series_labels(&rows);
    let floats = |name: &str| table.floats(name);
    let (run, method) = (table.strings("run")?, table.strings("method")?);
    let (cr, bits, kl) = (floats("cr_audited")?, floats("bits_per_element")?, floats("kl")?);
    let (diff, low) = (floats("score_diff")?, floats("score_diff_low")?);
    let requests = folder.join(REQUESTS_CSV);
    let mut by_run: HashMap<String, Vec<f64>> = HashMap::new();
    if requests.exists() {
        let table = Columns::read(&requests)?;
        for (run, kl) in table.strings("run")?.into_iter().zip(table.floats("kl")?) {
            by_run.entry(run).or_default().push(kl);
        }
    }
    let mut series: Vec<Series> = Vec::new();
    for i in 0..method.len() {
        if is_control(&method[i]) {
            continue;
        }
        let point = Point {
            method: method[i].clone(),
            cr: cr[i],
            bits_per_element: bits[i],
            kl: kl[i],
            score_diff: diff[i],
            score_low: low[i],
            kl_of_requests: by_run.get(&run[i]).cloned().unwrap_or_default(),
        };
        match series.iter_mut().find(|s| s.name == labels[i]) {
            Some(own) => own.points.push(point),
            None => series.push(Series { name: labels[i].clone(), points: vec![point] }),
        }
    }
    if series.is_empty() {
        return Err(Error::file(&path, "has no method but the controls; sweep some"));
    }
    Ok(series)
}
