//! One self-contained HTML file of a results folder: what was claimed, figures, tables that sort, manifests.

mod claims;
mod front;

pub use claims::{Claim, Verdict, claims};
use front::{Front, front};

use crate::error::{Error, IoAt, Result};
use crate::files;
use crate::tables::Table;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::write::GzEncoder;
use minijinja::{AutoEscape, Environment, context};
use serde::Serialize;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

pub const REPORT: &str = "report.html";
const TEMPLATE: &str = include_str!("template.html");
/// Lines of a table that are shown, at most.
const MOST_ROWS: usize = 400;
/// Tables too large and too fine to read on a page, and those that only machines have.
const LEFT_OUT: [&str; 5] =
    ["requests.csv", "layers.csv", "closed_forms.csv", "predictions.csv", "stats.csv"];

/// A folder that holds results.
#[derive(Debug, Serialize)]
struct Section {
    /// Its path below the folder reported on.
    name: String,
    claims: Vec<Claim>,
    /// Why no claim can be judged: tables of an older version.
    problem: Option<String>,
    /// Its row of the first page.
    front: Option<Front>,
    /// SVG sources, with their names, compressed: a page of all figures as text is nine megabytes.
    figures: Vec<(String, String)>,
    tables: Vec<Shown>,
    /// Names and texts.
    manifests: Vec<(String, String)>,
}

/// A table as the page shows it.
#[derive(Debug, Serialize)]
struct Shown {
    name: String,
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
    /// Rows of the file.
    in_all: usize,
}

/// Writes report.html into `out`, of all results in it and below it; returns its path.
pub fn report(out: &Path) -> Result<PathBuf> {
    if !out.is_dir() {
        return Err(Error::file(out, "no such folder; name one that `kvfuse sweep` or `kvfuse run` wrote"));
    }
    let mut sections = Vec::new();
    gather(out, out, &mut sections)?;
    if sections.is_empty() {
        let problem =
            "holds no results; name a folder that `kvfuse sweep`, `stats`, `simulate` or `run` wrote";
        return Err(Error::file(out, problem));
    }
    let mut jinja = Environment::new();
    jinja.set_auto_escape_callback(|_| AutoEscape::Html);
    let path = out.join(REPORT);
    let bad = |e: minijinja::Error| Error::file(&path, e.to_string());
    jinja.add_template("report", TEMPLATE).map_err(bad)?;
    let title =
        out.file_name().map_or_else(|| out.display().to_string(), |n| n.to_string_lossy().into_owned());
    let fronts: Vec<&Front> = sections.iter().filter_map(|s| s.front.as_ref()).collect();
    let values = context! { title, fronts, sections, version => env!("CARGO_PKG_VERSION") };
    let html = jinja.get_template("report").and_then(|t| t.render(values)).map_err(bad)?;
    files::write_atomically(&path, |file| file.write_all(html.as_bytes()))?;
    Ok(path)
}

/// Sections of a folder and, in order of their names, of those in it.
fn gather(root: &Path, folder: &Path, sections: &mut Vec<Section>) -> Result<()> {
    let mut entries: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder).at(folder)? {
        entries.push(entry.at(folder)?.path());
    }
    entries.sort();
    let kind = |path: &Path, kind: &str| path.is_file() && path.extension().is_some_and(|e| e == kind);
    let name = |path: &Path| path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let tables: Vec<&PathBuf> = entries.iter().filter(|p| kind(p, "csv")).collect();
    if !tables.is_empty() {
        let below = folder.strip_prefix(root).unwrap_or(folder).display().to_string();
        let texts = |wanted: &dyn Fn(&Path) -> bool| -> Result<Vec<(String, String)>> {
            let of = entries.iter().filter(|p| wanted(p));
            of.map(|p| Ok((name(p), fs::read_to_string(p).at(p)?))).collect()
        };
        let own = if below.is_empty() { name(root) } else { below };
        let figures = texts(&|p| kind(p, "svg"))?;
        let judged = claims(folder);
        sections.push(Section {
            problem: judged.as_ref().err().map(ToString::to_string),
            claims: judged.unwrap_or_default(),
            front: front(folder, &own)?,
            name: own,
            figures: figures.into_iter().map(|(name, svg)| (name, packed(&svg))).collect(),
            tables: tables
                .into_iter()
                .filter(|p| !LEFT_OUT.contains(&&name(p)[..]))
                .map(|p| table(p, name(p)))
                .collect::<Result<_>>()?,
            manifests: texts(&|p| kind(p, "json") && name(p).ends_with("manifest.json"))?,
        });
    }
    // Finished runs and dumps are no results.
    let deeper = entries.iter().filter(|p| p.is_dir() && !["runs", "dump"].contains(&&name(p)[..]));
    deeper.into_iter().try_for_each(|p| gather(root, p, sections))
}

/// A text, gzipped, in base64.
fn packed(text: &str) -> String {
    let mut gz = GzEncoder::new(Vec::new(), Compression::best());
    // Writing to memory does not fail.
    let _ = gz.write_all(text.as_bytes());
    STANDARD.encode(gz.finish().unwrap_or_default())
}

fn table(path: &Path, name: String) -> Result<Shown> {
    let read = Table::read(path)?;
    let columns = read.names();
    let cells: Vec<Vec<String>> = columns.iter().map(|c| read.strings(c)).collect::<Result<_>>()?;
    let shown = read.height().min(MOST_ROWS);
    let rows = (0..shown).map(|i| cells.iter().map(|column| column[i].clone()).collect()).collect();
    Ok(Shown { name, columns, rows, in_all: read.height() })
}
