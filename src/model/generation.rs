//! What a folder's `generation_config.json` says of greedy answers, as transformers 5 takes it
//! (`generation/utils.py`, `_get_logits_processor`). Sampling settings say nothing of them.

use super::probe::argmax;
use crate::error::{Error, Result};
use serde_json::Value;
use std::borrow::Cow;
use std::path::Path;

/// How the next token of a greedy answer is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Divides positive logits of tokens that the prompt or the answer has, multiplies negative ones. 1 changes nothing.
    repetition_penalty: f32,
}

impl Default for Generation {
    fn default() -> Self {
        Generation { repetition_penalty: 1.0 }
    }
}

/// Fields that change greedy answers and are not supported, each with the numbers that change nothing. Lists change
/// nothing when empty.
const OTHERS: [(&str, &[f64]); 19] = [
    ("bad_words_ids", &[]),
    ("begin_suppress_tokens", &[]),
    ("constraints", &[]),
    ("dola_layers", &[]),
    ("encoder_no_repeat_ngram_size", &[0.0]),
    ("encoder_repetition_penalty", &[1.0]),
    ("exponential_decay_length_penalty", &[]),
    ("force_words_ids", &[]),
    ("forced_bos_token_id", &[]),
    ("forced_eos_token_id", &[]),
    ("guidance_scale", &[1.0]),
    ("min_length", &[0.0]),
    ("min_new_tokens", &[0.0]),
    ("no_repeat_ngram_size", &[0.0]),
    ("num_beams", &[1.0]),
    ("penalty_alpha", &[0.0]),
    ("sequence_bias", &[]),
    ("stop_strings", &[]),
    ("suppress_tokens", &[]),
];

impl Generation {
    /// # Errors
    /// Names a field that would change greedy answers and is not supported.
    pub fn read(value: &Value, path: &Path) -> Result<Self> {
        let set = |(name, neutral): &(&str, &[f64])| match value.get(*name) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(fields)) => !fields.is_empty(),
            Some(other) => other.as_f64().is_none_or(|x| !neutral.contains(&x)),
        };
        if let Some((name, _)) = OTHERS.iter().find(|field| set(field)) {
            let problem = format!("{name} is not supported; remove it to measure answers without it");
            return Err(Error::file(path, problem));
        }
        let repetition_penalty = match value.get("repetition_penalty") {
            None | Some(Value::Null) => 1.0,
            Some(other) => match other.as_f64().filter(|p| *p > 0.0 && p.is_finite()) {
                Some(penalty) => penalty as f32,
                None => return Err(Error::file(path, "repetition_penalty must be a number above 0")),
            },
        };
        Ok(Generation { repetition_penalty })
    }

    /// The next token, of logits `[vocab]` after a prompt and the answer so far.
    pub fn next(&self, logits: &[f32], prompt: &[u32], answer: &[u32]) -> u32 {
        argmax(&self.scores(logits, prompt, answer))
    }

    fn scores<'a>(&self, logits: &'a [f32], prompt: &[u32], answer: &[u32]) -> Cow<'a, [f32]> {
        if self.repetition_penalty == 1.0 {
            return Cow::Borrowed(logits);
        }
        let mut scores = logits.to_vec();
        for &token in prompt.iter().chain(answer) {
            // From the logit itself: a token counts once however often it came.
            let logit = logits[token as usize];
            let scale = if logit < 0.0 { self.repetition_penalty } else { 1.0 / self.repetition_penalty };
            scores[token as usize] = logit * scale;
        }
        Cow::Owned(scores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<Generation> {
        Generation::read(&value, Path::new("generation_config.json"))
    }

    #[test]
    fn a_repeated_token_pays_once() {
        let generation = read(json!({"repetition_penalty": 2.0, "do_sample": true, "top_k": 20})).unwrap();
        let logits = [3.0, 2.0, -1.0, -1.5];
        assert_eq!(generation.scores(&logits, &[0, 0], &[2])[..], [1.5, 2.0, -2.0, -1.5]);
        assert_eq!(generation.next(&logits, &[0], &[]), 1);
        assert_eq!(Generation::default().next(&logits, &[0], &[]), 0);
    }

    #[test]
    fn what_is_not_supported_is_named_unless_it_changes_nothing() {
        assert_eq!(read(Value::Null).unwrap(), Generation::default());
        let neutral = json!({"num_beams": 1, "suppress_tokens": [], "min_length": 0, "guidance_scale": null,
            "sequence_bias": {}, "stop_strings": null});
        assert_eq!(read(neutral).unwrap(), Generation::default());
        for (name, value) in [
            ("num_beams", json!(4)),
            ("suppress_tokens", json!([5])),
            ("stop_strings", json!("\n")),
            ("forced_bos_token_id", json!(1)),
            ("no_repeat_ngram_size", json!(3)),
            ("repetition_penalty", json!("high")),
        ] {
            let error = read(json!({ name: value })).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("generation_config.json"), "{error}");
        }
    }
}
