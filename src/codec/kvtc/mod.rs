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
use super::trained::TrainedOption;
use super::{CacheBatch, Codec, Coverage, Memo, Role, Trained};
use crate::error::{Error, Result};
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
        let all = serde_json::to_value(self).map_err(|e| Error::argument(e.to_string()))?;
        Ok(self.codec.as_ref().map_or(all.clone(), |trained| trained.name_in(all)))
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
        let written: Vec<Vec<u8>> =
            coded.par_iter().map(|column| self.bytes(shared, column)).collect::<Result<_>>()?;
        for (column, bytes) in coded.into_iter().zip(written) {
            self.read(batch, column, bytes)?;
        }
        Ok(())
    }

    fn decode(&self, batch: &mut CacheBatch) -> Result<()> {
        self.check(batch)?;
        let (all, _) = columns(batch)?;
        for column in &all {
            if let Some(payload) = batch.pool.payload(column.pages[0]) {
                let bytes = payload.bytes.clone();
                self.read(batch, column, bytes)?;
            }
        }
        Ok(())
    }
}

impl Coding {
    /// Whether the caches are of the model that the transform was fitted to, as far as that can be seen.
    fn check(&self, batch: &CacheBatch) -> Result<()> {
        let (shape, origin) = (batch.pool.shape(), &self.trained.book.origin);
        let layers = batch.caches.first().map_or(origin.layers, |c| c.layers.len());
        if (origin.layers, origin.kv_heads, origin.head_dim) == (layers, shape.kv_heads, shape.head_dim) {
            return Ok(());
        }
        Err(Error::argument(format!(
            "the transform was fitted to {} ({} layers, {} key/value heads of {}); these caches are of another model",
            origin.model, origin.layers, origin.kv_heads, origin.head_dim
        )))
    }

    fn bytes(&self, batch: &CacheBatch, column: &Column) -> Result<Vec<u8>> {
        let half = batch.pool.shape().token_width();
        let layers = stripped(batch, column);
        let mut sink = BitSink::default();
        for (part, transform) in self.trained.book.parts.iter().enumerate() {
            let row = |t: usize| {
                layers.iter().flat_map(move |layer| &layer[(2 * t + part) * half..][..half]).copied()
            };
            let x: Vec<f32> = (0..column.tokens).flat_map(row).collect();
            code::put(transform, &self.groups[part], &x, &mut sink);
        }
        let mut deflate = DeflateEncoder::new(Vec::new(), Compression::best());
        let written = deflate.write_all(&sink.finish().0).and_then(|()| deflate.finish());
        written.map_err(|e| Error::argument(format!("DEFLATE: {e}")))
    }

    /// Puts what the bytes say into the column's pages.
    fn read(&self, batch: &mut CacheBatch, column: &Column, bytes: Vec<u8>) -> Result<()> {
        let half = batch.pool.shape().token_width();
        let unusable = || Error::argument("has a block that its codec cannot read");
        let mut packed = Vec::new();
        // A damaged stream may say more than any block holds.
        let most = 4 * column.tokens as u64 * (2 * column.pages.len() * half) as u64 + 64;
        DeflateDecoder::new(&bytes[..]).take(most).read_to_end(&mut packed).map_err(|_| unusable())?;
        let mut source = BitSource::new(&packed);
        let parts: Vec<Vec<f32>> = (0..2)
            .map(|part| {
                code::take(&self.trained.book.parts[part], &self.groups[part], column.tokens, &mut source)
            })
            .collect();
        if source.bytes_taken() != packed.len() {
            return Err(unusable());
        }
        let width = half * column.pages.len();
        let layer = |n: usize| -> Vec<f32> {
            let row = |t: usize| parts.iter().flat_map(move |x| &x[t * width + n * half..][..half]).copied();
            (0..column.tokens).flat_map(row).collect()
        };
        let numbers: Vec<Vec<f32>> = (0..column.pages.len()).map(layer).collect();
        store(batch, column, &numbers, &vec![1.0; column.pages.len()], bytes);
        Ok(())
    }
}
