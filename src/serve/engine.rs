//! The engine: continuous batching over one pool of pages under a budget in bytes.
//!
//! A step admits waiting requests while pages are free, gives every running request its next token (or a chunk of its
//! prompt), stores what a chain of methods makes of the blocks that became full, and hands out the tokens. If pages run
//! out, cold columns of the prefix cache go first, then the request that came last is preempted and computed again later.

use super::fuse::{Candidate, candidates, fuse};
use super::job::{Counts, Event, Finish, Job, Limits};
use super::policy::Policy;
use super::prefix::{NewColumn, NodeId, PrefixCache};
use super::tier;
use crate::block::{BlockId, BlockPool, Entry, RequestCache, Storage};
use crate::codec::{CacheBatch, Codec, Memo};
use crate::error::Result;
use crate::model::{Model, Segment};
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

/// A request in the engine.
struct Sequence {
    job: Job,
    tenant: usize,
    /// Prompt and answer.
    tokens: Vec<u32>,
    cache: RequestCache,
    /// The columns of its first blocks, which it reads.
    columns: Vec<NodeId>,
    /// Full blocks that were fused and coded already.
    settled: usize,
    preempted: bool,
}

impl Sequence {
    /// Tokens that are not in the cache yet.
    fn due(&self) -> usize {
        self.tokens.len() - self.cache.tokens
    }

    /// Columns that it will open for these and its next token.
    fn columns_due(&self, size: usize) -> usize {
        (self.tokens.len() + 1).div_ceil(size) - self.cache.tokens.div_ceil(size)
    }
}

pub struct Engine<'m> {
    model: &'m Model,
    limits: Limits,
    policy: Policy,
    pool: BlockPool,
    prefix: PrefixCache,
    tenants: HashMap<String, usize>,
    waiting: VecDeque<Sequence>,
    /// In the order in which they were admitted.
    running: Vec<Sequence>,
    /// Events of jobs that ended outside of a step.
    ended: Vec<Event>,
    counts: Counts,
    /// What the pool had freed when memory was last given back.
    given_back: u64,
}

/// Coded columns up to this part of the budget do not make way for one more request while others run: a column of pages takes the room of
/// some thirty coded ones.
const KEPT_SHARE: usize = 4;
/// Freed bytes in the pool after which its memory goes back to the system.
const GIVE_BACK: u64 = 4 << 20;

impl<'m> Engine<'m> {
    pub fn new(model: &'m Model, limits: Limits, policy: Policy) -> Self {
        let mut pool = BlockPool::new(model.decoder.block_shape(limits.block_size), Storage::F16);
        pool.pack_coded(true);
        Engine {
            model,
            limits,
            policy,
            pool,
            prefix: PrefixCache::default(),
            tenants: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            ended: Vec::new(),
            counts: Counts::default(),
            given_back: 0,
        }
    }

    /// Takes a request in; it runs when there is room.
    pub fn submit(&mut self, job: Job) {
        let known = self.tenants.len();
        let tenant = *self.tenants.entry(job.tenant.clone()).or_insert(known);
        self.waiting.push_back(Sequence {
            tokens: job.prompt.clone(),
            tenant,
            job,
            cache: self.model.decoder.new_cache(),
            columns: Vec::new(),
            settled: 0,
            preempted: false,
        });
    }

    /// Calls a request off; its pages are free at once.
    pub fn abort(&mut self, id: u64) {
        if let Some(i) = self.running.iter().position(|s| s.job.id == id) {
            let mut sequence = self.running.remove(i);
            self.release(&mut sequence);
        } else if let Some(i) = self.waiting.iter().position(|s| s.job.id == id) {
            self.waiting.remove(i);
        } else {
            return;
        }
        self.ended.push(Event { id, token: None, finish: Some(Finish::Aborted), logits: None });
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.ended.is_empty()
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes of pages and of encoded columns.
    pub fn bytes(&self) -> usize {
        self.pool.bytes() + self.prefix.coded_bytes()
    }

    /// Pages alive.
    pub fn pages(&self) -> usize {
        self.pool.live_blocks()
    }

    /// Bytes of a full block of all layers in f16.
    fn column_bytes(&self) -> usize {
        self.model.decoder.column_bytes(self.limits.block_size)
    }

    /// Gives back all that nobody reads.
    pub fn forget(&mut self) {
        while let Some(id) = self.prefix.coldest() {
            self.prefix.drop_column(&mut self.pool, id);
        }
        if self.running.is_empty() {
            self.prefix.clear(&mut self.pool);
        }
    }

    /// One step.
    ///
    /// # Errors
    /// Keys, values or logits that are no numbers; codecs that fail.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        self.admit()?;
        let plan = self.plan()?;
        let mut events = std::mem::take(&mut self.ended);
        if plan.iter().any(|n| *n > 0) {
            self.counts.steps += 1;
            events.extend(self.forward(&plan)?);
        }
        if self.pool.freed_bytes() - self.given_back >= GIVE_BACK {
            self.pool.give_back();
            self.given_back = self.pool.freed_bytes();
        }
        Ok(events)
    }

    /// Moves waiting requests to the running ones while their prompts fit into memory and begin in this step: one that waits
    /// may find more of its prefix computed.
    fn admit(&mut self) -> Result<()> {
        let mut due: usize = self.running.iter().map(Sequence::due).sum();
        while self.running.len() < self.limits.running && due < self.limits.step_tokens {
            let Some(mut sequence) = self.waiting.pop_front() else { break };
            let size = self.limits.block_size;
            // The last token is always computed: its logits are wanted.
            let whole = (sequence.tokens.len() - 1) / size;
            let found = match self.policy.prefix {
                true => self.prefix.find(sequence.tenant, &sequence.tokens, size, whole),
                false => Vec::new(),
            };
            found.iter().for_each(|&id| self.prefix.take(id));
            let columns = sequence.columns_due(size);
            let coded = found.iter().filter(|id| self.prefix.is_coded(**id)).count();
            let needed = (columns - found.len() + coded) * self.column_bytes();
            if columns * self.column_bytes() > self.limits.budget_bytes {
                found.iter().for_each(|&id| self.prefix.give(id));
                let finish = Some(Finish::TooLarge);
                self.ended.push(Event { id: sequence.job.id, token: None, finish, logits: None });
                continue;
            }
            // Room is left for the prompts of those that run, and for their next tokens.
            let spare: usize = self.running.iter().map(|s| s.columns_due(size)).sum();
            // One more request is not worth what many others would have to compute again.
            let kept = if self.running.is_empty() { 0 } else { self.limits.budget_bytes / KEPT_SHARE };
            if !self.make_room(needed + spare * self.column_bytes(), kept)? {
                found.iter().for_each(|&id| self.prefix.give(id));
                self.waiting.push_front(sequence);
                if self.running.is_empty() && self.prefix.columns() > 0 {
                    // It fits by itself: what it found is coded and takes the room that it needs.
                    self.prefix.clear(&mut self.pool);
                    continue;
                }
                break;
            }
            self.decode(&found)?;
            for &id in &found {
                let Some(entries) = self.prefix.node(id).and_then(|n| n.pages.as_ref()) else { continue };
                for (table, entry) in sequence.cache.layers.iter_mut().zip(entries) {
                    self.pool.retain(entry.block);
                    table.entries.push(*entry);
                }
            }
            sequence.cache.tokens = found.len() * size;
            sequence.settled = found.len();
            let (queries, hits) = (sequence.tokens.len() as u64, (found.len() * size) as u64);
            self.counts.decoded_tokens += (coded * size) as u64;
            if sequence.preempted {
                self.counts.preempted_queries += queries;
                self.counts.preempted_hits += hits;
            } else {
                self.counts.prefix_queries += queries;
                self.counts.prefix_hits += hits;
            }
            found.iter().for_each(|&id| self.prefix.want(id));
            // Only a second tier asks what comes back.
            if self.policy.tier.is_some() && !sequence.preempted {
                self.prefix.asked(sequence.tenant, &sequence.tokens, size, whole);
            }
            sequence.columns = found;
            due += sequence.due();
            self.running.push(sequence);
        }
        Ok(())
    }

    /// Makes pages of the coded ones among a request's columns.
    fn decode(&mut self, columns: &[NodeId]) -> Result<()> {
        let Some(tier) = &self.policy.tier else { return Ok(()) };
        let started = Instant::now();
        // Columns with pages stand before those without.
        let run: Vec<NodeId> = columns.iter().copied().filter(|id| self.prefix.is_coded(*id)).collect();
        if !run.is_empty() {
            tier::decode(&**tier, self.model, &mut self.pool, &mut self.prefix, &run)?;
            self.counts.decode_seconds += started.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// Frees what is cold until so many bytes are free; whether they are. Coded columns go last, down to `kept` bytes of them.
    fn make_room(&mut self, bytes: usize, kept: usize) -> Result<bool> {
        while self.bytes() + bytes > self.limits.budget_bytes {
            let coldest = self.prefix.coldest();
            if let Some(id) = coldest {
                self.keep_coded(id)?;
            }
            let coded = || self.prefix.coldest_coded().filter(|_| self.prefix.coded_bytes() > kept);
            let Some(id) = coldest.or_else(coded) else { return Ok(false) };
            let known = self.prefix.columns();
            self.prefix.free(&mut self.pool, id);
            self.counts.dropped_columns += (known - self.prefix.columns()) as u64;
        }
        Ok(true)
    }

    /// Codes a cold column, and those before it that will go next, if the chain has a second tier.
    fn keep_coded(&mut self, id: NodeId) -> Result<()> {
        let Some(tier) = &self.policy.tier else { return Ok(()) };
        let run = self.prefix.cold_run(id);
        if !run.is_empty() {
            let started = Instant::now();
            tier::encode(&**tier, self.model, &self.pool, &mut self.prefix, &run)?;
            self.counts.encode_seconds += started.elapsed().as_secs_f64();
            self.counts.encoded_columns += run.len() as u64;
        }
        Ok(())
    }

    /// Tokens that every running request is given in this step. Preempts if pages run out.
    fn plan(&mut self) -> Result<Vec<usize>> {
        loop {
            let mut left = self.limits.step_tokens.max(self.running.len());
            let mut plan = vec![0; self.running.len()];
            // Those that decode come first; prompts share what is left.
            for (n, sequence) in plan.iter_mut().zip(&self.running) {
                if sequence.due() == 1 {
                    *n = 1;
                    left -= 1;
                }
            }
            for (n, sequence) in plan.iter_mut().zip(&self.running).filter(|(n, _)| **n == 0) {
                *n = sequence.due().min(left);
                left -= *n;
            }
            let size = self.limits.block_size;
            let opened = |(n, s): (&usize, &Sequence)| {
                (s.cache.tokens + n).div_ceil(size) - s.cache.tokens.div_ceil(size)
            };
            let columns: usize = plan.iter().zip(&self.running).map(opened).sum();
            if self.make_room(columns * self.column_bytes(), 0)? {
                return Ok(plan);
            }
            if self.prefix.forget_payloads() {
                continue;
            }
            // Who came last waits again.
            let Some(mut last) = self.running.pop() else { return Ok(Vec::new()) };
            let alone = self.running.is_empty();
            let id = last.job.id;
            last.columns.iter().for_each(|&id| self.prefix.want(id));
            self.release(&mut last);
            if alone {
                let finish = Some(Finish::TooLarge);
                self.ended.push(Event { id, token: None, finish, logits: None });
            } else {
                self.counts.preemptions += 1;
                last.preempted = true;
                self.waiting.push_front(last);
            }
        }
    }

    /// Runs the planned tokens and takes the next ones.
    fn forward(&mut self, plan: &[usize]) -> Result<Vec<Event>> {
        let started = Instant::now();
        let decoder = &self.model.decoder;
        let mut segments: Vec<Segment> = self
            .running
            .iter_mut()
            .zip(plan)
            .filter(|(_, n)| **n > 0)
            .map(|(s, n)| {
                let from = s.cache.tokens;
                Segment { cache: &mut s.cache, tokens: &s.tokens[from..from + n] }
            })
            .collect();
        let run: Vec<usize> = (0..plan.len()).filter(|&i| plan[i] > 0).collect();
        let ran = decoder.forward(&mut self.pool, &mut segments, None);
        let hidden = ran.map_err(|fault| {
            let id = self.running[run[fault.segment]].job.id.to_string();
            fault.of(|_| &id)
        })?;
        // The last row of every request that has no tokens left.
        let width = decoder.config().hidden;
        let (mut row, mut rows, mut ready) = (0, Vec::new(), Vec::new());
        for &i in &run {
            row += plan[i];
            let sequence = &self.running[i];
            let decodes = plan[i] == 1 && sequence.tokens.len() > sequence.job.prompt.len();
            *(if decodes { &mut self.counts.decode_tokens } else { &mut self.counts.prefill_tokens }) +=
                plan[i] as u64;
            if sequence.due() == 0 {
                rows.extend_from_slice(&hidden[(row - 1) * width..row * width]);
                ready.push(i);
            }
        }
        let logits = decoder.logits(&rows);
        self.counts.forward_seconds += started.elapsed().as_secs_f64();
        for i in 0..self.running.len() {
            self.settle(i)?;
        }
        let vocab = decoder.config().vocab;
        let mut events = Vec::new();
        let mut finished = Vec::new();
        for (&i, logits) in ready.iter().zip(logits.chunks_exact(vocab)) {
            let event = self.sample(i, logits)?;
            if event.finish.is_some() {
                finished.push(i);
            }
            events.push(event);
        }
        for i in finished.into_iter().rev() {
            let mut sequence = self.running.remove(i);
            self.release(&mut sequence);
        }
        Ok(events)
    }

    /// Takes the next token of a request.
    fn sample(&mut self, i: usize, logits: &[f32]) -> Result<Event> {
        let Sequence { job, tokens, .. } = &mut self.running[i];
        let (prompt, answer) = tokens.split_at(job.prompt.len());
        let token = self.model.generation.next(logits, prompt, answer);
        let kept = (answer.len() < job.keep_logits).then(|| logits.to_vec());
        let ends = self.model.tokenizer.is_end(token) && !job.ignore_end;
        if ends {
            return Ok(Event { id: job.id, token: None, finish: Some(Finish::Stop), logits: kept });
        }
        tokens.push(token);
        let answer = &tokens[job.prompt.len()..];
        let stopped = !job.stop.is_empty() && {
            let text = self.model.tokenizer.decode(answer)?;
            job.stop.iter().any(|stop| text.contains(stop))
        };
        let full = answer.len() >= job.max_tokens || tokens.len() >= self.model.decoder.context();
        let finish = match (stopped, full) {
            (true, _) => Some(Finish::Stop),
            (_, true) => Some(Finish::Length),
            _ => None,
        };
        Ok(Event { id: job.id, token: Some(token), finish, logits: kept })
    }

    /// Fuses, codes and makes known the blocks of a running request that became full.
    fn settle(&mut self, i: usize) -> Result<()> {
        let size = self.limits.block_size;
        let sequence = &mut self.running[i];
        let full = sequence.cache.tokens / size;
        if full == sequence.settled {
            return Ok(());
        }
        let new = sequence.settled..full;
        sequence.settled = full;
        if let Some(fusion) = &self.policy.fusion {
            let started = Instant::now();
            let known = self.known(i);
            let cache = &mut self.running[i].cache;
            self.counts.fused_pages += fuse(fusion, &mut self.pool, cache, new.clone(), &known) as u64;
            self.counts.fuse_seconds += started.elapsed().as_secs_f64();
        }
        if let Some(code) = self.policy.code.clone() {
            let started = Instant::now();
            self.code(&*code, i)?;
            self.counts.code_seconds += started.elapsed().as_secs_f64();
        }
        if self.policy.prefix {
            for block in new {
                let sequence = &mut self.running[i];
                let own = NewColumn {
                    tenant: sequence.tenant,
                    parent: sequence.columns.last().copied(),
                    tokens: &sequence.tokens[block * size..(block + 1) * size],
                    block,
                    entries: column(&sequence.cache, block),
                };
                let id = self.prefix.add(&mut self.pool, own);
                sequence.columns.push(id);
                self.adopt(i, block, id);
            }
        }
        Ok(())
    }

    /// The pages that a running request's blocks may be read from, by layer: those of its tenant.
    fn known(&self, i: usize) -> Vec<Vec<Candidate>> {
        let (tenant, layers) = (self.running[i].tenant, self.model.decoder.config().layers);
        if self.policy.prefix {
            let there = self.prefix.paged().filter(|(n, _)| n.tenant == tenant);
            return candidates(there.map(|(n, e)| (n.block, e)), layers);
        }
        // Without a prefix cache, what runs is all there is.
        let others = self.running.iter().enumerate().filter(|(j, s)| *j != i && s.tenant == tenant);
        let columns: Vec<(usize, Vec<Entry>)> =
            others.flat_map(|(_, s)| (0..s.settled).map(move |b| (b, column(&s.cache, b)))).collect();
        candidates(columns.iter().map(|(b, e)| (*b, &e[..])), layers)
    }

    /// Reads a block from the column that was there already, where two requests computed the same one at once.
    fn adopt(&mut self, i: usize, block: usize, id: NodeId) {
        let Some(entries) = self.prefix.node(id).and_then(|n| n.pages.as_ref()) else { return };
        for (table, entry) in self.running[i].cache.layers.iter_mut().zip(entries) {
            if table.entries[block].block != entry.block {
                table.replace(&mut self.pool, block, *entry);
            }
        }
    }

    /// Puts the full pages of a request into fewer bits, as far as its codec codes them.
    fn code(&mut self, codec: &dyn Codec, i: usize) -> Result<()> {
        let sequence = &mut self.running[i];
        let mut batch = lend(self.model, &mut self.pool);
        let cache = std::mem::replace(&mut sequence.cache, RequestCache::new(0));
        let tokens = sequence.tokens[..cache.tokens].to_vec();
        batch.push(cache, tokens, "");
        let coded = codec.encode(&mut batch, &Memo::default());
        self.pool = batch.pool;
        if let Some(cache) = batch.caches.pop() {
            sequence.cache = cache;
        }
        coded
    }

    fn release(&mut self, sequence: &mut Sequence) {
        sequence.columns.drain(..).for_each(|id| self.prefix.give(id));
        let empty = self.model.decoder.new_cache();
        std::mem::replace(&mut sequence.cache, empty).release(&mut self.pool);
        sequence.settled = 0;
    }

    /// Whether every page's references are those of tables and columns, and no page is in two tenants' tables; for tests.
    pub fn check(&self) -> std::result::Result<(), String> {
        let mut references: HashMap<BlockId, (u32, usize)> = HashMap::new();
        let tables = self
            .running
            .iter()
            .flat_map(|s| s.cache.layers.iter().flat_map(|t| &t.entries).map(move |e| (s.tenant, e.block)));
        let columns = self.prefix.paged().flat_map(|(n, e)| e.iter().map(move |e| (n.tenant, e.block)));
        for (tenant, block) in tables.chain(columns) {
            let (count, owner) = references.entry(block).or_insert((0, tenant));
            *count += 1;
            if *owner != tenant {
                return Err(format!("{block:?} is read by two tenants"));
            }
        }
        for page in self.pool.pages() {
            let counted = references.get(&page).map_or(0, |r| r.0);
            if counted != self.pool.references(page) {
                let held = self.pool.references(page);
                return Err(format!("{page:?} has {held} references, {counted} entries point at it"));
            }
        }
        if references.len() != self.pool.live_blocks() {
            return Err(format!("{} pages are read, {} live", references.len(), self.pool.live_blocks()));
        }
        Ok(())
    }
}

/// A block of all layers.
fn column(cache: &RequestCache, block: usize) -> Vec<Entry> {
    cache.layers.iter().map(|t| t.entries[block]).collect()
}

/// The pool in a batch without requests, for a codec.
fn lend(model: &Model, pool: &mut BlockPool) -> CacheBatch {
    let mut batch = CacheBatch::empty(pool.shape(), Storage::F16, model.decoder.ropes());
    std::mem::swap(&mut batch.pool, pool);
    batch
}
