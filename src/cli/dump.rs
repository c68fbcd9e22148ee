//! `kvfuse dump`.

use super::draw::DrawArgs;
use super::say;
use crate::dump::{DumpDtype, DumpOptions, Sort, dump};
use crate::files;
use crate::model::registry::DEFAULT_MODEL;
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Prefill prompts and write their KV caches: one safetensors shard a request, and manifest.json.
///
/// Run the same command again to go on after an interruption. The schema is docs/dump-format.md.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse dump --data builtin:qa --requests 64 --shots 3 -o dumps/qa")]
pub struct Args {
    /// Built-in name, GGUF file, Hugging Face folder or hf:ORG/NAME[@REVISION]
    #[arg(long, default_value = DEFAULT_MODEL)]
    model: String,
    #[command(flatten)]
    draw: DrawArgs,
    /// Put this many filler tokens in front of every other request, so that equal text stands at other positions
    #[arg(long, value_name = "TOKENS", default_value_t = 0, hide_default_value = true)]
    shift: usize,
    /// Cut the middle out of prompts of more tokens than this
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<usize>,
    /// Order of the requests; requests of a batch stand together
    #[arg(long, value_enum, default_value = "none")]
    sort: Sort,
    /// Wrap every prompt in the model's chat template, as the message of a user
    #[arg(long)]
    chat: bool,
    /// Storage of keys and values
    #[arg(long, value_enum, default_value_t = DumpDtype::F32)]
    dtype: DumpDtype,
    /// Folder to write [default: dumps/ and a name made of the options and a checksum of model and data]
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Args {
    pub fn options(self, typed: Vec<String>) -> DumpOptions {
        DumpOptions {
            model: self.model,
            draw: self.draw.draw(),
            shift: self.shift,
            dtype: self.dtype,
            chat: self.chat,
            max_tokens: self.max_tokens,
            sort: self.sort,
            command: typed,
        }
    }
}

pub fn run(args: Args, typed: Vec<String>) -> Result<()> {
    let out = folder(&args)?;
    let manifest = dump(&out, &args.options(typed))?;
    let tokens: usize = manifest.requests.iter().map(|r| r.tokens).sum();
    let cut = manifest.requests.iter().filter(|r| r.request.cut_tokens > 0).count();
    if cut > 0 {
        say(format!("{cut} prompts were cut in the middle to --max-tokens"))?;
    }
    say(format!(
        "{}: {} requests, {tokens} tokens, of which {} lead every prompt",
        out.display(),
        manifest.requests.len(),
        manifest.shared_prefix_tokens
    ))?;
    Ok(())
}

/// Where a dump goes.
pub fn folder(args: &Args) -> Result<PathBuf> {
    match &args.out {
        Some(out) => Ok(out.clone()),
        None => Ok(PathBuf::from("dumps").join(default_name(args)?)),
    }
}

/// The last part of a name, path or `kind:path`, as a file name. A file that is named for its split (RULER's all are
/// `TASK/validation.jsonl`) has its folder's name in front.
pub fn stem(text: &str) -> String {
    let mut parts = text.trim_end_matches('/').rsplit(['/', ':']);
    let last = parts.next().unwrap_or(text);
    let known = [".json", ".jsonl", ".gguf", ".txt"];
    let stem = known.iter().find_map(|e| last.strip_suffix(e)).unwrap_or(last);
    let folder = parts.next().filter(|f| SPLITS.contains(&stem) && text.contains('/') && !f.is_empty());
    let stem = folder.map_or(stem.to_owned(), |folder| format!("{folder}-{stem}"));
    stem.chars().map(|c| if c.is_ascii_alphanumeric() || "-.".contains(c) { c } else { '_' }).collect()
}

const SPLITS: [&str; 5] = ["train", "validation", "valid", "dev", "test"];

/// A folder name that no two different dumps share: it ends with a checksum of the contents of model and data.
fn default_name(args: &Args) -> Result<String> {
    let longest = args.max_tokens.map(|m| format!("-x{m}")).unwrap_or_default();
    let requests = args.draw.limit.unwrap_or(args.draw.requests);
    let flags = [("-sorted", args.sort == Sort::Length), ("-chat", args.chat)];
    let flags: String = flags.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    let plain = format!(
        "{}-{}-n{}-k{}-s{}",
        stem(&args.model),
        stem(&args.draw.data),
        requests,
        args.draw.shots,
        args.draw.seed
    );
    let length = args.draw.length.map(|l| format!("-l{l}")).unwrap_or_default();
    let rag = args.draw.passages.map(|k| format!("-rag{k}of{}", args.draw.pool)).unwrap_or_default();
    let half = args.draw.half.map(|h| format!("-{h:?}").to_lowercase()).unwrap_or_default();
    let optional = [
        ("-m", args.draw.needles - args.draw.needles.min(1)),
        ("-t", args.draw.tenants),
        ("-p", args.shift),
        ("-q", args.draw.turns.unwrap_or(0)),
        ("-c", args.draw.continuation.unwrap_or(0)),
    ];
    let optional = optional.iter().filter(|(_, n)| *n > 0).map(|(name, n)| format!("{name}{n}"));
    let dtype = format!("-{:?}", args.dtype).to_lowercase();
    let data = args.draw.data.split_once(':').map(|(_, file)| Path::new(file)).filter(|file| file.is_file());
    let data = data.map_or(Ok(String::new()), files::sha256)?;
    let contents = files::sha256_bytes((crate::model::checksum(&args.model)? + &data).as_bytes());
    let name = plain + &half + &length + &rag + &longest + &optional.collect::<String>() + &flags + &dtype;
    Ok(format!("{name}-{}", &contents[..8]))
}

#[cfg(test)]
mod tests {
    use super::stem;

    #[test]
    fn splits_are_named_for_their_folders() {
        assert_eq!(stem("squad:data/xquad-en-a.json"), "xquad-en-a");
        assert_eq!(stem("ruler:data/niah_single_1/validation.jsonl"), "niah_single_1-validation");
        assert_eq!(stem("ruler:validation.jsonl"), "validation");
        assert_eq!(stem("hf:org/Model-1B@v1"), "Model-1B_v1");
    }
}
