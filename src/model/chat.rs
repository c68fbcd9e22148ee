//! Chat templates: the Jinja source that a chat model's files carry, rendered as transformers renders it.

use crate::error::{Error, Result};
use crate::files;
use chrono::{DateTime, Local};
use minijinja::value::{Kwargs, Value as Cell};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// A template, and the special tokens that it may name (`bos_token`, `eos_token` ...).
#[derive(Debug, Clone, Default)]
pub struct Chat {
    pub source: String,
    pub tokens: BTreeMap<String, String>,
}

/// What one side of a conversation said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

impl Message {
    /// A user's.
    pub fn user(text: &str) -> Self {
        Message { role: "user".to_owned(), content: text.to_owned() }
    }
}

/// The template of the folder that holds `tokenizer.json`: of `chat_template.jinja`, else of `tokenizer_config.json`, whose
/// content is `config`.
pub fn template_beside(tokenizer: &Path, config: &Value) -> Result<Option<String>> {
    let own = tokenizer.with_file_name("chat_template.jinja");
    if own.exists() {
        return files::read_text(&own).map(Some);
    }
    Ok(match config.get("chat_template") {
        Some(Value::String(template)) => Some(template.clone()),
        // Several named ones.
        Some(Value::Array(named)) => {
            let default = named.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
            default.and_then(|t| t.get("template")).and_then(Value::as_str).map(str::to_owned)
        }
        _ => None,
    })
}

impl Chat {
    /// A conversation up to where the assistant answers.
    pub fn render(&self, messages: &[Message], path: &Path) -> Result<String> {
        let source = without_generation_blocks(&self.source);
        self.rendered(&source, messages).map_err(|e| {
            // minijinja's errors have a source and a line; the message alone is for people.
            Error::file(path, format!("chat template: {}", e.to_string().lines().next().unwrap_or_default()))
        })
    }

    fn rendered(&self, source: &str, messages: &[Message]) -> std::result::Result<String, minijinja::Error> {
        let mut jinja = Environment::new();
        jinja.set_trim_blocks(true);
        jinja.set_lstrip_blocks(true);
        // Templates call methods that Python's strings and lists have.
        jinja.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        jinja.add_filter("tojson", to_json);
        jinja.add_function("strftime_now", strftime_now);
        jinja.add_function("raise_exception", |message: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        jinja.add_template("chat", source)?;
        let values = context! {
            messages => Cell::from_serialize(messages), add_generation_prompt => true, tools => (), documents => (),
            ..Cell::from_serialize(&self.tokens)
        };
        jinja.get_template("chat")?.render(values)
    }
}

/// `{% generation %}` marks what an assistant wrote, for training; it prints nothing. minijinja takes no statements of
/// others, so the two become ones that do nothing, with their white-space control.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, statement) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = statement.find("%}") else {
            rest = statement;
            break;
        };
        let (statement, after) = statement.split_at(end + 2);
        let word = statement[2..end].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => out.push_str(&statement.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&statement.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(statement),
        }
        rest = after;
    }
    out + rest
}

/// The date and time as a template wants them. `SOURCE_DATE_EPOCH` (seconds) stands in for the clock, so that a dump can be
/// made again on another day.
fn strftime_now(format: String) -> std::result::Result<String, minijinja::Error> {
    let epoch = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|s| s.parse().ok());
    let mut text = String::new();
    let written = match epoch.and_then(|seconds| DateTime::from_timestamp(seconds, 0)) {
        Some(time) => write!(text, "{}", time.format(&format)),
        None => write!(text, "{}", Local::now().format(&format)),
    };
    let bad = |_| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: '{format}'"));
    written.map(|()| text).map_err(bad)
}

/// Python's `json.dumps`: a space after commas and colons, nothing escaped that need not be.
fn to_json(value: &Cell, options: Kwargs) -> std::result::Result<Cell, minijinja::Error> {
    let (indent, sorted, ascii) = (
        options.get::<Option<usize>>("indent")?,
        options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    );
    options.assert_all_used()?;
    let bad = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let mut value = serde_json::to_value(value).map_err(bad)?;
    if sorted {
        value.sort_all_objects();
    }
    let text = match indent {
        Some(indent) => written(&value, PrettyFormatter::with_indent(" ".repeat(indent).as_bytes())),
        None => written(&value, Spaced(CompactFormatter)),
    };
    let text = text.map_err(bad)?;
    Ok(Cell::from_safe_string(if ascii { escaped(&text) } else { text }))
}

fn written(value: &Value, formatter: impl Formatter) -> serde_json::Result<String> {
    let mut bytes = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What is not ASCII as `\uXXXX`; only strings hold such characters.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out += &format!("\\u{unit:04x}"));
        }
    }
    out
}

/// `, ` and `: ` between the parts.
struct Spaced(CompactFormatter);

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, text: &str) -> std::result::Result<String, String> {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        let chat = Chat { source: source.to_owned(), tokens: tokens.into() };
        chat.render(&[Message::user(text)], Path::new("t")).map_err(|e| e.to_string())
    }

    #[test]
    fn a_template_sees_the_text() {
        let template = "{{ bos_token }}{% for m in messages %}\n<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>\n\
                        {% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}";
        assert_eq!(render(template, " Who?\n").unwrap(), "<s><|user|>Who?<|end|>\n<|assistant|>");
        assert!(render("{{ raise_exception('no') }}", "").unwrap_err().contains("no"));
        assert!(render("{% if %}", "").is_err());
    }

    #[test]
    fn statements_and_filters_of_current_templates() {
        let marked =
            "{% for m in messages %}\n  {%- generation -%}\n{{ m.content }} {% endgeneration %}{% endfor %}!";
        assert_eq!(render(marked, "a").unwrap(), "a !");
        assert_eq!(
            render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "")
                .unwrap(),
            "1"
        );
        let json = "{{ {'b': [1, 'x'], 'a': none} | tojson }}";
        assert_eq!(render(json, "").unwrap(), r#"{"b": [1, "x"], "a": null}"#);
        assert_eq!(
            render("{{ 'é<' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}", "").unwrap(),
            r#""é<""\u00e9""#
        );
        assert_eq!(render("{{ {'a': 1} | tojson(indent=2) }}", "").unwrap(), "{\n  \"a\": 1\n}");
        assert_eq!(render("{% if tools %}x{% endif %}{{ eos_token }}", "").unwrap(), "</s>");
        assert_eq!(render("{{ strftime_now('%Y') | length }}", "").unwrap(), "4");
    }
}
