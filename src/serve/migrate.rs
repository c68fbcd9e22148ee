//! Moving a request's cache from one machine to another: bytes, and seconds to encode and decode them, against computing it again.

use crate::block::{BlockPool, Storage};
use crate::codec::evict::Needs;
use crate::codec::{CacheBatch, Chain, Codec, Ledger, Memo, Role};
use crate::dump::{Manifest, open_model};
use crate::encoded::load_caches;
use crate::error::{Error, Result};
use crate::files;
use crate::interrupt;
use crate::lock::FolderLock;
use crate::model::kernels::instructions;
use crate::model::{Model, Segment};
use crate::progress::{Progress, Unit};
use crate::stats::{mean, quantile, rounded};
use crate::tables::write_table;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;

/// A chain over a link a row.
pub const MIGRATION_CSV: &str = "migration.csv";

/// What to move.
pub struct MigrateOptions {
    pub dump: PathBuf,
    /// If it lies elsewhere than when dumped.
    pub model: Option<String>,
    pub chains: Vec<Chain>,
    pub links_gbits: Vec<f64>,
    /// The dump's first so many, each moved by itself.
    pub requests: usize,
    /// Every time is the median of so many.
    pub repeats: usize,
    pub block_size: usize,
    pub out: PathBuf,
    pub command: Vec<String>,
}

/// One chain over one link, a request's mean. Bytes and the seconds of encoding, decoding and prefill are measured; seconds on
/// the link are bytes over its rate: a projection, without latency and protocol.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MigrateRow {
    pub method: String,
    pub link_gbits: f64,
    pub requests: usize,
    pub tokens: f64,
    /// What the ledger counts of the request alone; a trained file lies on both machines already.
    pub bytes: f64,
    /// With reading back what was written, which this tool's encoders do.
    pub encode_seconds: f64,
    pub decode_seconds: f64,
    pub link_seconds: f64,
    /// One after the other.
    pub total_seconds: f64,
    /// Prefill of the same tokens on this machine.
    pub recompute_seconds: f64,
    /// The link below which computing again is faster; none where coding alone takes longer.
    pub break_even_gbits: Option<f64>,
}

/// What one chain does to one request.
struct Moved {
    bytes: f64,
    encode_seconds: f64,
    decode_seconds: f64,
}

/// Measures all chains, writes migration.csv and manifest.json, and returns the rows.
///
/// # Errors
/// Chains that need attention scores or prefill anew; damaged dumps.
pub fn migrate(options: &MigrateOptions) -> Result<Vec<MigrateRow>> {
    for chain in &options.chains {
        let unfit = |role| role == Role::Evict || role == Role::Whole;
        let attends = chain.needs() != Needs::default();
        if chain.chunks().is_some() || attends || chain.stages().iter().any(|s| unfit(s.role)) {
            let problem = format!(
                "{}: only chains that encode whole finished caches without attention weights can be moved",
                chain.name()
            );
            return Err(Error::argument(problem));
        }
    }
    let manifest = Manifest::read(&options.dump)?;
    let _lock = FolderLock::take(&options.out)?;
    files::writable_folder(&options.out)?;
    let model = open_model(&options.dump, options.model.as_deref(), &manifest)?;
    let requests: Vec<usize> = (0..manifest.requests.len().min(options.requests)).collect();
    let progress = Progress::new("moving", requests.len() as u64, Unit::Items("requests"));
    let mut tokens = Vec::new();
    let mut recompute = Vec::new();
    let mut moved: Vec<Vec<Moved>> = options.chains.iter().map(|_| Vec::new()).collect();
    for &i in &requests {
        let ropes = model.decoder.ropes();
        let (batch, prompts) = load_caches(&options.dump, &manifest, &[i], options.block_size, ropes, 0)?;
        tokens.push(prompts[0].len() as f64);
        recompute.push(median(options.repeats, || {
            prefill(&model, &prompts[0], options.block_size, &manifest.requests[i].request.id)
        })?);
        for (chain, own) in options.chains.iter().zip(&mut moved) {
            own.push(send(chain, &batch, options.repeats)?);
        }
        progress.increment();
    }
    progress.finish();
    let layout = (requests.len(), mean(&tokens), mean(&recompute));
    let rows: Vec<MigrateRow> = options
        .chains
        .iter()
        .zip(&moved)
        .flat_map(|(chain, own)| {
            options.links_gbits.iter().map(move |&link| row(chain.name(), link, layout, own))
        })
        .collect();
    write_table(&options.out.join(MIGRATION_CSV), &rows)?;
    let value = serde_json::json!({
        "kvfuse_version": env!("CARGO_PKG_VERSION"),
        "kernels": [instructions()],
        "command": options.command,
        "threads": rayon::current_num_threads(),
        "repeats": options.repeats,
        "block_size": options.block_size,
        "dump": manifest.origin()?,
    });
    files::write_json(&options.out.join("manifest.json"), &value)?;
    Ok(rows)
}

fn row(
    method: String,
    link: f64,
    (requests, tokens, recompute): (usize, f64, f64),
    moved: &[Moved],
) -> MigrateRow {
    let of = |f: fn(&Moved) -> f64| mean(&moved.iter().map(f).collect::<Vec<_>>());
    let (bytes, encode, decode) = (of(|m| m.bytes), of(|m| m.encode_seconds), of(|m| m.decode_seconds));
    let gigabits = 8e-9 * bytes;
    let left = recompute - encode - decode;
    MigrateRow {
        method,
        link_gbits: link,
        requests,
        tokens: rounded(tokens),
        bytes: rounded(bytes),
        encode_seconds: rounded(encode),
        decode_seconds: rounded(decode),
        link_seconds: rounded(gigabits / link),
        total_seconds: rounded(encode + decode + gigabits / link),
        recompute_seconds: rounded(recompute),
        break_even_gbits: (left > 0.0).then(|| rounded(gigabits / left)),
    }
}

/// Encodes and decodes one request's cache.
fn send(chain: &Chain, base: &CacheBatch, repeats: usize) -> Result<Moved> {
    let mut encoded = base.clone();
    let encode_seconds = median(repeats, || {
        encoded = base.clone();
        let started = Instant::now();
        chain.encode(&mut encoded, &Memo::default())?;
        Ok(started.elapsed().as_secs_f64())
    })?;
    let coded = chain.stages().last().is_some_and(|stage| stage.role == Role::Code);
    let decode_seconds = match coded {
        // Pages as they are can be read as they come.
        false => 0.0,
        true => median(repeats, || {
            let mut received = encoded.clone();
            let started = Instant::now();
            chain.decode(&mut received)?;
            Ok(started.elapsed().as_secs_f64())
        })?,
    };
    let layers = base.caches[0].layers.len();
    let bytes = Ledger::of(&encoded, &chain.coverage(layers)).file_bits() as f64 / 8.0;
    Ok(Moved { bytes, encode_seconds, decode_seconds })
}

/// Seconds to compute a prompt's cache.
fn prefill(model: &Model, tokens: &[u32], block_size: usize, id: &String) -> Result<f64> {
    let mut pool = BlockPool::new(model.decoder.block_shape(block_size), Storage::F16);
    let mut cache = model.decoder.new_cache();
    let started = Instant::now();
    let segment = Segment { cache: &mut cache, tokens };
    let computed = model.decoder.forward(&mut pool, &mut [segment], None);
    computed.map_err(|f| f.of(|_| id))?;
    Ok(started.elapsed().as_secs_f64())
}

/// The median of some measurements of seconds, after one that warms up.
fn median(repeats: usize, mut once: impl FnMut() -> Result<f64>) -> Result<f64> {
    once()?;
    let mut seconds = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        interrupt::check()?;
        seconds.push(once()?);
    }
    Ok(quantile(&seconds, 0.5).unwrap_or(f64::NAN))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1 MB, 10 ms each way, 100 ms to compute: at 1 Gbit/s 8 ms on the link; below 0.1 Gbit/s computing again is faster.
    #[test]
    fn a_link_adds_what_its_rate_says() {
        let moved = [Moved { bytes: 1e6, encode_seconds: 0.01, decode_seconds: 0.01 }];
        let row = row("none".to_owned(), 1.0, (1, 100.0, 0.1), &moved);
        assert_eq!((row.link_seconds, row.total_seconds, row.break_even_gbits), (0.008, 0.028, Some(0.1)));
        let slow = [Moved { bytes: 1e6, encode_seconds: 0.1, decode_seconds: 0.1 }];
        assert_eq!(super::row("none".to_owned(), 1.0, (1, 100.0, 0.1), &slow).break_even_gbits, None);
    }
}
