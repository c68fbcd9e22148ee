//! `kvfuse model`.

use super::say;
use super::table::table;
use crate::model::registry::{BUILTINS, DEFAULT_MODEL, builtin, resolve};
use crate::model::{Model, probe};
use anyhow::{Context, Result};
use clap::Subcommand;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the built-in models and whether they are on disk
    List,
    /// Fetch a built-in model or hf:ORG/NAME[@REVISION] if it is not on disk yet; prints its path
    Pull {
        #[arg(default_value = DEFAULT_MODEL)]
        name: String,
    },
    /// Print a model's sizes, RoPE parameters and checksum
    Info {
        /// Built-in name, GGUF file, Hugging Face folder or hf:ORG/NAME[@REVISION]
        #[arg(default_value = DEFAULT_MODEL)]
        model: String,
    },
    /// Run one prompt: token ids, the ten best next tokens, a greedy continuation
    ///
    /// Example: kvfuse model try smollm2-135m "The capital of France is"
    Try {
        /// Built-in name, GGUF file, Hugging Face folder or hf:ORG/NAME[@REVISION]
        model: String,
        prompt: String,
        /// Tokens to continue by
        #[arg(long, default_value_t = 16)]
        tokens: usize,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

pub fn run(command: Command) -> Result<()> {
    match command {
        Command::List => list(),
        Command::Pull { name } => {
            if name.starts_with("hf:") {
                say(resolve(&name)?.display().to_string())?;
                return Ok(());
            }
            builtin(&name).with_context(|| {
                let names: Vec<&str> = BUILTINS.iter().map(|b| b.name).collect();
                format!("'{name}' is not a built-in model (those are: {})", names.join(", "))
            })?;
            say(resolve(&name)?.display().to_string())?;
            Ok(())
        }
        Command::Info { model } => info(&model),
        Command::Try { model, prompt, tokens, json } => try_prompt(&model, &prompt, tokens, json),
    }
}

fn list() -> Result<()> {
    let mut rows = Vec::new();
    for model in BUILTINS {
        let path = model.cached_path()?;
        let place = if path.exists() { path.display().to_string() } else { "not fetched yet".to_owned() };
        rows.push(vec![
            model.name.to_owned(),
            format!("{:.0} MB", model.bytes as f64 / 1e6),
            place,
            model.description.to_owned(),
        ]);
    }
    say(table(&["name", "size", "file", "what it is"], &rows))?;
    Ok(())
}

fn info(spec: &str) -> Result<()> {
    let path = resolve(spec)?;
    let model = Model::load(spec)?;
    let c = model.decoder.config();
    let kv_bytes = 2 * 2 * c.layers * c.kv_heads * c.head_dim;
    say(format!(
        "file              {}\nsha256            {}\narchitecture      {}\nlayers            {}\nhidden size       {}\n\
         attention heads   {} (key/value heads {}, size {})\nintermediate size {}\nvocabulary        {}\n\
         context           {} tokens\nRoPE              base {}, {} dims, rotate-half\nKV cache          {} bytes a token at 16 bits",
        path.display(),
        model.sha256,
        c.architecture,
        c.layers,
        c.hidden,
        c.heads,
        c.kv_heads,
        c.head_dim,
        c.intermediate,
        c.vocab,
        c.context,
        c.rope.base,
        c.rope.dims,
        kv_bytes,
    ))?;
    Ok(())
}

fn try_prompt(spec: &str, prompt: &str, tokens: usize, json: bool) -> Result<()> {
    let model = Model::load(spec)?;
    let p = probe(&model, prompt, tokens)?;
    if json {
        say(serde_json::to_string(&p)?)?;
        return Ok(());
    }
    let rows: Vec<Vec<String>> = p
        .top10
        .iter()
        .map(|c| vec![format!("{:?}", c.text), c.id.to_string(), format!("{:.4}", c.logit)])
        .collect();
    say(format!(
        "token ids   {:?}\nprompt NLL  {:.4} nats a token\n\n{}\n\ngreedy      {:?}\n            {:?}",
        p.ids,
        p.nll_prompt,
        table(&["next token", "id", "logit"], &rows),
        p.greedy_text,
        p.greedy_ids
    ))?;
    Ok(())
}
