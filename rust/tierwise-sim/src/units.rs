//! Byte counts as people write and read them, and how many are missing.

use serde::Serialize;

/// What does not fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shortfall {
    /// Tier that is too small: `device` or `host`.
    pub tier: String,
    /// Where or for what, if that is known.
    pub op: Option<String>,
    /// Bytes needed by the tightest plan.
    pub needed_bytes: u64,
    /// Bytes missing.
    pub shortfall_bytes: u64,
}

impl Shortfall {
    /// Of device memory.
    pub fn device(op: String, needed_bytes: u64, shortfall_bytes: u64) -> Self {
        Shortfall { tier: "device".to_owned(), op: Some(op), needed_bytes, shortfall_bytes }
    }

    /// Of host memory.
    pub fn host(needed_bytes: u64, shortfall_bytes: u64) -> Self {
        Shortfall { tier: "host".to_owned(), op: None, needed_bytes, shortfall_bytes }
    }
}

/// Parses `80GB` (10^9), `80GiB` (2^30), `512MB` or a plain number of bytes.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "kib" => 1 << 10,
        "mb" => 1_000_000,
        "mib" => 1 << 20,
        "gb" => 1_000_000_000,
        "gib" => 1 << 30,
        "tb" => 1_000_000_000_000,
        "tib" => 1 << 40,
        other => return Err(format!("unknown unit `{other}`; known are B, kB, KiB, MB, MiB, GB, GiB, TB, TiB")),
    };
    let value: f64 = number.parse().map_err(|_| format!("`{text}` is not a number of bytes such as 80GB or 75GiB"))?;
    let bytes = value * scale as f64;
    if bytes.is_finite() && bytes < 2_f64.powi(60) { Ok(bytes as u64) } else { Err(format!("`{text}` is too large")) }
}

/// Decimal gigabytes with two digits.
pub fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

/// Seconds with milliseconds.
pub fn seconds(ns: u64) -> String {
    format!("{:.3} s", ns as f64 / 1e9)
}
