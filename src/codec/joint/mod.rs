//! The joint codec: every block is predicted from what the decoder has already, and what differs is coded (docs/joint.md).

pub mod book;
mod bound;
pub mod corpus;
mod entropy;
mod layers;
mod links;
pub mod reference;
pub mod train;

use super::columns::{Column, charge, columns, store_layer, stripped_layer};
use super::evict::Needs;
use super::registry::{Method, Scale, Search, number};
use super::trained::{TrainedOption, check_model};
use super::{CacheBatch, Codec, Coverage, Memo, Role};
use crate::error::{Error, Result};
use book::Book;
pub use bound::{Bound, LayerBound, Matches, Parts};
pub use corpus::corpus_of;
pub use entropy::eighths;
use entropy::{Coder, Decoder, Encoder};
use layers::{Layers, Wanted};
use links::{Plan, code_references, plans, references};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops;
use std::path::Path;
use std::sync::Arc;

#[derive(Debug, Clone, Serialize, clap::Args)]
#[serde(rename_all = "kebab-case")]
pub struct Joint {
    /// File of `kvfuse train`
    #[arg(long, value_name = "FILE", value_parser = TrainedOption::<Book>::read, value_hint = clap::ValueHint::FilePath)]
    codec: Option<TrainedOption<Book>>,
    /// Step of the quantiser, rounded to an eighth of an octave; the step that the file was trained at if it is left out
    #[arg(long, value_parser = step)]
    step: Option<f64>,
    /// Predict tokens from earlier tokens that stand behind the same text
    #[arg(long, action = clap::ArgAction::Set, default_value_t = true, value_name = "BOOL")]
    reference: bool,
    /// Finer steps for blocks that several requests share: the step is divided by their number to this power
    #[arg(long, default_value_t = SPREAD, value_parser = number("a power", ops::Bound::Included(0.0), ops::Bound::Included(4.0)))]
    spread: f64,
    /// Finer steps for tokens that the end of the prompt attends to, coarser ones for others: the step goes with attention to minus this
    /// power; 0 for equal steps
    #[arg(long, default_value_t = 0.0, value_parser = number("a power", ops::Bound::Included(0.0), ops::Bound::Included(4.0)))]
    attention: f64,
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

impl Method for Joint {
    const NAME: &'static str = "joint";
    const ROLE: Role = Role::Code;
    const ABOUT: &'static str = "Predicts every block from the layers below and from earlier blocks with the same text, quantises what differs by what an error there does, and \
                                 codes it. Needs a codec that was trained for the model (`kvfuse train`).";
    const PAPER: &'static str = "kvfuse, docs/joint.md";
    const DIALS: &'static [&'static str] = &["step"];
    const SEARCH: Option<Search> =
        Some(Search { option: "step", fine: 1e-4, coarse: 1.0, scale: Scale::Logarithmic });

    fn effective(&self) -> Result<serde_json::Value> {
        TrainedOption::columns(self, self.codec.as_ref())
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
        attention: 0.0,
        within_tenant: false,
        charge_tokens: 0,
    };
    Coding { book: Arc::new(book), options }.encode(batch, &Memo::default())
}

impl Codec for Coding {
    fn within_tenant(&self) -> Option<bool> {
        self.options.reference.then_some(self.options.within_tenant)
    }

    fn coverage(&self, layers: usize) -> Coverage {
        // A column's pages are listed once for all layers.
        let trained = super::Trained { bits: self.book.bits, tokens: self.options.charge_tokens };
        Coverage { layers: 0..layers, table_layers: layers.max(1), leaf_tokens: None, trained }
    }

    fn needs(&self) -> Needs {
        Needs { prompt: self.options.attention > 0.0, ..Needs::default() }
    }

    fn blocks_stand_alone(&self) -> bool {
        !self.options.reference
    }

    fn takes_changed(&self) -> bool {
        false
    }

    fn trained_file(&self) -> Option<(&Path, &str)> {
        self.options.codec.as_ref().map(|t| (t.path.as_path(), &t.sha256[..]))
    }

    fn decode(&self, batch: &mut CacheBatch) -> Result<()> {
        self.check(batch)?;
        let (all, _) = columns(batch)?;
        let unusable = || Error::argument("has a block that its codec cannot read");
        let (mut bytes, mut decoders) = (Vec::new(), Vec::new());
        let (mut steps, mut references) = (Vec::new(), Vec::new());
        for (number, column) in all.iter().enumerate() {
            let own = batch.pool.payload(column.pages[0]).ok_or_else(unusable)?.bytes.clone();
            let mut decoder = Decoder::new(&own)?;
            steps.push(code_steps(&mut decoder, &vec![0; column.tokens]));
            let sources = code_references(&mut decoder, &vec![None; column.tokens]);
            if !sources.iter().flatten().all(|r| links::sound(r, number, &all)) {
                return Err(unusable());
            }
            references.push(sources);
            decoders.push(decoder);
            bytes.push(own);
        }
        let plans = plans(&all, steps, references);
        let mut coded = Layers::new(&self.book, &plans, decoders);
        for n in 0..self.book.layers.len() {
            coded.next(None);
            if coded.coders().any(Decoder::failed) {
                return Err(unusable());
            }
            store_layer(batch, &all, n, coded.rebuilt());
        }
        // Which layers the bits are of is not written.
        let bits = vec![0.0; self.book.layers.len()];
        all.iter().zip(bytes).for_each(|(column, bytes)| charge(batch, column, &bits, bytes));
        Ok(())
    }

    fn encode(&self, batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        let (all, plans) = self.plan(batch)?;
        self.code(batch, &all, &plans, None);
        Ok(())
    }

    fn bound(&self, batch: &mut CacheBatch) -> Result<Bound> {
        let (all, plans) = self.plan(batch)?;
        let mut watch = bound::Watch::new(&self.book, &plans);
        self.code(batch, &all, &plans, Some(&mut watch));
        watch.bounds(&self.book)
    }
}

impl Coding {
    /// A batch's columns, and how each is to be coded.
    fn plan(&self, batch: &CacheBatch) -> Result<(Vec<Column>, Vec<Plan>)> {
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
        let plans = plans(&all, self.steps(batch, &all, &of_requests)?, found);
        Ok((all, plans))
    }

    /// Encodes columns, and lets `watch` see what is left of every component.
    fn code(
        &self,
        batch: &mut CacheBatch,
        all: &[Column],
        plans: &[Plan],
        mut watch: Option<&mut bound::Watch>,
    ) {
        let mut coded = Layers::new(&self.book, plans, plans.iter().map(opened).collect());
        let mut bits = vec![Vec::with_capacity(self.book.layers.len()); all.len()];
        for n in 0..self.book.layers.len() {
            let numbers = stripped_layer(batch, all, n);
            let spent = coded.next(Some(Wanted { numbers: &numbers, watch: watch.is_some() }));
            store_layer(batch, all, n, coded.rebuilt());
            bits.iter_mut().zip(spent.bits).for_each(|(all, own)| all.push(own));
            if let Some(watch) = &mut watch {
                watch.layer(n, &spent.seen);
            }
        }
        for ((column, bits), coder) in all.iter().zip(bits).zip(coded.into_coders()) {
            charge(batch, column, &bits, coder.finish());
        }
    }

    fn check(&self, batch: &CacheBatch) -> Result<()> {
        let o = &self.book.origin;
        let sizes = [o.layers, o.kv_heads, o.head_dim];
        check_model(batch, "the codec was trained for", &o.model, sizes)
    }

    /// The step of every token of every column. Blocks that many requests read have finer ones, and so have tokens that are attended to.
    fn steps(&self, batch: &CacheBatch, all: &[Column], of_requests: &[Vec<usize>]) -> Result<Vec<Vec<i32>>> {
        let base = self.options.step.map_or(self.book.origin.step, entropy::eighths);
        let usual = |column: &Column| {
            let readers = column.readers.max(1) as f64;
            base - (8.0 * self.options.spread * readers.log2()).round() as i32
        };
        let mut steps: Vec<Vec<i32>> = all.iter().map(|c| vec![usual(c); c.tokens]).collect();
        if self.options.attention > 0.0 {
            let observed =
                batch.observed.as_ref().ok_or_else(|| Error::argument("needs attention weights"))?;
            let own = |column: &Column| match self.options.within_tenant {
                true => &batch.tenants[column.request][..],
                false => "",
            };
            let groups: Vec<&str> = all.iter().map(own).collect();
            let weights = weights(observed, all, of_requests, batch.pool.shape().block_size, &groups);
            for (steps, weights) in steps.iter_mut().zip(weights) {
                for (step, weight) in steps.iter_mut().zip(weights) {
                    let offset = (-8.0 * self.options.attention * weight.log2() / 4.0).round() * 4.0;
                    *step += (offset as i32).clamp(-MOST_OFFSET, MOST_OFFSET);
                }
            }
        }
        Ok(steps)
    }
}

/// A column's stream, with what both sides must know before its numbers.
fn opened(plan: &Plan) -> Encoder {
    let mut encoder = Encoder::default();
    code_steps(&mut encoder, &plan.steps);
    code_references(&mut encoder, &plan.sources);
    encoder
}

/// The furthest that a token's step is from its column's, in eighths of an octave.
const MOST_OFFSET: i32 = 28;

/// What a token that nobody looks at weighs, of what is usual.
const LEAST_WEIGHT: f64 = 0.1;

/// Codes the steps of a column's tokens, or decodes them: the first, and whether all are equal; if not, differences in half octaves.
fn code_steps<C: Coder>(coder: &mut C, wish: &[i32]) -> Vec<i32> {
    let first = wish.first().copied().unwrap_or(0);
    let first = coder.bits(16, (first + (1 << 15)) as u32) as i32 - (1 << 15);
    let equal = wish.iter().all(|s| *s == first);
    if coder.bits(1, u32::from(equal)) == 1 {
        return vec![first; wish.len()];
    }
    let code = |s: &i32| first + (coder.bits(5, ((s - first) / 4 + 16) as u32) as i32 - 16) * 4;
    wish.iter().map(code).collect()
}

/// How much each token of each column is attended to, by the end of the prompts that have it: 1 is usual in the column's group.
fn weights(
    observed: &[super::evict::Observed],
    all: &[Column],
    of_requests: &[Vec<usize>],
    size: usize,
    groups: &[&str],
) -> Vec<Vec<f64>> {
    let mut sums: Vec<Vec<f64>> = all.iter().map(|c| vec![0.0; c.tokens]).collect();
    for (seen, own) in observed.iter().zip(of_requests) {
        let layers = seen.layers.len().max(1) as f64;
        let tokens = seen.layers.first().map_or(0, |l| l.window.len());
        let mut w = vec![0.0f64; tokens];
        for layer in &seen.layers {
            // The first token takes what no other does.
            let sum: f64 = layer.window.iter().skip(1).map(|x| f64::from(*x)).sum();
            for (w, x) in w.iter_mut().zip(&layer.window) {
                *w += f64::from(*x) / sum.max(1e-9) * tokens as f64 / layers;
            }
        }
        for (i, &column) in own.iter().enumerate() {
            for (t, sum) in sums[column].iter_mut().enumerate() {
                *sum += w.get(i * size + t).copied().unwrap_or(1.0) / all[column].readers as f64;
            }
        }
    }
    sums.iter_mut().flatten().for_each(|w| *w = (*w + LEAST_WEIGHT) / (1.0 + LEAST_WEIGHT));
    // The geometric mean is one in every group, so that the rate stays about where the step puts it.
    let mut logs: BTreeMap<&str, (f64, usize)> = BTreeMap::new();
    for (own, group) in sums.iter().zip(groups) {
        let sum = logs.entry(group).or_default();
        *sum = (sum.0 + own.iter().map(|w| w.ln()).sum::<f64>(), sum.1 + own.len());
    }
    for (own, group) in sums.iter_mut().zip(groups) {
        let (log, count) = logs[group];
        own.iter_mut().for_each(|w| *w /= (log / count.max(1) as f64).exp());
    }
    sums
}
