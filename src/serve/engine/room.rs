//! Who gets room: admission, columns of the prefix cache that make way, preemption.

use super::{Engine, Sequence};
use crate::error::Result;
use crate::serve::job::{Event, Finish};
use crate::serve::prefix::NodeId;
use crate::serve::tier;
use std::time::Instant;

/// Coded columns up to this part of the budget do not make way for one more request while others run: a column of pages takes the room of
/// some thirty coded ones.
const KEPT_SHARE: usize = 4;

impl Engine<'_> {
    /// Moves waiting requests to the running ones while their prompts fit into memory and begin in this step: one that waits
    /// may find more of its prefix computed.
    pub(super) fn admit(&mut self) -> Result<()> {
        let mut due: usize = self.running.iter().map(Sequence::due).sum();
        while self.running.len() < self.limits.running && due < self.limits.step_tokens {
            let Some(sequence) = self.waiting.pop_front() else { break };
            let columns = sequence.columns_due(self.limits.block_size);
            if columns * self.column_bytes() > self.limits.budget_bytes {
                self.refuse(&sequence);
                continue;
            }
            let found = self.find(&sequence);
            found.iter().for_each(|&id| self.prefix.take(id));
            if self.make_room_for(columns, &found)? {
                due += self.start(sequence, found)?;
                continue;
            }
            found.iter().for_each(|&id| self.prefix.give(id));
            self.waiting.push_front(sequence);
            if !self.running.is_empty() || self.prefix.columns() == 0 {
                break;
            }
            // It fits by itself: what it found is coded and takes the room that it needs.
            self.prefix.clear(&mut self.pool);
        }
        Ok(())
    }

    /// A request that no budget of this size can hold.
    fn refuse(&mut self, sequence: &Sequence) {
        let finish = Some(Finish::TooLarge);
        self.ended.push(Event { id: sequence.job.id, token: None, finish, logits: None });
    }

    /// Whole blocks of a request that are there. The last token is always computed: its logits are wanted.
    fn whole_blocks(&self, sequence: &Sequence) -> usize {
        (sequence.tokens.len() - 1) / self.limits.block_size
    }

    /// The columns of the prefix cache that a request begins with.
    fn find(&self, sequence: &Sequence) -> Vec<NodeId> {
        let whole = self.whole_blocks(sequence);
        match self.policy.prefix {
            true => self.prefix.find(sequence.tenant, &sequence.tokens, self.limits.block_size, whole),
            false => Vec::new(),
        }
    }

    /// Whether there is room for a request of so many columns, of which some were found, beside those that run.
    fn make_room_for(&mut self, columns: usize, found: &[NodeId]) -> Result<bool> {
        let coded = found.iter().filter(|id| self.prefix.is_coded(**id)).count();
        let needed = columns - found.len() + coded;
        // Room is left for the prompts of those that run, and for their next tokens.
        let spare: usize = self.running.iter().map(|s| s.columns_due(self.limits.block_size)).sum();
        // One more request is not worth what many others would have to compute again.
        let kept = if self.running.is_empty() { 0 } else { self.limits.budget_bytes / KEPT_SHARE };
        self.make_room((needed + spare) * self.column_bytes(), kept)
    }

    /// Lets a request run from the columns that were found; returns the tokens that are due.
    fn start(&mut self, mut sequence: Sequence, found: Vec<NodeId>) -> Result<usize> {
        let size = self.limits.block_size;
        self.counts.decoded_tokens += (self.decode(&found)? * size) as u64;
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
            self.prefix.asked(sequence.tenant, &sequence.tokens, size, self.whole_blocks(&sequence));
        }
        sequence.columns = found;
        let due = sequence.due();
        self.running.push(sequence);
        Ok(due)
    }

    /// Makes pages of the coded ones among a request's columns; returns how many.
    fn decode(&mut self, columns: &[NodeId]) -> Result<usize> {
        let Some(tier) = &self.policy.tier else { return Ok(0) };
        let started = Instant::now();
        // Columns with pages stand before those without.
        let run: Vec<NodeId> = columns.iter().copied().filter(|id| self.prefix.is_coded(*id)).collect();
        if !run.is_empty() {
            tier::decode(&**tier, self.model, &mut self.pool, &mut self.prefix, &run)?;
            self.counts.decode_seconds += started.elapsed().as_secs_f64();
            if let Some(code) = self.policy.code.clone() {
                let started = Instant::now();
                self.code_columns(&*code, &run)?;
                self.counts.code_seconds += started.elapsed().as_secs_f64();
            }
        }
        Ok(run.len())
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
    pub(super) fn plan(&mut self) -> Result<Vec<usize>> {
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
            last.columns.iter().for_each(|&id| self.prefix.want(id));
            self.release(&mut last);
            if self.running.is_empty() {
                self.refuse(&last);
            } else {
                self.counts.preemptions += 1;
                last.preempted = true;
                self.waiting.push_front(last);
            }
        }
    }
}
