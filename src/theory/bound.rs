//! `kvfuse simulate --bound`: what a codec spends against the Gaussian rate-distortion bound of its own predictors
//! (docs/theory.md, "The bound").

use crate::codec::evict::{observe, show_attention};
use crate::codec::joint::LayerBound;
use crate::codec::{Chain, Codec, Ledger, Memo};
use crate::dump::{Manifest, open_model};
use crate::encoded::load_caches;
use crate::error::{Error, Result};
use crate::files;
use crate::interrupt;
use crate::lock::FolderLock;
use crate::model::Ropes;
use crate::model::kernels::instructions;
use crate::progress::{Progress, Unit};
use crate::stats::rounded;
use crate::tables::{BOUND_CSV, BOUND_LAYERS_CSV, BOUND_MATCHES_CSV, write_table};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;

pub const BOUND_MANIFEST: &str = "bound.manifest.json";

pub struct BoundOptions {
    pub dump: PathBuf,
    pub chains: Vec<Chain>,
    pub block_size: usize,
    pub out: PathBuf,
    /// Arguments to record in the manifest.
    pub command: Vec<String>,
}

/// A chain: one row of bound.csv. Bits are per KV number that is coded: those of distinct blocks.
#[derive(Debug, Clone, Serialize)]
pub struct BoundRow {
    pub method: String,
    pub model: String,
    pub data: String,
    pub block_size: usize,
    pub requests: usize,
    pub coded_elements: u64,
    pub coded_bits_per_element: f64,
    /// Of a Gaussian source at the same total squared error.
    pub gaussian_bits_per_element: f64,
    pub distance_bits_per_element: f64,
    /// Of a Gaussian source with the widths that training found.
    pub predicted_bits_per_element: f64,
    pub cr_audited: f64,
    /// The ratio if components took the Gaussian's bits and all else what it takes now.
    pub cr_bound: f64,
}

/// A layer's keys or values: one row of bound_layers.csv, each layer at its own squared error.
#[derive(Debug, Clone, Serialize)]
struct LayerRow {
    method: String,
    layer: usize,
    kind: &'static str,
    coded_elements: u64,
    coded_bits_per_element: f64,
    gaussian_bits_per_element: f64,
    distance_bits_per_element: f64,
}

/// Tokens by the class of their reference: one row of bound_matches.csv.
#[derive(Debug, Clone, Serialize)]
struct MatchRow {
    method: String,
    /// 0 without a reference; then by how many tokens agree, the longest by sightings too (docs/joint.md).
    class: usize,
    tokens: u64,
    runs: u64,
    coded_bits_per_token_and_layer: f64,
}

/// Encodes all requests of a dump as one batch by each chain and writes the tables.
///
/// # Errors
/// Chains without such a bound; bad dumps.
pub fn bound(options: &BoundOptions) -> Result<Vec<BoundRow>> {
    let manifest = Manifest::read(&options.dump)?;
    let _lock = FolderLock::take(&options.out)?;
    files::writable_folder(&options.out)?;
    let config = &manifest.model.config;
    let longest = manifest.requests.iter().map(|r| r.tokens).max().unwrap_or(0);
    let ropes = Arc::new(Ropes::new(config, longest));
    let all: Vec<usize> = (0..manifest.requests.len()).collect();
    let (batch, _) = load_caches(&options.dump, &manifest, &all, options.block_size, ropes, 1)?;
    let memo = Memo::default();
    let progress = Progress::new("bounding", options.chains.len() as u64, Unit::Items("chains"));
    let (mut rows, mut layers, mut matches) = (Vec::new(), Vec::new(), Vec::new());
    for chain in &options.chains {
        interrupt::check()?;
        let method = chain.name();
        let mut coded = batch.clone();
        show_attention(&mut coded, chain, &memo, |batch, needs| {
            observe(&open_model(&options.dump, None, &manifest)?, batch, needs)
        })?;
        let found = chain.bound(&mut coded).map_err(|e| Error::argument(format!("{method}: {e}")))?;
        let ledger = Ledger::of(&coded, &chain.coverage(config.layers));
        let all = per_element(&found.all);
        let saved = found.all.coded.total() - found.all.gaussian.total();
        let bits = ledger.total_bits() as f64;
        rows.push(BoundRow {
            method: method.clone(),
            model: manifest.model.name.clone(),
            data: manifest.data.name.clone(),
            block_size: options.block_size,
            requests: manifest.requests.len(),
            coded_elements: found.all.elements,
            coded_bits_per_element: rounded(all.0),
            gaussian_bits_per_element: rounded(all.1),
            distance_bits_per_element: rounded(all.0 - all.1),
            predicted_bits_per_element: rounded(
                found.all.predicted.total() / found.all.elements.max(1) as f64,
            ),
            cr_audited: rounded(ledger.cr_audited()),
            cr_bound: rounded(ledger.cr_audited() * bits / (bits - saved)),
        });
        for (layer, own) in found.layers.iter().enumerate() {
            layers.extend(kinds(&method, layer, own));
        }
        let layers = config.layers as f64;
        matches.extend(found.matches.iter().enumerate().map(|(class, m)| MatchRow {
            method: method.clone(),
            class,
            tokens: m.tokens,
            runs: m.runs,
            coded_bits_per_token_and_layer: rounded(m.bits / m.tokens.max(1) as f64 / layers),
        }));
        progress.increment();
    }
    progress.finish();
    write_table(&options.out.join(BOUND_MATCHES_CSV), &matches)?;
    write_table(&options.out.join(BOUND_CSV), &rows)?;
    write_table(&options.out.join(BOUND_LAYERS_CSV), &layers)?;
    let value = serde_json::json!({
        "kvfuse_version": env!("CARGO_PKG_VERSION"),
        "kernels": [instructions()],
        "command": options.command,
        "dump": manifest.origin()?,
    });
    files::write_json(&options.out.join(BOUND_MANIFEST), &value)?;
    Ok(rows)
}

/// Bits per element, coded and Gaussian.
fn per_element(bound: &LayerBound) -> (f64, f64) {
    let elements = bound.elements.max(1) as f64;
    (bound.coded.total() / elements, bound.gaussian.total() / elements)
}

fn kinds(method: &str, layer: usize, bound: &LayerBound) -> [LayerRow; 2] {
    let elements = bound.elements / 2;
    let row = |kind, coded: f64, gaussian: f64| {
        let share = elements.max(1) as f64;
        LayerRow {
            method: method.to_owned(),
            layer,
            kind,
            coded_elements: elements,
            coded_bits_per_element: rounded(coded / share),
            gaussian_bits_per_element: rounded(gaussian / share),
            distance_bits_per_element: rounded((coded - gaussian) / share),
        }
    };
    [
        row("keys", bound.coded.keys, bound.gaussian.keys),
        row("values", bound.coded.values, bound.gaussian.values),
    ]
}
