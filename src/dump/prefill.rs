//! `kvfuse dump`: prefill every request once and write its cache.

use super::manifest::{DataEntry, MANIFEST, Manifest, ModelEntry, RequestEntry, SCHEMA};
use super::shard::{DumpDtype, Shard, write_shard};
use crate::block::{BlockPool, BlockTable, Part, RequestCache, Storage};
use crate::error::{Error, Result};
use crate::lock::FolderLock;
use crate::model::kernels::instructions;
use crate::model::{Model, NUMERICS, Segment};
use crate::progress::{Progress, Unit};
use crate::task::{Draw, Filler, Request};
use crate::{files, interrupt, task};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::path::Path;

/// What to dump.
#[derive(Debug, Clone)]
pub struct DumpOptions {
    pub model: String,
    /// Which prompts; their seed decides about filler and tenants too.
    pub draw: Draw,
    /// Filler tokens in front of every other request (the second, the fourth ...).
    pub shift: usize,
    pub dtype: DumpDtype,
    /// Wrap every prompt in the model's chat template.
    pub chat: bool,
    /// Cut the middle out of prompts of more tokens.
    pub max_tokens: Option<usize>,
    /// In which order requests are dumped.
    pub sort: Sort,
    /// Arguments to record in the manifest.
    pub command: Vec<String>,
}

impl DumpOptions {
    /// What can be said before there is a model.
    pub fn check(&self) -> Result<()> {
        if self.shift > 0 && (self.chat || self.max_tokens.is_some()) {
            return Err(Error::argument("--shift goes with neither --chat nor --max-tokens"));
        }
        self.draw.check()
    }
}

/// The order of a dump's requests, which is the order in which a sweep puts them into batches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    /// As the data has them, or as they were drawn.
    #[default]
    None,
    /// By tokens, the shortest first.
    Length,
}

/// Tokens that a suggested `--max-tokens` leaves for the answer.
const ANSWER_ROOM: usize = 64;

/// Tokens a prefill block holds. Any size gives the same dump; this one keeps the last block small.
const BLOCK_SIZE: usize = 16;

/// Writes the dump into `folder`, going on where an earlier run of the same command stopped.
///
/// The tokens that all prompts share are prefilled once; then one request at a time is in memory.
pub fn dump(folder: &Path, options: &DumpOptions) -> Result<Manifest> {
    options.check()?;
    let model = Model::load(&options.model)?;
    // Before anything so long is made up.
    let context = model.decoder.context();
    for (name, tokens) in [("--length", options.draw.length.unwrap_or(0)), ("--shift", options.shift)] {
        if tokens >= context {
            return Err(Error::argument(format!(
                "{name} {tokens}: the model takes less than {context} tokens"
            )));
        }
    }
    let mut set = task::load(&options.draw, &|text| Ok(model.tokenizer.encode(text)?.len()))?;
    let _lock = FolderLock::take(folder)?;
    files::writable_folder(folder)?;
    let encode = |r: &Request| match options.chat {
        true => model.tokenizer.encode_chat(&r.prompt),
        false => model.tokenizer.encode_prompt(&r.prompt),
    };
    let mut prompts: Vec<Vec<u32>> = set.requests.iter().map(encode).collect::<Result<_>>()?;
    if let Some(most) = options.max_tokens {
        cut(&model, &mut set.requests, &mut prompts, most)?;
    }
    if options.sort == Sort::Length {
        let mut pairs: Vec<_> = set.requests.into_iter().zip(prompts).collect();
        pairs.sort_by_key(|(_, tokens)| tokens.len());
        (set.requests, prompts) = pairs.into_iter().unzip();
    }
    if options.shift > 0 {
        shift(&model, &mut set.requests, &mut prompts, options)?;
    }
    if let Some(i) = prompts.iter().position(|p| p.is_empty() || p.len() >= context) {
        let message = format!(
            "request {} has {} tokens; the model takes 1 to {context}, answer included: pass --max-tokens {} to cut the middle \
             out of longer prompts",
            set.requests[i].id,
            prompts[i].len(),
            context.saturating_sub(ANSWER_ROOM).max(2)
        );
        return Err(Error::argument(message));
    }
    let shared = shared_prefix(&prompts);
    let entries = set.requests.into_iter().zip(&prompts).enumerate();
    let mut manifest = Manifest {
        schema: SCHEMA,
        kvfuse_version: env!("CARGO_PKG_VERSION").to_owned(),
        numerics: NUMERICS,
        kernels: vec![instructions().to_owned()],
        command: options.command.clone(),
        model: ModelEntry {
            name: options.model.clone(),
            sha256: model.sha256.clone(),
            config: model.decoder.config().clone(),
        },
        data: DataEntry {
            name: options.draw.spec.clone(),
            sha256: set.sha256,
            template: set.template,
            shots: set.shots,
        },
        seed: options.draw.seed,
        dtype: options.dtype,
        shared_prefix_tokens: shared,
        // A chat answer ends where the model ends it.
        stop: set.stop.filter(|_| !options.chat),
        answer_tokens: set.answer_tokens,
        chat: options.chat,
        encoded: None,
        requests: entries
            .map(|(i, (request, tokens))| RequestEntry {
                bits: None,
                shard: format!("request-{i:05}.safetensors"),
                sha256: String::new(),
                tokens: tokens.len(),
                request,
            })
            .collect(),
    };
    if folder.join(MANIFEST).exists() {
        let there = Manifest::read_unfinished(folder)?;
        if !there.same_dump(&manifest) {
            return Err(Error::file(folder, "holds a different dump; choose another -o or delete it"));
        }
        manifest.kernels.extend(there.kernels);
        manifest.kernels.sort();
        manifest.kernels.dedup();
    } else {
        manifest.write(folder)?;
    }
    let sums = prefill_all(folder, &manifest, &model, &prompts)?;
    manifest.requests.iter_mut().zip(sums).for_each(|(request, sum)| request.sha256 = sum);
    manifest.write(folder)?;
    Ok(manifest)
}

/// Cuts the middle out of prompts of more than `most` tokens, as LongBench's authors do: instructions stand at both ends.
fn cut(model: &Model, requests: &mut [Request], prompts: &mut [Vec<u32>], most: usize) -> Result<()> {
    if most < 2 {
        return Err(Error::argument("--max-tokens must be at least 2"));
    }
    for (request, prompt) in requests.iter_mut().zip(prompts) {
        if prompt.len() <= most {
            continue;
        }
        request.cut_tokens = prompt.len() - most;
        prompt.drain(most.div_ceil(2)..most.div_ceil(2) + request.cut_tokens);
        request.prompt = model.tokenizer.decode(prompt)?;
    }
    Ok(())
}

/// Puts exactly `options.shift` filler tokens in front of every other prompt, so that equal text comes to stand at other
/// positions. A BOS token stays in front of all.
fn shift(
    model: &Model,
    requests: &mut [Request],
    prompts: &mut [Vec<u32>],
    options: &DumpOptions,
) -> Result<()> {
    let filler = Filler::load()?;
    let mut rng = ChaCha8Rng::seed_from_u64(options.draw.seed);
    let tokenizer = &model.tokenizer;
    let mut text = filler.sentence(&mut rng);
    let mut tokens = tokenizer.encode(&text)?;
    let end = tokenizer.continuation(&text, "\n\n")?;
    let wanted = options.shift.saturating_sub(end.len());
    while tokens.len() < wanted {
        text = format!("{text} {}", filler.sentence(&mut rng));
        tokens = tokenizer.encode(&text)?;
    }
    tokens.truncate(wanted);
    tokens.extend(&end[..end.len().min(options.shift)]);
    let text = tokenizer.decode(&tokens)?;
    for (request, prompt) in requests.iter_mut().zip(prompts).skip(1).step_by(2) {
        let lead = prompt.len() - tokenizer.encode(&request.prompt)?.len();
        let own = tokenizer.continuation(&text, &request.prompt)?;
        prompt.truncate(lead);
        prompt.extend(tokens.iter().chain(&own));
        request.prompt.insert_str(0, &text);
        request.shift_tokens = options.shift;
    }
    Ok(())
}

/// Writes all shards that are not there yet; returns the checksums of all.
fn prefill_all(
    folder: &Path,
    manifest: &Manifest,
    model: &Model,
    prompts: &[Vec<u32>],
) -> Result<Vec<String>> {
    let plan = manifest.plan()?;
    let there = |i: usize| finished(folder, manifest, i, &prompts[i], &plan);
    let mut sums: Vec<String> = (0..prompts.len()).map(|i| there(i).unwrap_or_default()).collect();
    let todo: Vec<usize> = (0..prompts.len()).filter(|&i| sums[i].is_empty()).collect();
    let label = format!("prefilling {}", manifest.model.name);
    let progress = Progress::new(label, prompts.len() as u64, Unit::Items("requests"));
    progress.set((prompts.len() - todo.len()) as u64);
    if todo.is_empty() {
        progress.finish();
        return Ok(sums);
    }
    let decoder = &model.decoder;
    let mut pool = BlockPool::new(decoder.block_shape(BLOCK_SIZE), Storage::F32);
    let mut prefix = decoder.new_cache();
    let common = &prompts[0][..manifest.shared_prefix_tokens];
    if !common.is_empty() {
        let fed = decoder.forward(&mut pool, &mut [Segment { cache: &mut prefix, tokens: common }], None);
        fed.map_err(|f| f.of(|_| &manifest.requests[0].request.id))?;
    }
    for i in todo {
        interrupt::check()?;
        let mut cache = prefix.fork(&mut pool);
        let own = &prompts[i][common.len()..];
        let fed = decoder.forward(&mut pool, &mut [Segment { cache: &mut cache, tokens: own }], None);
        fed.map_err(|f| f.of(|_| &manifest.requests[i].request.id))?;
        let layers = read_layers(&pool, &cache);
        let path = manifest.shard_path(folder, i);
        sums[i] = write_shard(&path, &prompts[i], &layers, decoder.config(), manifest.dtype, &plan)?;
        cache.release(&mut pool);
        progress.increment();
    }
    progress.finish();
    Ok(sums)
}

/// The checksum of a shard that is whole, holds this prompt and was written for this dump.
fn finished(folder: &Path, manifest: &Manifest, i: usize, tokens: &[u32], plan: &str) -> Option<String> {
    let shard = Shard::open(&manifest.shard_path(folder, i), &manifest.model.config).ok()?;
    (shard.tokens() == tokens && shard.plan().as_deref() == Some(plan)).then(|| shard.sha256())
}

/// Tokens all prompts begin with, but never a whole prompt: every request computes its own last token.
pub fn shared_prefix(prompts: &[Vec<u32>]) -> usize {
    let first = &prompts[0];
    let common = |p: &Vec<u32>| p.iter().zip(first).take_while(|(a, b)| a == b).count();
    let shortest = prompts.iter().map(|p| p.len() - 1).min().unwrap_or(0);
    prompts.iter().map(common).min().unwrap_or(0).min(shortest)
}

/// Keys and values of every layer, read back through the block tables.
fn read_layers(pool: &BlockPool, cache: &RequestCache) -> Vec<(Vec<f32>, Vec<f32>)> {
    let read = |table: &BlockTable| {
        let all = |part: Part| -> Vec<f32> {
            table.entries.iter().flat_map(|e| pool.numbers(e.block, part).into_owned()).collect()
        };
        (all(Part::Key), all(Part::Value))
    };
    cache.layers.iter().map(read).collect()
}
