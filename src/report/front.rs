//! The first page: what to use, by workload and model.

use crate::compare::{CompareOptions, Compared, Slopes, compare, read};
use crate::error::Result;
use crate::tables::SWEEP_CSV;
use serde::Serialize;
use std::path::Path;

/// KL that counts as negligible, nats a token; and the loss of score that counts as none: one point.
const KL: f64 = 0.02;
const MARGIN: f64 = 0.01;

/// One folder with several methods in it.
#[derive(Debug, Serialize)]
pub struct Front {
    /// Name of the section.
    pub name: String,
    /// The methods that store least at the KL, best first, three at most: name, ratio, interval.
    pub at_kl: Vec<(String, String, String)>,
    /// The method that stores least without losing a point: name and ratio.
    pub at_score: Option<(String, String)>,
    pub methods: usize,
}

/// The page's row of a folder; `None` where there is nothing to choose from.
pub fn front(folder: &Path, name: &str) -> Result<Option<Front>> {
    if !folder.join(SWEEP_CSV).exists() {
        return Ok(None);
    }
    // A folder of controls alone, or of another kind, has no methods to compare.
    let Ok(series) = read(folder) else { return Ok(None) };
    if series.len() < 2 {
        return Ok(None);
    }
    let options = CompareOptions {
        anchor: None,
        max_kl: KL,
        margin: MARGIN,
        slopes: Slopes::Pchip,
        resamples: 1000,
        seed: 0,
    };
    let rows = compare(&series, &options)?;
    let mut by_kl: Vec<&Compared> = rows.iter().filter(|r| r.cr_at_kl.is_some()).collect();
    by_kl.sort_by(|a, b| b.cr_at_kl.unwrap_or(0.0).total_cmp(&a.cr_at_kl.unwrap_or(0.0)));
    let at_kl = by_kl.iter().take(3).map(|r| {
        let more = if r.beyond_points { ">= " } else { "" };
        let interval = match (r.cr_at_kl_low, r.cr_at_kl_high) {
            (Some(low), Some(high)) => format!("[{low:.1}, {high:.1}]"),
            _ => String::new(),
        };
        (r.series.clone(), format!("{more}{:.1}", r.cr_at_kl.unwrap_or(0.0)), interval)
    });
    let by_score = rows.iter().filter_map(|r| Some((r, r.cr_at_score?)));
    let at_score =
        by_score.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(r, cr)| (r.series.clone(), format!("{cr:.1}")));
    Ok(Some(Front { name: name.to_owned(), at_kl: at_kl.collect(), at_score, methods: rows.len() }))
}
