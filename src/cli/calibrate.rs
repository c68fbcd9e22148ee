//! `kvfuse calibrate`.

use super::say;
use super::table::table;
use crate::calibrate::{CalibrateOptions, LayerReport, Target, calibrate, calibrate_from_model};
use crate::codec::Chain;
use crate::codec::fusion::{Choices, Similarity};
use crate::files;
use crate::sweep::Settings;
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};

/// Find thresholds of single layers on some of a dump's questions; a sweep over the others then uses them.
///
/// Every layer is fused alone at a grid of thresholds on keys and values. With --target-kl the layers' thresholds minimise
/// stored bits while the measured KL of all layers together stays within the target; with --target-error every layer's
/// relative squared error does. With --model-based nothing is fused: rate and error are predicted from pair statistics.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  kvfuse calibrate dumps/qa --target-kl 0.02 -o qa.toml\n  kvfuse sweep dumps/qa --method bff:thresholds=qa.toml\n  \
    kvfuse calibrate dumps/qa --model-based --target-cr 4 -o qa-model.toml"
)]
pub struct Args {
    /// Folder that `kvfuse dump` wrote
    dump: PathBuf,
    /// KL from no fusion, nats a token, that the calibration questions may reach; a list writes a file for each
    #[arg(
        long,
        value_name = "NATS",
        value_delimiter = ',',
        required_unless_present_any = ["target_error", "target_cr"]
    )]
    target_kl: Vec<f64>,
    /// Relative squared error that each layer's keys, and its values, may reach; a list writes a file for each
    #[arg(long, value_name = "E", value_delimiter = ',')]
    target_error: Vec<f64>,
    /// Audited ratio to reach with the least predicted error (with --model-based); a list writes a file for each
    #[arg(long, value_name = "RATIO", value_delimiter = ',', requires = "model_based")]
    target_cr: Vec<f64>,
    /// Predict from pair statistics alone (docs/theory.md): nothing is fused or decoded
    #[arg(long, conflicts_with_all = ["target_kl", "floor"])]
    model_based: bool,
    /// Questions to calibrate on, drawn by seed [default: half of the dump's]
    #[arg(long, value_name = "N")]
    questions: Option<usize>,
    /// Let no threshold lie below this quantile of the similarity of unrelated blocks, as 0.99
    #[arg(long, value_name = "QUANTILE")]
    floor: Option<f64>,
    /// How blocks fuse, but for the thresholds; a calibration can do without spared layers
    #[arg(long, value_name = "CHAIN", default_value = "bff:pairing=best,spare-layers=0")]
    method: String,
    /// Tokens a block
    #[arg(long, default_value_t = 16)]
    block_size: usize,
    /// Requests fused together; a sweep should take as many
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Decides which questions are drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Model to run, if it lies elsewhere than when dumped
    #[arg(long)]
    model: Option<String>,
    /// File to write; of several targets, each has its number in its name
    #[arg(short, long, value_name = "FILE", default_value = "thresholds.toml")]
    out: PathBuf,
}

impl Args {
    /// Checked as far as they can be before there is a dump.
    pub fn options(self, typed: Vec<String>) -> Result<CalibrateOptions> {
        let kls = self.target_kl.iter().map(|&kl| ("--target-kl", kl, Target::Kl(kl)));
        let errors = self.target_error.iter().map(|&e| ("--target-error", e, Target::Error(e)));
        let ratios = self.target_cr.iter().map(|&cr| ("--target-cr", cr, Target::Cr(cr)));
        let targets: Vec<_> = kls.chain(errors).chain(ratios).collect();
        let unusable = |level: &f64| !(*level > 0.0 && level.is_finite());
        if let Some((name, level, _)) = targets.iter().find(|(_, level, _)| unusable(level)) {
            bail!("{name} {level}: must be above 0");
        }
        if let Some(floor) = self.floor.filter(|f| !(*f > 0.0 && *f < 1.0)) {
            bail!("--floor {floor}: must lie between 0 and 1");
        }
        let chain = Chain::undialled(&self.method)?;
        let choices = chain.fusion().map(|f| *f.choices()).unwrap_or_default();
        let settings = Settings {
            dump: Some(self.dump),
            block_size: Some(vec![self.block_size]),
            batch: Some(vec![self.batch]),
            model: self.model,
            ..Settings::default()
        };
        Ok(CalibrateOptions {
            sweep: settings.options(typed)?,
            choices: Choices { similarity: Similarity::Lower, ..choices },
            targets: targets.iter().map(|(.., target)| *target).collect(),
            questions: self.questions,
            floor: self.floor,
            seed: self.seed,
        })
    }
}

pub fn run(args: Args, typed: Vec<String>) -> Result<()> {
    let (out, model_based) = (args.out.clone(), args.model_based);
    let options = args.options(typed)?;
    files::writable_beside(&out)?;
    let found = if model_based { calibrate_from_model(&options) } else { calibrate(&options) }?;
    for (thresholds, layers) in found {
        let path = if options.targets.len() == 1 { out.clone() } else { numbered(&out, &thresholds.target) };
        thresholds.write(&path)?;
        say(report(&layers))?;
        say(format!(
            "\n{} questions, target {}: CR audited {:.2}{}{}\n{}\n",
            thresholds.questions.len(),
            thresholds.target,
            thresholds.calibration_cr_audited,
            if model_based { " (predicted)" } else { "" },
            thresholds.calibration_kl.map_or(String::new(), |kl| {
                let over = thresholds
                    .target
                    .strip_prefix("kl ")
                    .and_then(|t| t.parse().ok())
                    .is_some_and(|t: f64| kl > t);
                let remark = if over { " (above the target even with the strictest thresholds)" } else { "" };
                format!(", KL {kl:.4} nats a token{remark}")
            }),
            path.display()
        ))?;
    }
    Ok(())
}

/// `qa.toml` of target `kl 0.02` becomes `qa-kl-0.02.toml`.
fn numbered(path: &Path, target: &str) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}-{}.toml", target.replace(' ', "-")))
}

fn report(layers: &[LayerReport]) -> String {
    let value = |t: f64| if t < 0.0 { "-".to_owned() } else { t.to_string() };
    let rows: Vec<Vec<String>> = layers
        .iter()
        .map(|l| {
            vec![
                l.thresholds.layer.to_string(),
                l.thresholds.key.to_string(),
                value(l.thresholds.value),
                l.floor.map_or("-".to_owned(), |(k, v)| format!("{k:.3} {v:.3}")),
                format!("{:.2}", l.cr),
                l.kl.map_or("-".to_owned(), |kl| format!("{kl:.5}")),
            ]
        })
        .collect();
    table(&["layer", "key tau", "value tau", "floors K V", "CR audited", "KL alone"], &rows)
}
