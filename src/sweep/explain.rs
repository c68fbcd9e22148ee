//! `kvfuse explain`: what an arm did to one request, block by block.

use super::arms::{Arm, Packing};
use super::evaluate::Base;
use super::lot::{encode_batch, load};
use super::rows::RequestScore;
use super::run::{questions, setting};
use super::runs::{RunRecord, Runs, run_id};
use super::settings::Settings;
use crate::codec::registry::is_control;
use crate::codec::{CacheBatch, Chain, Memo, relative_error};
use crate::dump::{Manifest, open_model};
use crate::error::{Error, IoAt, Result};
use crate::model::kernels::cosine;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

/// Which arm and request of a sweep to explain.
pub struct ExplainOptions {
    /// Folder that a sweep wrote.
    pub out: PathBuf,
    /// Position in the sweep (from 0) or id of the request.
    pub request: String,
    /// The arm, by whatever is given.
    pub run: Option<String>,
    /// Its chain, as `--method` has it.
    pub method: Option<String>,
    /// `column=value` pairs, as in sweep.csv.
    pub only: Vec<(String, String)>,
}

/// A block that another one shares storage with.
#[derive(Debug, Clone, Copy)]
pub struct Partner {
    /// Position of the request in the sweep.
    pub request: usize,
    pub block: usize,
    /// Cosines between the two blocks as they were, keys with their positions.
    pub key_cosine: f64,
    pub value_cosine: f64,
}

/// One block of the request in one layer.
#[derive(Debug, Clone)]
pub struct FusedBlock {
    pub layer: usize,
    pub block: usize,
    /// Other blocks behind the same storage, the most similar first.
    pub with: Vec<Partner>,
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
    /// Text of each full block of the cache.
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

    // Only the runs of this manifest: the folder may hold those of other settings.
    let setting = setting(&sweep, &manifest, &questions)?;
    let runs = Runs::at(&options.out);
    let mut finished: Vec<(Arm, RunRecord)> = Vec::new();
    for arm in sweep.arms()? {
        if let Some(record) = runs.load(&run_id(&setting, &arm)?).filter(|r| r.requests.len() == ids.len()) {
            finished.push((arm, record));
        }
    }
    let (arm, record) = choose(&finished, options)?.clone();
    let none = |(a, _): &&(Arm, RunRecord)| a.chain.is_unfused() && a.packing == arm.packing;
    let plain = finished
        .iter()
        .find(none)
        .ok_or_else(|| Error::file(&options.out, "has no finished run of the control 'none'; sweep again"))?;
    let (score, plain) = (record.requests[at].clone(), plain.1.requests[at].clone());

    let model = open_model(&sweep.dump, sweep.model.as_deref(), &manifest)?;
    // The requests that were fused together with it.
    let Packing { block_size, batch, first_token } = arm.packing;
    let first = at / batch * batch;
    let lot = &questions[first..questions.len().min(first + batch)];
    let (batch, prompts) = load(&sweep.dump, &model, &manifest, lot, block_size)?;
    // With a spared first token, the sweep's caches hold the last prompt token too.
    let original = Base::new(&model, batch, &prompts, first_token)?.batch;
    let encoded = encode_batch(&model, &original, &Memo::default(), &arm.chain)?;
    if encoded.caches.iter().any(|c| c.layers.iter().any(|t| t.kept.is_some())) {
        let name = arm.chain.name();
        return Err(Error::argument(format!(
            "{name} drops tokens; only blocks that stand where they stood can be explained"
        )));
    }
    let tokens = &original.tokens[at - first];
    let texts = tokens.chunks_exact(block_size).map(|t| model.tokenizer.decode(t)).collect::<Result<_>>()?;
    let mut fused = fused_blocks(&original, &encoded, at - first);
    for partner in fused.iter_mut().flat_map(|b| &mut b.with) {
        partner.request += first;
    }
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

/// The one run that fits what is asked for.
fn choose<'a>(finished: &'a [(Arm, RunRecord)], options: &ExplainOptions) -> Result<&'a (Arm, RunRecord)> {
    let cells = |record: &RunRecord| serde_json::to_value(&record.row).unwrap_or_default();
    let cell = |columns: &Value, name: &str| match &columns[name] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    if let Some((_, first)) = finished.first()
        && let Some((name, _)) = options.only.iter().find(|(name, _)| cells(first).get(name).is_none())
    {
        return Err(Error::argument(format!("--only {name}: sweep.csv has no such column")));
    }
    let named: Option<Vec<String>> = match &options.method {
        Some(text) => Some(Chain::parse(text)?.iter().map(Chain::name).collect()),
        None => None,
    };
    let fits = |(_, record): &&(Arm, RunRecord)| {
        let own = &record.row.arm.method;
        let columns = cells(record);
        options.run.as_ref().is_none_or(|run| *run == record.row.run)
            && named.as_ref().is_none_or(|names| names.contains(own))
            && options.only.iter().all(|(name, value)| cell(&columns, name) == *value)
            && (options.run.is_some() || !is_control(own))
    };
    let found: Vec<&(Arm, RunRecord)> = finished.iter().filter(fits).collect();
    match found[..] {
        [one] => Ok(one),
        [] => Err(Error::file(&options.out, "has no finished run that fits; its sweep.csv lists them")),
        _ => {
            let describe =
                |(_, record): &&(Arm, RunRecord)| format!("{} ({})", record.row.run, record.row.arm.method);
            let list: Vec<String> = found.iter().take(6).map(describe).collect();
            let more = if found.len() > 6 { ", ..." } else { "" };
            let message = format!(
                "{} runs fit: name one by --run, or narrow it down by --method and --only bff.pairing=best: {}{more}",
                found.len(),
                list.join(", ")
            );
            Err(Error::argument(message))
        }
    }
}

/// Full blocks of a request that share storage, or are restored from numbers made for several.
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
            if !encoded.is_fused(request, layer, block) {
                continue;
            }
            let (x, y) = (original.read(request, layer, block), encoded.read(request, layer, block));
            let partner = |&(r, b): &(usize, usize)| {
                let z = original.read(r, layer, b);
                Partner {
                    request: r,
                    block: b,
                    key_cosine: cosine(&x.0, &z.0),
                    value_cosine: cosine(&x.1, &z.1),
                }
            };
            let mut with: Vec<Partner> =
                owners[&entry.block].iter().filter(|&&at| at != (request, block)).map(partner).collect();
            with.sort_by(|a, b| b.key_cosine.total_cmp(&a.key_cosine));
            fused.push(FusedBlock {
                layer,
                block,
                with,
                key_cosine: cosine(&x.0, &y.0),
                value_cosine: cosine(&x.1, &y.1),
                key_error: relative_error(&x.0, &y.0),
                value_error: relative_error(&x.1, &y.1),
            });
        }
    }
    fused
}
