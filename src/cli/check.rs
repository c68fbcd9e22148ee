//! `kvfuse check`.

use super::say;
use super::table::table;
use crate::tables::{Difference, Tolerance, compare_folders};
use anyhow::{Result, bail};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Hold the tables of one results folder against those of another, column by column.
///
/// Every CSV file of the first folder (and its folders) must be in the second, with the same columns and rows: texts equal,
/// numbers equal within the tolerances, but for a few outliers. The same processor gives the same bytes; another one (manifests
/// say which kernels, `avx512` or `avx2`) rounds sums otherwise, which is what the tolerances are for. Files that only the second folder has, names of runs and texts
/// of answers are not looked at.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse check results/quick /tmp/again/quick")]
pub struct Args {
    /// What is expected
    expected: PathBuf,
    /// What was made
    made: PathBuf,
    /// Numbers may differ by this part of the larger of them
    #[arg(long, value_name = "SHARE", default_value_t = 0.02)]
    relative: f64,
    /// Or by this much
    #[arg(long, value_name = "DIFFERENCE", default_value_t = 0.01)]
    absolute: f64,
    /// Share of a table's cells, and of each column's, that may lie outside, rounded up, but never a whole column: another
    /// processor rounds otherwise, and a near tie of two tokens or of a cosine and its threshold then falls the other way
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    outliers: f64,
}

pub fn run(args: Args) -> Result<()> {
    let tolerance = Tolerance { relative: args.relative, absolute: args.absolute, outliers: args.outliers };
    let found = compare_folders(&args.expected, &args.made, &tolerance)?;
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|d: &Difference| {
            vec![
                d.file.clone(),
                d.cells.to_string(),
                d.different.to_string(),
                d.outside.to_string(),
                d.worst.clone().unwrap_or_else(|| "-".to_owned()),
                if d.bad.is_empty() { "agrees".to_owned() } else { format!("DIFFERS: {}", d.bad.join(", ")) },
            ]
        })
        .collect();
    say(table(&["table", "cells", "not equal", "outside", "worst", ""], &rows))?;
    let kernels: BTreeSet<&(String, String)> = found.iter().filter_map(|d| d.kernels.as_ref()).collect();
    for (expected, made) in kernels {
        say(format!(
            "computed with {expected}, and again with {made}: last digits differ, and near ties with them"
        ))?;
    }
    let bad: Vec<&str> = found.iter().filter(|d| !d.bad.is_empty()).map(|d| &d.file[..]).collect();
    if !bad.is_empty() {
        bail!("{} of {} tables differ: {}", bad.len(), found.len(), bad.join(", "));
    }
    say(format!("{} tables agree within {} or {} %", found.len(), args.absolute, 100.0 * args.relative))?;
    Ok(())
}
