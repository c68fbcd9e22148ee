//! Text to token ids and back, from GGUF metadata or a `tokenizer.json`.

use super::chat;
use super::gguf::Gguf;
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
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

/// Ends of text that chat and base models of the supported families use.
const END_TOKENS: [&str; 8] = [
    "<|endoftext|>",
    "<|im_end|>",
    "</s>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<eos>",
    "<end_of_turn>",
    "<|end|>",
];
/// `tokenizer.ggml.token_type` of control tokens, of words that are always tokens, and of single bytes.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;
/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    /// Prepended to every prompt when the model asks for it (BOS).
    lead: Vec<u32>,
    ends: BTreeSet<u32>,
    /// Token ids that the model has an embedding for are below this.
    vocab: usize,
    /// Jinja source of the chat template, if the model has one.
    template: Option<String>,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file's metadata describes.
    pub fn from_gguf(gguf: &Gguf, path: &Path) -> Result<Self> {
        let missing =
            |key: &str| Error::file(path, format!("metadata {key} is missing; use a HF folder instead"));
        let bad = |e: tokenizers::Error| Error::file(path, format!("unusable tokenizer metadata: {e}"));
        let tokens = gguf.strings("tokenizer.ggml.tokens").ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
        let kinds = gguf.integers("tokenizer.ggml.token_type").unwrap_or_default();
        let kind = gguf.string("tokenizer.ggml.model").unwrap_or_default();
        let mut inner = match kind {
            "gpt2" => {
                let merges = gguf.strings("tokenizer.ggml.merges");
                let merges = merges.ok_or_else(|| missing("tokenizer.ggml.merges"))?;
                let pre = gguf.string("tokenizer.ggml.pre").unwrap_or_default();
                byte_level(path, &tokens, &merges, pre)?
            }
            "llama" => {
                let scores = gguf.floats("tokenizer.ggml.scores");
                let scores = scores.ok_or_else(|| missing("tokenizer.ggml.scores"))?;
                let unknown = gguf.integer("tokenizer.ggml.unknown_token_id").unwrap_or(0) as usize;
                let space = gguf.boolean("tokenizer.ggml.add_space_prefix").unwrap_or(true);
                sentence_piece(&tokens, &kinds, &scores, unknown, space).map_err(bad)?
            }
            other => {
                let problem =
                    format!("GGUF tokenizer '{other}' is not supported; use a HF folder with tokenizer.json");
                return Err(Error::file(path, problem));
            }
        };
        let of_kind = |wanted: i64| tokens.iter().zip(&kinds).filter(move |(_, kind)| **kind == wanted);
        let special = of_kind(CONTROL).map(|(t, _)| AddedToken::from(t.as_str(), true));
        inner.add_special_tokens(special.collect::<Vec<_>>()).map_err(bad)?;
        let own = of_kind(USER_DEFINED).map(|(t, _)| AddedToken::from(t.as_str(), false).normalized(false));
        inner.add_tokens(own.collect::<Vec<_>>()).map_err(bad)?;

        // Files of the SentencePiece family want one unless they say otherwise, as llama.cpp has it.
        let bos = gguf.boolean("tokenizer.ggml.add_bos_token").unwrap_or(kind == "llama");
        let bos = gguf.integer("tokenizer.ggml.bos_token_id").filter(|_| bos).map(|id| id as u32);
        let end = gguf.integer("tokenizer.ggml.eos_token_id").map(|id| id as u32);
        let template = gguf.string("tokenizer.chat_template").map(str::to_owned);
        Ok(Self::finish(path, inner, bos.into_iter().collect(), end, template))
    }

    /// Reads a Hugging Face `tokenizer.json`, and the chat template beside it if there is one. What its post-processor puts
    /// in front of a text (BOS) is put in front of prompts.
    pub fn from_file(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::file(path, "missing; a model folder needs a tokenizer.json"));
        }
        let bad = |e| Error::file(path, format!("not a usable tokenizer.json: {e}"));
        let inner = tokenizers::Tokenizer::from_file(path).map_err(bad)?;
        let (with, without) = (inner.encode_fast("a", true), inner.encode_fast("a", false));
        let (with, without) = (with.map_err(bad)?, without.map_err(bad)?);
        let lead = with.get_ids().windows(without.len().max(1)).position(|w| w == without.get_ids());
        let lead = with.get_ids()[..lead.unwrap_or(0)].to_vec();
        let template = chat::template_beside(path)?;
        Ok(Self::finish(path, inner, lead, None, template))
    }

    fn finish(
        path: &Path,
        mut inner: tokenizers::Tokenizer,
        lead: Vec<u32>,
        end: Option<u32>,
        template: Option<String>,
    ) -> Self {
        // Prompts are data: "<|im_end|>" in a passage is text, not an instruction to stop.
        inner.set_encode_special_tokens(true);
        let named = END_TOKENS.iter().filter_map(|t| inner.token_to_id(t));
        let ends = named.chain(end).collect();
        Tokenizer { path: path.to_owned(), inner, lead, ends, vocab: usize::MAX, template }
    }

    /// For a model of `vocab` embeddings. The vocabulary may name more tokens (Gemma 3 names one for images), as long as no
    /// text has them.
    pub(super) fn of_model(mut self, vocab: usize) -> Result<Self> {
        self.vocab = vocab;
        self.known(self.lead.iter().chain(&self.ends).copied().collect())?;
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

    /// Token ids of a text that continues another: nothing is put in front.
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

    /// Token ids of a text as the first message of a user, in the model's chat template, up to where the assistant
    /// answers. The template's special tokens are parsed, the text's are not.
    pub fn encode_chat(&self, text: &str) -> Result<Vec<u32>> {
        let template = self
            .template
            .as_deref()
            .ok_or_else(|| Error::file(&self.path, "the model has no chat template: leave --chat out"))?;
        let name = |id: Option<&u32>| id.and_then(|&id| self.inner.id_to_token(id)).unwrap_or_default();
        let (before, after) = chat::around_user(template, &name(self.lead.first()), &name(self.ends.first()))
            .map_err(|problem| Error::file(&self.path, format!("chat template: {problem}")))?;
        let mut parsing = self.inner.clone();
        parsing.set_encode_special_tokens(false);
        let (before, after) = (self.encode_with(&parsing, &before)?, self.encode_with(&parsing, &after)?);
        // Most templates write the BOS themselves.
        let lead = if before.starts_with(&self.lead) { &[][..] } else { &self.lead };
        Ok([lead, &before, &self.encode(text)?, &after].concat())
    }

    /// Text of token ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|e| Error::file(&self.path, format!("cannot decode: {e}")))
    }

    /// Whether a token ends the text.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// The token that ends a text; the first of the vocabulary if the model names none.
    pub fn end(&self) -> u32 {
        self.ends.first().copied().unwrap_or(0)
    }

    /// Saves a `tokenizer.json`.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.inner.save(path, false).map_err(|e| Error::file(path, e.to_string()))
    }
}

/// What a word is to Qwen2's tokenizer (its published tokenizer.json): single digits, a letter's run with one sign before it,
/// signs, line ends, spaces.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Byte-level BPE (GPT-2 and its kin).
fn byte_level(path: &Path, tokens: &[String], merges: &[String], pre: &str) -> Result<tokenizers::Tokenizer> {
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
        "gpt-2" | "default" | "" => Ok(bytes.into()),
        _ => {
            let problem =
                format!("pre-tokenizer '{name}' is not supported; use a HF folder with tokenizer.json");
            Err(Error::file(path, problem))
        }
    }
}
