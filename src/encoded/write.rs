//! `kvfuse encode`: the caches of a dump through a chain, as one file.

use super::{FUSED, Header, LAYER_FRAME, MAGIC, PAGE_FRAME, SCALED, STRIPPED, load_caches};
use crate::block::{BlockId, BlockPool, Kept, halves};
use crate::codec::evict::{observe, show_attention};
use crate::codec::{CacheBatch, Chain, Codec, Ledger, Memo, Role};
use crate::dump::{EncodedBy, Manifest, open_model};
use crate::error::{Error, Result};
use crate::files;
use crate::model::Ropes;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// What to encode, and where to.
pub struct EncodeOptions {
    pub dump: PathBuf,
    pub chain: Chain,
    pub block_size: usize,
    pub out: PathBuf,
}

/// Bytes of an encoded file by what they are. The body is what the ledger counts; pages end on whole bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Size {
    /// Bits that the ledger counts.
    pub ledger_bits: u64,
    /// The share of a trained file that the ledger charges besides; the file does not hold it.
    pub trained_bits: u64,
    /// Bits that fill up the last bytes of pages.
    pub padding_bits: u64,
    /// Lengths and checksums of pages and tables.
    pub frame_bytes: u64,
    /// Magic, header and its checksum: model, prompts, token ids.
    pub header_bytes: u64,
    pub file_bytes: u64,
    /// Audited ratio of the ledger.
    pub cr_audited: f64,
}

/// Encodes all requests of a dump as one batch.
///
/// # Errors
/// Chains that prefill anew (they need the model); damaged dumps; files that cannot be written.
pub fn encode(options: &EncodeOptions) -> Result<Size> {
    let EncodeOptions { dump, chain, block_size, out } = options;
    files::writable_beside(out)?;
    if chain.chunks().is_some() {
        let problem = format!("{} prefills anew and cannot encode caches of a dump; sweep it", chain.name());
        return Err(Error::argument(problem));
    }
    let manifest = Manifest::read(dump)?;
    let config = &manifest.model.config;
    let longest = manifest.requests.iter().map(|r| r.tokens).max().unwrap_or(0);
    let ropes = Arc::new(Ropes::new(config, longest));
    let all: Vec<usize> = (0..manifest.requests.len()).collect();
    let (mut batch, tokens) = load_caches(dump, &manifest, &all, *block_size, ropes, 0)?;
    let memo = Memo::default();
    show_attention(&mut batch, chain, &memo, |batch, needs| {
        observe(&open_model(dump, None, &manifest)?, batch, needs)
    })?;
    chain.encode(&mut batch, &memo)?;
    if chain.role() == Role::Whole {
        return Err(Error::argument(format!(
            "{}: its bits are another program's and not at hand",
            chain.name()
        )));
    }
    let coverage = chain.coverage(config.layers);
    let ledger = Ledger::of(&batch, &coverage);
    let code = chain.stages().last().filter(|s| s.role == Role::Code);
    let trained = code.and_then(|s| s.codec.trained_file());
    let mut header = Header {
        kvfuse_version: env!("CARGO_PKG_VERSION").to_owned(),
        method: chain.name(),
        code: match trained {
            Some((path, _)) => code.and_then(|s| s.with_file(path)),
            None => code.map(ToString::to_string),
        },
        code_sha256: trained.map(|(_, sum)| sum.to_owned()),
        block_size: *block_size,
        touched: 0..0,
        table_layers: 1,
        evicts: batch.caches.iter().any(|c| c.layers.iter().any(|t| t.kept.is_some())),
        manifest: Manifest { command: Vec::new(), ..manifest },
        tokens,
    };
    header.manifest.encoded = Some(EncodedBy { method: chain.name(), options: chain.options() });
    let shares = by_tokens(ledger.total_bits(), &header.tokens);
    for (request, bits) in header.manifest.requests.iter_mut().zip(shares) {
        request.sha256.clear();
        request.bits = Some(bits);
    }
    header.set_coverage(&coverage);

    let json = serde_json::to_vec(&header).map_err(|e| Error::file(out, e.to_string()))?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend((json.len() as u64).to_le_bytes());
    bytes.extend(&json);
    let sum = Sha256::digest(&bytes);
    bytes.extend(sum);
    let header_bytes = bytes.len() as u64;
    let (mut frame_bytes, mut page_bits) = (0, 0);
    for layer in 0..header.manifest.model.config.layers {
        let written = write_layer(&batch, layer, &header, &mut bytes);
        frame_bytes += (LAYER_FRAME + PAGE_FRAME * written.pages) as u64;
        page_bits += written.page_bits;
    }
    files::write_atomically(out, |file| file.write_all(&bytes))?;
    // A codec of whole columns keeps all bytes with the first layer's page, so bits fit bytes only in sum.
    let coded = ledger.stored_element_bits() + ledger.codebook_bits;
    let padding_bits = page_bits.saturating_sub(coded);
    Ok(Size {
        ledger_bits: ledger.file_bits(),
        trained_bits: ledger.trained_bits,
        padding_bits,
        frame_bytes,
        header_bytes,
        file_bytes: bytes.len() as u64,
        cr_audited: ledger.cr_audited(),
    })
}

/// Bits dealt to requests by their tokens, to the last one.
fn by_tokens(bits: u64, requests: &[Vec<u32>]) -> Vec<u64> {
    let all: usize = requests.iter().map(Vec::len).sum();
    let (mut tokens, mut dealt) = (0, 0);
    let mut share = |request: &Vec<u32>| {
        tokens += request.len();
        let until = (u128::from(bits) * tokens as u128 / all.max(1) as u128) as u64;
        let own = until - dealt;
        dealt = until;
        own
    };
    requests.iter().map(&mut share).collect()
}

struct Written {
    pages: usize,
    /// Bits of the pages' own bytes.
    page_bits: u64,
}

/// Number of pages, pages in the order in which tables first list them, tables, checksum of number and tables.
fn write_layer(batch: &CacheBatch, layer: usize, header: &Header, bytes: &mut Vec<u8>) -> Written {
    let mut numbers: HashMap<BlockId, u32> = HashMap::new();
    let mut pages: Vec<BlockId> = Vec::new();
    let mut tables = Vec::new();
    for cache in &batch.caches {
        if header.evicts {
            tables.extend(kept_list(cache.layers[layer].kept.as_deref()));
        }
        for entry in &cache.layers[layer].entries {
            let number = *numbers.entry(entry.block).or_insert_with(|| {
                pages.push(entry.block);
                pages.len() as u32 - 1
            });
            let flag = |on: bool, flag: u32| if on { flag } else { 0 };
            let word = number
                | flag(entry.scale.is_some(), SCALED)
                | flag(entry.stripped, STRIPPED)
                | flag(entry.fused, FUSED);
            tables.extend(word.to_le_bytes());
            if let Some(scale) = entry.scale {
                tables.extend(scale.key.to_le_bytes());
                tables.extend(scale.value.to_le_bytes());
            }
        }
    }
    let count = (pages.len() as u32).to_le_bytes();
    bytes.extend(count);
    let mut page_bits = 0;
    for &page in &pages {
        page_bits += write_page(&batch.pool, page, bytes);
    }
    let mut sum = crc32fast::Hasher::new();
    sum.update(&count);
    // Layers of a group list the same pages in the same places.
    if header.has_table(layer) {
        sum.update(&tables);
        bytes.extend(&tables);
    }
    bytes.extend(sum.finalize().to_le_bytes());
    Written { pages: pages.len(), page_bits }
}

/// The number of tokens that were kept and a bit a token; of a table that kept all, 2^32 - 1 and nothing else.
fn kept_list(kept: Option<&Kept>) -> Vec<u8> {
    let Some(kept) = kept else { return u32::MAX.to_le_bytes().to_vec() };
    let mut bits = vec![0u8; kept.tokens.div_ceil(8)];
    for &position in &kept.positions {
        bits[position as usize / 8] |= 1 << (position % 8);
    }
    [&(kept.positions.len() as u32).to_le_bytes()[..], &bits].concat()
}

/// A page with its frame; returns the bits of its own bytes.
fn write_page(pool: &BlockPool, page: BlockId, bytes: &mut Vec<u8>) -> u64 {
    let payload = pool.payload(page);
    let own = match payload {
        Some(payload) => payload.bytes.clone(),
        None => [halves::to_bytes(&pool.keys(page)), halves::to_bytes(&pool.values(page))].concat(),
    };
    let mut frame = Vec::with_capacity(PAGE_FRAME);
    frame.extend((pool.tokens(page) as u16).to_le_bytes());
    frame.extend(u16::from(payload.is_some()).to_le_bytes());
    frame.extend((own.len() as u32).to_le_bytes());
    let mut sum = crc32fast::Hasher::new();
    sum.update(&frame);
    sum.update(&own);
    frame.extend(sum.finalize().to_le_bytes());
    bytes.extend(frame);
    bytes.extend(&own);
    8 * own.len() as u64
}
