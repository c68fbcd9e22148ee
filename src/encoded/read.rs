//! `kvfuse decode`: an encoded file back to a dump.

use super::{FUSED, Header, MAGIC, SCALED, STRIPPED};
use crate::block::{
    BlockId, BlockShape, BlockTable, Entry, Kept, Payload, RequestCache, Scale, Storage, halves,
};
use crate::codec::{CacheBatch, Chain, Codec, PageShape, Stage};
use crate::dump::{DumpDtype, Manifest, write_shard};
use crate::error::{Error, Result};
use crate::files;
use crate::interrupt;
use crate::lock::FolderLock;
use crate::model::Ropes;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::sync::Arc;

/// The caches in an encoded file, ready to be read.
pub struct Encoded {
    pub batch: CacheBatch,
    /// The chain that encoded them.
    pub method: String,
    pub manifest: Manifest,
    tokens: Vec<Vec<u32>>,
}

/// Whether checksums differ. To a fuzzer none do: it would hardly get past them.
fn differ<T: PartialEq + ?Sized>(a: &T, b: &T) -> bool {
    !cfg!(fuzzing) && a != b
}

/// One request's table as it is written: which tokens it kept, and its entries.
type Listed = (Option<Arc<Kept>>, Vec<(u32, Option<Scale>)>);

/// Bytes of a file, taken one stretch after the other.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| self.damaged("is cut short"))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn word(&mut self) -> Result<u32> {
        let bytes = self.take(4)?;
        Ok(bytes.iter().rev().fold(0, |word, b| word << 8 | u32::from(*b)))
    }

    fn damaged(&self, what: &str) -> Error {
        Error::file(self.path, format!("{what} (byte {}); encode it again", self.at))
    }
}

impl Encoded {
    /// Reads and checks a file. `codec`: where the trained file is that it was encoded with, if that was moved.
    ///
    /// # Errors
    /// Files of another kind or version, cut short, or with any byte changed.
    pub fn read(path: &Path, codec: Option<&Path>) -> Result<Self> {
        let map = files::map(path)?;
        let mut reader = Reader { path, bytes: &map, at: 0 };
        let header = header(&mut reader)?;
        let config = header.manifest.model.config.clone();
        let shape = BlockShape {
            block_size: header.block_size,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        };
        let code = reading_stage(path, &header, codec)?;
        let longest = header.tokens.iter().map(Vec::len).max().unwrap_or(0);
        let ropes = Arc::new(Ropes::new(&config, longest));
        // Scales and positions come on top, so numbers stay as they are read.
        let mut batch = CacheBatch::empty(shape, Storage::F32, ropes);
        for (tokens, entry) in header.tokens.iter().zip(&header.manifest.requests) {
            let cache = RequestCache { layers: Vec::new(), tokens: tokens.len() };
            batch.push(cache, tokens.clone(), &entry.request.tenant);
        }
        let mut table: Vec<Listed> = Vec::new();
        for layer in 0..config.layers {
            interrupt::check()?;
            let count = reader.word()?;
            let mut pages = Vec::new();
            let mut tokens_left: usize = header.tokens.iter().map(Vec::len).sum();
            for _ in 0..count {
                pages.push(page(&mut reader, &mut batch, code.is_some(), shape, &mut tokens_left)?);
            }
            let mut sum = crc32fast::Hasher::new();
            sum.update(&count.to_le_bytes());
            if header.has_table(layer) {
                let from = reader.at;
                table = header
                    .tokens
                    .iter()
                    .map(|tokens| {
                        let kept = if header.evicts { kept(&mut reader, tokens.len())? } else { None };
                        let stored = kept.as_ref().map_or(tokens.len(), |k| k.positions.len());
                        let entries = (0..stored.div_ceil(shape.block_size)).map(|_| entry(&mut reader));
                        Ok((kept, entries.collect::<Result<_>>()?))
                    })
                    .collect::<Result<_>>()?;
                sum.update(&reader.bytes[from..reader.at]);
            }
            if differ(&sum.finalize(), &reader.word()?) {
                return Err(reader.damaged("is damaged: the checksum of a block table differs"));
            }
            for (cache, (kept, entries)) in batch.caches.iter_mut().zip(&table) {
                let mut own = BlockTable { entries: Vec::new(), kept: kept.clone() };
                for &(word, scale) in entries {
                    let number = (word & !(SCALED | STRIPPED | FUSED)) as usize;
                    let known = pages.get(number).copied();
                    let block = known.ok_or_else(|| reader.damaged("lists a page that it does not hold"))?;
                    batch.pool.retain(block);
                    let (stripped, fused) = (word & STRIPPED != 0, word & FUSED != 0);
                    own.entries.push(Entry { block, scale, stripped, fused });
                }
                cache.layers.push(own);
            }
            pages.into_iter().for_each(|page| batch.pool.release(page));
        }
        if reader.at != reader.bytes.len() {
            return Err(reader.damaged("goes on after its end"));
        }
        for (cache, tokens) in batch.caches.iter().zip(&header.tokens) {
            let fits = cache.layers.iter().all(|table| {
                let stored: usize = table.entries.iter().map(|e| batch.pool.tokens(e.block)).sum();
                stored == table.slots_before(tokens.len())
            });
            if !fits {
                return Err(reader.damaged("has pages that hold more or fewer tokens than its requests have"));
            }
        }
        if let Some(code) = &code {
            code.decode(&mut batch).map_err(|e| Error::file(path, format!("{e}; encode it again")))?;
        }
        Ok(Encoded { batch, method: header.method, manifest: header.manifest, tokens: header.tokens })
    }
}

/// Tokens of a block beyond which a header is not believed.
const LARGEST_BLOCK: usize = 1 << 24;

fn header(reader: &mut Reader) -> Result<Header> {
    let magic = reader.take(MAGIC.len())?;
    if magic[..7] != MAGIC[..7] {
        return Err(Error::file(reader.path, "is no encoded file of `kvfuse encode`"));
    }
    if magic != MAGIC {
        let problem = format!(
            "has version {} of the format, this kvfuse reads {}; encode it again",
            magic[7], MAGIC[7]
        );
        return Err(Error::file(reader.path, problem));
    }
    let (low, high) = (reader.word()?, reader.word()?);
    let json = reader.take((u64::from(high) << 32 | u64::from(low)) as usize)?;
    let own = Sha256::digest(&reader.bytes[..reader.at]);
    if differ(reader.take(32)?, &own[..]) {
        return Err(reader.damaged("is damaged: the checksum of the header differs"));
    }
    let header: Header = serde_json::from_slice(json)
        .map_err(|e| Error::file(reader.path, format!("has an unusable header ({e}); encode it again")))?;
    header.manifest.model.config.check(reader.path)?;
    let sound = (1..=LARGEST_BLOCK).contains(&header.block_size)
        && header.table_layers > 0
        && header.tokens.len() == header.manifest.requests.len()
        && header.tokens.iter().all(|t| !t.is_empty());
    if sound { Ok(header) } else { Err(reader.damaged("has a header that contradicts itself")) }
}

/// The stage that reads coded pages, with its trained file checked.
fn reading_stage(path: &Path, header: &Header, codec: Option<&Path>) -> Result<Option<Chain>> {
    let Some(text) = &header.code else { return Ok(None) };
    let moved = codec.and_then(|codec| Stage::moved(text, codec));
    let text = moved.as_ref().unwrap_or(text);
    let chain = Chain::parse(text)?.swap_remove(0);
    let own = chain.stages().last().and_then(|s| s.codec.trained_file());
    if let (Some((trained, sum)), Some(expected)) = (own, &header.code_sha256)
        && sum != expected
    {
        let problem = format!(
            "was encoded with another codec than {} (SHA-256 {}...); pass that one with --codec",
            trained.display(),
            &expected[..expected.len().min(12)]
        );
        return Err(Error::file(path, problem));
    }
    Ok(Some(chain))
}

/// A page with its frame, put into the pool; a coded one as its bytes, with zeros for numbers.
fn page(
    reader: &mut Reader,
    batch: &mut CacheBatch,
    has_code: bool,
    shape: BlockShape,
    tokens_left: &mut usize,
) -> Result<BlockId> {
    let from = reader.at;
    let first = reader.word()?;
    let (tokens, coded) = ((first & 0xffff) as usize, first >> 16 == 1);
    let length = reader.word()? as usize;
    let expected = reader.word()?;
    let bytes = reader.take(length)?;
    let mut sum = crc32fast::Hasher::new();
    sum.update(&reader.bytes[from..from + 8]);
    sum.update(bytes);
    if differ(&sum.finalize(), &expected) {
        return Err(reader.damaged("is damaged: the checksum of a page differs"));
    }
    let page = PageShape { tokens, kv_heads: shape.kv_heads, head_dim: shape.head_dim, layer: 0, layers: 1 };
    let unusable = || reader.damaged("has a page of another shape");
    // No more tokens than the requests have: a small file cannot ask for much memory.
    if tokens == 0 || tokens > shape.block_size || tokens > *tokens_left || (coded && !has_code) {
        return Err(unusable());
    }
    *tokens_left -= tokens;
    if coded {
        let zeros = vec![0.0; page.numbers()];
        let id = batch.pool.allocate(&zeros, &zeros);
        let payload = Payload { bytes: bytes.to_vec(), code_bits: 8 * bytes.len() as u64, side_bits: 0 };
        batch.pool.recode(id, zeros.clone(), zeros, payload, None);
        return Ok(id);
    }
    let numbers = halves::from_bytes(bytes);
    let (keys, values) = numbers.split_at(numbers.len() / 2);
    if keys.len() != page.numbers() || values.len() != keys.len() {
        return Err(unusable());
    }
    Ok(batch.pool.allocate(keys, values))
}

/// Which of so many tokens a table kept; `None` for all.
fn kept(reader: &mut Reader, tokens: usize) -> Result<Option<Arc<Kept>>> {
    let count = reader.word()?;
    if count == u32::MAX {
        return Ok(None);
    }
    let bits = reader.take(tokens.div_ceil(8))?;
    let positions: Vec<u32> =
        (0..tokens as u32).filter(|p| bits[*p as usize / 8] >> (p % 8) & 1 == 1).collect();
    if positions.is_empty() || positions.len() != count as usize {
        return Err(reader.damaged("has a list of kept tokens that contradicts itself"));
    }
    Ok(Some(Arc::new(Kept { positions, tokens })))
}

fn entry(reader: &mut Reader) -> Result<(u32, Option<Scale>)> {
    let word = reader.word()?;
    let scale = if word & SCALED == 0 {
        None
    } else {
        Some(Scale { key: f32::from_bits(reader.word()?), value: f32::from_bits(reader.word()?) })
    };
    Ok((word, scale))
}

/// Writes what attention reads of an encoded file as a dump of f32 numbers; returns its manifest.
pub fn decode(file: &Path, codec: Option<&Path>, out: &Path) -> Result<Manifest> {
    let Encoded { batch, manifest, tokens, method } = Encoded::read(file, codec)?;
    if batch.caches.iter().any(|c| c.layers.iter().any(|t| t.kept.is_some())) {
        let problem =
            format!("was encoded by {method}, which drops tokens; a dump holds all tokens of a prompt");
        return Err(Error::file(file, problem));
    }
    let _lock = FolderLock::take(out)?;
    files::writable_folder(out)?;
    if std::fs::read_dir(out).is_ok_and(|mut d| d.any(|e| e.is_ok_and(|e| e.file_name() != ".kvfuse-lock"))) {
        return Err(Error::file(out, "is not empty; choose another -o"));
    }
    let mut manifest = Manifest { dtype: DumpDtype::F32, ..manifest };
    let plan = manifest.plan()?;
    let config = manifest.model.config.clone();
    for (request, ids) in tokens.iter().enumerate() {
        interrupt::check()?;
        let layers: Vec<(Vec<f32>, Vec<f32>)> = (0..config.layers)
            .into_par_iter()
            .map(|layer| {
                let blocks = batch.caches[request].layers[layer].entries.len();
                let read: Vec<_> = (0..blocks).map(|block| batch.read(request, layer, block)).collect();
                let (keys, values): (Vec<_>, Vec<_>) = read.into_iter().unzip();
                (keys.concat(), values.concat())
            })
            .collect();
        let path = manifest.shard_path(out, request);
        manifest.requests[request].sha256 = write_shard(&path, ids, &layers, &config, DumpDtype::F32, &plan)?;
    }
    manifest.write(out)?;
    Ok(manifest)
}
