//! KVTC: keys and values of all layers along principal directions, bits by dynamic programming, DEFLATE.

mod book;
mod code;
mod fit;
mod widths;

pub use book::{Book, Origin, SCHEMA, Transform};
pub use fit::fit;

use super::columns::{Column, columns, store, stripped};
use super::quantize::{BitSink, BitSource};
use super::registry::{Method, Scale, Search, number};
use super::trained::{TrainedOption, check_model};
use super::{CacheBatch, Codec, Coverage, Memo, Role, Trained};
use crate::error::{Error, Result};
use crate::model::gemm::ROWS;
use code::{kept, project, put, restore, take};
use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use rayon::prelude::*;
use serde::Serialize;
use std::io::{Read, Write};
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;
use widths::{Group, allocate};

#[derive(Debug, Clone, Serialize, clap::Args)]
#[serde(rename_all = "kebab-case")]
pub struct Kvtc {
    /// File of `kvfuse train --kvtc`
    #[arg(long, value_name = "FILE", value_parser = TrainedOption::<Book>::read, value_hint = clap::ValueHint::FilePath)]
    codec: Option<TrainedOption<Book>>,
    /// Bits a number, before DEFLATE
    #[arg(long, default_value_t = 1.0, value_parser = number("a rate", Bound::Excluded(0.0), Bound::Included(16.0)))]
    bits: f64,
    /// Last tokens of every request that stay raw, in whole blocks
    #[arg(long, default_value_t = 128)]
    residual: usize,
    /// First tokens of every request that stay raw, in whole blocks
    #[arg(long, default_value_t = 4)]
    sinks: usize,
    /// Cached tokens that pay for the trained file together; 0 charges nothing
    #[arg(long, default_value_t = 1_000_000)]
    charge_tokens: u64,
}

impl Method for Kvtc {
    const NAME: &'static str = "kvtc";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "Keys without position, and values, of all layers and heads of a token as one vector each: its places along trained principal directions, in \
                                 groups of 16, 64 or 256 with a scale and an offset and 2, 4 or 8 bits each (the first directions in f16, the last left out), as dynamic \
                                 programming decides, then DEFLATE, block by block.";
    const PAPER: &'static str = "after KV Cache Transform Coding 2025 (arXiv 2511.01815)";
    const DIALS: &'static [&'static str] = &["bits"];
    const SEARCH: Option<Search> =
        Some(Search { option: "bits", fine: 8.0, coarse: 0.02, scale: Scale::Logarithmic });

    fn effective(&self) -> Result<serde_json::Value> {
        TrainedOption::columns(self, self.codec.as_ref())
    }

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        let trained = self.codec.clone().ok_or_else(|| {
            Error::argument("kvtc needs codec=FILE, the -kvtc.safetensors of `kvfuse train --kvtc`")
        })?;
        let token = self.bits * Book::width(&trained.book.origin) as f64;
        let groups = [0, 1].map(|part| allocate(&trained.book.parts[part].costs, token));
        Ok(Arc::new(Coding { trained, options: self.clone(), groups }))
    }
}

/// [`Kvtc`] with its file, and how directions of keys and of values are stored.
struct Coding {
    trained: TrainedOption<Book>,
    options: Kvtc,
    groups: [Vec<Group>; 2],
}

impl Codec for Coding {
    fn coverage(&self, layers: usize) -> Coverage {
        // A column's pages are listed once for all layers.
        let trained = Trained { bits: self.trained.book.bits, tokens: self.options.charge_tokens };
        Coverage { table_layers: layers.max(1), trained, ..Coverage::of(0..layers) }
    }

    fn takes_changed(&self) -> bool {
        false
    }

    fn trained_file(&self) -> Option<(&Path, &str)> {
        Some((&self.trained.path, &self.trained.sha256))
    }

    fn encode(&self, batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        self.check(batch)?;
        let (all, of_requests) = columns(batch)?;
        // A column is coded if no request that has it needs it raw.
        let mut raw = vec![false; all.len()];
        for (cache, own) in batch.caches.iter().zip(&of_requests) {
            let mut first = 0;
            for &number in own {
                let end = first + all[number].tokens;
                raw[number] |= first < self.options.sinks || end + self.options.residual > cache.tokens;
                first = end;
            }
        }
        let coded: Vec<&Column> = all.iter().zip(&raw).filter(|(_, raw)| !**raw).map(|(c, _)| c).collect();
        let shared: &CacheBatch = batch;
        let written = by_tiles(shared, &coded, |some| {
            let bytes = self.bytes(shared, some)?;
            self.numbers(shared, some, bytes)
        })?;
        put_back(batch, &coded, written);
        Ok(())
    }

    fn decode(&self, batch: &mut CacheBatch) -> Result<()> {
        self.check(batch)?;
        let (all, _) = columns(batch)?;
        let shared: &CacheBatch = batch;
        let coded: Vec<&Column> =
            all.iter().filter(|column| shared.pool.payload(column.pages[0]).is_some()).collect();
        let bytes = |column: &&Column| shared.pool.payload(column.pages[0]).map(|p| p.bytes.clone());
        let read = by_tiles(shared, &coded, |some| {
            self.numbers(shared, some, some.iter().map(|c| bytes(c).unwrap_or_default()).collect())
        })?;
        put_back(batch, &coded, read);
        Ok(())
    }
}

/// A column as its bytes say (`[layers][tokens, K and V]`, keys without position), and the bytes.
type Decoded = (Vec<Vec<f32>>, Vec<u8>);

/// Runs `f` on as many columns at a time as make a tile of tokens.
fn by_tiles(
    batch: &CacheBatch,
    columns: &[&Column],
    f: impl Fn(&[&Column]) -> Result<Vec<Decoded>> + Send + Sync,
) -> Result<Vec<Decoded>> {
    let of_a_tile = (ROWS / batch.pool.shape().block_size).max(1);
    let read: Vec<Vec<Decoded>> = columns.par_chunks(of_a_tile).map(f).collect::<Result<_>>()?;
    Ok(read.into_iter().flatten().collect())
}

/// Puts columns, as their bytes say, into the pool; bits are shared out evenly by layer.
fn put_back(batch: &mut CacheBatch, columns: &[&Column], read: Vec<Decoded>) {
    for (column, (numbers, bytes)) in columns.iter().zip(read) {
        store(batch, column, &numbers, &vec![1.0; column.pages.len()], bytes);
    }
}

impl Coding {
    fn check(&self, batch: &CacheBatch) -> Result<()> {
        let o = &self.trained.book.origin;
        let sizes = [o.layers, o.kv_heads, o.head_dim];
        check_model(batch, "the transform was fitted to", &o.model, sizes)
    }

    fn bytes(&self, batch: &CacheBatch, columns: &[&Column]) -> Result<Vec<Vec<u8>>> {
        let half = batch.pool.shape().token_width();
        let layers: Vec<Vec<Vec<f32>>> = columns.iter().map(|column| stripped(batch, column)).collect();
        let mut sinks: Vec<BitSink> = columns.iter().map(|_| BitSink::default()).collect();
        for (part, transform) in self.trained.book.parts.iter().enumerate() {
            let groups = &self.groups[part];
            let mut x = Vec::new();
            for (column, layers) in columns.iter().zip(&layers) {
                for t in 0..column.tokens {
                    layers
                        .iter()
                        .for_each(|layer| x.extend_from_slice(&layer[(2 * t + part) * half..][..half]));
                }
            }
            let count = kept(groups);
            let places = project(transform, count, &x);
            let mut rest = &places[..];
            for (column, sink) in columns.iter().zip(&mut sinks) {
                let (own, after) = rest.split_at(column.tokens * count);
                put(groups, own, column.tokens, sink);
                rest = after;
            }
        }
        sinks.into_iter().map(deflated).collect()
    }

    fn numbers(&self, batch: &CacheBatch, columns: &[&Column], bytes: Vec<Vec<u8>>) -> Result<Vec<Decoded>> {
        let half = batch.pool.shape().token_width();
        let tokens: usize = columns.iter().map(|column| column.tokens).sum();
        let mut places = [Vec::new(), Vec::new()];
        for (column, bytes) in columns.iter().zip(&bytes) {
            // A damaged stream may say more than any block holds.
            let most = 4 * column.tokens * 2 * column.pages.len() * half + 64;
            let packed = inflated(bytes, most)?;
            let mut source = BitSource::new(&packed);
            for (places, groups) in places.iter_mut().zip(&self.groups) {
                places.extend(take(groups, column.tokens, &mut source));
            }
            if source.bytes_taken() != packed.len() {
                return Err(unusable());
            }
        }
        let [keys, values] = [0, 1].map(|part| {
            let count = kept(&self.groups[part]);
            restore(&self.trained.book.parts[part], count, &places[part], tokens)
        });
        let mut first = 0;
        let column = |(column, bytes): (&&Column, Vec<u8>)| {
            let (width, here) = (half * column.pages.len(), first..first + column.tokens);
            first = here.end;
            let layer = |n: usize| -> Vec<f32> {
                let row = |t: usize| {
                    [&keys, &values].into_iter().flat_map(move |x| &x[t * width + n * half..][..half])
                };
                here.clone().flat_map(row).copied().collect()
            };
            ((0..column.pages.len()).map(layer).collect(), bytes)
        };
        Ok(columns.iter().zip(bytes).map(column).collect())
    }
}

fn unusable() -> Error {
    Error::argument("has a block that its codec cannot read")
}

fn deflated(sink: BitSink) -> Result<Vec<u8>> {
    let mut deflate = DeflateEncoder::new(Vec::new(), Compression::best());
    let written = deflate.write_all(&sink.finish().0).and_then(|()| deflate.finish());
    written.map_err(|e| Error::argument(format!("DEFLATE: {e}")))
}

fn inflated(bytes: &[u8], most: usize) -> Result<Vec<u8>> {
    let mut packed = Vec::new();
    DeflateDecoder::new(bytes).take(most as u64).read_to_end(&mut packed).map_err(|_| unusable())?;
    Ok(packed)
}
