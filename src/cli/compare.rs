//! `kvfuse compare`.

use super::table::table;
use super::{say, say_rows};
use crate::compare::{CompareOptions, Compared, Product, Slopes, compare, products, read};
use crate::tables::{COMPARE_CSV, PRODUCTS_CSV, SWEEP_CSV, Table, write_table};
use anyhow::{Context, Result};
use std::path::PathBuf;

/// Compare the methods of a sweep: what each stores at a KL and at no loss of score, and Bjontegaard differences to one of them.
///
/// Writes compare.csv beside sweep.csv, and products.csv where chains of several lossy methods stand beside their parts. A method is a
/// curve: rows that differ in dials alone. BD-rate is the mean difference of log bits at equal KL where both curves have it; it needs two points each.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  kvfuse compare results/chains/smollm2-135m\n  kvfuse compare results/qa --anchor prefix+kivi --max-kl 0.01 --margin 0.02"
)]
pub struct Args {
    /// Folder that `kvfuse sweep` wrote
    results: PathBuf,
    /// The method that the others are held against, as the table names it [default: the first]
    #[arg(long, value_name = "NAME")]
    anchor: Option<String>,
    /// KL at which ratios are read, nats per token
    #[arg(long, value_name = "NATS", default_value_t = 0.02)]
    max_kl: f64,
    /// Loss of score that counts as none: the low end of the interval must not lie further below
    #[arg(long, value_name = "SCORE", default_value_t = 0.05)]
    margin: f64,
    /// Curves between points
    #[arg(long, value_enum, default_value = "pchip")]
    slopes: Slopes,
    /// Resamples of requests for intervals
    #[arg(long, default_value_t = 1000, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=100_000))]
    resamples: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print the rows of compare.csv as JSON lines instead of a table
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<()> {
    let series = read(&args.results)?;
    let rows = compare(
        &series,
        &CompareOptions {
            anchor: args.anchor.clone(),
            max_kl: args.max_kl,
            margin: args.margin,
            slopes: args.slopes,
            resamples: args.resamples,
            seed: args.seed,
        },
    )?;
    let path = args.results.join(COMPARE_CSV);
    write_table(&path, &rows)?;
    let products = products(&Table::read(&args.results.join(SWEEP_CSV))?)?;
    let beside = args.results.join(PRODUCTS_CSV);
    if !products.is_empty() {
        write_table(&beside, &products)?;
    } else if beside.exists() {
        // Of an earlier sweep.
        std::fs::remove_file(&beside).with_context(|| beside.display().to_string())?;
    }
    if args.json {
        return say_rows(&rows);
    }
    let anchor = args.anchor.as_deref().unwrap_or(&series[0].name);
    let (at_kl, at_score) = (format!("CR at KL {}", args.max_kl), format!("CR at score -{}", args.margin));
    let against = format!("bits against {anchor}, % [95 %]");
    let lines: Vec<Vec<String>> = rows.iter().map(line).collect();
    say(table(&["method", "points", "on front", &at_kl, &at_score, &against, "KL, dB", "overlap"], &lines))?;
    if !products.is_empty() {
        let lines: Vec<Vec<String>> = products.iter().map(product).collect();
        say("")?;
        say(table(
            &["chain", "CR", "product of its parts", "CR share", "KL", "sum of its parts", "KL share"],
            &lines,
        ))?;
    }
    say(format!("\n{}", path.display()))
}

fn product(row: &Product) -> Vec<String> {
    let Product { method, cr, cr_product, share, kl, kl_sum, kl_share } = row;
    let numbers = [(cr, 2), (cr_product, 2), (share, 2), (kl, 4), (kl_sum, 4), (kl_share, 2)];
    let cells = numbers.iter().map(|(x, digits)| format!("{x:.digits$}"));
    std::iter::once(method.clone()).chain(cells).collect()
}

fn line(row: &Compared) -> Vec<String> {
    let number = |x: Option<f64>, digits: usize| x.map_or("-".to_owned(), |x| format!("{x:.digits$}"));
    let interval = |low: Option<f64>, high: Option<f64>, digits: usize| match (low, high) {
        (Some(low), Some(high)) => format!(" [{low:.digits$}, {high:.digits$}]"),
        _ => String::new(),
    };
    let more = if row.beyond_points { ">= " } else { "" };
    vec![
        row.series.clone(),
        row.points.to_string(),
        row.on_front.to_string(),
        match row.cr_at_kl {
            Some(cr) => format!("{more}{cr:.2}{}", interval(row.cr_at_kl_low, row.cr_at_kl_high, 2)),
            None => "-".to_owned(),
        },
        number(row.cr_at_score, 2),
        format!(
            "{}{}",
            number(row.bd_rate_percent, 0),
            interval(row.bd_rate_percent_low, row.bd_rate_percent_high, 0)
        ),
        number(row.bd_quality_db, 1),
        row.overlap.map_or("-".to_owned(), |o| format!("{:.0} %", 100.0 * o)),
    ]
}
