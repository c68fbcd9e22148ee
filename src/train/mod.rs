//! `kvfuse train` and `kvfuse sensitivity`: what a joint codec is made of, measured on the model.

mod collect;
mod metric;
mod sensitivity;
mod transform;

pub use metric::EVEN;
pub use sensitivity::{Sensitivity, SensitivityOptions, sensitivity};

use crate::codec::TrainedFile;
use crate::codec::joint::book::{Book, LayerBook, Origin, SCHEMA, write};
use crate::codec::joint::corpus::Corpus;
use crate::codec::joint::rebuild;
use crate::codec::joint::train::{Metric, Training, train as fit};
use crate::dump::Manifest;
use crate::dump::open_model;
use crate::error::{Error, Result};
use crate::files;
use crate::model::Model;
use crate::progress::{Progress, Unit};
use std::path::{Path, PathBuf};

/// A part of the codec that can be left out, to see what it is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Prediction from the layers below.
    Prediction,
    /// Uncorrelated components.
    Klt,
    /// Weights of errors by what they do; numbers' own variances in their place.
    Metric,
}

impl Part {
    /// The file of the codec without it, beside the whole one.
    pub fn path(self, whole: &Path) -> PathBuf {
        let stem = whole.file_stem().unwrap_or_default().to_string_lossy();
        let name = format!("{stem}-without-{self:?}.safetensors").to_lowercase();
        whole.with_file_name(name)
    }
}

/// What to train on, and how.
#[derive(Debug, Clone)]
pub struct TrainOptions {
    pub dumps: Vec<PathBuf>,
    pub out: PathBuf,
    pub training: Training,
    /// Parts to leave out, each in a codec of its own beside the whole one.
    pub without: Vec<Part>,
    /// A KVTC transform besides, of so many directions.
    pub kvtc: Option<usize>,
    /// Requests whose answers errors are measured on.
    pub questions: usize,
    /// The share of the metric that is taken as if answers attended to all tokens alike.
    pub even: f64,
    /// How often errors are weighted anew by what the codec's own errors do.
    pub rounds: usize,
    pub seed: u64,
    /// Arguments to record in the file.
    pub command: Vec<String>,
}

/// What training came to, for people.
#[derive(Clone)]
pub struct Trained {
    pub tokens: usize,
    pub components: Vec<usize>,
    pub bytes: u64,
    /// It was there already.
    pub known: bool,
}

/// Trains a joint codec and what else is asked for, unless it is there already: of the same dumps, settings and version.
///
/// # Errors
/// Dumps of different models, damaged dumps, too little text; files that cannot be written; Ctrl-C.
pub fn train(options: &TrainOptions) -> Result<Trained> {
    let manifests: Vec<Manifest> = options.dumps.iter().map(|d| Manifest::read(d)).collect::<Result<_>>()?;
    let first = manifests.first().ok_or_else(|| Error::argument("no dump to train on"))?;
    for (dump, manifest) in options.dumps.iter().zip(&manifests) {
        if manifest.model.sha256 != first.model.sha256 {
            let problem = format!("is of another model than {}", options.dumps[0].display());
            return Err(Error::file(dump, problem));
        }
    }
    let settings = serde_json::json!({
        "step": options.training.step,
        "taps": options.training.taps,
        "klt": options.training.klt,
        "ridge": options.training.ridge,
        "rank": options.training.rank,
        "questions": options.questions,
        "even": options.even,
        "rounds": options.rounds,
        "seed": options.seed,
        "metric": "answers",
    });
    let dumps: Vec<serde_json::Value> = manifests.iter().map(|m| m.origin()).collect::<Result<_>>()?;
    let trained = finished(options, &settings, &dumps);
    let directions = options.kvtc.filter(|&directions| !transform::is_there(options, &dumps, directions));
    if let (Some(trained), None) = (&trained, directions) {
        return Ok(trained.clone());
    }
    files::writable_beside(&options.out)?;
    let model = open_model(&options.dumps[0], None, first)?;
    let corpus = collect::corpus(&options.dumps, &manifests, &model)?;
    let trained = match trained {
        Some(trained) => trained,
        None => joint(options, &manifests, &model, &corpus, settings, dumps.clone())?,
    };
    if let Some(directions) = directions {
        transform::train(options, first, &corpus, dumps, directions)?;
    }
    Ok(trained)
}

fn joint(
    options: &TrainOptions,
    manifests: &[Manifest],
    model: &Model,
    corpus: &Corpus,
    settings: serde_json::Value,
    dumps: Vec<serde_json::Value>,
) -> Result<Trained> {
    let first = &manifests[0];
    let config = model.decoder.config().clone();
    let fitted = |metrics: &[Metric], training: &Training| {
        let progress = Progress::new("training layers", config.layers as u64, Unit::Items("layers"));
        let fitted = fit(corpus, metrics, training, || progress.increment())?;
        progress.finish();
        Ok::<_, Error>(fitted)
    };
    let training = options.training;
    let mut metrics = metric::base(&options.dumps[0], first, model, options.even)?;
    let bench = sensitivity::Bench::new(&options.dumps[0], first, model, options.questions)?;
    let noise = bench.measure(&metrics, options.seed)?;
    metric::weigh(&mut metrics, &noise);
    let (mut layers, mut tables) = fitted(&metrics, &training)?;
    for _ in 0..options.rounds {
        let errors = bench.own_errors(&metrics, |batch| rebuild(batch, &layers, &tables, &training))?;
        metric::weigh(&mut metrics, &errors);
        (layers, tables) = fitted(&metrics, &training)?;
    }
    let mut contexts: Vec<String> = manifests
        .iter()
        .flat_map(|m| {
            let all: Vec<usize> = (0..m.requests.len()).collect();
            m.contexts(&all).into_iter().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    contexts.sort_unstable();
    contexts.dedup();
    let origin = Origin {
        schema: SCHEMA,
        kvfuse_version: env!("CARGO_PKG_VERSION").to_owned(),
        command: options.command.clone(),
        model: first.model.name.clone(),
        model_sha256: first.model.sha256.clone(),
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        step: options.training.step,
        training_tokens: corpus.tokens(),
        contexts,
        dumps,
        settings,
    };
    write(&options.out, &origin, &layers, &tables)?;
    for &part in &options.without {
        let (layers, tables) = match part {
            Part::Prediction => fitted(&metrics, &Training { taps: 0, ..training })?,
            Part::Klt => fitted(&metrics, &Training { klt: false, ..training })?,
            Part::Metric => fitted(&metric::plain(corpus, &config), &training)?,
        };
        write(&part.path(&options.out), &origin, &layers, &tables)?;
    }
    Ok(came_to(&options.out, &origin, &layers, false))
}

/// Requests of a dump that have answers, so many at most, spread over all.
///
/// # Errors
/// If there are none.
fn asked(dump: &Path, manifest: &Manifest, most: usize) -> Result<Vec<usize>> {
    let has_answer = |&i: &usize| !manifest.requests[i].request.references.is_empty();
    let all: Vec<usize> = (0..manifest.requests.len()).filter(has_answer).collect();
    if all.is_empty() {
        let problem = "has no questions with answers; what errors do is measured on these";
        return Err(Error::file(dump, problem));
    }
    let count = all.len().min(most.max(1));
    Ok((0..count).map(|i| all[i * all.len() / count]).collect())
}

/// What is there already: every file asked for, of the same dumps, settings and version.
fn finished(
    options: &TrainOptions,
    settings: &serde_json::Value,
    dumps: &[serde_json::Value],
) -> Option<Trained> {
    let same = |path: &Path| {
        let book = Book::read(path).ok()?;
        let origin = &book.origin;
        let same = origin.settings == *settings
            && origin.dumps == dumps
            && origin.kvfuse_version == env!("CARGO_PKG_VERSION");
        same.then_some(book)
    };
    let whole = same(&options.out)?;
    let parts = options.without.iter().all(|part| same(&part.path(&options.out)).is_some());
    parts.then(|| came_to(&options.out, &whole.origin, &whole.layers, true))
}

fn came_to(path: &Path, origin: &Origin, layers: &[LayerBook], known: bool) -> Trained {
    Trained {
        tokens: origin.training_tokens,
        components: layers.iter().map(|l| l.components).collect(),
        bytes: std::fs::metadata(path).map(|m| m.len()).unwrap_or(0),
        known,
    }
}
