//! Whether two folders of result tables say the same: what was committed, and what was made again.

use super::{TIMINGS_CSV, Table};
use crate::error::{Error, IoAt, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Tables that are not compared: times differ, the others are not committed.
const LEFT_OUT: [&str; 3] = [TIMINGS_CSV, "requests.csv", "layers.csv"];
/// Columns that name things by checksum, and how the names of others end that do: a trained file's bytes say how it was made, too.
const NAMES: [&str; 2] = ["run", "thresholds"];
const CHECKSUM: &str = "-sha256";

/// How far two numbers may lie apart.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Share of the larger of the two.
    pub relative: f64,
    pub absolute: f64,
    /// Share of a table's and of each column's cells that may lie outside, rounded up, but never all of a column.
    pub outliers: f64,
}

impl Tolerance {
    fn spared(&self, cells: usize) -> usize {
        (self.outliers * cells as f64).ceil() as usize
    }
}

/// One table of both folders.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Path below the folders.
    pub file: String,
    pub cells: usize,
    /// Cells that are not the same, and cells outside of the tolerance.
    pub different: usize,
    pub outside: usize,
    /// The cell that lies farthest apart: column, line, both values.
    pub worst: Option<String>,
    /// What the two were computed with, where their manifests say so and it is not the same.
    pub kernels: Option<(String, String)>,
    /// Table with more cells outside than may be, or that there are too many in all; empty if the tables agree.
    pub bad: Vec<String>,
}

/// Compares every table below `expected` with its namesake below `made`.
pub fn compare_folders(expected: &Path, made: &Path, tolerance: &Tolerance) -> Result<Vec<Difference>> {
    let mut files = Vec::new();
    tables(expected, Path::new(""), &mut files)?;
    files.sort();
    if files.is_empty() {
        return Err(Error::file(expected, "holds no tables to compare with"));
    }
    files.iter().map(|file| compare(&expected.join(file), &made.join(file), file, tolerance)).collect()
}

/// Paths of the tables below a folder.
fn tables(root: &Path, below: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let folder = root.join(below);
    for entry in fs::read_dir(&folder).at(&folder)? {
        let entry = entry.at(&folder)?;
        let (path, name) = (below.join(entry.file_name()), entry.file_name());
        if entry.path().is_dir() {
            tables(root, &path, found)?;
        } else if path.extension().is_some_and(|e| e == "csv") && !LEFT_OUT.iter().any(|l| name == *l) {
            found.push(path);
        }
    }
    Ok(())
}

fn compare(expected: &Path, made: &Path, file: &Path, tolerance: &Tolerance) -> Result<Difference> {
    let (a, b) = (Table::read(expected)?, Table::read(made)?);
    if a.names() != b.names() || a.height() != b.height() {
        let problem = format!(
            "has other columns or rows than {}; was it made by the same command?",
            expected.display()
        );
        return Err(Error::file(made, problem));
    }
    let mut found = Difference {
        file: file.display().to_string(),
        cells: 0,
        different: 0,
        outside: 0,
        worst: None,
        kernels: kernels(expected).zip(kernels(made)).filter(|(a, b)| a != b),
        bad: Vec::new(),
    };
    let mut farthest = 0.0;
    for name in a.names().iter().filter(|n| !NAMES.contains(&&n[..]) && !n.ends_with(CHECKSUM)) {
        let (cells, outside) = (found.cells, found.outside);
        for (line, (x, y)) in (2..).zip(a.strings(name)?.iter().zip(&b.strings(name)?)) {
            let (xs, ys): (Vec<&str>, Vec<&str>) = (x.split(';').collect(), y.split(';').collect());
            found.cells += xs.len();
            if xs.len() != ys.len() {
                found.different += xs.len();
                found.outside += xs.len();
                farthest = f64::INFINITY;
                found.worst = Some(format!("{name}, line {line}: lists of {} and {}", xs.len(), ys.len()));
                continue;
            }
            for (x, y) in xs.iter().zip(&ys).filter(|(x, y)| x != y) {
                let apart = apart(x, y, tolerance);
                found.different += usize::from(apart > 0.0);
                found.outside += usize::from(apart > 1.0);
                if apart > farthest {
                    farthest = apart;
                    found.worst = Some(format!("{name}, line {line}: {x} and {y}"));
                }
            }
        }
        let (cells, outside) = (found.cells - cells, found.outside - outside);
        if outside > tolerance.spared(cells).min(cells - 1) {
            found.bad.push(name.clone());
        }
    }
    // A row that is wrong throughout has but one cell in each column.
    if found.bad.is_empty() && found.outside > tolerance.spared(found.cells) {
        found.bad.push("too many cells in all".to_owned());
    }
    Ok(found)
}

/// What the manifest beside a table says that it was computed with; none if there is no such manifest.
fn kernels(table: &Path) -> Option<String> {
    let text = fs::read_to_string(table.with_file_name("manifest.json")).ok()?;
    let manifest: serde_json::Value = serde_json::from_str(&text).ok()?;
    let names: Vec<&str> = manifest["kernels"].as_array()?.iter().filter_map(|name| name.as_str()).collect();
    (!names.is_empty()).then(|| names.join(" and "))
}

/// Distance of two cells: above 1 outside of the tolerance, infinite for texts and for a NaN against a number.
fn apart(x: &str, y: &str, tolerance: &Tolerance) -> f64 {
    match (x.parse::<f64>(), y.parse::<f64>()) {
        (Ok(x), Ok(y)) if x.is_nan() && y.is_nan() => 0.0,
        (Ok(x), Ok(y)) if x.is_finite() && y.is_finite() => {
            let allowed = tolerance.absolute.max(tolerance.relative * x.abs().max(y.abs()));
            if x == y { 0.0 } else { (x - y).abs() / allowed.max(f64::MIN_POSITIVE) }
        }
        _ => f64::INFINITY,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_numbers_agree_and_far_ones_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |folder: &str, text: &str| {
            let folder = dir.path().join(folder).join("x");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("sweep.csv"), text).unwrap();
            fs::write(folder.join("timings.csv"), folder.display().to_string()).unwrap();
            fs::write(folder.join("manifest.json"), r#"{"kernels":["avx2"]}"#).unwrap();
        };
        write("a", "run,method,kl,layer_cr\nr1,none,0.5,1;2\nr2,bff,2,1;2\n");
        write("b", "run,method,kl,layer_cr\nr9,none,0.501,1;2\nr8,bff,2.5,1;2\n");
        let tolerance = Tolerance { relative: 0.01, absolute: 1e-6, outliers: 0.0 };
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let found = compare_folders(&a, &b, &tolerance).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].cells, found[0].different, found[0].outside), (8, 2, 1));
        assert_eq!(found[0].worst.as_deref(), Some("kl, line 3: 2.0 and 2.5"));
        assert_eq!(found[0].bad, ["kl"]);
        assert_eq!(found[0].kernels, None);
        fs::write(b.join("x/manifest.json"), r#"{"kernels":["avx2","avx512"]}"#).unwrap();
        let other = Some(("avx2".to_owned(), "avx2 and avx512".to_owned()));
        assert_eq!(compare_folders(&a, &b, &tolerance).unwrap()[0].kernels, other);
        let lenient = Tolerance { outliers: 0.2, ..tolerance };
        let bad = |b: &Path, tolerance: &Tolerance| compare_folders(&a, b, tolerance).unwrap()[0].bad.clone();
        assert!(bad(&b, &lenient).is_empty() && bad(&a, &tolerance).is_empty());
        // One cell of a column may be spared, a whole column never; many cells of one column do not hide behind another's.
        write("b", "run,method,kl,layer_cr\nr1,none,0.7,1;2\nr2,bff,2.5,1;2\n");
        assert_eq!(bad(&b, &Tolerance { outliers: 1.0, ..tolerance }), ["kl"]);
        // Nor does a row that is wrong throughout.
        write("b", "run,method,kl,layer_cr\nr1,gone,0.7,4;5\nr2,bff,2,1;2\n");
        assert_eq!(bad(&b, &Tolerance { outliers: 0.3, ..tolerance }), ["too many cells in all"]);
        write("b", "run,method,kl,layer_cr\nr1,none,NaN,1;2\nr2,bff,2,1;2\n");
        assert_eq!(bad(&b, &Tolerance { relative: 1.0, ..tolerance }), ["kl"]);
        write("b", "run,method,kl,layer_cr\nr9,none,0.501,1;2\n");
        assert!(compare_folders(&a, &b, &tolerance).unwrap_err().to_string().contains("rows"));
    }
}
