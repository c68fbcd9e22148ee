//! Names for the series of a table: the chain's methods and those options in which its rows differ.

use crate::codec::registry::{is_control, method};
use crate::codec::spec::{names, parse};
use crate::error::Result;
use crate::tables::Table;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// A row as labels see it.
#[derive(Debug, Clone, Default)]
pub struct Labelled {
    /// The chain in normal form.
    pub method: String,
    /// `stage.option` and columns of the packing -> cell; empty cells left out.
    pub cells: BTreeMap<String, String>,
}

/// Columns that tell how caches are packed, and how a cell of theirs reads.
pub const PACKING: [(&str, &str); 3] =
    [("block_size", "block "), ("batch", "batch "), ("first_token", "first token ")];

impl Labelled {
    /// Names of the chain's methods.
    pub fn stages(&self) -> Vec<&str> {
        names(&self.method)
    }

    /// The dial that a stage has turned, and where it stands.
    pub fn dials(&self) -> Vec<(&str, &str, &str)> {
        let of = |stage: &'_ str| method(stage).map_or(&[][..], |m| m.dials).iter().copied();
        let mut found = Vec::new();
        for stage in self.stages() {
            for dial in of(stage) {
                if let Some(value) = self.cells.get(&format!("{stage}.{dial}")) {
                    found.push((stage, dial, &value[..]));
                }
            }
        }
        found
    }

    /// What tells the row from others of its series: where its dials stand.
    pub fn name(&self) -> String {
        let name = |&(stage, _, value): &(&str, &str, &str)| {
            // A calibration is known by what it was made for.
            self.cells.get(&format!("{stage}.target")).cloned().unwrap_or_else(|| value.to_owned())
        };
        self.dials().iter().map(name).collect::<Vec<_>>().join(", ")
    }
}

/// The rows of a sweep.csv as labels see them.
fn labelled(table: &Table) -> Result<Vec<Labelled>> {
    let method = table.strings("method")?;
    let options = table.names().into_iter().filter(|n| n.contains('.'));
    let packing = PACKING.iter().map(|(name, _)| (*name).to_owned());
    let named: Vec<(String, Vec<String>)> =
        packing.chain(options).map(|n| Ok((n.clone(), table.strings(&n)?))).collect::<Result<_>>()?;
    let row = |(i, method): (usize, &String)| Labelled {
        method: method.clone(),
        cells: named
            .iter()
            .filter(|(_, cells)| !cells[i].is_empty())
            .map(|(name, cells)| (name.clone(), cells[i].clone()))
            .collect(),
    };
    Ok(method.iter().enumerate().map(row).collect())
}

/// A table of a sweep with what its rows are called, as columns: `series`, its own name in it (`point`), the dial that the series turns and
/// where it stands, if it has one that is a number (`dial`, `dial_at`), and whether it is a `control`.
pub fn named(table: &Table) -> Result<Table> {
    #[derive(Serialize)]
    struct Names {
        series: String,
        point: String,
        dial: Option<String>,
        dial_at: Option<f64>,
        control: bool,
    }
    let rows = labelled(table)?;
    let names = |(row, series): (&Labelled, String)| {
        let turned =
            row.dials().into_iter().find_map(|(_, dial, at)| Some((dial.to_owned(), at.parse().ok()?)));
        let (dial, dial_at) = turned.unzip();
        Names { series, point: row.name(), dial, dial_at, control: is_control(&row.method) }
    };
    table.beside(&rows.iter().zip(series_labels(&rows)).map(names).collect::<Vec<_>>())
}

/// Options that a chain in normal form spells out, as `stage.option`.
fn spelt(chain: &str) -> Vec<String> {
    let stages = parse(chain).unwrap_or_default().into_iter().flatten();
    stages.flat_map(|s| s.options.into_iter().map(move |o| format!("{}.{}", s.name, o.name))).collect()
}

/// The last end of a character at or before a byte.
pub fn boundary(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// Bytes that a name begins with as all others do, up to the end of one of them or of a word.
fn common<'a>(name: &str, others: impl Iterator<Item = &'a String>) -> usize {
    let agree = |a: &str, b: &str| a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    others
        .map(|other| {
            let same = agree(name, other);
            let whole = same == name.len() || same == other.len();
            if whole { same } else { name[..boundary(name, same)].rfind('-').unwrap_or(0) }
        })
        .min()
        .unwrap_or(0)
}

/// A label for each row. Rows of a series have the same label: where a dial stands is no part of it, but which one is turned is.
pub fn series_labels(rows: &[Labelled]) -> Vec<String> {
    let label = |row: &Labelled| {
        let stages = row.stages();
        let mut words = vec![stages.join("+")];
        // With a budget or a calibration, what is compared follows.
        let turned: Vec<(&str, &str)> = row.dials().iter().map(|d| (d.0, d.1)).collect();
        let of_a_dial = |column: &str| {
            let dial =
                |(stage, option): (&str, &str)| method(stage).is_some_and(|m| m.dials.contains(&option));
            column.split_once('.').is_some_and(|c| dial(c) || c.1 == "target")
        };
        let alike = |other: &&Labelled| {
            other.stages() == stages && other.dials().iter().map(|d| (d.0, d.1)).eq(turned.iter().copied())
        };
        // What no row of these spells out follows from what they do.
        let spelt: BTreeSet<String> =
            rows.iter().filter(alike).flat_map(|other| spelt(&other.method)).collect();
        for (column, cell) in row.cells.iter().filter(|(column, _)| spelt.contains(*column)) {
            let differs =
                rows.iter().filter(alike).any(|other| other.cells.get(column).is_some_and(|c| c != cell));
            let Some((_, option)) = column.split_once('.') else { continue };
            if !differs || of_a_dial(column) {
                continue;
            }
            let own = self::spelt(&row.method).contains(column);
            let words_of = option.replace('-', " ");
            match (&cell[..], option) {
                (_, "pairing" | "representative" | "similarity") => words.push(cell.clone()),
                // What is usual goes without saying.
                _ if !own => {}
                ("true", _) => words.push(words_of),
                ("false", _) => words.push(format!("no {words_of}")),
                (text, _) if text.parse::<f64>().is_err() => {
                    let others = rows.iter().filter(alike).filter_map(|o| o.cells.get(column));
                    let rest = &text[common(text, others)..];
                    words.extend((!rest.is_empty()).then(|| rest.trim_start_matches('-').replace('-', " ")));
                }
                _ => words.push(format!("{words_of} {cell}")),
            }
        }
        for (column, before) in PACKING {
            let cell = row.cells.get(column);
            if rows.iter().any(|other| other.cells.get(column) != cell) {
                words.extend(cell.map(|cell| format!("{before}{cell}")));
            }
        }
        for (stage, dial) in &turned {
            let usual = method(stage).and_then(|m| m.grid).map(|(name, _)| name);
            if usual.is_some_and(|usual| usual != *dial) {
                let target = row.cells.get(&format!("{stage}.target"));
                let predicted = target.is_some_and(|t| t.starts_with("model "));
                words.push(match *dial {
                    "thresholds" if predicted => "calibrated by model".to_owned(),
                    "thresholds" => "calibrated".to_owned(),
                    other => other.replace('-', " "),
                });
            }
        }
        words.join(" ")
    };
    rows.iter().map(label).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_named() {
        let row = |method: &str, cells: &[(&str, &str)]| Labelled {
            method: method.to_owned(),
            cells: cells.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        };
        let rows = [
            row("none", &[]),
            row("bff:tau=0.9", &[("bff.tau", "0.9"), ("bff.pairing", "tree"), ("bff.similarity", "keys")]),
            row("bff:tau=0.8", &[("bff.tau", "0.8"), ("bff.pairing", "tree"), ("bff.similarity", "keys")]),
            row(
                "bff:tau=0.9,pairing=best",
                &[("bff.tau", "0.9"), ("bff.pairing", "best"), ("bff.similarity", "keys")],
            ),
            row(
                "bff:max-error=0.1",
                &[("bff.max-error", "0.1"), ("bff.pairing", "tree"), ("bff.similarity", "lower")],
            ),
            row(
                "bff:thresholds=qa-1",
                &[("bff.thresholds", "qa-1"), ("bff.target", "kl 0.02"), ("bff.pairing", "best")],
            ),
        ];
        assert_eq!(
            series_labels(&rows),
            ["none", "bff tree", "bff tree", "bff best", "bff max error", "bff calibrated"]
        );
        assert_eq!(series_labels(&rows[1..3]), ["bff", "bff"]);
        let coded = |method: &str, codec: &str, reference: &str| {
            row(method, &[("joint.codec", codec), ("joint.reference", reference)])
        };
        let rows_of_codecs = [
            coded("joint:codec=j", "j", "true"),
            coded("joint:codec=j,reference=false", "j", "false"),
            coded("joint:codec=j-without-klt", "j-without-klt", "true"),
        ];
        assert_eq!(series_labels(&rows_of_codecs), ["joint", "joint no reference", "joint without klt"]);
        assert_eq!(rows[2].name(), "0.8");
        assert_eq!(rows[5].name(), "kl 0.02");
    }
}
