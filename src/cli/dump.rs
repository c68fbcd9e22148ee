//! `kvfuse dump`.

use super::{say, typed_command};
use crate::dump::{DumpDtype, DumpOptions, dump};
use crate::model::registry::DEFAULT_MODEL;
use anyhow::Result;
use std::path::PathBuf;

/// Prefill prompts and write their KV caches: one safetensors shard a request, and manifest.json.
///
/// Run the same command again to go on after an interruption. The schema is docs/dump-format.md.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse dump --data builtin:qa --requests 64 --shots 3 -o dumps/qa")]
pub struct Args {
    /// Built-in name, GGUF file or Hugging Face folder
    #[arg(long, default_value = DEFAULT_MODEL)]
    model: String,
    /// builtin:qa, squad:FILE (SQuAD v1.1 JSON) or prompts:FILE (JSON lines)
    #[arg(long, default_value = "builtin:qa")]
    data: String,
    /// Prompts to draw
    #[arg(long, default_value_t = 64)]
    requests: usize,
    /// Worked examples in front of every question
    #[arg(long, default_value_t = 3)]
    shots: usize,
    /// Decides which examples and questions are drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Storage of keys and values
    #[arg(long, value_enum, default_value_t = DumpDtype::F32)]
    dtype: DumpDtype,
    /// Folder to write [default: dumps/ and a name made of model, data, requests, shots and seed]
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub fn run(args: Args) -> Result<()> {
    let out = args.out.clone().unwrap_or_else(|| PathBuf::from("dumps").join(default_name(&args)));
    let manifest = dump(
        &out,
        &DumpOptions {
            model: args.model,
            data: args.data,
            requests: args.requests,
            shots: args.shots,
            seed: args.seed,
            dtype: args.dtype,
            command: typed_command(),
        },
    )?;
    let tokens: usize = manifest.requests.iter().map(|r| r.tokens).sum();
    say(format!(
        "{}: {} requests, {tokens} tokens, of which {} lead every prompt",
        out.display(),
        manifest.requests.len(),
        manifest.shared_prefix_tokens
    ));
    Ok(())
}

/// A folder name that two different dumps are unlikely to share.
fn default_name(args: &Args) -> String {
    let stem = |text: &str| {
        let last = text.rsplit(['/', ':']).next().unwrap_or(text);
        let stem = last.split('.').next().unwrap_or(last);
        stem.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect::<String>()
    };
    format!("{}-{}-n{}-k{}-s{}", stem(&args.model), stem(&args.data), args.requests, args.shots, args.seed)
}
