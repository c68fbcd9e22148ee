//! Grouped-query attention that reads keys and values through a block table, all of them or those in a sliding window.

use super::gemm::{View, product};
use super::kernels::{causal_softmax, scores, scores_by_channel, softmax_row, weighted_sum};
use super::rope::Rope;
use crate::block::{BlockPool, BlockTable, Entry, Part};
use rayon::prelude::*;
use std::ops::Range;

/// Head geometry of the queries (the pool knows that of the keys), and what a query does with the keys.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Factor on the inner products of queries and keys.
    pub scale: f32,
    /// Tokens a query sees, its own among them; `None` for all.
    pub window: Option<usize>,
}

impl Heads {
    /// Query heads that read one key/value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// The first position that a query at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }
}

/// The new tokens of one request: their keys and values are already in `table`.
pub struct Query<'a> {
    pub table: &'a BlockTable,
    /// First row of this request in the query and output matrices.
    pub row: usize,
    /// New tokens.
    pub tokens: usize,
    /// Position of the first new token = tokens in the cache before it.
    pub start: usize,
}

/// Query tokens that one task covers; the causal mask lets a task skip the keys after its last token.
const TASK_TOKENS: usize = 64;
/// From this many query rows (tokens x heads of a group) on, gathering the blocks and one matrix product beat reading
/// them in place.
const GATHER_ROWS: usize = 12;

/// One task: some query tokens of one request against one key/value head.
struct Task<'a> {
    table: &'a BlockTable,
    kv_head: usize,
    row: usize,
    tokens: usize,
    /// Position of the first query, and the slot of its own key.
    start: usize,
    slot: usize,
}

impl Task<'_> {
    /// The first slot that a query sees.
    fn first_slot(&self, heads: Heads, position: usize) -> usize {
        self.table.slots_before(heads.first_seen(position))
    }
}

/// Causal attention of all requests' new tokens in one layer.
///
/// `queries` is `[rows, stride]`, of which the first `heads * head_dim` numbers of a row are the rotated queries;
/// the result is `[rows, heads * head_dim]`.
pub fn attend(
    pool: &BlockPool,
    rope: &Rope,
    heads: Heads,
    queries: &[f32],
    stride: usize,
    requests: &[Query],
) -> Vec<f32> {
    let rows: usize = requests.iter().map(|q| q.tokens).sum();
    let mut tasks = Vec::new();
    for request in requests {
        for kv_head in 0..heads.kv_heads {
            for first in (0..request.tokens).step_by(TASK_TOKENS) {
                tasks.push(Task {
                    table: request.table,
                    kv_head,
                    row: request.row + first,
                    tokens: TASK_TOKENS.min(request.tokens - first),
                    start: request.start + first,
                    slot: request.table.slots_before(request.start + first),
                });
            }
        }
    }
    let run = |task: &Task| {
        // Windows are counted in positions, rows of a product in slots.
        let even = heads.window.is_none() || task.table.kept.is_none();
        if even && task.tokens * heads.group() >= GATHER_ROWS {
            gathered(pool, rope, heads, queries, stride, task)
        } else {
            in_place(pool, rope, heads, queries, stride, task)
        }
    };
    let outputs: Vec<Vec<f32>> = tasks.par_iter().map(run).collect();

    let group_width = heads.group() * heads.head_dim;
    let mut out = vec![0.0; rows * heads.width()];
    for (task, output) in tasks.iter().zip(outputs) {
        for (i, row) in output.chunks_exact(group_width).enumerate() {
            let at = (task.row + i) * heads.width() + task.kv_head * group_width;
            out[at..at + group_width].copy_from_slice(row);
        }
    }
    out
}

/// A block of the table: its entry, the slot of its first token, and its tokens that are looked at.
struct Seen<'a> {
    entry: &'a Entry,
    first: usize,
    tokens: usize,
}

/// The table's blocks that hold the slots from `from` (rounded down to a whole block) to `to`.
fn visible<'a>(
    pool: &'a BlockPool,
    table: &'a BlockTable,
    from: usize,
    to: usize,
) -> impl Iterator<Item = Seen<'a>> {
    let size = pool.shape().block_size;
    let blocks = table.entries[..to.div_ceil(size)].iter().enumerate().skip(from / size);
    blocks.map(move |(b, entry)| Seen { entry, first: b * size, tokens: size.min(to - b * size) })
}

/// Keys of one head of a block, rotated to where the block stands if it is stored without positions: `[tokens, head_dim]`.
fn read_keys(pool: &BlockPool, rope: &Rope, kv_head: usize, seen: &Seen, out: &mut Vec<f32>) {
    let from = out.len();
    pool.read_head(seen.entry.block, Part::Key, kv_head, seen.tokens, out);
    if seen.entry.stripped {
        rope.rotate_tokens(&mut out[from..], pool.shape().head_dim, seen.first);
    }
}

/// Few query rows: every block is read once, for all of them.
fn in_place(
    pool: &BlockPool,
    rope: &Rope,
    heads: Heads,
    queries: &[f32],
    stride: usize,
    task: &Task,
) -> Vec<f32> {
    let (d, group) = (heads.head_dim, heads.group());
    let rows = task.tokens * group;
    let total = task.slot + task.tokens;
    let query = |i: usize| {
        let at = (task.row + i / group) * stride + (task.kv_head * group + i % group) * d;
        &queries[at..at + d]
    };
    // What a row sees, in slots.
    let spans: Vec<Range<usize>> = (0..task.tokens)
        .map(|token| task.first_slot(heads, task.start + token)..task.slot + token + 1)
        .collect();
    let from = spans[0].start;
    let mut weights = vec![0.0; rows * total];
    let mut numbers = Vec::new();
    for seen in visible(pool, task.table, from, total) {
        let scale = seen.entry.key_scale() * heads.scale;
        numbers.clear();
        let block = seen.entry.block;
        let channels = !seen.entry.stripped && pool.read_by_channel(block, task.kv_head, &mut numbers);
        if !channels {
            read_keys(pool, rope, task.kv_head, &seen, &mut numbers);
        }
        for (i, weights) in weights.chunks_exact_mut(total).enumerate() {
            let weights = &mut weights[seen.first..seen.first + seen.tokens];
            match channels {
                true => scores_by_channel(query(i), &numbers, pool.tokens(block), scale, weights),
                false => scores(query(i), &numbers, d, scale, weights),
            }
        }
    }
    for (i, weights) in weights.chunks_exact_mut(total).enumerate() {
        let span = spans[i / group].clone();
        weights[..span.start].fill(0.0);
        softmax_row(&mut weights[span.clone()]);
        weights[span.end..].fill(0.0);
    }
    let mut out = vec![0.0; rows * d];
    for seen in visible(pool, task.table, from, total) {
        numbers.clear();
        pool.read_head(seen.entry.block, Part::Value, task.kv_head, seen.tokens, &mut numbers);
        let scale = seen.entry.value_scale();
        for (weights, out) in weights.chunks_exact(total).zip(out.chunks_exact_mut(d)) {
            weighted_sum(out, &numbers, d, scale, &weights[seen.first..seen.first + seen.tokens]);
        }
    }
    out
}

/// Many query rows: the head's keys and values are copied out once and multiplied as matrices.
fn gathered(
    pool: &BlockPool,
    rope: &Rope,
    heads: Heads,
    queries: &[f32],
    stride: usize,
    task: &Task,
) -> Vec<f32> {
    let (d, group) = (heads.head_dim, heads.group());
    let size = pool.shape().block_size;
    // Blocks before the first query's window are of no use to any.
    let from = task.first_slot(heads, task.start) / size * size;
    let end = task.slot + task.tokens;
    let total = end - from;
    let rows = task.tokens * group;
    let mut keys = Vec::with_capacity(total * d);
    let mut values = Vec::with_capacity(total * d);
    for seen in visible(pool, task.table, from, end) {
        let at = keys.len();
        read_keys(pool, rope, task.kv_head, &seen, &mut keys);
        pool.read_head(seen.entry.block, Part::Value, task.kv_head, seen.tokens, &mut values);
        let (key_scale, value_scale) = (seen.entry.key_scale() * heads.scale, seen.entry.value_scale());
        keys[at..].iter_mut().for_each(|x| *x *= key_scale);
        if value_scale != 1.0 {
            values[at..].iter_mut().for_each(|x| *x *= value_scale);
        }
    }
    let mut gathered_queries = Vec::with_capacity(rows * d);
    for token in 0..task.tokens {
        let at = (task.row + token) * stride + task.kv_head * group * d;
        gathered_queries.extend_from_slice(&queries[at..at + group * d]);
    }
    let mut weights = vec![0.0; rows * total];
    let queries = View::row_major(&gathered_queries, rows, d);
    product(queries, View::row_major(&keys, total, d).transposed(), &mut weights);
    causal_softmax(&mut weights, total, task.slot + 1 - from, group, heads.window.unwrap_or(usize::MAX));
    let mut out = vec![0.0; rows * d];
    product(View::row_major(&weights, rows, total), View::row_major(&values, total, d), &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockShape, Scale, Storage};
    use crate::model::RopeConfig;
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Both paths equal attention written out in f64: scales, blocks without positions, windows and evicted tokens included.
        #[test]
        fn equals_the_definition(
            start in 0usize..40, tokens in 1usize..70, block_size in 1usize..20,
            window in prop::option::of(1usize..60), seed in 0u64..99, evict in any::<bool>()
        ) {
            let heads = Heads { heads: 4, kv_heads: 2, head_dim: 8, scale: 0.4, window };
            let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
            let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.random_range(-1.0..1.0)).collect() };
            let mut pool = BlockPool::new(BlockShape { block_size, kv_heads: 2, head_dim: 8 }, Storage::F32);
            let mut table = BlockTable::default();
            let total = start + tokens;
            let (keys, values) = (random(total * 16), random(total * 16));
            // Two of three of the earlier tokens stay.
            let there = |t: usize| !evict || t >= start || t % 3 != 1;
            for t in (0..total).filter(|t| there(*t)) {
                table.append(&mut pool, &keys[t * 16..][..16], &values[t * 16..][..16]);
            }
            let stored: Vec<usize> = (0..total).filter(|t| there(*t)).collect();
            if evict {
                let positions = stored.iter().filter(|t| **t < start).map(|t| *t as u32).collect();
                table.kept = Some(std::sync::Arc::new(crate::block::Kept { positions, tokens: start }));
            }
            let rope = Rope::new(&RopeConfig::plain(100.0, 8), 128);
            for (i, entry) in table.entries.iter_mut().enumerate() {
                if i % 2 == 1 { entry.scale = Some(Scale { key: 1.5, value: 0.5 }); }
                if i % 3 == 1 && !evict {
                    let mut stripped = pool.keys(entry.block).into_owned();
                    rope.strip_tokens(&mut stripped, 16, i * block_size);
                    let values = pool.values(entry.block).into_owned();
                    entry.block = pool.allocate(&stripped, &values);
                    entry.stripped = true;
                }
            }
            let stride = 40;
            let queries = random(tokens * stride);
            let request = Query { table: &table, row: 0, tokens, start };
            let got = attend(&pool, &rope, heads, &queries, stride, &[request]);

            for token in 0..tokens {
                for head in 0..4 {
                    let query = &queries[token * stride + head * 8..][..8];
                    let kv = head / 2;
                    let scale = |t: usize, on: f64| {
                        let slot = stored.iter().position(|s| *s == t).unwrap_or(0);
                        if slot / block_size % 2 == 1 { on } else { 1.0 }
                    };
                    let own = start + token;
                    let weights: Vec<f64> = (0..=own).map(|t| {
                        if window.is_some_and(|w| own - t >= w) || !there(t) { return 0.0; }
                        let key = &keys[t * 16 + kv * 8..][..8];
                        let s: f64 = query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        (s * scale(t, 1.5) * 0.4).exp()
                    }).collect();
                    let sum: f64 = weights.iter().sum();
                    for i in 0..8 {
                        let expected: f64 = weights.iter().enumerate().map(|(t, w)| {
                            w / sum * scale(t, 0.5) * f64::from(values[t * 16 + kv * 8 + i])
                        }).sum();
                        let got = f64::from(got[token * 32 + head * 8 + i]);
                        prop_assert!((got - expected).abs() < 1e-5, "{} {}", got, expected);
                    }
                }
            }
        }
    }
}
