//! What sweeps measured, as series of points.

use crate::error::{Error, Result};
use crate::sweep::named;
use crate::tables::{REQUESTS, SWEEP_CSV, Table, find_long_table};
use polars::prelude::{JoinArgs, JoinType, LazyFrame, MaintainOrderJoin, col};
use serde::Deserialize;
use std::path::Path;

/// One arm.
#[derive(Debug, Clone, Deserialize)]
pub struct Point {
    pub method: String,
    #[serde(rename = "cr_audited")]
    pub cr: f64,
    pub bits_per_element: f64,
    /// Nats a token, mean over requests.
    pub kl: f64,
    /// Difference of the score from no encoding, and the low end of its interval.
    pub score_diff: f64,
    #[serde(rename = "score_diff_low")]
    pub score_low: f64,
    /// Whether no arm of any series beats it in both ratio and KL.
    pub on_front: bool,
    /// Of each request, in the order of its table; empty without that table.
    #[serde(default)]
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
    let mut arms = named(&Table::read(&path)?)?
        .query(|arms| arms.filter(col("control").not()))?
        .with_front("cr_audited", "kl")?;
    if arms.height() == 0 {
        return Err(Error::file(&path, "has no method but the controls; sweep some"));
    }
    if let Some(path) = find_long_table(folder, REQUESTS) {
        let of_run = |requests: LazyFrame| {
            requests.group_by_stable([col("run")]).agg([col("kl").alias("kl_of_requests")])
        };
        let requests = Table::read(&path)?.query(of_run)?;
        let how = JoinArgs { maintain_order: MaintainOrderJoin::Left, ..JoinArgs::new(JoinType::Left) };
        arms = arms.query(|arms| arms.join(requests.lazy(), [col("run")], [col("run")], how))?;
    }
    arms.groups("series")?.into_iter().map(|(name, own)| Ok(Series { name, points: own.rows()? })).collect()
}
