//! Fields of a Hugging Face `config.json`, with the defaults that transformers gives them.

use serde_json::{Map, Value};

/// No field of a known architecture is larger; products of three of them fit 64 bits.
const MAX: u64 = 1 << 20;

/// A parsed `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Config(Map<String, Value>);

impl Config {
    /// Takes an object.
    pub fn new(value: Value) -> Result<Self, String> {
        match value {
            Value::Object(map) => Ok(Config(map)),
            other => Err(format!("a config is a JSON object, not `{other}`")),
        }
    }

    /// The object.
    pub fn value(&self) -> Value {
        Value::Object(self.0.clone())
    }

    /// `model_type`.
    pub fn model_type(&self) -> Result<&str, String> {
        self.0
            .get("model_type")
            .and_then(Value::as_str)
            .ok_or_else(|| "model_type is missing; a Hugging Face config.json names it".to_owned())
    }

    /// The first of some names of a size that is there and not null.
    fn find(&self, names: &[&str]) -> Option<(String, &Value)> {
        names.iter().find_map(|name| self.0.get(*name).filter(|v| !v.is_null()).map(|v| ((*name).to_owned(), v)))
    }

    /// A size of at least 1, under any of its names.
    pub fn size(&self, names: &[&str]) -> Result<u64, String> {
        match self.find(names) {
            Some((name, value)) => checked(&name, value),
            None => Err(format!("{} is missing", names.join(" or "))),
        }
    }

    /// A size that has a default.
    pub fn size_or(&self, names: &[&str], default: u64) -> Result<u64, String> {
        self.find(names).map_or(Ok(default), |(name, value)| checked(&name, value))
    }

    /// A switch that has a default.
    pub fn flag_or(&self, name: &str, default: bool) -> Result<bool, String> {
        match self.find(&[name]) {
            Some((_, value)) => value.as_bool().ok_or_else(|| format!("{name} is {value}; it must be true or false")),
            None => Ok(default),
        }
    }

    /// A text that has a default.
    pub fn text_or<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.0.get(name).and_then(Value::as_str).unwrap_or(default)
    }
}

fn checked(name: &str, value: &Value) -> Result<u64, String> {
    match value.as_u64() {
        Some(size) if (1..=MAX).contains(&size) => Ok(size),
        _ => Err(format!("{name} is {value}; it must be between 1 and {MAX}")),
    }
}
