//! `kvfuse methods`.

use super::say;
use crate::codec::registry::{Entry, method, methods};
use crate::codec::spec::nearest;
use anyhow::{Result, bail};

/// List the methods that `--method` takes, or explain one: what it does, where it is from, its options.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  kvfuse methods\n  kvfuse methods bff")]
pub struct Args {
    /// Method to explain
    name: Option<String>,
}

pub fn run(args: Args) -> Result<()> {
    let Some(name) = args.name else {
        let rows: Vec<Vec<String>> = methods().map(row).collect();
        say(listed(&rows))?;
        say("\nA chain joins methods by +, options follow a colon, | and high:low:step make a grid:")?;
        return say("  kvfuse sweep DUMP --method 'prefix,prefix+bff:tau=0.95:0.80:0.05,pairing=tree|best'");
    };
    let Some(entry) = method(&name) else {
        let hint = nearest(&name, methods().map(|m| m.name))
            .map_or(String::new(), |n| format!("; did you mean {n}?"));
        bail!("no method is called '{name}'{hint}");
    };
    say(format!("{}\n  {}", entry.name, entry.about))?;
    if !entry.paper.is_empty() {
        say(format!("  {}", entry.paper))?;
    }
    let options = entry.options();
    if !options.is_empty() {
        say("")?;
        let rows: Vec<Vec<String>> = options
            .into_iter()
            .map(|o| {
                let values =
                    if o.values.is_empty() { String::new() } else { format!(" ({})", o.values.join(", ")) };
                vec![o.name, o.default.unwrap_or("-".to_owned()), o.help + &values]
            })
            .collect();
        say(listed(
            &[vec![vec!["option".to_owned(), "default".to_owned(), "meaning".to_owned()]], rows].concat(),
        ))?;
    }
    if let Some((name, values)) = entry.grid {
        say(format!("\nWith none of {} it means {name}={values}.", entry.dials.join(", ")))?;
    }
    Ok(())
}

/// A line a method: its name and the first sentence about it.
fn row(entry: &Entry) -> Vec<String> {
    let first = entry.about.split(". ").next().unwrap_or_default();
    vec![entry.name.to_owned(), first.trim_end_matches('.').to_owned()]
}

/// Lines in left-aligned columns.
fn listed(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
        format!("  {}", cells.join("  ")).trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}
