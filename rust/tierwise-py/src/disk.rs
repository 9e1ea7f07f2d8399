//! What a directory is good for as the NVMe tier.

use crate::errors;
use pyo3::prelude::*;
use std::path::PathBuf;
use std::time::Duration;
use tierwise_io::doctor::{ProbeLimits, probe};

/// Measures a directory with about `max_bytes` for about `max_seconds`; gives the report as JSON.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // Python paths arrive by value.
#[pyo3(signature = (directory, max_bytes = 1_073_741_824, max_seconds = 6.0))]
pub fn probe_disk(py: Python<'_>, directory: PathBuf, max_bytes: u64, max_seconds: f64) -> PyResult<String> {
    let time = Duration::try_from_secs_f64(max_seconds)
        .map_err(|error| pyo3::exceptions::PyValueError::new_err(format!("max_seconds={max_seconds}: {error}")))?;
    let report = py.detach(|| probe(&directory, ProbeLimits { bytes: max_bytes, time })).map_err(|error| errors::storage(py, &error))?;
    Ok(serde_json::to_string(&report).unwrap_or_default())
}
