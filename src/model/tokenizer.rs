//! Text to token ids and back, from GGUF metadata or a `tokenizer.json`.

use super::chat::{self, Chat};
use super::gguf::Gguf;
use crate::error::{Error, Result};
use crate::files;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{NFC, Prepend, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, decoders,
    normalizers,
};

/// Tokens that end a generation wherever a vocabulary has them, as llama.cpp has it (`llama_vocab`, src/llama-vocab.cpp):
/// GGUF files name one or two of them only.
const END_TOKENS: [&str; 27] = [
    "<|endoftext|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<EOT>",
    "< EOT >",
    "_<EOT>",
    "<end_of_utterance>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "</s>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<|return|>",
    "<|call|>",
    "<|fim_pad|>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<|flush|>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
    "<|calls|>",
];
/// `tokenizer.ggml.token_type` of control tokens, of words that are always tokens, and of single bytes.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;
/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

pub struct Tokenizer {
    path: PathBuf,
    /// Special tokens in a text are text to it.
    inner: tokenizers::Tokenizer,
    /// `inner` for texts that begin in the middle: no space is put in front.
    bare: OnceLock<tokenizers::Tokenizer>,
    /// `inner` that parses special tokens, for rendered chat templates.
    parsing: OnceLock<tokenizers::Tokenizer>,
    /// Prepended to every prompt when the model asks for it (BOS).
    lead: Vec<u32>,
    ends: Ends,
    /// Token ids that the model has an embedding for are below this.
    vocab: usize,
    chat: Option<Chat>,
    /// A rendered template is given the lead if it does not begin with it (llama.cpp); transformers takes it as it is.
    chat_lead: bool,
}

/// Tokens that end an answer.
#[derive(Default)]
struct Ends {
    all: BTreeSet<u32>,
    /// What ends a text, and what ends the assistant's turn.
    text: Option<u32>,
    turn: Option<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file's metadata describes.
    pub fn from_gguf(gguf: &Gguf, path: &Path) -> Result<Self> {
        let missing =
            |key: &str| Error::file(path, format!("metadata {key} is missing; use a HF folder instead"));
        let bad = |e: tokenizers::Error| Error::file(path, format!("unusable tokenizer metadata: {e}"));
        let tokens =
            gguf.strings("tokenizer.ggml.tokens")?.ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
        let kinds = gguf.integers("tokenizer.ggml.token_type")?.unwrap_or_default();
        if !kinds.is_empty() && kinds.len() != tokens.len() {
            return Err(Error::file(path, "tokenizer.ggml.token_type and tokens differ in length"));
        }
        let kind = gguf.string("tokenizer.ggml.model").unwrap_or_default();
        let pre = gguf.string("tokenizer.ggml.pre");
        let mut inner = match kind {
            "gpt2" => {
                let merges = gguf.strings("tokenizer.ggml.merges")?;
                let merges = merges.ok_or_else(|| missing("tokenizer.ggml.merges"))?;
                byte_level(path, &tokens, &merges, pre)?
            }
            "llama" => {
                let scores = gguf.floats("tokenizer.ggml.scores")?;
                let scores = scores.ok_or_else(|| missing("tokenizer.ggml.scores"))?;
                if scores.len() != tokens.len() {
                    return Err(Error::file(path, "tokenizer.ggml.scores and tokens differ in length"));
                }
                let unknown = gguf.integer("tokenizer.ggml.unknown_token_id")?.unwrap_or(0) as usize;
                let space = gguf.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
                sentence_piece(&tokens, &kinds, &scores, unknown, space).map_err(bad)?
            }
            other => {
                let problem =
                    format!("GGUF tokenizer '{other}' is not supported; use a HF folder with tokenizer.json");
                return Err(Error::file(path, problem));
            }
        };
        if gguf.boolean("tokenizer.ggml.add_eos_token")? == Some(true) {
            let problem =
                "tokenizer.ggml.add_eos_token ends every prompt before its answer; use another model";
            return Err(Error::file(path, problem));
        }
        for key in ["tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces"] {
            let off = gguf.boolean(key).is_ok_and(|flag| flag != Some(true));
            if !off {
                let problem = format!("{key} is not supported; use a HF folder with tokenizer.json");
                return Err(Error::file(path, problem));
            }
        }
        let strips = StripsRight::of(gguf);
        let of_kind = |wanted: i64| tokens.iter().zip(&kinds).filter(move |(_, kind)| **kind == wanted);
        let special =
            of_kind(CONTROL).map(|(t, _)| AddedToken::from(t.as_str(), true).rstrip(strips.strips(t)));
        inner.add_special_tokens(special.collect::<Vec<_>>()).map_err(bad)?;
        let own = of_kind(USER_DEFINED).map(|(t, _)| AddedToken::from(t.as_str(), false).normalized(false));
        inner.add_tokens(own.collect::<Vec<_>>()).map_err(bad)?;

        let id = |name: &str| -> Result<Option<u32>> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            // llama.cpp passes over ids beyond the vocabulary.
            Ok(gguf.integer(&key)?.filter(|id| (*id as usize) < tokens.len()).map(|id| id as u32))
        };
        let spm = kind == "llama";
        // Files of the SentencePiece family, and Llama 3's, want one unless they say otherwise, as llama.cpp has it.
        let wants = gguf.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(spm || pre == Some("llama-bpe"));
        let bos = id("bos")?.or((spm && tokens.len() > 1).then_some(1)).filter(|_| wants);
        let eos = id("eos")?.or((spm && tokens.len() > 2).then_some(2));
        let eot = id("eot")?;
        let named = END_TOKENS.iter().filter_map(|t| inner.token_to_id(t));
        let all = named.chain(eos).chain(eot).chain(id("eom")?).collect();
        let text_of =
            |id: Option<u32>| id.and_then(|id| tokens.get(id as usize)).cloned().unwrap_or_default();
        let chat = gguf.string("tokenizer.chat_template").map(|source| Chat {
            source: source.to_owned(),
            tokens: [
                ("bos_token".to_owned(), text_of(id("bos").ok().flatten().or(bos))),
                ("eos_token".to_owned(), text_of(eos)),
            ]
            .into(),
        });
        let ends = Ends { all, text: eos, turn: eot.or(eos) };
        Ok(Self::finish(path, inner, bos.into_iter().collect(), ends, chat, true))
    }

    /// Reads a Hugging Face `tokenizer.json` and what lies beside it: `tokenizer_config.json`, the chat template, and the ids
    /// that end an answer, of `generation_config.json` or else `config.json`. What the post-processor puts in front of a
    /// text (BOS) is put in front of prompts.
    pub fn from_file(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::file(path, "missing; a model folder needs a tokenizer.json"));
        }
        let bad = |e: tokenizers::Error| Error::file(path, format!("not a usable tokenizer.json: {e}"));
        let text = files::read_text(path)?;
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

    fn finish(
        path: &Path,
        mut inner: tokenizers::Tokenizer,
        lead: Vec<u32>,
        ends: Ends,
        chat: Option<Chat>,
        chat_lead: bool,
    ) -> Self {
        // Prompts are data: "<|im_end|>" in a passage is text, not an instruction to stop.
        inner.set_encode_special_tokens(true);
        Tokenizer {
            path: path.to_owned(),
            inner,
            bare: OnceLock::new(),
            parsing: OnceLock::new(),
            lead,
            ends,
            vocab: usize::MAX,
            chat,
            chat_lead,
        }
    }

    /// For a model of `vocab` embeddings. The vocabulary may name more tokens (Gemma 3 names one for images), as long as no
    /// text has them.
    pub(super) fn of_model(mut self, vocab: usize) -> Result<Self> {
        self.vocab = vocab;
        self.known(self.lead.clone())?;
        // Never generated: the model has no logit for it.
        self.ends.all.retain(|id| (*id as usize) < vocab);
        Ok(self)
    }

    /// Refuses token ids that the model has no embedding for.
    fn known(&self, ids: Vec<u32>) -> Result<Vec<u32>> {
        match ids.iter().find(|id| **id as usize >= self.vocab) {
            None => Ok(ids),
            Some(id) => {
                let problem = format!(
                    "token {id} is beyond the model's {} embeddings; use the tokenizer that belongs to the model",
                    self.vocab
                );
                Err(Error::file(&self.path, problem))
            }
        }
    }

    /// Token ids of a text by itself, without the BOS token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(&self.inner, text)
    }

    fn encode_with(&self, inner: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
        let encoding = inner.encode_fast(text, false);
        let encoding = encoding.map_err(|e| Error::file(&self.path, format!("cannot tokenize: {e}")))?;
        self.known(encoding.get_ids().to_vec())
    }

    /// Token ids of a whole prompt, with the BOS token if the model wants one.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode(text)?;
        Ok(self.lead.iter().copied().chain(ids).collect())
    }

    /// Token ids of a text that follows another: those of both together, less those of the first. Where the two grow into one
    /// token at the seam, the text is encoded by itself with nothing put in front, since the first one's tokens stand.
    pub fn continuation(&self, before: &str, text: &str) -> Result<Vec<u32>> {
        let first = self.encode(before)?;
        let both = self.encode(&format!("{before}{text}"))?;
        match both.strip_prefix(&first[..]) {
            Some(rest) => Ok(rest.to_vec()),
            None => self.encode_with(self.bare()?, text),
        }
    }

    /// [`Tokenizer::continuation`] of a user's message in the chat template: what the assistant answers.
    pub fn chat_continuation(&self, message: &str, text: &str) -> Result<Vec<u32>> {
        let before = self.render(message)?;
        let parsing = self.parsing();
        let first = self.encode_with(parsing, &before)?;
        let both = self.encode_with(parsing, &format!("{before}{text}"))?;
        match both.strip_prefix(&first[..]) {
            Some(rest) => Ok(rest.to_vec()),
            None => self.encode_with(self.bare()?, text),
        }
    }

    /// A user's message in the chat template, up to where the assistant answers.
    pub fn render(&self, message: &str) -> Result<String> {
        let chat = self.chat.as_ref();
        let chat =
            chat.ok_or_else(|| Error::file(&self.path, "the model has no chat template: leave --chat out"))?;
        chat.render(message, &self.path)
    }

    /// Token ids of a text as the first message of a user, in the model's chat template, up to where the assistant
    /// answers. The template's special tokens are parsed, the text's are not.
    pub fn encode_chat(&self, text: &str) -> Result<Vec<u32>> {
        let rendered = self.render(text)?;
        let ids = match self.names_special(text) {
            false => self.encode_with(self.parsing(), &rendered)?,
            true => self.encode_around(text, &rendered)?,
        };
        let lead = if !self.chat_lead || ids.starts_with(&self.lead) { &[][..] } else { &self.lead };
        Ok([lead, &ids].concat())
    }

    /// Whether a text spells a special token.
    fn names_special(&self, text: &str) -> bool {
        let added = self.inner.get_added_tokens_decoder();
        added.values().any(|t| t.special && !t.content.is_empty() && text.contains(&t.content))
    }

    /// A rendered template piece by piece: what is the user's is text, whatever it spells.
    fn encode_around(&self, text: &str, rendered: &str) -> Result<Vec<u32>> {
        // Where the template puts a text that it cannot have by itself is where it puts any.
        const MARK: &str = "kvfuse-user-text";
        let marked = self.render(MARK)?;
        let pieces: Vec<&str> = marked.split(MARK).collect();
        let own = [text, text.trim()].into_iter().find(|own| pieces.join(own) == rendered);
        let own = own.ok_or_else(|| {
            let problem = "the chat template changes a prompt that spells a special token; leave --chat out";
            Error::file(&self.path, problem)
        })?;
        let mut parsing = self.bare()?.clone();
        parsing.set_encode_special_tokens(false);
        let mut ids = self.encode_with(self.parsing(), pieces[0])?;
        for piece in &pieces[1..] {
            ids.extend(self.encode_with(self.bare()?, own)?);
            ids.extend(self.encode_with(&parsing, piece)?);
        }
        Ok(ids)
    }

    fn parsing(&self) -> &tokenizers::Tokenizer {
        self.parsing.get_or_init(|| {
            let mut parsing = self.inner.clone();
            parsing.set_encode_special_tokens(false);
            parsing
        })
    }

    fn bare(&self) -> Result<&tokenizers::Tokenizer> {
        if self.bare.get().is_none() {
            let bare = without_prefix(&self.inner)
                .map_err(|e| Error::file(&self.path, format!("not a usable tokenizer: {e}")))?;
            // Another thread may have been faster, with the same.
            let _ = self.bare.set(bare);
        }
        Ok(self.bare.get().unwrap_or(&self.inner))
    }

    /// Text of token ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| Error::file(&self.path, format!("cannot decode: {e}")))
    }

    /// Whether a token ends the text.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.all.contains(&id)
    }

    /// The token that ends a text, or with `chat` the assistant's turn, if the model names one.
    pub fn end(&self, chat: bool) -> Option<u32> {
        let end = if chat { self.ends.turn } else { self.ends.text };
        end.filter(|id| (*id as usize) < self.vocab)
    }

    /// Saves a `tokenizer.json`.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.inner.save(path, false).map_err(|e| Error::file(path, e.to_string()))
    }
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

/// The same tokenizer for a text that begins in the middle of another.
fn without_prefix(
    inner: &tokenizers::Tokenizer,
) -> std::result::Result<tokenizers::Tokenizer, tokenizers::Error> {
    /// No step puts anything in front.
    fn strip(step: &mut Value) {
        match step {
            Value::Array(steps) => {
                steps.retain(|s| s["type"] != "Prepend");
                steps.iter_mut().for_each(strip);
            }
            Value::Object(fields) => {
                for (name, off) in [("prepend_scheme", "never".into()), ("add_prefix_space", false.into())] {
                    if let Some(field) = fields.get_mut(name) {
                        *field = off;
                    }
                }
                fields.values_mut().filter(|v| v.is_array()).for_each(strip);
            }
            _ => {}
        }
    }
    let mut bare = inner.clone();
    if let Some(normalizer) = inner.get_normalizer() {
        let mut steps = Value::Array(vec![serde_json::to_value(normalizer)?]);
        strip(&mut steps);
        let kept = serde_json::json!({"type": "Sequence", "normalizers": steps});
        bare.with_normalizer(Some(serde_json::from_value::<NormalizerWrapper>(kept)?))?;
    }
    if let Some(words) = inner.get_pre_tokenizer() {
        let mut step = serde_json::to_value(words)?;
        strip(&mut step);
        bare.with_pre_tokenizer(Some(serde_json::from_value::<PreTokenizerWrapper>(step)?));
    }
    Ok(bare)
}

/// Which special tokens swallow the white space after them. llama.cpp has it of Phi 3 by the model's name
/// (`llama_vocab::impl::load`, src/llama-vocab.cpp): GGUF files do not say so.
struct StripsRight(bool);

impl StripsRight {
    fn of(gguf: &Gguf) -> Self {
        let name = gguf.string("general.name").unwrap_or_default().to_lowercase();
        StripsRight(name.contains("phi-3") || name.contains("phi3"))
    }

    fn strips(&self, token: &str) -> bool {
        self.0 && !["<unk>", "<s>", "<|endoftext|>"].contains(&token)
    }
}

/// What a word is to Qwen2's tokenizer (its published tokenizer.json): single digits, a letter's run with one sign before it,
/// signs, line ends, spaces.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Byte-level BPE (GPT-2 and its kin).
fn byte_level(
    path: &Path,
    tokens: &[String],
    merges: &[String],
    pre: Option<&str>,
) -> Result<tokenizers::Tokenizer> {
    let pre = match pre {
        // Aliases of one.
        Some("llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2") => {
            "llama-bpe"
        }
        Some("megrez" | "deepseek-r1-qwen" | "kormo") => "qwen2",
        Some("gpt2") => "gpt-2",
        Some(pre) => pre,
        None => "",
    };
    let bad = |e: tokenizers::Error| Error::file(path, format!("unusable tokenizer metadata: {e}"));
    let vocab: Vocab = tokens.iter().cloned().zip(0u32..).collect();
    let merges: Option<Vec<(String, String)>> =
        merges.iter().map(|m| m.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()))).collect();
    let merges = merges.ok_or_else(|| Error::file(path, "damaged metadata tokenizer.ggml.merges"))?;
    // Llama 3 takes a word that is a token as it is, whatever its merges say.
    let whole_words = pre == "llama-bpe";
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(whole_words).build();
    let mut inner = tokenizers::Tokenizer::new(bpe.map_err(bad)?);
    inner.with_pre_tokenizer(Some(pre_tokenizer(path, pre)?));
    if pre == "qwen2" {
        inner.with_normalizer(Some(NFC)).map_err(bad)?;
    }
    inner.with_decoder(Some(ByteLevel::default()));
    Ok(inner)
}

/// SentencePiece BPE (Llama 2, Mistral, Gemma, Phi 3): of two neighbours that make a token, those with the best score join
/// first. As merges: all ways to split each token in two tokens, best token first, as Hugging Face's conversion has it.
fn sentence_piece(
    tokens: &[String],
    kinds: &[i64],
    scores: &[f32],
    unknown: usize,
    space_prefix: bool,
) -> std::result::Result<tokenizers::Tokenizer, tokenizers::Error> {
    let vocab: Vocab = tokens.iter().cloned().zip(0u32..).collect();
    let plain = |i: &usize| !matches!(kinds.get(*i), Some(&CONTROL | &USER_DEFINED | &BYTE));
    let mut order: Vec<usize> = (0..tokens.len().min(scores.len())).filter(plain).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut merges = Vec::new();
    for token in order.into_iter().map(|i| &tokens[i]) {
        let cuts = token.char_indices().rev().filter(|(at, _)| *at > 0).map(|(at, _)| token.split_at(at));
        let known = cuts.filter(|(left, right)| vocab.contains_key(*left) && vocab.contains_key(*right));
        merges.extend(known.map(|(left, right)| (left.to_owned(), right.to_owned())));
    }
    let mut builder = BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = tokens.get(unknown) {
        builder = builder.unk_token(unknown.clone());
    }
    let mut inner = tokenizers::Tokenizer::new(builder.build()?);
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if space_prefix {
        steps.push(Prepend::new(SPACE.to_owned()).into());
    }
    steps.push(Replace::new(" ", SPACE)?.into());
    inner.with_normalizer(Some(normalizers::Sequence::new(steps)))?;
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new(SPACE, " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if space_prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    inner.with_decoder(Some(decoders::sequence::Sequence::new(decoders)));
    Ok(inner)
}

/// The pre-tokenizer that `tokenizer.ggml.pre` names.
fn pre_tokenizer(path: &Path, name: &str) -> Result<PreTokenizerWrapper> {
    let bytes = ByteLevel::new(false, true, true);
    match name {
        "smollm" => Ok(Sequence::new(vec![Digits::new(true).into(), bytes.into()]).into()),
        "qwen2" | "llama-bpe" => {
            let bad = |e: tokenizers::Error| Error::file(path, format!("unusable pre-tokenizer: {e}"));
            // Llama 3 differs in that up to three digits stay together.
            let digits = if name == "qwen2" { r"\p{N}" } else { r"\p{N}{1,3}" };
            let pattern = SplitPattern::Regex(QWEN2_WORDS.replace(r"|\p{N}|", &format!("|{digits}|")));
            let words = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(bad)?;
            Ok(Sequence::new(vec![words.into(), ByteLevel::new(false, true, false).into()]).into())
        }
        "gpt-2" => Ok(bytes.into()),
        // What llama.cpp then takes is nobody's own.
        "" | "default" => {
            let problem = "does not say how words are cut (tokenizer.ggml.pre is missing or 'default'); convert the model \
                           again with a current converter, or use its HF folder";
            Err(Error::file(path, problem))
        }
        _ => {
            let problem =
                format!("pre-tokenizer '{name}' is not supported; use a HF folder with tokenizer.json");
            Err(Error::file(path, problem))
        }
    }
}
