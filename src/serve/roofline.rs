//! A roofline model of serving (Williams et al. 2009): held against the runs of a bench, then projected to accelerators.
//!
//! A step takes what its arithmetic or what its reading takes, whichever is longer. On the CPU of a bench the arithmetic decides, so
//! the bench tests that roof alone; the roof of memory, which decides on accelerators, is that of data sheets.

use super::policy::Policy;
use crate::codec::Chain;
use crate::error::{Error, Result};
use crate::files;
use crate::model::{Model, ModelConfig};
use crate::stats::rounded;
use crate::tables::{Table, write_table};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// A run of a bench a row: how long its arithmetic should have taken, and took.
pub const ROOFLINE_CSV: &str = "roofline.csv";
/// A chain on an accelerator a row.
pub const PROJECTION_CSV: &str = "projection.csv";

/// What a decoder costs.
#[derive(Debug, Clone, Serialize)]
pub struct Shape {
    pub name: String,
    /// Multiply-accumulates of a token in the decoder's linear layers, and of its logits.
    pub parameters: f64,
    pub head_parameters: f64,
    /// Of embeddings that are no head too: they lie in memory and are not read.
    pub embedding_parameters: f64,
    /// Query heads of all layers times their size.
    pub attention_width: f64,
    /// Bytes of a token's keys and values in f16.
    pub kv_bytes: f64,
}

impl Shape {
    pub fn of(name: &str, c: &ModelConfig) -> Self {
        Shape {
            name: name.to_owned(),
            parameters: c.non_embedding_parameters() as f64,
            head_parameters: (c.vocab * c.hidden) as f64,
            // The built-in models' embeddings are their heads.
            embedding_parameters: 0.0,
            attention_width: (c.layers * c.heads * c.head_dim) as f64,
            kv_bytes: (4 * c.layers * c.kv_heads * c.head_dim) as f64,
        }
    }

    /// Llama 3.1 8B, by its published config.json: 32 layers of 4096, 32 heads over 8 key/value heads of 128, 14336, 128256 tokens.
    pub fn llama_8b() -> Self {
        let layer = 4096.0 * (4096.0 + 2.0 * 1024.0) + 4096.0 * 4096.0 + 3.0 * 4096.0 * 14_336.0;
        Shape {
            name: "llama-3.1-8b".to_owned(),
            parameters: 32.0 * layer,
            head_parameters: 128_256.0 * 4096.0,
            embedding_parameters: 128_256.0 * 4096.0,
            attention_width: 32.0 * 4096.0,
            kv_bytes: 4.0 * 32.0 * 1024.0,
        }
    }

    /// Operations of `tokens` that each see `context` tokens, with logits of `heads` of them.
    fn operations(&self, tokens: f64, context: f64, heads: f64) -> f64 {
        2.0 * (self.parameters * tokens + self.head_parameters * heads)
            + 4.0 * self.attention_width * context * tokens
    }

    /// Of f16 weights that a step reads.
    fn weight_bytes(&self) -> f64 {
        2.0 * (self.parameters + self.head_parameters)
    }

    /// Of all f16 weights.
    fn resident_bytes(&self) -> f64 {
        self.weight_bytes() + 2.0 * self.embedding_parameters
    }
}

/// An accelerator by its data sheet: dense bf16 operations a second, bytes of memory a second, bytes of memory.
#[derive(Debug, Clone, Copy)]
pub struct Accelerator {
    pub name: &'static str,
    pub operations_per_second: f64,
    pub bytes_per_second: f64,
    pub memory_bytes: f64,
}

const fn accelerator(name: &'static str, teraflops: f64, terabytes: f64, gigabytes: f64) -> Accelerator {
    Accelerator {
        name,
        operations_per_second: teraflops * 1e12,
        bytes_per_second: terabytes * 1e12,
        memory_bytes: gigabytes * 1e9,
    }
}

/// Vendors' data sheets, without sparsity.
pub const ACCELERATORS: [Accelerator; 5] = [
    accelerator("L4", 121.0, 0.3, 24.0),
    accelerator("A100-80GB", 312.0, 2.039, 80.0),
    accelerator("H100-SXM", 989.0, 3.35, 80.0),
    accelerator("H200-SXM", 989.0, 4.8, 141.0),
    accelerator("MI300X", 1307.0, 5.3, 192.0),
];

/// Requests that run at once, at most: vLLM's default.
const MOST_REQUESTS: f64 = 256.0;
/// Of an accelerator's memory, what an engine uses: vLLM's default.
const USED: f64 = 0.9;

/// A run of a bench against the roof of arithmetic.
#[derive(Debug, Clone, Serialize)]
pub struct Checked {
    pub method: String,
    pub repeat: f64,
    pub request_rate: String,
    pub budget_bytes: f64,
    pub operations: f64,
    pub forward_seconds: f64,
    /// At the rate of the first method's runs.
    pub predicted_seconds: f64,
    pub measured_over_predicted: f64,
}

/// A chain's traits, measured by a bench: they go with prompts and budget.
#[derive(Debug, Clone)]
struct Traits {
    method: String,
    /// Bytes that a running request holds, of those without any encoding; cold prefixes count as held.
    held: f64,
    /// Prompt tokens that were found.
    hits: f64,
    /// Bytes read of a token's keys and values, of those in f16.
    read: f64,
}

/// A chain on an accelerator: everything here is a projection.
#[derive(Debug, Clone, Serialize)]
pub struct Projected {
    pub accelerator: String,
    pub model: String,
    pub method: String,
    pub held_share: f64,
    pub hit_share: f64,
    pub read_share: f64,
    pub requests_at_once: f64,
    pub decode_step_ms: f64,
    /// What bounds a decode step: memory or arithmetic.
    pub bound: &'static str,
    pub tokens_per_second: f64,
    /// Over exact prefix caching; nothing where the bench has none.
    pub gain_percent: Option<f64>,
}

/// What is projected: prompts and answers, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub input: f64,
    pub output: f64,
}

/// What to project.
pub struct ProjectOptions {
    /// Folder of `kvfuse serve-bench`.
    pub results: PathBuf,
    /// Tokens of a prompt and an answer; the bench's own where not given.
    pub input: Option<f64>,
    pub output: Option<f64>,
}

/// Checks the runs, projects, and writes roofline.csv and projection.csv beside serve.csv.
///
/// # Errors
/// Folders without a bench; one whose model or codec is not at hand; a bench whose budget was never short.
pub fn project(options: &ProjectOptions) -> Result<(Vec<Checked>, Vec<Projected>)> {
    let path = options.results.join(super::SERVE_CSV);
    let table = Table::read(&path)?;
    let manifest = files::read_json(&options.results.join("manifest.json"))?;
    let Some(name) = manifest["model"].as_str() else {
        return Err(Error::file(&options.results, "has no manifest of serve-bench; run it again"));
    };
    let model = Model::load(name)?;
    let shape = Shape::of(name, model.decoder.config());
    let checked = check(&table, &shape)?;
    write_table(&options.results.join(ROOFLINE_CSV), &checked)?;
    let of = |column: &str| -> Result<f64> { Ok(table.floats(column)?[0]) };
    let requests = of("completed")?.max(1.0);
    let load = Load {
        input: options.input.unwrap_or(of("total_input_tokens")? / requests),
        output: options.output.unwrap_or(of("total_output_tokens")? / requests),
    };
    let Some(methods) = manifest["method"].as_str() else {
        return Err(Error::file(
            &options.results,
            "has a manifest without its chains; run serve-bench again",
        ));
    };
    let block_size = manifest["block_size"].as_u64().unwrap_or(16) as usize;
    let policies = Chain::parse_served(methods)?
        .iter()
        .map(|chain| Policy::of(chain, model.decoder.block_shape(block_size)))
        .collect::<Result<Vec<_>>>()?;
    let traits = traits(&table, &policies, &path)?;
    let mut projected = Vec::new();
    for shape in [shape, Shape::llama_8b()] {
        for accelerator in &ACCELERATORS {
            projected.extend(on(accelerator, &shape, &traits, load));
        }
    }
    write_table(&options.results.join(PROJECTION_CSV), &projected)?;
    Ok((checked, projected))
}

/// Every run's arithmetic at the rate that the first method's runs had.
fn check(table: &Table, shape: &Shape) -> Result<Vec<Checked>> {
    let (method, rate) = (table.strings("method")?, table.strings("request_rate")?);
    let floats = |name: &str| table.floats(name);
    let (prefill, decode) = (floats("prefill_tokens")?, floats("decode_tokens")?);
    let (seconds, completed) = (floats("forward_seconds")?, floats("completed")?);
    let (input, output) = (floats("total_input_tokens")?, floats("total_output_tokens")?);
    let (repeat, budget) = (floats("repeat")?, floats("budget_bytes")?);
    let (asked, found) = (floats("prefix_query_tokens")?, floats("prefix_hit_tokens")?);
    let operations = |i: usize| {
        let (input, output) = (input[i] / completed[i].max(1.0), output[i] / completed[i].max(1.0));
        let hits = found[i] / asked[i].max(1.0);
        shape.operations(prefill[i], behind(input, hits), completed[i])
            + shape.operations(decode[i], input + output / 2.0, decode[i])
    };
    let first: Vec<usize> = (0..method.len()).filter(|&i| method[i] == method[0]).collect();
    let own: f64 = first.iter().map(|&i| operations(i)).sum();
    let speed = own / first.iter().map(|&i| seconds[i]).sum::<f64>();
    let checked = |i: usize| Checked {
        method: method[i].clone(),
        repeat: repeat[i],
        request_rate: rate[i].clone(),
        budget_bytes: budget[i],
        operations: rounded(operations(i)),
        forward_seconds: seconds[i],
        predicted_seconds: rounded(operations(i) / speed),
        measured_over_predicted: rounded(seconds[i] * speed / operations(i)),
    };
    Ok((0..method.len()).map(checked).collect())
}

/// Tokens that those of a prompt see on average, where a share of it was found: those that are left stand at its end.
fn behind(input: f64, hits: f64) -> f64 {
    input * (1.0 + hits) / 2.0
}

/// Of its budget, what a bench without any encoding must have reached for its bytes to say what requests hold.
const SHORT: f64 = 0.8;

/// What the bench's chains do, over their runs at the first load under the first budget.
fn traits(table: &Table, policies: &[Policy], path: &Path) -> Result<Vec<Traits>> {
    let (method, rate) = (table.strings("method")?, table.strings("request_rate")?);
    let floats = |name: &str| table.floats(name);
    let (pool, running) = (floats("mean_pool_bytes")?, floats("mean_concurrent_requests")?);
    let (asked, found) = (floats("prefix_query_tokens")?, floats("prefix_hit_tokens")?);
    let budget = floats("budget_bytes")?;
    let (peak, pages) = (floats("peak_pool_bytes")?, floats("peak_pages")?);
    let mut all: Vec<Traits> = Vec::new();
    let over = |own: &[usize], a: &[f64], b: &[f64]| {
        own.iter().map(|&i| a[i]).sum::<f64>() / own.iter().map(|&i| b[i]).sum::<f64>()
    };
    let held = |own: &[usize]| over(own, &pool, &running);
    let runs = |name: &str| -> Vec<usize> {
        (0..method.len())
            .filter(|&i| method[i] == name && rate[i] == rate[0] && budget[i] == budget[0])
            .collect()
    };
    let plain = runs("none");
    if plain.is_empty() {
        return Err(Error::file(path, "has no arm `none` to compare bytes with; run serve-bench with it"));
    }
    if over(&plain, &peak, &budget) < SHORT {
        let problem = "was never short of memory, so its bytes do not say what requests hold; run serve-bench with a smaller \
                       budget or more requests at once";
        return Err(Error::file(path, problem));
    }
    for policy in policies {
        let own = runs(&policy.name);
        if own.is_empty() {
            continue;
        }
        // What is read in place is read as it is stored.
        let read = match policy.code {
            Some(_) => over(&own, &peak, &pages) / over(&plain, &peak, &pages),
            None => 1.0,
        };
        all.push(Traits {
            method: policy.name.clone(),
            held: held(&own) / held(&plain),
            hits: over(&own, &found, &asked.iter().map(|a| a.max(1.0)).collect::<Vec<_>>()),
            read: read.min(1.0),
        });
    }
    Ok(all)
}

/// All chains on one accelerator.
fn on(accelerator: &Accelerator, shape: &Shape, traits: &[Traits], load: Load) -> Vec<Projected> {
    let rate = |t: &Traits| throughput(accelerator, shape, t, load);
    let prefix = traits.iter().find(|t| t.method == "prefix").map(|t| rate(t).tokens_per_second);
    let prefix = prefix.filter(|p| *p > 0.0);
    let row = |t: &Traits| Projected {
        gain_percent: prefix.map(|p| rounded(100.0 * (rate(t).tokens_per_second / p - 1.0))),
        ..rate(t)
    };
    // A model that does not fit has no row.
    traits.iter().map(row).filter(|row| row.requests_at_once >= 1.0).collect()
}

/// Requests that never stop coming: each is prefilled, but for what is found, and then decodes among as many as memory holds.
fn throughput(accelerator: &Accelerator, shape: &Shape, traits: &Traits, load: Load) -> Projected {
    let room = accelerator.memory_bytes * USED - shape.resident_bytes();
    let held = (load.input + load.output) * shape.kv_bytes * traits.held;
    let n = (room / held).floor().clamp(0.0, MOST_REQUESTS);
    let context = load.input + load.output / 2.0;
    let seconds = |operations: f64, bytes: f64| {
        let arithmetic = operations / accelerator.operations_per_second;
        let reading = bytes / accelerator.bytes_per_second;
        (arithmetic.max(reading), if reading > arithmetic { "memory" } else { "arithmetic" })
    };
    let computed = load.input * (1.0 - traits.hits);
    let (prefill, _) =
        seconds(shape.operations(computed, behind(load.input, traits.hits), 1.0), shape.weight_bytes());
    let read = shape.weight_bytes() + n * context * shape.kv_bytes * traits.read;
    let (step, bound) = seconds(shape.operations(n, context, n), read);
    Projected {
        accelerator: accelerator.name.to_owned(),
        model: shape.name.clone(),
        method: traits.method.clone(),
        held_share: rounded(traits.held),
        hit_share: rounded(traits.hits),
        read_share: rounded(traits.read),
        requests_at_once: n,
        decode_step_ms: rounded(1e3 * step),
        bound,
        tokens_per_second: rounded(n * load.output / (n * prefill + load.output * step)),
        gain_percent: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traits(method: &str, held: f64, hits: f64, read: f64) -> Traits {
        Traits { method: method.to_owned(), held, hits, read }
    }

    /// An 8B model on an H100 by hand: 15.0 GB of weights are read and 16.1 GB held, 131 kB a token, and memory holds as many requests as fit beside them.
    #[test]
    fn a_step_reads_weights_and_caches() {
        let shape = Shape::llama_8b();
        assert!((shape.weight_bytes() / 1e9 - 15.0).abs() < 0.1, "{}", shape.weight_bytes());
        assert!((shape.resident_bytes() / 1e9 - 16.06).abs() < 0.1, "{}", shape.resident_bytes());
        let load = Load { input: 1000.0, output: 100.0 };
        let h100 = &ACCELERATORS[2];
        let none = throughput(h100, &shape, &traits("none", 1.0, 0.0, 1.0), load);
        assert_eq!(
            none.requests_at_once,
            ((72e9 - shape.resident_bytes()) / (1100.0 * 131_072.0)).floor().min(256.0)
        );
        let step = (shape.weight_bytes() + none.requests_at_once * 1050.0 * 131_072.0) / 3.35e12;
        assert!((none.decode_step_ms - 1e3 * step).abs() < 1e-3 && none.bound == "memory");
        // Fewer bytes read and more requests: never slower.
        let coded = throughput(h100, &shape, &traits("kivi", 0.5, 0.0, 0.5), load);
        assert!(coded.tokens_per_second > none.tokens_per_second);
        let small = Accelerator { memory_bytes: 10e9, ..*h100 };
        assert!(on(&small, &shape, &[traits("none", 1.0, 0.0, 1.0)], load).is_empty());
    }

    #[test]
    fn gains_are_over_prefix_caching() {
        let all = [traits("none", 1.0, 0.0, 1.0), traits("prefix", 0.5, 0.6, 1.0)];
        let rows = on(&ACCELERATORS[1], &Shape::llama_8b(), &all, Load { input: 400.0, output: 64.0 });
        assert_eq!(rows[1].gain_percent, Some(0.0));
        assert!(rows[0].gain_percent.unwrap() < 0.0);
    }
}
