//! `kvfuse simulate`.

use super::table::table;
use super::{say, say_rows};
use crate::codec::Chain;
use crate::codec::fusion::Pairing;
use crate::plot::{plot_bound, plot_simulation};
use crate::sweep::parse_taus;
use crate::theory::{BoundOptions, BoundRow, Draws, Model, World, bound};
use crate::theory::{SimulateOptions, Simulation, simulate};
use anyhow::{Result, bail};
use clap::ValueEnum;
use std::path::PathBuf;

/// The Poisson-process model of fusion: closed forms, synthetic caches in which its assumptions hold or fail one at a time,
/// and both against what a sweep measured.
///
/// Writes closed_forms.csv, monte_carlo.csv and, where asked for, scale.csv, predictions.csv, verdicts.csv
/// (docs/theory.md), with figures.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  kvfuse simulate --stats results/qa-stats/stats.csv --against results/qa/sweep.csv -o results/qa-model\n  \
    kvfuse simulate --stats results/qa-stats/stats.csv --requests 8..65536 -o results/qa-scale\n  \
    kvfuse simulate --bound dumps/test --method 'prefix+joint:codec=joint.safetensors,step=0.004|0.008' -o results/qa-joint"
)]
pub struct Args {
    /// Table that `kvfuse stats` wrote
    #[arg(long, value_name = "FILE", required_unless_present = "bound")]
    stats: Option<PathBuf>,
    /// Instead of all else: what chains spend on this dump's caches, against the Gaussian rate-distortion bound
    /// of their own predictors; writes bound.csv, bound_layers.csv and bound_matches.csv
    #[arg(long, value_name = "DUMP", conflicts_with_all = ["stats", "against", "requests"], requires = "method")]
    bound: Option<PathBuf>,
    /// Chains to hold against the bound
    #[arg(long, value_name = "CHAINS", requires = "bound")]
    method: Option<String>,
    /// sweep.csv of the same dump, to hold the predictions against
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// Batch sizes to extrapolate to: numbers, or LOW..HIGH in powers of two
    #[arg(long, value_name = "LIST")]
    requests: Option<String>,
    /// Distinct blocks that a request adds to those all share [default: as measured]
    #[arg(long, value_name = "BLOCKS", value_parser = clap::value_parser!(u64).range(1..))]
    blocks: Option<u64>,
    /// Thresholds: numbers or high:low:step [default: those of the statistics]
    #[arg(long)]
    tau: Option<String>,
    /// Tokens a block, where the statistics have several sizes [default: the first]
    #[arg(long, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=65_535))]
    block_size: Option<usize>,
    /// Layer that the synthetic caches are like [default: the middle one]
    #[arg(long)]
    layer: Option<usize>,
    /// Synthetic worlds
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [World::Iid, World::Common, World::Law])]
    world: Vec<World>,
    /// Requests and blocks a request of a synthetic cache
    #[arg(long, value_name = "REQUESTS,BLOCKS", value_delimiter = ',', num_args = 1, default_value = "32,8")]
    synthetic: Vec<usize>,
    /// Synthetic caches to draw in each world
    #[arg(long, default_value_t = 20)]
    draws: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder to write
    #[arg(short, long, default_value = "simulation")]
    out: PathBuf,
    /// Print the rows of prediction_summary.csv, or of monte_carlo.csv without --against, as JSON lines instead of tables
    #[arg(long)]
    json: bool,
}

/// The largest batch anyone extrapolates to.
const MOST_REQUESTS: usize = 1 << 30;
/// Blocks of a synthetic cache, at most: every pair is looked at.
const MOST_BLOCKS: usize = 8192;

impl Args {
    /// What can be checked before there are statistics, a dump, trained files.
    pub fn check(self) -> Result<()> {
        match &self.method {
            Some(method) => Ok(Chain::check_text(method)?),
            None => self.options(Vec::new()).map(|_| ()),
        }
    }

    /// What to hold against the bound.
    fn bound_options(self, typed: Vec<String>) -> Result<BoundOptions> {
        let (Some(dump), Some(method)) = (self.bound, self.method) else { bail!("--bound needs --method") };
        Ok(BoundOptions {
            dump,
            chains: Chain::parse(&method)?,
            block_size: self.block_size.unwrap_or(16),
            out: self.out,
            command: typed,
        })
    }

    /// Checked as far as they can be before there are statistics.
    pub fn options(self, typed: Vec<String>) -> Result<SimulateOptions> {
        let [requests, blocks] = self.synthetic[..] else {
            bail!("--synthetic: write REQUESTS,BLOCKS, as 32,8")
        };
        if requests == 0 || blocks == 0 || requests.saturating_mul(blocks) > MOST_BLOCKS {
            bail!("--synthetic {requests},{blocks}: 1 to {MOST_BLOCKS} blocks in all");
        }
        if self.draws == 0 {
            bail!("--draws 0: draw at least once");
        }
        Ok(SimulateOptions {
            stats: self.stats.unwrap_or_default(),
            against: self.against,
            requests: self.requests.as_deref().map_or(Ok(Vec::new()), batch_sizes)?,
            blocks: self.blocks.map(|b| b as usize),
            taus: self.tau.as_deref().map(parse_taus).transpose()?,
            block_size: self.block_size,
            layer: self.layer,
            draws: Draws { worlds: self.world, requests, blocks, draws: self.draws, seed: self.seed },
            out: self.out,
            command: typed,
        })
    }
}

pub fn run(args: Args, typed: Vec<String>) -> Result<()> {
    let json = args.json;
    if args.bound.is_some() {
        let options = args.bound_options(typed)?;
        let rows = bound(&options)?;
        let written = plot_bound(&options.out)?;
        if json {
            return say_rows(&rows);
        }
        say(bound_table(&rows))?;
        return written.iter().try_for_each(|path| say(path.display().to_string()));
    }
    let options = args.options(typed)?;
    let found = simulate(&options)?;
    if json {
        plot_simulation(&options.out)?;
        return match found.summary.is_empty() {
            true => say_rows(&found.monte_carlo),
            false => say_rows(&found.summary),
        };
    }
    report(&found)?;
    for path in plot_simulation(&options.out)? {
        say(path.display().to_string())?;
    }
    Ok(())
}

fn bound_table(rows: &[BoundRow]) -> String {
    let line = |r: &BoundRow| {
        vec![
            r.method.clone(),
            format!("{:.3}", r.coded_bits_per_element),
            format!("{:.3}", r.gaussian_bits_per_element),
            format!("{:+.3}", r.distance_bits_per_element),
            format!("{:.3}", r.predicted_bits_per_element),
            format!("{:.1}", r.cr_audited),
            format!("{:.1}", r.cr_bound),
        ]
    };
    let lines: Vec<Vec<String>> = rows.iter().map(line).collect();
    table(
        &[
            "method",
            "coded bits/element",
            "Gaussian at the same error",
            "distance",
            "predicted by training",
            "CR audited",
            "CR at the bound",
        ],
        &lines,
    )
}

/// `8,64` or `8..65536` (powers of two times the first).
fn batch_sizes(text: &str) -> Result<Vec<usize>> {
    let number = |s: &str| match s.trim().parse::<usize>() {
        Ok(n) if (1..=MOST_REQUESTS).contains(&n) => Ok(n),
        _ => bail!("--requests {text}: write numbers from 1 to {MOST_REQUESTS}, or LOW..HIGH as 8..65536"),
    };
    let mut sizes = Vec::new();
    for part in text.split(',') {
        match part.split_once("..") {
            Some((low, high)) => {
                let (low, high) = (number(low)?, number(high)?);
                if high < low {
                    bail!("--requests {text}: the range is reversed; write LOW..HIGH");
                }
                sizes.extend(std::iter::successors(Some(low), |n| Some(2 * n)).take_while(|n| *n <= high));
            }
            None => sizes.push(number(part)?),
        }
    }
    sizes.sort_unstable();
    sizes.dedup();
    Ok(sizes)
}

/// Tables to read; the rest is in the CSV files.
fn report(found: &Simulation) -> Result<()> {
    let optional = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{x:.2}"));
    // Where no pair or every pair lies above the threshold there is nothing to see.
    let drawn = found.monte_carlo.iter().filter(|r| r.q > 0.0 && r.q < 0.999);
    let rows: Vec<Vec<String>> = drawn
        .map(|r| {
            vec![
                name(r.world),
                name(r.pairing),
                r.tau.to_string(),
                format!("{:.2e}", r.q),
                optional(r.dispersion),
                format!("{:.2} [{:.2}, {:.2}]", r.cr, r.cr_low, r.cr_high),
                format!("{:.2}", r.cr_model),
                format!("{:.3}", r.key_error),
                r.key_error_model.map_or("-".to_owned(), |e| format!("{e:.3}")),
            ]
        })
        .collect();
    say("synthetic caches, drawn and fused by the sweep's own code")?;
    say(table(
        &["world", "pairing", "tau", "q", "var/mean", "CR [95 %]", "CR model", "K err", "K err model"],
        &rows,
    ))?;
    if found.summary.is_empty() {
        return Ok(());
    }
    let rows: Vec<Vec<String>> = found
        .summary
        .iter()
        .map(|r| {
            vec![
                words(r.model).to_owned(),
                name(r.pairing),
                r.tau.to_string(),
                format!("{:.2}", r.cr_measured),
                format!("{:.2}", r.cr_predicted),
                format!("{:.2} [{:.2}, {:.2}]", r.cr_over, r.cr_over_low, r.cr_over_high),
                optional(r.key_error_over),
                optional(r.value_error_over),
            ]
        })
        .collect();
    say(
        "\npredicted against measured, full blocks of all layers; last columns: predicted / measured, median layer",
    )?;
    say(table(
        &["model", "pairing", "tau", "CR measured", "CR predicted", "by layer [10, 90 %]", "K err", "V err"],
        &rows,
    ))?;
    let mut columns: Vec<(Model, Pairing)> = Vec::new();
    for v in &found.verdicts {
        if !columns.contains(&(v.model, v.pairing)) {
            columns.push((v.model, v.pairing));
        }
    }
    let layers = found.verdicts.iter().map(|v| v.layer).max().map_or(0, |l| l + 1);
    let cell = |layer: usize, (model, pairing): (Model, Pairing)| {
        let v = found.verdicts.iter().find(|v| v.layer == layer && v.model == model && v.pairing == pairing);
        match v.and_then(|v| Some((v, v.holds?, v.worst_error?, v.worst_tau?))) {
            Some((_, true, worst, _)) => format!("holds ({:.0} %)", 100.0 * worst),
            Some((v, false, worst, tau)) => {
                let reach = v.holds_down_to.map_or("fails".to_owned(), |t| format!("down to {t}"));
                format!("{reach} ({:.0} % at {tau})", 100.0 * worst)
            }
            None => "-".to_owned(),
        }
    };
    let line = |layer: usize| {
        let cells = columns.iter().map(|&c| cell(layer, c));
        std::iter::once(layer.to_string()).chain(cells).collect::<Vec<String>>()
    };
    let titles: Vec<String> = columns.iter().map(|&(m, p)| format!("{}: {}", words(m), name(p))).collect();
    let header: Vec<&str> = std::iter::once("layer").chain(titles.iter().map(String::as_str)).collect();
    say(
        "\nverdicts: where the predicted ratio is within 10 %, at every threshold at which blocks fuse or down to one (and the worst); reasons are in verdicts.csv",
    )?;
    say(table(&header, &(0..layers).map(line).collect::<Vec<_>>()))
}

/// An option's name, as typed.
fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or(String::new(), |v| v.get_name().to_owned())
}

fn words(model: Model) -> &'static str {
    match model {
        Model::Uniform => "uniform",
        Model::ByPosition => "by position",
    }
}
