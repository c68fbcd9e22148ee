//! `kvfuse stats`.

use super::table::table;
use super::{say, say_rows};
use crate::codec::Chain;
use crate::codec::fusion::RopeMode;
use crate::dump::Half;
use crate::plot::plot_stats;
use crate::stats::{STATS_CSV, StatsOptions, measure};
use crate::stats::{SimilarityOptions, StatRow};
use crate::sweep::parse_taus;
use anyhow::{Result, bail};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Measure how alike the blocks of a dump are: laws of cosine similarity by layer and class of pairs, their tails, and
/// whether pairs above a threshold come alone, as the Poisson model needs them to.
///
/// Writes stats.csv (docs/statistics.md), stats.manifest.json and figures.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse stats dumps/qa --block-size 8,16,32 -o results/qa-stats")]
pub struct Args {
    /// Folder that `kvfuse dump` wrote
    dump: PathBuf,
    /// Folder to write
    #[arg(short, long, default_value = "stats")]
    out: PathBuf,
    /// Tokens a block; several make several tables in one
    #[arg(long, value_delimiter = ',', default_value = "16")]
    block_size: Vec<usize>,
    /// Look at so many blocks of a layer only, drawn by seed
    #[arg(long, value_name = "BLOCKS")]
    sample: Option<usize>,
    /// Only one half of the requests; the halves share no passage (`kvfuse sweep --half`)
    #[arg(long, value_enum)]
    half: Option<Half>,
    /// Compare keys as cached, or without their positions
    #[arg(long, value_enum, default_value_t = RopeMode::Keep)]
    rope: RopeMode,
    /// Thresholds to count exceedances at: numbers or high:low:step
    #[arg(long, default_value = TAUS)]
    tau: String,
    /// Look at these layers only, as 3,12
    #[arg(long, value_delimiter = ',', value_name = "LAYERS")]
    layers: Option<Vec<usize>>,
    /// Count how many of the pairs above a threshold pairing=lsh finds: so many blocks, drawn by seed, compared with all others
    #[arg(long, value_name = "BLOCKS")]
    lsh_recall: Option<usize>,
    /// Fuse each layer by itself in these ways, as bff:tau=0.9,pairing=lsh: what is left of its blocks, at which error
    #[arg(long, value_name = "CHAINS")]
    fuse: Option<String>,
    /// Decides which blocks are sampled
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print the rows as JSON lines instead of a table
    #[arg(long)]
    json: bool,
}

/// Dense where sweeps look.
pub const TAUS: &str =
    "0.99,0.97,0.95,0.93,0.9,0.87,0.85,0.83,0.8,0.78,0.75,0.72,0.7,0.65,0.6,0.55,0.5,0.4,0.3";

impl Args {
    /// Checked as far as they can be before there is a dump.
    pub fn options(self, typed: Vec<String>) -> Result<StatsOptions> {
        if self.block_size.contains(&0) {
            bail!("--block-size 0: a block has at least one token");
        }
        if self.sample.is_some_and(|n| n < 2) {
            bail!("--sample: at least 2 blocks make a pair");
        }
        let mut sizes = self.block_size;
        sizes.dedup();
        let mut taus = parse_taus(&self.tau)?;
        taus.sort_by(f64::total_cmp);
        Ok(StatsOptions {
            dump: self.dump,
            out: self.out,
            half: self.half,
            similarity: SimilarityOptions {
                block_sizes: sizes,
                rope: self.rope,
                sample: self.sample,
                seed: self.seed,
                taus,
                layers: self.layers,
                lsh_recall: self.lsh_recall,
                fuse: self.fuse.as_deref().map_or(Ok(Vec::new()), Chain::parse)?,
            },
            command: typed,
        })
    }
}

pub fn run(args: Args, typed: Vec<String>) -> Result<()> {
    let json = args.json;
    let options = args.options(typed)?;
    let rows = measure(&options)?;
    if json {
        plot_stats(&options.out)?;
        return say_rows(&rows);
    }
    for &size in &options.similarity.block_sizes {
        say(report(&rows, size))?;
    }
    say(options.out.join(STATS_CSV).display().to_string())?;
    for path in plot_stats(&options.out)? {
        say(path.display().to_string())?;
    }
    Ok(())
}

/// A line a layer of one block size.
fn report(rows: &[StatRow], size: usize) -> String {
    let of = |layer: usize, part: &str, class: &str, statistic: &str, at: Option<f64>| {
        let of_layer = |r: &&StatRow| r.block_size == size && r.layer == layer;
        let row = rows.iter().find(|r| of_layer(r) && r.is(part, class, statistic, at));
        row.map(|r| r.value)
    };
    let layers: BTreeSet<usize> = rows.iter().filter(|r| r.block_size == size).map(|r| r.layer).collect();
    let shown = |x: Option<f64>, digits: usize| x.map_or("-".to_owned(), |x| format!("{x:.digits$}"));
    let count = |x: Option<f64>| x.map_or("-".to_owned(), |x| x.to_string());
    let line = |layer: usize| {
        let all = |statistic| of(layer, "both", "all", statistic, None);
        let key = |class, statistic, at| of(layer, "key", class, statistic, at);
        let sharp = Some(0.85);
        vec![
            layer.to_string(),
            count(all("blocks")),
            count(all("distinct")),
            shown(key("same_request", "mean", None), 3),
            shown(key("same_position", "mean", None), 3),
            shown(key("other", "mean", None), 3),
            shown(of(layer, "value", "other", "mean", None), 3),
            shown(key("all", "effective_dimension_centred", None), 0),
            key("all", "exceedance", sharp).map_or("-".to_owned(), |q| format!("{q:.2e}")),
            shown(key("all", "dispersion", sharp), 1),
            shown(key("all", "rho1", sharp), 3),
            shown(key("all", "value_above", sharp), 3),
        ]
    };
    let header = [
        "layer",
        "blocks",
        "distinct",
        "K same req",
        "K same pos",
        "K other",
        "V other",
        "K dims",
        "q(0.85)",
        "dispersion",
        "rho1",
        "V above",
    ];
    format!("blocks of {size} tokens\n{}", table(&header, &layers.into_iter().map(line).collect::<Vec<_>>()))
}
