//! The tokenizer that a GGUF file's metadata describes.

use super::*;

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file's metadata describes.
    pub fn from_gguf(gguf: Metadata) -> Result<Self> {
        let path = gguf.path;
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
}

/// Which special tokens swallow the white space after them. llama.cpp has it of Phi 3 by the model's name
/// (`llama_vocab::impl::load`, src/llama-vocab.cpp): GGUF files do not say so.
struct StripsRight(bool);

impl StripsRight {
    fn of(gguf: Metadata) -> Self {
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
