//! `kvfuse explain`: what an arm did to one request, block by block.

use super::arms::{Arm, Method};
use super::rows::RequestScore;
use super::runs::RunRecord;
use super::settings::Settings;
use super::stage::{encode_batch, load};
use super::sweep::{open_model, questions};
use crate::codec::{CacheBatch, Memo, relative_error};
use crate::dump::Manifest;
use crate::error::{Error, IoAt, Result};
use crate::model::Model;
use crate::model::kernels::inner;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Which arm and request of a sweep to explain.
pub struct ExplainOptions {
    /// Folder that a sweep wrote.
    pub out: PathBuf,
    /// Position in the sweep (from 0) or id of the request.
    pub request: String,
    /// The arm, by whatever is given.
    pub run: Option<String>,
    pub tau: Option<f64>,
    pub max_error: Option<f64>,
    /// `column=value` pairs, as in sweep.csv.
    pub only: Vec<(String, String)>,
}

/// One block of the request in one layer.
#[derive(Debug, Clone)]
pub struct FusedBlock {
    pub layer: usize,
    pub block: usize,
    /// Other blocks behind the same storage: (request in the sweep, block).
    pub with: Vec<(usize, usize)>,
    /// Cosine of the block with what is read instead of it.
    pub key_cosine: f64,
    pub value_cosine: f64,
    /// Relative squared errors.
    pub key_error: f64,
    pub value_error: f64,
}

/// What an arm did to one request.
pub struct Explanation {
    pub record: RunRecord,
    pub score: RequestScore,
    /// The same request without fusion.
    pub plain: RequestScore,
    pub question: String,
    pub references: Vec<String>,
    /// Text of each full block.
    pub texts: Vec<String>,
    pub layers: usize,
    /// Fused blocks, layer by layer.
    pub fused: Vec<FusedBlock>,
    /// Ids of all requests of the sweep, in its order.
    pub ids: Vec<String>,
}

/// Encodes the request's batch again as the arm did and reads off what shares what.
pub fn explain(options: &ExplainOptions) -> Result<Explanation> {
    let path = options.out.join("manifest.json");
    if !path.exists() {
        return Err(Error::file(
            &options.out,
            "holds no manifest.json; name a folder that `kvfuse sweep` wrote",
        ));
    }
    let text = fs::read_to_string(&path).at(&path)?;
    let bad = |problem: String| Error::file(&path, problem);
    let value: Value = serde_json::from_str(&text).map_err(|e| bad(format!("not a sweep manifest: {e}")))?;
    let settings: Settings = serde_json::from_value(value["options"].clone())
        .map_err(|e| bad(format!("not the manifest of a sweep of this version: {e}")))?;
    let sweep = settings.options(Vec::new())?;
    let manifest = Manifest::read(&sweep.dump)?;
    if value["dump"]["identity"] != manifest.identity()?[..] {
        return Err(Error::file(&sweep.dump, "is not the dump that was swept; sweep again"));
    }
    let questions = questions(&sweep, &manifest)?;
    let ids: Vec<String> = questions.iter().map(|&i| manifest.requests[i].request.id.clone()).collect();
    let number = options.request.parse::<usize>().ok().filter(|&n| n < ids.len());
    let at = number.or_else(|| ids.iter().position(|id| *id == options.request)).ok_or_else(|| {
        let message = format!(
            "--request {}: the sweep has {} requests, 0 to {}",
            options.request,
            ids.len(),
            ids.len() - 1
        );
        Error::argument(message)
    })?;

    let records = records(&options.out)?;
    let record = choose(&records, options)?.clone();
    let none = |r: &&RunRecord| {
        r.row.arm.method == Method::None && r.row.arm.block_size == record.row.arm.block_size
    };
    let plain = records
        .iter()
        .find(none)
        .ok_or_else(|| Error::file(&options.out, "has no finished run of the control 'none'; sweep again"))?;
    let score = |r: &RunRecord| {
        let missing = || Error::file(&options.out, "its runs are of other requests; sweep again");
        r.requests.get(at).filter(|s| s.id == ids[at]).cloned().ok_or_else(missing)
    };
    let (score, plain) = (score(&record)?, score(plain)?);

    let arm = record.row.arm.arm(&sweep.grid.thresholds)?;
    let model = open_model(&sweep.dump, sweep.model.as_deref(), &manifest)?;
    // The requests that were fused together with it.
    let first = at / sweep.batch * sweep.batch;
    let lot = &questions[first..questions.len().min(first + sweep.batch)];
    let (original, _) = load(&sweep.dump, &model, &manifest, lot, arm.block_size, 0)?;
    let encoded = encode(&model, &original, &arm)?;
    let size = arm.block_size;
    let tokens = &original.tokens[at - first];
    let texts = tokens.chunks_exact(size).map(|t| model.tokenizer.decode(t)).collect::<Result<_>>()?;
    let fused = fused_blocks(&original, &encoded, at - first)
        .into_iter()
        .map(|b| FusedBlock { with: b.with.iter().map(|&(r, block)| (r + first, block)).collect(), ..b })
        .collect();
    let request = &manifest.requests[questions[at]].request;
    Ok(Explanation {
        score,
        plain,
        question: request.question.clone(),
        references: request.references.clone(),
        texts,
        layers: model.decoder.config().layers,
        fused,
        ids,
        record,
    })
}

fn encode(model: &Model, original: &CacheBatch, arm: &Arm) -> Result<CacheBatch> {
    encode_batch(model, original, &Memo::default(), &arm.encoder()?)
}

/// All finished runs of a folder, in the order of their names.
fn records(out: &Path) -> Result<Vec<RunRecord>> {
    let folder = out.join("runs");
    let mut paths: Vec<PathBuf> =
        fs::read_dir(&folder).at(&folder)?.filter_map(|e| e.ok().map(|e| e.path())).collect();
    paths.sort();
    paths.retain(|p| p.extension().is_some_and(|e| e == "json"));
    let read = |path: &PathBuf| {
        let text = fs::read_to_string(path).at(path)?;
        Ok(serde_json::from_str(&text).ok())
    };
    let read: Vec<Option<RunRecord>> = paths.iter().map(read).collect::<Result<_>>()?;
    Ok(read.into_iter().flatten().collect())
}

/// The one run that fits what is asked for.
fn choose<'a>(records: &'a [RunRecord], options: &ExplainOptions) -> Result<&'a RunRecord> {
    let fits = |r: &&RunRecord| {
        let columns = serde_json::to_value(&r.row.arm).unwrap_or_default();
        let cell = |name: &str| match &columns[name] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        options.run.as_ref().is_none_or(|run| *run == r.row.run)
            && options.tau.is_none_or(|tau| r.row.arm.tau == Some(tau))
            && options.max_error.is_none_or(|e| r.row.arm.max_error == Some(e))
            && options.only.iter().all(|(name, value)| cell(name) == *value)
            && (options.run.is_some() || !matches!(r.row.arm.method, Method::None | Method::Prefix))
    };
    let found: Vec<&RunRecord> = records.iter().filter(fits).collect();
    match found[..] {
        [one] => Ok(one),
        [] => Err(Error::file(&options.out, "has no finished run that fits; its sweep.csv lists them")),
        _ => {
            let describe = |r: &&RunRecord| {
                let a = &r.row.arm;
                let name = |x: Option<String>| x.unwrap_or_default().to_lowercase();
                format!(
                    "{} ({} {} {})",
                    r.row.run,
                    a.method.name(),
                    name(a.pairing.map(|p| format!("{p:?}"))),
                    a.tau.or(a.max_error).map_or(a.thresholds.clone().unwrap_or_default(), |t| t.to_string()),
                )
            };
            let list: Vec<String> = found.iter().take(6).map(describe).collect();
            let more = if found.len() > 6 { ", ..." } else { "" };
            let message = format!(
                "{} runs fit: name one by --run, or narrow it down by --tau and --only pairing=best: {}{more}",
                found.len(),
                list.join(", ")
            );
            Err(Error::argument(message))
        }
    }
}

/// Blocks of a request that are not stored for it alone as they were.
fn fused_blocks(original: &CacheBatch, encoded: &CacheBatch, request: usize) -> Vec<FusedBlock> {
    let mut fused = Vec::new();
    for layer in 0..original.caches[request].layers.len() {
        let mut owners: BTreeMap<_, Vec<(usize, usize)>> = BTreeMap::new();
        for (r, cache) in encoded.caches.iter().enumerate() {
            for (block, entry) in cache.layers[layer].entries.iter().enumerate() {
                owners.entry(entry.block).or_default().push((r, block));
            }
        }
        for (block, entry) in encoded.caches[request].layers[layer].entries.iter().enumerate() {
            let sharing = &owners[&entry.block];
            let (x, y) = (original.read(request, layer, block), encoded.read(request, layer, block));
            if sharing.len() < 2 && x == y {
                continue;
            }
            fused.push(FusedBlock {
                layer,
                block,
                with: sharing.iter().copied().filter(|&at| at != (request, block)).collect(),
                key_cosine: cosine(&x.0, &y.0),
                value_cosine: cosine(&x.1, &y.1),
                key_error: relative_error(&x.0, &y.0),
                value_error: relative_error(&x.1, &y.1),
            });
        }
    }
    fused
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let norm = f64::from(inner(a, a)).sqrt() * f64::from(inner(b, b)).sqrt();
    if norm > 0.0 { f64::from(inner(a, b)) / norm } else { 0.0 }
}
