//! What a directory is good for as the NVMe tier.

use crate::errors;
use pyo3::prelude::*;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tierwise_io::Direction;
use tierwise_io::doctor::{ProbeLimits, probe};
use tierwise_io::pages::Pages;
use tierwise_io::raw::Raw;
use tierwise_io::spill_file::{Naming, SpillFile};

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

/// A raw loop over a spill file of its own: the peer of `benchmarks/nvme.py`.
#[pyclass(frozen, module = "tierwise._core")]
pub struct RawDisk {
    inner: Mutex<Raw>,
    #[pyo3(get)]
    direct: bool,
}

#[pymethods]
impl RawDisk {
    #[new]
    #[allow(clippy::needless_pass_by_value)] // Python paths arrive by value.
    fn new(
        py: Python<'_>,
        directory: PathBuf,
        nbytes: u64,
        block_bytes: usize,
        depth: usize,
        memory_bytes: usize,
        ring: bool,
    ) -> PyResult<Self> {
        let open = || {
            let file = SpillFile::create(&directory, nbytes, Naming::Anonymous)?;
            let direct = file.direct();
            let pages = Pages::new(memory_bytes.max(depth.saturating_mul(block_bytes)), 2 << 20)?;
            let inner = Raw::new(file, block_bytes, depth, Arc::new(pages), ring)?;
            // The first write of a block also changes the file system's books.
            inner.run(&[Direction::Write], None)?;
            tierwise_io::error::Result::Ok(RawDisk { inner: Mutex::new(inner), direct })
        };
        py.detach(open).map_err(|error| errors::storage(py, &error))
    }

    #[pyo3(signature = (reads, writes, seconds, blocks = 1))]
    fn run(&self, py: Python<'_>, reads: bool, writes: bool, seconds: f64, blocks: usize) -> PyResult<(f64, f64)> {
        let kinds: Vec<Direction> = [(reads, Direction::Read), (writes, Direction::Write)]
            .into_iter()
            .filter_map(|(wanted, kind)| wanted.then_some(kind))
            .flat_map(|kind| std::iter::repeat_n(kind, blocks))
            .collect();
        let time = Duration::try_from_secs_f64(seconds)
            .map_err(|error| pyo3::exceptions::PyValueError::new_err(format!("seconds={seconds}: {error}")))?;
        let moved = py
            .detach(|| self.inner.lock().unwrap_or_else(PoisonError::into_inner).run(&kinds, Some(time)))
            .map_err(|error| errors::storage(py, &error))?;
        Ok((moved.bytes[0] as f64 / moved.seconds, moved.bytes[1] as f64 / moved.seconds))
    }
}
