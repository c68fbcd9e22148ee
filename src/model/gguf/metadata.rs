//! Metadata of a GGUF file by key. What is there in another type than its meaning asks for is an error; only
//! [`Metadata::string`] passes it over.

use crate::error::{Error, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use std::path::Path;

/// A file's metadata.
#[derive(Clone, Copy)]
pub struct Metadata<'a> {
    pub path: &'a Path,
    pub(super) content: &'a Content,
}

impl<'a> Metadata<'a> {
    pub(super) fn value(&self, key: &str) -> Option<&'a Value> {
        self.content.metadata.get(key)
    }

    /// What `read` makes of an entry, which it calls `wanted` in errors.
    fn read<T>(&self, key: &str, wanted: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(key, wanted))
    }

    fn list<T>(&self, key: &str, wanted: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<Vec<T>>> {
        self.read(key, wanted, |v| v.to_vec().ok().and_then(|values| values.iter().map(&read).collect()))
    }

    /// An entry of another type than its meaning asks for.
    pub(super) fn wrong(&self, key: &str, wanted: &str) -> Error {
        Error::file(self.path, format!("metadata {key} is not {wanted}; convert the model again"))
    }

    /// A text, if that is what is there.
    pub fn string(&self, key: &str) -> Option<&'a str> {
        self.value(key)?.to_string().ok().map(String::as_str)
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a text", |v| v.to_string().ok().map(String::as_str))
    }

    pub fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        self.list(key, "a list of texts", |v| v.to_string().ok().cloned())
    }

    /// Integers of any width.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        self.list(key, "a list of integers", signed)
    }

    /// Numbers of any width.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.list(key, "a list of numbers", |v| number(v).map(|x| x as f32))
    }

    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "a flag", flag)
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", number)
    }

    /// A whole number of any width. Per layer in some files: one number if all layers have the same.
    pub fn integer(&self, key: &str) -> Result<Option<u64>> {
        if let Some(Value::Array(layers)) = self.value(key) {
            let numbers: Vec<Option<i64>> = layers.iter().map(signed).collect();
            if numbers.windows(2).any(|w| w[0] != w[1]) {
                let problem =
                    format!("{key} differs between layers, which is not supported; use another model");
                return Err(Error::file(self.path, problem));
            }
        }
        let one = |value: &Value| match value {
            Value::Array(layers) => layers.first().and_then(signed),
            other => signed(other),
        };
        self.read(key, "a whole number", |v| u64::try_from(one(v)?).ok())
    }
}

/// A flag, or a number that stands for one.
pub(super) fn flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        other => signed(other).map(|n| n != 0),
    }
}

/// An integer of any width.
fn signed(value: &Value) -> Option<i64> {
    match value {
        Value::U8(n) => Some(i64::from(*n)),
        Value::U16(n) => Some(i64::from(*n)),
        Value::U32(n) => Some(i64::from(*n)),
        Value::U64(n) => i64::try_from(*n).ok(),
        Value::I8(n) => Some(i64::from(*n)),
        Value::I16(n) => Some(i64::from(*n)),
        Value::I32(n) => Some(i64::from(*n)),
        Value::I64(n) => Some(*n),
        _ => None,
    }
}

/// A number of any width; integers count.
fn number(value: &Value) -> Option<f64> {
    match value {
        Value::F32(x) => Some(f64::from(*x)),
        Value::F64(x) => Some(*x),
        other => signed(other).map(|n| n as f64),
    }
}
