//! Text to token ids and back, from GGUF metadata or a `tokenizer.json`.

mod from_file;
mod from_gguf;

use super::chat::{self, Chat, Message};
use super::gguf::Metadata;
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
        self.render_messages(&[Message::user(message)])
    }

    fn render_messages(&self, messages: &[Message]) -> Result<String> {
        let chat = self.chat.as_ref();
        let chat =
            chat.ok_or_else(|| Error::file(&self.path, "the model has no chat template: leave --chat out"))?;
        chat.render(messages, &self.path)
    }

    /// Token ids of a text as the first message of a user, in the model's chat template, up to where the assistant
    /// answers. The template's special tokens are parsed, the text's are not.
    pub fn encode_chat(&self, text: &str) -> Result<Vec<u32>> {
        let rendered = self.render(text)?;
        let ids = match self.names_special(text) {
            false => self.encode_with(self.parsing(), &rendered)?,
            true => self.encode_around(text, &rendered)?,
        };
        Ok(self.with_chat_lead(ids))
    }

    /// Token ids of a rendered template, behind the BOS token if the model wants one and the template has not put it.
    fn with_chat_lead(&self, ids: Vec<u32>) -> Vec<u32> {
        let lead = if !self.chat_lead || ids.starts_with(&self.lead) { &[][..] } else { &self.lead };
        [lead, &ids].concat()
    }

    /// Token ids of a conversation in the model's chat template, up to where the assistant answers.
    ///
    /// # Errors
    /// A message that spells a special token: as text it cannot be told from the template's own.
    pub fn encode_messages(&self, messages: &[Message]) -> Result<Vec<u32>> {
        if let [Message { role, content }] = messages
            && role == "user"
        {
            return self.encode_chat(content);
        }
        if messages.iter().any(|m| self.names_special(&m.content)) {
            return Err(Error::argument("a message spells one of the model's special tokens; leave it out"));
        }
        let rendered = self.render_messages(messages)?;
        Ok(self.with_chat_lead(self.encode_with(self.parsing(), &rendered)?))
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
