//! The joint codec: every block is predicted from what the decoder has already, and what differs is coded (docs/joint.md).

pub mod book;
mod column;
mod entropy;
pub mod reference;
pub mod train;

use super::registry::{Method, Scale, Search};
use super::{CacheBatch, Codec, Coverage, Memo, Role};
use crate::block::{BlockId, Payload};
use crate::error::{Error, Result};
use crate::files;
use book::Book;
use column::{Components, Plan, Rebuilt, Source, Wanted};
pub use entropy::eighths;
use entropy::{Coder, Decoder, Encoder};
use rayon::prelude::*;
use reference::{Index, Match, Place};
use serde::{Serialize, Serializer};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Debug, Clone, Serialize, clap::Args)]
#[serde(rename_all = "kebab-case")]
pub struct Joint {
    /// File of `kvfuse train`
    #[arg(long, value_name = "FILE", value_parser = Trained::read, value_hint = clap::ValueHint::FilePath)]
    codec: Option<Trained>,
    /// Step of the quantiser, rounded to an eighth of an octave; the step that the file was trained at if it is left out
    #[arg(long, value_parser = step)]
    step: Option<f64>,
    /// Predict tokens from earlier tokens that stand behind the same text
    #[arg(long, action = clap::ArgAction::Set, default_value_t = true, value_name = "BOOL")]
    reference: bool,
    /// Finer steps for blocks that several requests share: the step is divided by their number to this power
    #[arg(long, default_value_t = SPREAD)]
    spread: f64,
    /// Squared error, in steps, that a saved bit is worth in rounding
    #[arg(long, default_value_t = 0.0)]
    lambda: f32,
    /// Never refer to a request of another tenant
    #[arg(long, action = clap::ArgAction::Set, default_value_t = false, value_name = "BOOL")]
    within_tenant: bool,
    /// Cached tokens that pay for the trained file together; 0 charges nothing
    #[arg(long, default_value_t = 1_000_000)]
    charge_tokens: u64,
}

/// The usual [`Joint::spread`], which codecs are trained with too.
const SPREAD: f64 = 0.25;

fn step(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(step) if step > 1e-6 && step < 1e6 => Ok(step),
        _ => Err("a step is a number above 0".to_owned()),
    }
}

/// A trained codec, known by its file's name and checksum.
#[derive(Clone)]
struct Trained {
    path: PathBuf,
    book: Arc<Book>,
    sha256: String,
    name: String,
}

impl std::fmt::Debug for Trained {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.name)
    }
}

impl Trained {
    fn read(path: &str) -> std::result::Result<Self, String> {
        let path = PathBuf::from(path);
        let read = |path: &Path| -> Result<Self> {
            let book = Arc::new(Book::read(path)?);
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let sha256 = files::sha256(path)?;
            Ok(Trained { path: path.to_owned(), book, sha256, name: stem })
        };
        read(&path).map_err(|e| e.to_string())
    }
}

impl Serialize for Trained {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name)
    }
}

impl Method for Joint {
    const NAME: &'static str = "joint";
    const ABOUT: &'static str = "Predicts every block from the layers below and from earlier blocks with the same text, quantises what differs by what an error there does, and \
                                 codes it. Needs a codec that was trained for the model (`kvfuse train`).";
    const PAPER: &'static str = "kvfuse, docs/joint.md";
    const DIALS: &'static [&'static str] = &["step"];
    const SEARCH: Option<Search> =
        Some(Search { option: "step", fine: 1e-4, coarse: 1.0, scale: Scale::Logarithmic });

    fn effective(&self) -> Result<serde_json::Value> {
        let mut all = serde_json::to_value(self).map_err(|e| Error::argument(e.to_string()))?;
        // Of two codecs of one name, each has rows of its own.
        if let (Some(trained), Some(fields)) = (&self.codec, all.as_object_mut()) {
            fields.insert("codec-sha256".to_owned(), trained.sha256[..12].into());
        }
        Ok(all)
    }

    fn codec(&self) -> Result<Arc<dyn Codec>> {
        match &self.codec {
            Some(trained) => Ok(Arc::new(Coding { book: Arc::clone(&trained.book), options: self.clone() })),
            None => Err(Error::argument("joint needs codec=FILE of `kvfuse train`")),
        }
    }
}

/// [`Joint`] with its file.
struct Coding {
    book: Arc<Book>,
    options: Joint,
}

/// A block of tokens in all layers, as it lies in the pool.
#[derive(Debug, Clone)]
pub struct Column {
    /// Where it stands first.
    pub request: usize,
    pub block: usize,
    /// Its pages, layer by layer.
    pub pages: Vec<BlockId>,
    pub tokens: usize,
    /// Requests that have it.
    pub readers: usize,
}

/// All columns of a batch, in the order in which requests first have them; and each request's columns, block by block.
pub fn columns(batch: &CacheBatch) -> Result<(Vec<Column>, Vec<Vec<usize>>)> {
    let mut all: Vec<Column> = Vec::new();
    let mut known: HashMap<BlockId, usize> = HashMap::new();
    let mut of_requests = Vec::with_capacity(batch.caches.len());
    for (request, cache) in batch.caches.iter().enumerate() {
        let blocks = cache.layers.first().map_or(0, |t| t.entries.len());
        let mut own = Vec::with_capacity(blocks);
        for block in 0..blocks {
            let entries = cache.layers.iter().map(|table| table.entries[block]);
            if entries.clone().any(|e| e.scale.is_some() || e.stripped) {
                return Err(Error::argument(
                    "joint codes blocks as prefill left them; it follows nothing but prefix",
                ));
            }
            let pages: Vec<BlockId> = entries.map(|e| e.block).collect();
            let number = *known.entry(pages[0]).or_insert_with(|| {
                let tokens = batch.pool.tokens(pages[0]);
                all.push(Column { request, block, pages: pages.clone(), tokens, readers: 0 });
                all.len() - 1
            });
            if all[number].pages != pages {
                return Err(Error::argument(
                    "joint needs the same sharing in all layers; it follows nothing but prefix",
                ));
            }
            all[number].readers += 1;
            own.push(number);
        }
        of_requests.push(own);
    }
    Ok((all, of_requests))
}

/// Numbers of a column, keys without position: `[layers][tokens, width]`.
pub fn stripped(batch: &CacheBatch, column: &Column) -> Vec<Vec<f32>> {
    let shape = batch.pool.shape();
    let half = shape.token_width();
    let first = column.block * shape.block_size;
    let layer = |(n, page): (usize, &BlockId)| {
        let mut keys = batch.pool.keys(*page).to_vec();
        batch.ropes.layer(n).strip_tokens(&mut keys, half, first);
        let values = batch.pool.values(*page);
        keys.chunks_exact(half)
            .zip(values.chunks_exact(half))
            .flat_map(|(k, v)| k.iter().chain(v))
            .copied()
            .collect()
    };
    column.pages.iter().enumerate().map(layer).collect()
}

/// What a token is predicted from: a token of an earlier column, and the class of the match.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reference {
    pub column: usize,
    pub token: usize,
    pub class: usize,
}

/// Of each token of a column.
pub type Sources = Vec<Option<Reference>>;

/// Finds the references of all columns, column by column; only requests of the same group refer to one another.
pub fn references(
    batch: &CacheBatch,
    columns: &[Column],
    of_requests: &[Vec<usize>],
    within_tenant: bool,
) -> Vec<Sources> {
    let size = batch.pool.shape().block_size;
    let group = |request: usize| match within_tenant {
        true => batch.tenants.iter().position(|t| *t == batch.tenants[request]).unwrap_or(0) as u64,
        false => 0,
    };
    let mut index = Index::new(&batch.tokens);
    let column_of = |place: Place| of_requests[place.request].get(place.token / size).copied();
    columns
        .iter()
        .enumerate()
        .map(|(number, column)| {
            let first = column.block * size;
            let group = group(column.request);
            let mut previous = None;
            let own = (first..first + column.tokens).map(|token| {
                // The first token of a request is like no other, and has no components.
                let usable = |p: Place| p.token > 0 && column_of(p).is_some_and(|c| c < number);
                let found = index.find(column.request, token, group, previous, usable);
                let found = found.filter(|m: &Match| usable(m.place) && token > 0);
                previous = found.map(|m| m.place);
                let Match { place, class } = found?;
                let from = column_of(place)?;
                Some(Reference { column: from, token: place.token % size, class })
            });
            let own = own.collect();
            index.add(column.request, first..first + column.tokens, group);
            own
        })
        .collect()
}

/// Columns in groups, each of which refers to earlier groups only.
pub fn waves(references: &[Sources]) -> Vec<Vec<usize>> {
    let mut depth: Vec<usize> = Vec::with_capacity(references.len());
    let mut waves: Vec<Vec<usize>> = Vec::new();
    for (number, own) in references.iter().enumerate() {
        let deepest = own.iter().flatten().map(|r| depth[r.column] + 1).max().unwrap_or(0);
        depth.push(deepest);
        if waves.len() <= deepest {
            waves.resize(deepest + 1, Vec::new());
        }
        waves[deepest].push(number);
    }
    waves
}

/// The tokens of a batch to train on, each physical block once. `folds`: the part that each request's text is in.
pub fn corpus_of(batch: &CacheBatch, folds: &[u8]) -> Result<train::Corpus> {
    let (all, of_requests) = columns(batch)?;
    let found = references(batch, &all, &of_requests, false);
    let layers = batch.caches.first().map_or(0, |c| c.layers.len());
    let mut corpus = train::Corpus {
        width: 2 * batch.pool.shape().token_width(),
        layers: vec![Vec::new(); layers],
        raw: Vec::new(),
        fold: Vec::new(),
        source: Vec::new(),
    };
    let mut first_row = Vec::with_capacity(all.len());
    for (column, sources) in all.iter().zip(&found) {
        first_row.push(corpus.raw.len());
        for (t, source) in sources.iter().enumerate() {
            corpus.raw.push(column.block == 0 && t == 0);
            let source = source.map(|r| (first_row[r.column] + r.token, r.class));
            // The same text again is in the same part.
            let same = source.filter(|(_, class)| *class >= reference::SAME);
            corpus.fold.push(same.map_or(folds[column.request], |(row, _)| corpus.fold[row]));
            corpus.source.push(source);
        }
    }
    let numbers: Vec<Vec<Vec<f32>>> = all.par_iter().map(|column| stripped(batch, column)).collect();
    for column in numbers {
        corpus.layers.iter_mut().zip(column).for_each(|(layer, own)| layer.extend(own));
    }
    Ok(corpus)
}

/// Encodes caches by a codec that is still being trained, at the step it is trained at.
pub fn rebuild(
    batch: &mut CacheBatch,
    layers: &[book::LayerBook],
    tables: &book::TableParts,
    training: &train::Training,
) -> Result<()> {
    let book = Book::of(layers, tables, training.step, batch.pool.shape())?;
    let options = Joint {
        codec: None,
        step: None,
        reference: true,
        spread: SPREAD,
        lambda: 0.0,
        within_tenant: false,
        charge_tokens: 0,
    };
    Coding { book: Arc::new(book), options }.encode(batch, &Memo::default())
}

impl Codec for Coding {
    fn role(&self) -> Role {
        Role::Code
    }

    fn within_tenant(&self) -> Option<bool> {
        self.options.reference.then_some(self.options.within_tenant)
    }

    fn coverage(&self, layers: usize) -> Coverage {
        // A column's pages are listed once for all layers.
        let trained = super::Trained { bits: self.book.bits, tokens: self.options.charge_tokens };
        Coverage { layers: 0..layers, table_layers: layers.max(1), leaf_tokens: None, trained }
    }

    fn takes_fused(&self) -> bool {
        false
    }

    fn trained_file(&self) -> Option<(&Path, &str)> {
        self.options.codec.as_ref().map(|t| (t.path.as_path(), &t.sha256[..]))
    }

    fn decode(&self, batch: &mut CacheBatch) -> Result<()> {
        self.check(batch)?;
        let (all, _) = columns(batch)?;
        let unusable = || Error::argument("has a block that its codec cannot read");
        let mut opened: Vec<Option<Decoder>> = Vec::with_capacity(all.len());
        let mut steps = Vec::with_capacity(all.len());
        let mut references: Vec<Sources> = Vec::with_capacity(all.len());
        for (number, column) in all.iter().enumerate() {
            let bytes = &batch.pool.payload(column.pages[0]).ok_or_else(unusable)?.bytes;
            let mut coder = Decoder::new(bytes)?;
            steps.push(coder.bits(16, 0) as i32 - (1 << 15));
            let own = code_references(&mut coder, &vec![None; column.tokens]);
            let sound = |r: &Reference| {
                let from = all.get(r.column).filter(|_| r.column < number);
                from.is_some_and(|c| r.token < c.tokens && !(c.block == 0 && r.token == 0))
                    && (1..reference::MATCHES).contains(&r.class)
            };
            if !own.iter().flatten().all(sound) {
                return Err(unusable());
            }
            references.push(own);
            opened.push(Some(coder));
        }
        let mut components: Vec<Components> = vec![Components::default(); all.len()];
        for wave in waves(&references) {
            let coders: Vec<(usize, Decoder)> =
                wave.iter().filter_map(|&number| Some((number, opened[number].take()?))).collect();
            let read: Vec<(usize, Rebuilt, bool)> = coders
                .into_par_iter()
                .map(|(number, mut coder)| {
                    let column = &all[number];
                    let sources = sources(&references[number], &components);
                    let plan = Plan {
                        tokens: column.tokens,
                        raw_first: column.block == 0,
                        step: steps[number],
                        sources: &sources,
                    };
                    let rebuilt = column::run(&self.book, &plan, &mut coder, None);
                    (number, rebuilt, coder.failed())
                })
                .collect();
            for (number, rebuilt, failed) in read {
                if failed {
                    return Err(unusable());
                }
                let bytes = batch.pool.payload(all[number].pages[0]).map(|p| p.bytes.clone());
                store(batch, &all[number], &rebuilt, bytes.unwrap_or_default());
                components[number] = rebuilt.components;
            }
        }
        Ok(())
    }

    fn encode(&self, batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        self.check(batch)?;
        let (all, of_requests) = columns(batch)?;
        if all.iter().any(|c| c.pages.iter().any(|p| batch.pool.payload(*p).is_some())) {
            return Err(Error::argument("joint codes blocks as prefill left them"));
        }
        let found = if self.options.reference {
            references(batch, &all, &of_requests, self.options.within_tenant)
        } else {
            all.iter().map(|c| vec![None; c.tokens]).collect()
        };
        let step = self.options.step.map_or(self.book.origin.step, entropy::eighths);
        let mut components: Vec<Components> = vec![Components::default(); all.len()];
        for wave in waves(&found) {
            let coded: Vec<(Rebuilt, Vec<u8>)> = wave
                .par_iter()
                .map(|&number| {
                    let column = &all[number];
                    let readers = column.readers as f64;
                    let finer = (8.0 * self.options.spread * readers.max(1.0).log2()).round() as i32;
                    self.encode_column(batch, column, &found[number], step - finer, &components)
                })
                .collect();
            for (&number, (rebuilt, bytes)) in wave.iter().zip(coded) {
                store(batch, &all[number], &rebuilt, bytes);
                components[number] = rebuilt.components;
            }
        }
        Ok(())
    }
}

impl Coding {
    /// Whether the caches are of the model that the codec was trained for, as far as that can be seen.
    fn check(&self, batch: &CacheBatch) -> Result<()> {
        let shape = batch.pool.shape();
        let origin = &self.book.origin;
        let layers = batch.caches.first().map_or(origin.layers, |c| c.layers.len());
        if (origin.layers, origin.kv_heads, origin.head_dim) == (layers, shape.kv_heads, shape.head_dim) {
            return Ok(());
        }
        Err(Error::argument(format!(
            "the codec was trained for {} ({} layers, {} key/value heads of {}); these caches are of another model",
            origin.model, origin.layers, origin.kv_heads, origin.head_dim
        )))
    }

    fn encode_column(
        &self,
        batch: &CacheBatch,
        column: &Column,
        references: &Sources,
        step: i32,
        components: &[Components],
    ) -> (Rebuilt, Vec<u8>) {
        let numbers = stripped(batch, column);
        let mut coder = Encoder::default();
        coder.bits(16, (step + (1 << 15)) as u32);
        code_references(&mut coder, references);
        let sources = sources(references, components);
        let plan = Plan { tokens: column.tokens, raw_first: column.block == 0, step, sources: &sources };
        let wanted = Wanted { numbers: &numbers, lambda: self.options.lambda };
        let rebuilt = column::run(&self.book, &plan, &mut coder, Some(wanted));
        (rebuilt, coder.finish())
    }
}

/// Codes whether each token has a reference, whether it goes on where the one before it ended, and if not, where it is; or
/// decodes it. Returns what a decoder knows.
fn code_references<C: Coder>(coder: &mut C, references: &Sources) -> Sources {
    let mut previous: Option<Reference> = None;
    let mut all = Vec::with_capacity(references.len());
    for own in references {
        let wish = own.unwrap_or_default();
        let known = if coder.bits(1, u32::from(own.is_some())) == 0 {
            None
        } else {
            let next = previous.map(|p| Reference { token: p.token + 1, ..p });
            match next.filter(|_| coder.bits(1, u32::from(next == *own)) == 1) {
                Some(next) => Some(next),
                None => {
                    let low = coder.bits(16, (wish.column & 0xffff) as u32);
                    let high = coder.bits(16, (wish.column >> 16) as u32);
                    let token = coder.bits(16, wish.token as u32) as usize;
                    let class = coder.bits(3, wish.class as u32) as usize;
                    Some(Reference { column: (high << 16 | low) as usize, token, class })
                }
            }
        };
        all.push(known);
        previous = known;
    }
    all
}

/// References as the column coder takes them.
fn sources<'a>(references: &Sources, components: &'a [Components]) -> Vec<Option<Source<'a>>> {
    let source = |r: Reference| Source { column: &components[r.column], token: r.token, matched: r.class };
    references.iter().map(|r| r.map(source)).collect()
}

/// Puts a column as it is read back into the pool, its bytes with the first layer's page, its bits shared out by layer.
fn store(batch: &mut CacheBatch, column: &Column, rebuilt: &Rebuilt, bytes: Vec<u8>) {
    let shape = batch.pool.shape();
    let half = shape.token_width();
    let first = column.block * shape.block_size;
    let total = 8 * bytes.len() as u64;
    let ropes = Arc::clone(&batch.ropes);
    let by_layer = shares(total, &rebuilt.bits);
    let mut bytes = Some(bytes);
    for (n, (page, numbers)) in column.pages.iter().zip(&rebuilt.numbers).enumerate() {
        let rows = numbers.chunks_exact(2 * half);
        let mut keys: Vec<f32> = rows.clone().flat_map(|row| &row[..half]).copied().collect();
        let values = rows.flat_map(|row| &row[half..]).copied().collect();
        ropes.layer(n).rotate_tokens(&mut keys, half, first);
        let payload =
            Payload { bytes: bytes.take().unwrap_or_default(), code_bits: by_layer[n], side_bits: 0 };
        batch.pool.recode(*page, keys, values, payload);
    }
}

/// A total in whole parts that go with `weights`; what rounding leaves goes to the first.
fn shares(total: u64, weights: &[f64]) -> Vec<u64> {
    let sum: f64 = weights.iter().sum();
    let mut parts: Vec<u64> =
        weights.iter().map(|w| if sum > 0.0 { (w / sum * total as f64).floor() as u64 } else { 0 }).collect();
    let left = total - parts.iter().sum::<u64>().min(total);
    if let Some(first) = parts.first_mut() {
        *first += left;
    }
    parts
}
