//! A Hugging Face `tokenizer.json` and what lies beside it.

use super::*;

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json` and what lies beside it: `tokenizer_config.json`, the chat template, and the ids
    /// that end an answer, of `generation_config.json` or else `config.json`. What the post-processor puts in front of a
    /// text (BOS) is put in front of prompts.
    pub fn from_file(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::file(path, "missing; a model folder needs a tokenizer.json"));
        }
        let bad = |e: tokenizers::Error| Error::file(path, format!("not a usable tokenizer.json: {e}"));
        let text = files::read_text(path)?;
        // The crate panics where the JSON of a decoder is malformed, and where a template names a token that it does not list.
        let value: Value = serde_json::from_str(&text).map_err(|e| bad(e.into()))?;
        if let Some(token) = unlisted(&value["post_processor"]) {
            return Err(Error::file(
                path,
                format!("its post_processor does not list the token {token}; fetch it again"),
            ));
        }
        let mut inner: tokenizers::Tokenizer = text.parse().map_err(bad)?;
        // What a trainer cut or filled its batches to; transformers takes neither over.
        inner.with_truncation(None).map_err(bad)?;
        inner.with_padding(None);
        let beside = |name: &str| -> Result<Value> {
            let path = path.with_file_name(name);
            if !path.exists() {
                return Ok(Value::Null);
            }
            files::read_json(&path)
        };
        let config = beside("tokenizer_config.json")?;
        if config["split_special_tokens"] == true {
            let problem = "split_special_tokens is not supported; remove it";
            return Err(Error::file(path.with_file_name("tokenizer_config.json"), problem));
        }
        add_tokens(&mut inner, &config, path)?;
        let tokens = special_tokens(&config);
        let lead = lead(&inner, path)?;
        let eos = tokens.get("eos_token").and_then(|t| inner.token_to_id(t));
        let generation = eos_ids(&beside("generation_config.json")?);
        let ids = if generation.is_empty() { eos_ids(&beside("config.json")?) } else { generation };
        let mut all: BTreeSet<u32> = ids.iter().copied().chain(eos).collect();
        if all.is_empty() {
            all.extend(END_TOKENS.iter().filter_map(|t| inner.token_to_id(t)));
        }
        let text_end = eos.or(ids.first().copied()).or(all.first().copied());
        let ends = Ends { all, text: text_end, turn: text_end };
        let chat = chat::template_beside(path, &config)?.map(|source| Chat { source, tokens });
        Ok(Self::finish(path, inner, lead, ends, chat, false))
    }
}

/// A special token that a template, or one of a sequence of processors, names without saying which ids it has.
fn unlisted(processor: &Value) -> Option<&str> {
    let inner = processor["processors"].as_array().into_iter().flatten().find_map(unlisted);
    let pieces = ["single", "pair"].into_iter().filter_map(|list| processor[list].as_array()).flatten();
    let mut named = pieces.filter_map(|piece| piece["SpecialToken"]["id"].as_str());
    inner.or_else(|| named.find(|token| processor["special_tokens"].get(token).is_none()))
}

/// What the post-processor of a `tokenizer.json` puts in front of a text.
fn lead(inner: &tokenizers::Tokenizer, path: &Path) -> Result<Vec<u32>> {
    let bad = |e| Error::file(path, format!("not a usable tokenizer.json: {e}"));
    let ids = |special: bool| inner.encode_fast("a", special).map(|e| e.get_ids().to_vec()).map_err(bad);
    let (with, without) = (ids(true)?, ids(false)?);
    let around = (0..=with.len().saturating_sub(without.len())).find(|&at| with[at..].starts_with(&without));
    let at = around.ok_or_else(|| Error::file(path, "its post_processor changes a text's own tokens"))?;
    if with.len() > at + without.len() {
        let problem =
            "its post_processor appends a token, which would end every prompt before its answer; remove it";
        return Err(Error::file(path, problem));
    }
    Ok(with[..at].to_vec())
}

/// Tokens of `tokenizer_config.json`: those that `tokenizer.json` lacks are added at its end, and of those that it has the
/// flags count (transformers 5).
fn add_tokens(inner: &mut tokenizers::Tokenizer, config: &Value, path: &Path) -> Result<()> {
    let path = path.with_file_name("tokenizer_config.json");
    let Some(named) = config["added_tokens_decoder"].as_object() else { return Ok(()) };
    let mut named: Vec<(u32, AddedToken)> = named
        .iter()
        .map(|(id, token)| {
            let flag = |name: &str| token[name].as_bool().unwrap_or(false);
            let content = token["content"].as_str()?;
            let added = AddedToken::from(content, flag("special"))
                .single_word(flag("single_word"))
                .lstrip(flag("lstrip"))
                .rstrip(flag("rstrip"))
                .normalized(token["normalized"].as_bool().unwrap_or(!flag("special")));
            Some((id.parse().ok()?, added))
        })
        .collect::<Option<_>>()
        .ok_or_else(|| Error::file(&path, "damaged added_tokens_decoder"))?;
    named.sort_unstable_by_key(|(id, _)| *id);
    for (id, token) in named {
        let content = token.content.clone();
        let known = inner.token_to_id(&content).is_some();
        inner.add_tokens([token]).map_err(|e| Error::file(&path, e.to_string()))?;
        if !known && inner.token_to_id(&content) != Some(id) {
            let problem = format!(
                "added_tokens_decoder gives token {id} ('{content}') that tokenizer.json lacks and would number otherwise; \
                 save the tokenizer again"
            );
            return Err(Error::file(&path, problem));
        }
    }
    Ok(())
}

/// Names and texts of the special tokens of a `tokenizer_config.json`, each a string or an object with `content`.
fn special_tokens(config: &Value) -> BTreeMap<String, String> {
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        other => other.get("content").and_then(Value::as_str).map(str::to_owned),
    };
    let named = config.as_object().into_iter().flatten().filter(|(name, _)| name.ends_with("_token"));
    named.filter_map(|(name, value)| Some((name.clone(), text(value)?))).collect()
}

/// `eos_token_id`: a number, or a list of them.
fn eos_ids(config: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match &config["eos_token_id"] {
        Value::Array(ids) => ids.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}
