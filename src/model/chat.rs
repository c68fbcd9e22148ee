//! Chat templates: the Jinja source that a chat model's files carry.

use crate::error::{Error, IoAt, Result};
use minijinja::{Environment, context};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Stands for the user's text while a template is rendered; no template changes it.
const TEXT: &str = "kvfuse-user-text";

/// The chat template of the model folder that holds `tokenizer.json`: of `chat_template.jinja`, else of
/// `tokenizer_config.json`.
pub fn template_beside(tokenizer: &Path) -> Result<Option<String>> {
    let own = tokenizer.with_file_name("chat_template.jinja");
    if own.exists() {
        return fs::read_to_string(&own).at(&own).map(Some);
    }
    let config = tokenizer.with_file_name("tokenizer_config.json");
    if !config.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&config).at(&config)?;
    let value: Value =
        serde_json::from_str(&text).map_err(|e| Error::file(&config, format!("not JSON: {e}")))?;
    let template = match value.get("chat_template") {
        Some(Value::String(template)) => Some(template.clone()),
        // Several named ones.
        Some(Value::Array(named)) => {
            let default = named.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
            default.and_then(|t| t.get("template")).and_then(Value::as_str).map(str::to_owned)
        }
        _ => None,
    };
    Ok(template)
}

/// What a template writes before and after the first message of a user when the assistant is to answer it.
pub fn around_user(template: &str, bos: &str, eos: &str) -> std::result::Result<(String, String), String> {
    let mut jinja = Environment::new();
    jinja.set_trim_blocks(true);
    jinja.set_lstrip_blocks(true);
    // Templates call methods that Python's strings and lists have.
    jinja.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    jinja.add_function(
        "raise_exception",
        |message: String| -> std::result::Result<String, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
        },
    );
    jinja.add_template("chat", template).map_err(|e| e.to_string())?;
    let messages = [context! { role => "user", content => TEXT }];
    let values =
        context! { messages => messages, add_generation_prompt => true, bos_token => bos, eos_token => eos };
    let rendered = jinja.get_template("chat").and_then(|t| t.render(values)).map_err(|e| e.to_string())?;
    match rendered.split_once(TEXT) {
        Some((before, after)) => Ok((before.to_owned(), after.to_owned())),
        None => Err("it leaves out what the user says".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_cut_around_the_user() {
        let template = "{{ bos_token }}{% for m in messages %}\n<|{{ m['role'] }}|>{{ m['content'].strip() }}<|end|>\n\
                        {% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}";
        let (before, after) = around_user(template, "<s>", "</s>").unwrap();
        assert_eq!((&before[..], &after[..]), ("<s><|user|>", "<|end|>\n<|assistant|>"));
        assert!(around_user("{{ raise_exception('no') }}", "", "").unwrap_err().contains("no"));
        assert!(around_user("{% if %}", "", "").is_err());
        assert!(around_user("hello", "", "").is_err());
    }
}
