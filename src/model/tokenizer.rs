//! Text to token ids and back, from GGUF metadata or a `tokenizer.json`.

use super::gguf::Gguf;
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

/// Ends of text that chat and base models of the supported families use.
const END_TOKENS: [&str; 5] = ["<|endoftext|>", "<|im_end|>", "</s>", "<|end_of_text|>", "<|eot_id|>"];
/// `tokenizer.ggml.token_type` of control tokens.
const CONTROL: i64 = 3;

pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    /// Prepended to every prompt when the model asks for it.
    bos: Option<u32>,
    ends: BTreeSet<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file's metadata describes.
    pub fn from_gguf(gguf: &Gguf, path: &Path) -> Result<Self> {
        let missing =
            |key: &str| Error::file(path, format!("metadata {key} is missing; use a HF folder instead"));
        let model = gguf.string("tokenizer.ggml.model").unwrap_or_default();
        if model != "gpt2" {
            let problem =
                format!("GGUF tokenizer '{model}' is not supported; use a HF folder with tokenizer.json");
            return Err(Error::file(path, problem));
        }
        let tokens = gguf.strings("tokenizer.ggml.tokens").ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
        let merges = gguf.strings("tokenizer.ggml.merges").ok_or_else(|| missing("tokenizer.ggml.merges"))?;
        let pre_name = gguf.string("tokenizer.ggml.pre").unwrap_or_default();
        let pre = pre_tokenizer(path, pre_name)?;
        let bad = |e: tokenizers::Error| Error::file(path, format!("unusable tokenizer metadata: {e}"));

        let vocab: Vocab = tokens.iter().cloned().zip(0u32..).collect();
        let merges: Option<Vec<(String, String)>> =
            merges.iter().map(|m| m.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()))).collect();
        let merges = merges.ok_or_else(|| missing("tokenizer.ggml.merges"))?;
        let bpe = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(bad)?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        inner.with_pre_tokenizer(Some(pre));
        if pre_name == "qwen2" {
            inner.with_normalizer(Some(NFC)).map_err(bad)?;
        }
        inner.with_decoder(Some(ByteLevel::default()));
        let kinds = gguf.integers("tokenizer.ggml.token_type").unwrap_or_default();
        let special = tokens.iter().zip(&kinds).filter(|(_, kind)| **kind == CONTROL);
        let special: Vec<AddedToken> = special.map(|(t, _)| AddedToken::from(t.as_str(), true)).collect();
        inner.add_special_tokens(special).map_err(bad)?;

        let bos = gguf.boolean("tokenizer.ggml.add_bos_token").unwrap_or(false);
        let bos = gguf.integer("tokenizer.ggml.bos_token_id").filter(|_| bos).map(|id| id as u32);
        let end = gguf.integer("tokenizer.ggml.eos_token_id").map(|id| id as u32);
        Ok(Self::finish(path, inner, bos, end))
    }

    /// Reads a Hugging Face `tokenizer.json`. No BOS is added: see docs/models.md.
    pub fn from_file(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::file(path, "missing; a model folder needs a tokenizer.json"));
        }
        let inner = tokenizers::Tokenizer::from_file(path)
            .map_err(|e| Error::file(path, format!("not a usable tokenizer.json: {e}")))?;
        Ok(Self::finish(path, inner, None, None))
    }

    fn finish(path: &Path, mut inner: tokenizers::Tokenizer, bos: Option<u32>, end: Option<u32>) -> Self {
        // Prompts are data: "<|im_end|>" in a passage is text, not an instruction to stop.
        inner.set_encode_special_tokens(true);
        let named = END_TOKENS.iter().filter_map(|t| inner.token_to_id(t));
        let ends = named.chain(end).collect();
        Tokenizer { path: path.to_owned(), inner, bos, ends }
    }

    /// Token ids of a text that continues another: nothing is put in front.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false);
        let encoding = encoding.map_err(|e| Error::file(&self.path, format!("cannot tokenize: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of a whole prompt, with the BOS token if the model wants one.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode(text)?;
        Ok(self.bos.into_iter().chain(ids).collect())
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

/// The pre-tokenizer that `tokenizer.ggml.pre` names.
fn pre_tokenizer(path: &Path, name: &str) -> Result<PreTokenizerWrapper> {
    let bytes = ByteLevel::new(false, true, true);
    match name {
        "smollm" => Ok(Sequence::new(vec![Digits::new(true).into(), bytes.into()]).into()),
        "qwen2" => {
            let bad = |e: tokenizers::Error| Error::file(path, format!("unusable pre-tokenizer: {e}"));
            let pattern = SplitPattern::Regex(QWEN2_WORDS.to_owned());
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
