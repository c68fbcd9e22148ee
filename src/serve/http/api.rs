//! What clients send and what they get: OpenAI's completions and chat completions, as far as a greedy server has them.

use crate::model::{Message, Model, Tokenizer};
use crate::serve::job::{Finish, Job};
use serde::Deserialize;
use serde_json::{Value, json};

/// A request that cannot be served, with its HTTP status.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    pub status: u16,
    pub message: String,
    /// The field at fault.
    pub param: Option<&'static str>,
}

impl Refusal {
    pub fn bad(param: &'static str, message: impl Into<String>) -> Self {
        Refusal { status: 400, message: message.into(), param: Some(param) }
    }

    pub fn body(&self) -> Value {
        let kind = match self.status {
            404 => "not_found_error",
            400..500 => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}})
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn all(self) -> Vec<String> {
        match self {
            OneOrMany::One(text) => vec![text],
            OneOrMany::Many(texts) => texts,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    Tokens(Vec<u32>),
    Text(OneOrMany),
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct StreamOptions {
    #[serde(default)]
    pub include_usage: bool,
}

/// The body of either interface. Fields that would change an answer and are not honoured are refused by name.
#[derive(Debug, Clone, Deserialize)]
pub struct Body {
    pub model: Option<String>,
    pub prompt: Option<Prompt>,
    pub messages: Option<Vec<Message>>,
    pub max_tokens: Option<usize>,
    pub max_completion_tokens: Option<usize>,
    #[serde(default)]
    pub stream: bool,
    pub stream_options: Option<StreamOptions>,
    pub stop: Option<OneOrMany>,
    pub temperature: Option<f64>,
    pub n: Option<usize>,
    pub best_of: Option<usize>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub logprobs: Option<Value>,
    pub echo: Option<bool>,
    pub suffix: Option<String>,
    pub logit_bias: Option<Value>,
    pub tools: Option<Value>,
    pub response_format: Option<Value>,
    /// Go on behind the model's end of text (vLLM).
    #[serde(default)]
    pub ignore_eos: bool,
    /// Requests share pages only with those of the same salt (vLLM).
    #[serde(default)]
    pub cache_salt: String,
}

/// Tokens of an answer where a client does not say.
const USUAL_TOKENS: usize = 16;
const USUAL_CHAT_TOKENS: usize = 256;

impl Body {
    /// The job that it asks for; its id is yet to be given.
    pub fn job(self, model: &Model, name: &str, chat: bool) -> Result<Job, Refusal> {
        let (tokenizer, context) = (&model.tokenizer, model.decoder.context());
        self.check(name)?;
        let unusable = |param| move |e: crate::error::Error| Refusal::bad(param, e.to_string());
        let prompt = match (chat, self.prompt, self.messages) {
            (true, _, Some(messages)) if !messages.is_empty() => {
                tokenizer.encode_messages(&messages).map_err(unusable("messages"))?
            }
            (true, ..) => return Err(Refusal::bad("messages", "messages must be a list of at least one")),
            (false, Some(Prompt::Tokens(ids)), _) => ids,
            (false, Some(Prompt::Text(text)), _) => match &text.all()[..] {
                [text] => tokenizer.encode_prompt(text).map_err(unusable("prompt"))?,
                _ => return Err(Refusal::bad("prompt", "one prompt a request; send several requests")),
            },
            (false, None, _) => return Err(Refusal::bad("prompt", "prompt is missing")),
        };
        if prompt.is_empty() {
            return Err(Refusal::bad("prompt", "the prompt has no tokens"));
        }
        let vocab = model.decoder.config().vocab;
        if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab) {
            return Err(Refusal::bad("prompt", format!("token {id} is beyond the model's {vocab}")));
        }
        let usual = if chat { USUAL_CHAT_TOKENS } else { USUAL_TOKENS };
        let asked = self.max_completion_tokens.or(self.max_tokens);
        if asked == Some(0) {
            return Err(Refusal::bad("max_tokens", "max_tokens must be at least 1"));
        }
        let room = context.saturating_sub(prompt.len());
        let max_tokens = asked.unwrap_or(usual.min(room.max(1)));
        if max_tokens > room {
            let message = format!(
                "the model's context is {context} tokens; the prompt has {} and {max_tokens} are asked for",
                prompt.len()
            );
            return Err(Refusal::bad("max_tokens", message));
        }
        Ok(Job {
            id: 0,
            tenant: self.cache_salt,
            prompt,
            max_tokens,
            stop: self.stop.map(OneOrMany::all).unwrap_or_default(),
            ignore_end: self.ignore_eos,
            keep_logits: 0,
        })
    }

    fn check(&self, model: &str) -> Result<(), Refusal> {
        if let Some(asked) = self.model.as_ref().filter(|m| *m != model) {
            let message = format!("the model '{asked}' is not served; '{model}' is");
            return Err(Refusal { status: 404, message, param: Some("model") });
        }
        let greedy = "answers are greedy: send temperature 0 or leave it out";
        let not = |set: bool, param, why: &str| if set { Err(Refusal::bad(param, why)) } else { Ok(()) };
        not(self.temperature.is_some_and(|t| t != 0.0), "temperature", greedy)?;
        not(self.n.is_some_and(|n| n != 1), "n", "one answer a request; leave n out")?;
        not(self.best_of.is_some_and(|n| n != 1), "best_of", "one answer a request; leave best_of out")?;
        not(
            self.presence_penalty.is_some_and(|p| p != 0.0),
            "presence_penalty",
            "not supported; leave it out",
        )?;
        not(
            self.frequency_penalty.is_some_and(|p| p != 0.0),
            "frequency_penalty",
            "not supported; leave it out",
        )?;
        let empty = |v: &Value| matches!(v, Value::Null | Value::Bool(false));
        not(self.logprobs.as_ref().is_some_and(|v| !empty(v)), "logprobs", "not supported; leave it out")?;
        not(self.echo == Some(true), "echo", "not supported; leave it out")?;
        not(self.suffix.as_ref().is_some_and(|s| !s.is_empty()), "suffix", "not supported; leave it out")?;
        not(
            self.logit_bias.as_ref().is_some_and(|v| !empty(v)),
            "logit_bias",
            "not supported; leave it out",
        )?;
        not(self.tools.as_ref().is_some_and(|v| !empty(v)), "tools", "not supported; leave it out")?;
        let text = |v: &Value| empty(v) || v.get("type").and_then(Value::as_str) == Some("text");
        not(
            self.response_format.as_ref().is_some_and(|v| !text(v)),
            "response_format",
            "only text is supported",
        )
    }
}

/// OpenAI's word for why an answer ended.
pub fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::TooLarge | Finish::Aborted => "abort",
    }
}

/// What an answer is put into.
pub struct Envelope {
    pub id: String,
    pub model: String,
    pub created: u64,
    pub chat: bool,
}

impl Envelope {
    fn object(&self, kind: &str, choice: Value, usage: Option<Value>) -> Value {
        let mut out = json!({
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": [choice],
        });
        if let Some(usage) = usage {
            out["usage"] = usage;
        }
        out
    }

    /// A whole answer.
    pub fn whole(&self, text: &str, finish: Finish, usage: Value) -> Value {
        let reason = reason(finish);
        if self.chat {
            let message = json!({"role": "assistant", "content": text});
            let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": reason});
            return self.object("chat.completion", choice, Some(usage));
        }
        let choice = json!({"index": 0, "text": text, "logprobs": null, "finish_reason": reason});
        self.object("text_completion", choice, Some(usage))
    }

    /// A piece of a streamed one.
    pub fn piece(&self, text: &str, first: bool, finish: Option<Finish>) -> Value {
        let reason = finish.map(reason);
        if self.chat {
            let mut delta = json!({"content": text});
            if first {
                delta["role"] = "assistant".into();
            }
            let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason});
            return self.object("chat.completion.chunk", choice, None);
        }
        let choice = json!({"index": 0, "text": text, "logprobs": null, "finish_reason": reason});
        self.object("text_completion", choice, None)
    }

    /// The last piece of a stream that was asked to count.
    pub fn counted(&self, usage: Value) -> Value {
        let kind = if self.chat { "chat.completion.chunk" } else { "text_completion" };
        let mut out = self.object(kind, Value::Null, Some(usage));
        out["choices"] = json!([]);
        out
    }
}

pub fn usage(prompt: usize, answer: usize) -> Value {
    json!({"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer})
}

/// Turns tokens into text as they come: whole characters only, and nothing behind a stop text, nor what may become one.
pub struct Detokenizer {
    tokens: Vec<u32>,
    stop: Vec<String>,
    /// Bytes of text that were handed out.
    sent: usize,
}

impl Detokenizer {
    pub fn new(stop: Vec<String>) -> Self {
        Detokenizer { tokens: Vec::new(), stop, sent: 0 }
    }

    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// The text that is new with a token; all that is left with `last`.
    ///
    /// # Errors
    /// Tokens that the tokenizer cannot decode.
    pub fn push(
        &mut self,
        tokenizer: &Tokenizer,
        token: Option<u32>,
        last: bool,
    ) -> crate::error::Result<String> {
        self.tokens.extend(token);
        let text = tokenizer.decode(&self.tokens)?;
        let mut end = text.len();
        if let Some(at) = self.stop.iter().filter_map(|s| text.find(s.as_str())).min() {
            end = at;
        } else if !last {
            // A character that is not whole yet shows as U+FFFD.
            end = text.trim_end_matches('\u{fffd}').len();
            let begins = |s: &String| {
                (1..s.len()).rev().find(|n| s.is_char_boundary(*n) && text[..end].ends_with(&s[..*n]))
            };
            end -= self.stop.iter().filter_map(begins).max().unwrap_or(0);
        }
        let new = text.get(self.sent..end).unwrap_or_default().to_owned();
        self.sent = self.sent.max(end);
        Ok(new)
    }
}
