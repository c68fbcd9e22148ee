//! `kvfuse encode` and `kvfuse decode`.

use super::say;
use crate::codec::Chain;
use crate::encoded::{EncodeOptions, decode, encode};
use anyhow::{Result, bail};
use std::path::PathBuf;

/// Encode a dump's caches by a chain of methods into one file (docs/encoded-format.md).
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse encode dumps/qa --method prefix+kivi:bits=4 -o qa.kv")]
pub struct EncodeArgs {
    /// Folder that `kvfuse dump` wrote
    dump: PathBuf,
    /// One chain, without alternatives (`kvfuse methods`)
    #[arg(long, value_name = "CHAIN")]
    method: String,
    /// Tokens a block
    #[arg(long, default_value_t = 16, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=65_535))]
    block_size: usize,
    /// File to write
    #[arg(short, long)]
    out: PathBuf,
}

/// Write what can be read of an encoded file as a dump, which can be swept like any other.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse decode qa.kv -o dumps/qa-decoded")]
pub struct DecodeArgs {
    /// File that `kvfuse encode` wrote
    file: PathBuf,
    /// Trained file that it was encoded with, if that is not where it was
    #[arg(long, value_name = "FILE")]
    codec: Option<PathBuf>,
    /// Folder to write; must be empty
    #[arg(short, long)]
    out: PathBuf,
}

pub fn run(args: EncodeArgs) -> Result<()> {
    let mut chains = Chain::parse(&args.method)?;
    if chains.len() != 1 {
        bail!(
            "--method {}: {} chains; a file holds one, so choose a value for every alternative",
            args.method,
            chains.len()
        );
    }
    let chain = chains.swap_remove(0);
    let size = encode(&EncodeOptions {
        dump: args.dump,
        chain,
        block_size: args.block_size,
        out: args.out.clone(),
    })?;
    say(format!("{}: {} bytes, CR audited {:.2}", args.out.display(), size.file_bytes, size.cr_audited))?;
    say(format!(
        "ledger {} bits, padding {} bits, frames {} bytes, header {} bytes",
        size.ledger_bits, size.padding_bits, size.frame_bytes, size.header_bytes
    ))?;
    if size.trained_bits > 0 {
        say(format!("share of the trained codec (not in the file) {} bits", size.trained_bits))?;
    }
    Ok(())
}

pub fn run_decode(args: DecodeArgs) -> Result<()> {
    let manifest = decode(&args.file, args.codec.as_deref(), &args.out)?;
    say(format!("{}: {} requests", args.out.display(), manifest.requests.len()))
}
