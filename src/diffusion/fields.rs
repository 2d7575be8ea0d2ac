//! The fields of a JSON object, read with a default, a kind and a range each; what does not fit is named.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The error for a value that is well-formed and not handled.
pub(super) fn unhandled(field: &str, value: &str, handled: &str) -> Error {
    Error::unsupported(format!("{field} {value:?} is not handled; handled: {handled}"))
}

/// The file's fields; `null` counts as absent.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, name: &str, default: &'static str) -> Result<&'a str> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(Error::invalid_file(format!("{name} is {other}, must be text"))),
        }
    }

    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(Error::invalid_file(format!("{name} is {other}, must be true or false"))),
        }
    }

    pub(super) fn number(&self, name: &str, default: f64, least: f64, most: f64) -> Result<f64> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => match value.as_f64() {
                Some(number) if (least..=most).contains(&number) => Ok(number),
                _ => Err(Error::invalid_file(format!("{name} is {value}, must be a number in [{least}, {most}]"))),
            },
        }
    }

    pub(super) fn whole(&self, name: &str, default: u64, least: u64, most: u64) -> Result<u64> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => match value.as_u64() {
                Some(number) if (least..=most).contains(&number) => Ok(number),
                _ => Err(Error::invalid_file(format!("{name} is {value}, must be a whole number in {least}..={most}"))),
            },
        }
    }

    /// A list of numbers.
    pub(super) fn numbers(&self, name: &str) -> Result<Option<Vec<f64>>> {
        self.list(name, "numbers", Value::as_f64)
    }

    /// A list of whole numbers.
    pub(super) fn wholes(&self, name: &str) -> Result<Option<Vec<i64>>> {
        self.list(name, "whole numbers", Value::as_i64)
    }

    fn list<T>(&self, name: &str, kind: &str, read: fn(&Value) -> Option<T>) -> Result<Option<Vec<T>>> {
        let wrong = |value: &Value| Error::invalid_file(format!("{name} holds {value}, must be a list of {kind}"));
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(values)) => {
                values.iter().map(|value| read(value).ok_or_else(|| wrong(value))).collect::<Result<_>>().map(Some)
            }
            Some(other) => Err(wrong(other)),
        }
    }
}
