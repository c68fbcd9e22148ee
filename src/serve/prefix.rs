//! The prefix cache: a tree of full blocks by what their tokens are and what stands before them, one tree a tenant.
//!
//! A node is a *column*: one block of tokens in all layers. What nobody uses goes when room is needed, least recently used
//! first, leaves before what they stand on. A column that goes may leave its encoded form behind (the second tier).

use super::returns::{Chain, Returns, chain};
use crate::block::{BlockPool, Entry, Payload};
use std::collections::HashMap;

/// Name of a column; never given out twice.
pub type NodeId = u64;

#[derive(Debug)]
pub struct Node {
    /// Its pages, layer by layer, if it has any; the tree holds a reference to each.
    pub pages: Option<Vec<Entry>>,
    /// What a codec made of its pages, layer by layer. Kept while there are pages too: so a column is coded once.
    pub coded: Option<Vec<Payload>>,
    pub tokens: Box<[u32]>,
    /// Blocks before it.
    pub block: usize,
    pub tenant: usize,
    chain: Chain,
    parent: Option<NodeId>,
    /// Columns that stand on it, and how many of these have pages.
    children: usize,
    paged_children: usize,
    /// Running requests that read it.
    users: usize,
    used: u64,
    /// Whether it was, or will be, read by more than the request that made it: it is worth coding.
    wanted: bool,
}

impl Node {
    /// Whether its pages can go: nobody reads them, nor those of columns that stand on it.
    fn is_cold(&self) -> bool {
        self.users == 0 && self.paged_children == 0 && self.pages.is_some()
    }
}

/// A tenant and what stands before, then the block's tokens.
type Key = (usize, Option<NodeId>, Box<[u32]>);

#[derive(Debug, Default)]
pub struct PrefixCache {
    nodes: HashMap<NodeId, Node>,
    by_tokens: HashMap<Key, NodeId>,
    next: NodeId,
    clock: u64,
    coded_bytes: usize,
    returns: Returns,
}

impl PrefixCache {
    /// The columns that are there of a request's first `blocks` blocks.
    pub fn find(&self, tenant: usize, tokens: &[u32], size: usize, blocks: usize) -> Vec<NodeId> {
        let mut found = Vec::new();
        let mut parent = None;
        for own in tokens.chunks_exact(size).take(blocks) {
            let key = (tenant, parent, own.into());
            let Some(&node) = self.by_tokens.get(&key) else { break };
            found.push(node);
            parent = Some(node);
        }
        found
    }

    /// A request asks for its first `blocks` blocks, whether they are there or not.
    pub fn asked(&mut self, tenant: usize, tokens: &[u32], size: usize, blocks: usize) {
        let mut before = None;
        for own in tokens.chunks_exact(size).take(blocks) {
            let own = chain(tenant, before, own);
            self.returns.asked(own);
            before = Some(own);
        }
    }

    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// Columns with pages.
    pub fn paged(&self) -> impl Iterator<Item = (&Node, &[Entry])> {
        self.nodes.values().filter_map(|n| Some((n, n.pages.as_deref()?)))
    }

    pub fn columns(&self) -> usize {
        self.nodes.len()
    }

    /// Bytes of coded columns.
    pub fn coded_bytes(&self) -> usize {
        self.coded_bytes
    }

    /// Whether a column must be decoded before it can be read.
    pub fn is_coded(&self, id: NodeId) -> bool {
        self.nodes.get(&id).is_some_and(|n| n.pages.is_none())
    }

    /// A request begins to read a column.
    pub fn take(&mut self, id: NodeId) {
        self.clock += 1;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.users += 1;
            node.used = self.clock;
        }
    }

    /// A request found it, or will come back to it.
    pub fn want(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.wanted = true;
        }
    }

    /// A request reads it no more.
    pub fn give(&mut self, id: NodeId) {
        self.clock += 1;
        if let Some(node) = self.nodes.get_mut(&id) {
            node.users -= 1;
            node.used = self.clock;
        }
    }

    /// Adds a request's block, which the request is taken to read; if it is known already, the known one.
    pub fn add(&mut self, pool: &mut BlockPool, own: NewColumn) -> NodeId {
        let key = (own.tenant, own.parent, own.tokens.into());
        let id = match self.by_tokens.get(&key) {
            Some(&id) => id,
            None => {
                let before = own.parent.and_then(|p| self.nodes.get(&p)).map(|p| p.chain);
                let id = self.next;
                self.next += 1;
                let node = Node {
                    pages: None,
                    coded: None,
                    tokens: own.tokens.into(),
                    block: own.block,
                    tenant: own.tenant,
                    chain: chain(own.tenant, before, own.tokens),
                    parent: own.parent,
                    children: 0,
                    paged_children: 0,
                    users: 0,
                    used: 0,
                    wanted: false,
                };
                self.nodes.insert(id, node);
                self.by_tokens.insert(key, id);
                if let Some(parent) = own.parent.and_then(|p| self.nodes.get_mut(&p)) {
                    parent.children += 1;
                }
                id
            }
        };
        if self.is_coded(id) {
            own.entries.iter().for_each(|e| pool.retain(e.block));
            self.set_pages(id, own.entries);
        }
        self.take(id);
        id
    }

    /// Gives a column pages; the tree owns the references to them from now on.
    pub fn set_pages(&mut self, id: NodeId, entries: Vec<Entry>) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        node.pages = Some(entries);
        if let Some(parent) = node.parent.and_then(|p| self.nodes.get_mut(&p)) {
            parent.paged_children += 1;
        }
    }

    /// Keeps what a codec made of a column.
    pub fn set_coded(&mut self, id: NodeId, payloads: Vec<Payload>) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        self.coded_bytes += bytes_of(&payloads);
        node.coded = Some(payloads);
    }

    /// Lets go of what columns with pages are coded as; whether there was any.
    pub fn forget_payloads(&mut self) -> bool {
        let before = self.coded_bytes;
        for node in self.nodes.values_mut().filter(|n| n.pages.is_some()) {
            self.coded_bytes -= node.coded.take().as_deref().map_or(0, bytes_of);
        }
        self.coded_bytes < before
    }

    /// Lets go of a cold column: of its pages if it is coded, of all if it is not or has none.
    pub fn free(&mut self, pool: &mut BlockPool, id: NodeId) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if node.pages.is_some() {
            self.returns.went(node.chain);
        }
        if node.coded.is_none() || node.pages.is_none() {
            self.drop_column(pool, id);
            return;
        }
        let (pages, parent) = (node.pages.take(), node.parent);
        release(pool, pages);
        if let Some(parent) = parent.and_then(|p| self.nodes.get_mut(&p)) {
            parent.paged_children -= 1;
        }
    }

    /// The least recently used column with pages that nobody reads and no other with pages stands on.
    pub fn coldest(&self) -> Option<NodeId> {
        self.oldest(Node::is_cold)
    }

    /// The least recently used coded column that nothing stands on.
    pub fn coldest_coded(&self) -> Option<NodeId> {
        self.oldest(|n| n.users == 0 && n.children == 0 && n.pages.is_none())
    }

    fn oldest(&self, free: impl Fn(&Node) -> bool) -> Option<NodeId> {
        self.nodes.iter().filter(|n| free(n.1)).min_by_key(|n| n.1.used).map(|n| *n.0)
    }

    /// A cold column and those before it that nobody reads and nothing else stands on, as far as they are worth coding (a second
    /// request has found them, or enough of those that went came back) and not coded; first things first.
    pub fn cold_run(&self, id: NodeId) -> Vec<NodeId> {
        let pays = self.returns.pays();
        let mut run = Vec::new();
        let mut at = Some(id);
        while let Some((id, node)) = at.and_then(|id| Some((id, self.nodes.get(&id)?))) {
            let alone = run.is_empty() || node.children == 1;
            if node.users > 0
                || !alone
                || !(node.wanted || pays)
                || node.coded.is_some()
                || node.pages.is_none()
            {
                break;
            }
            run.push(id);
            at = node.parent;
        }
        run.reverse();
        run
    }

    /// Forgets a column and all coded ones that stand on it.
    pub fn drop_column(&mut self, pool: &mut BlockPool, id: NodeId) {
        let standing: Vec<NodeId> = match self.nodes.get(&id) {
            Some(node) if node.children > 0 => {
                self.nodes.iter().filter(|n| n.1.parent == Some(id)).map(|n| *n.0).collect()
            }
            _ => Vec::new(),
        };
        standing.into_iter().for_each(|child| self.drop_column(pool, child));
        let Some(node) = self.nodes.remove(&id) else { return };
        self.by_tokens.remove(&(node.tenant, node.parent, node.tokens));
        if let Some(parent) = node.parent.and_then(|p| self.nodes.get_mut(&p)) {
            parent.children -= 1;
            parent.paged_children -= usize::from(node.pages.is_some());
        }
        self.coded_bytes -= node.coded.as_deref().map_or(0, bytes_of);
        release(pool, node.pages);
    }

    /// Forgets all.
    pub fn clear(&mut self, pool: &mut BlockPool) {
        for (_, node) in self.nodes.drain() {
            release(pool, node.pages);
        }
        self.by_tokens.clear();
        self.coded_bytes = 0;
    }
}

/// A block of a request that has just become full.
pub struct NewColumn<'a> {
    pub tenant: usize,
    pub parent: Option<NodeId>,
    pub tokens: &'a [u32],
    pub block: usize,
    pub entries: Vec<Entry>,
}

/// What a column is coded as takes.
pub fn bytes_of(payloads: &[Payload]) -> usize {
    payloads.iter().map(|p| p.bytes.len()).sum()
}

fn release(pool: &mut BlockPool, pages: Option<Vec<Entry>>) {
    pages.iter().flatten().for_each(|e| pool.release(e.block));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockId, BlockShape, RequestCache, Storage};
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const SIZE: usize = 2;
    const LAYERS: usize = 2;

    /// A request that grows token by token.
    struct Reader {
        tenant: usize,
        tokens: Vec<u32>,
        cache: RequestCache,
        columns: Vec<NodeId>,
    }

    struct World {
        pool: BlockPool,
        prefix: PrefixCache,
        readers: Vec<Reader>,
        rng: ChaCha8Rng,
    }

    /// What a page of a tenant's block with these tokens before it holds.
    fn number(tenant: usize, tokens: &[u32]) -> f32 {
        tokens.iter().fold(tenant as f32 + 1.0, |n, t| (2.0 * n + *t as f32) % 1021.0)
    }

    impl World {
        fn columns(&self, entries: &RequestCache, block: usize) -> Vec<Entry> {
            entries.layers.iter().map(|t| t.entries[block]).collect()
        }

        fn pages(&mut self, n: f32) -> Vec<Entry> {
            (0..LAYERS).map(|_| Entry::plain(self.pool.allocate(&[n; SIZE], &[n; SIZE]))).collect()
        }

        /// Begins with a random prompt, of which what is there is taken.
        fn start(&mut self) {
            let tenant = self.rng.random_range(0..3);
            let length = self.rng.random_range(1..10);
            let prompt: Vec<u32> = (0..length).map(|_| self.rng.random_range(0..2)).collect();
            let found = self.prefix.find(tenant, &prompt, SIZE, (prompt.len() - 1) / SIZE);
            found.iter().for_each(|id| self.prefix.take(*id));
            let mut cache = RequestCache::new(LAYERS);
            for (block, &id) in found.iter().enumerate() {
                if self.prefix.is_coded(id) {
                    let entries = self.pages(number(tenant, &prompt[..(block + 1) * SIZE]));
                    self.prefix.set_pages(id, entries);
                }
                let entries = self.prefix.node(id).and_then(|n| n.pages.as_ref()).unwrap();
                for (table, entry) in cache.layers.iter_mut().zip(entries) {
                    self.pool.retain(entry.block);
                    table.entries.push(*entry);
                }
            }
            let tokens = prompt[..found.len() * SIZE].to_vec();
            cache.tokens = tokens.len();
            self.readers.push(Reader { tenant, tokens, cache, columns: found });
        }

        fn extend(&mut self, i: usize) {
            let token = self.rng.random_range(0..2);
            let reader = &mut self.readers[i];
            reader.tokens.push(token);
            // A block's numbers follow from the tokens up to its end: only then are they known.
            for table in &mut reader.cache.layers {
                table.append(&mut self.pool, &[0.0], &[0.0]);
            }
            reader.cache.tokens += 1;
            if !reader.tokens.len().is_multiple_of(SIZE) {
                return;
            }
            let block = reader.tokens.len() / SIZE - 1;
            let (tenant, n) = (reader.tenant, number(reader.tenant, &reader.tokens));
            let own = self.pages(n);
            let reader = &mut self.readers[i];
            for (table, entry) in reader.cache.layers.iter_mut().zip(&own) {
                table.replace(&mut self.pool, block, *entry);
                self.pool.release(entry.block);
            }
            let (tokens, parent) = (self.readers[i].tokens.clone(), self.readers[i].columns.last().copied());
            let entries = self.columns(&self.readers[i].cache, block);
            let own = NewColumn { tenant, parent, tokens: &tokens[block * SIZE..], block, entries };
            let id = self.prefix.add(&mut self.pool, own);
            let there = self.prefix.node(id).and_then(|n| n.pages.clone()).unwrap();
            let reader = &mut self.readers[i];
            for (table, entry) in reader.cache.layers.iter_mut().zip(there) {
                table.replace(&mut self.pool, block, entry);
            }
            reader.columns.push(id);
        }

        fn end(&mut self, i: usize) {
            let reader = self.readers.swap_remove(i);
            reader.columns.into_iter().for_each(|id| self.prefix.give(id));
            reader.cache.release(&mut self.pool);
        }

        fn cool(&mut self) {
            let Some(id) = self.prefix.coldest() else { return };
            if self.rng.random_bool(0.5) {
                self.prefix.want(id);
                for id in self.prefix.cold_run(id) {
                    self.prefix
                        .set_coded(id, vec![Payload { bytes: vec![7; 3], ..Payload::default() }; LAYERS]);
                }
            }
            self.prefix.free(&mut self.pool, id);
        }

        /// References are those of tables and columns, and everyone reads its own tenant's own tokens.
        fn check(&self) {
            let mut counted: HashMap<BlockId, u32> = HashMap::new();
            for reader in &self.readers {
                for table in &reader.cache.layers {
                    for (block, entry) in table.entries.iter().enumerate() {
                        *counted.entry(entry.block).or_default() += 1;
                        let end = (block + 1) * SIZE;
                        if end <= reader.tokens.len() {
                            let expected = number(reader.tenant, &reader.tokens[..end]);
                            assert_eq!(self.pool.keys(entry.block)[0], expected, "another's page");
                        }
                    }
                }
            }
            for (_, entries) in self.prefix.paged() {
                entries.iter().for_each(|e| *counted.entry(e.block).or_default() += 1);
            }
            assert_eq!(counted.len(), self.pool.live_blocks(), "a page leaks");
            for (block, count) in counted {
                assert_eq!(self.pool.references(block), count);
            }
            let coded = self.prefix.nodes.values().filter_map(|n| n.coded.as_deref()).map(bytes_of);
            assert_eq!(coded.sum::<usize>(), self.prefix.coded_bytes());
        }
    }

    /// A million random operations: nothing leaks, nothing is freed twice, no page is read by two tenants, and references are
    /// what tables and columns hold.
    #[test]
    fn a_million_operations_leave_every_reference_accounted_for() {
        let mut world = World {
            pool: BlockPool::new(BlockShape { block_size: SIZE, kv_heads: 1, head_dim: 1 }, Storage::F16),
            prefix: PrefixCache::default(),
            readers: Vec::new(),
            rng: ChaCha8Rng::seed_from_u64(11),
        };
        for step in 0..1_000_000 {
            let there = world.readers.len();
            match world.rng.random_range(0..16) {
                0 | 1 if there < 12 => world.start(),
                2 if there > 0 => world.end(step % there),
                3 | 4 => world.cool(),
                // A cache has a budget.
                _ if world.prefix.columns() > 100 => {
                    world.cool();
                    if let Some(id) = world.prefix.coldest_coded() {
                        world.prefix.drop_column(&mut world.pool, id);
                    }
                }
                5 => {
                    if let Some(id) = world.prefix.coldest_coded() {
                        world.prefix.free(&mut world.pool, id);
                    }
                }
                _ if there > 0 => {
                    let i = world.rng.random_range(0..there);
                    if world.readers[i].tokens.len() < 24 { world.extend(i) } else { world.end(i) }
                }
                _ => {}
            }
            if step % 997 == 0 {
                world.check();
            }
        }
        while !world.readers.is_empty() {
            world.end(0);
        }
        while let Some(id) = world.prefix.coldest() {
            world.prefix.drop_column(&mut world.pool, id);
        }
        world.check();
        world.prefix.clear(&mut world.pool);
        assert_eq!((world.pool.live_blocks(), world.pool.bytes(), world.prefix.coded_bytes()), (0, 0, 0));
    }
}
