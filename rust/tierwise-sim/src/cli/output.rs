//! What went wrong, and how results are written.

use super::{FAILED, Format, USAGE};
use crate::request::Error;
use std::io::Write;
use std::path::Path;

/// An exit code with its message.
pub struct Failure {
    pub code: u8,
    pub message: String,
}

/// The user's mistake.
pub fn usage(message: impl Into<String>) -> Failure {
    Failure { code: USAGE, message: message.into() }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure { code: FAILED, message: format!("cannot write the result: {error}") }
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Failure { code: FAILED, message: format!("cannot write JSON: {error}") }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Usage(message) => usage(message),
            Error::Execution(_) => Failure { code: FAILED, message: error.to_string() },
        }
    }
}

/// Prints a table or JSON.
pub fn print(out: &mut dyn Write, format: Format, table: &str, value: &impl serde::Serialize) -> Result<(), Failure> {
    match format {
        Format::Table => write!(out, "{table}")?,
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(value)?)?,
    }
    Ok(())
}

/// Writes a file that the user named.
pub fn write_file(path: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(path, text).map_err(|error| Failure { code: FAILED, message: format!("cannot write {}: {error}", path.display()) })
}
