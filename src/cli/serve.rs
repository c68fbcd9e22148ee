//! `kvfuse serve`.

use super::engine::{EngineArgs, at_least_one};
use super::say;
use crate::codec::Chain;
use crate::memory::Bytes;
use crate::model::registry::DEFAULT_MODEL;
use crate::serve::http::{ServerOptions, run as serve};
use anyhow::{Result, anyhow};
use std::net::{IpAddr, SocketAddr};

/// Serve a model behind OpenAI's HTTP interface, with caches kept by a chain of methods.
///
/// /v1/completions and /v1/chat/completions (streaming too), /v1/models, /health, and /metrics in Prometheus' format with
/// vLLM's names (docs/serving.md). Answers are greedy. Ctrl-C stops.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    kvfuse serve --method prefix+kivi:bits=4 --kv-cache-memory-bytes 512MiB\n  \
    curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\\n    \
      -d '{\"prompt\": \"The capital of France is\", \"max_tokens\": 8}'")]
pub struct Args {
    /// Built-in name, GGUF file, Hugging Face folder or hf:ORG/NAME[@REVISION]
    #[arg(long, default_value = DEFAULT_MODEL)]
    model: String,
    /// Chain to keep caches by (see `kvfuse methods`)
    #[arg(long, default_value = "prefix", value_name = "CHAIN")]
    method: String,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Bytes of keys and values
    #[arg(long, value_name = "BYTES", default_value = "1GiB")]
    kv_cache_memory_bytes: Bytes,
    #[command(flatten)]
    engine: EngineArgs,
    /// Requests that are open at once, those that wait included; more get status 503
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_open: usize,
}

pub fn run(args: Args) -> Result<()> {
    let mut chains = Chain::parse_served(&args.method)?;
    if chains.len() != 1 {
        return Err(anyhow!("--method {}: a server follows one chain", args.method));
    }
    let options = ServerOptions {
        model: args.model,
        chain: chains.swap_remove(0),
        limits: args.engine.limits(args.kv_cache_memory_bytes.0)?,
        address: SocketAddr::new(args.host, args.port),
        open: at_least_one("--max-open", args.max_open)?,
    };
    let name = options.chain.name();
    serve(&options, |address| {
        // A reader of stdout that has gone is no reason to stop serving.
        let _ = say(format!("serving {} by {name} at http://{address}", options.model));
    })?;
    Ok(())
}
