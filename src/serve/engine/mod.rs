//! The engine: continuous batching over one pool of pages under a budget in bytes.
//!
//! A step admits waiting requests while pages are free, gives every running request its next token (or a chunk of its
//! prompt), stores what a chain of methods makes of the blocks that became full, and hands out the tokens. If pages run
//! out, cold columns of the prefix cache go first, then the request that came last is preempted and computed again later.

mod room;
mod settle;

use super::job::{Counts, Event, Finish, Job, Limits};
use super::policy::Policy;
use super::prefix::{NodeId, PrefixCache};
use crate::block::{BlockId, BlockPool, CodedPages, RequestCache, Storage};
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
}

impl<'m> Engine<'m> {
    pub fn new(model: &'m Model, limits: Limits, policy: Policy) -> Self {
        let mut pool = BlockPool::new(model.decoder.block_shape(limits.block_size), Storage::F16);
        pool.hold_coded(CodedPages::PackedByChannel);
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
        self.page_bytes() + self.prefix.coded_bytes()
    }

    /// Bytes of pages alone.
    pub fn page_bytes(&self) -> usize {
        self.pool.bytes()
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
        Ok(events)
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
