//! `HostBench`.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tierwise_kernels::Pool;
use tierwise_kernels::measure::{self, HostKernel};

/// Memory that the host's kernels are measured on.
#[pyclass(frozen, module = "tierwise._core")]
pub struct HostBench {
    inner: Mutex<measure::HostBench>,
}

fn pool(threads: Option<usize>) -> PyResult<Pool> {
    Pool::try_new(threads).map_err(PyValueError::new_err)
}

#[pymethods]
impl HostBench {
    #[new]
    fn new(py: Python<'_>, numel: usize) -> PyResult<Self> {
        let pool = pool(None)?;
        let inner = py.detach(|| measure::HostBench::new(&pool, numel)).map_err(PyValueError::new_err)?;
        Ok(HostBench { inner: Mutex::new(inner) })
    }

    #[getter]
    fn numel(&self) -> usize {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).numel()
    }

    #[pyo3(signature = (kernel, seconds, threads = None))]
    fn rate(&self, py: Python<'_>, kernel: &str, seconds: f64, threads: Option<usize>) -> PyResult<f64> {
        let kernel = match kernel {
            "adam" => HostKernel::Adam,
            "params_first" => HostKernel::ParamsFirst,
            "moments" => HostKernel::Moments,
            "undoable" => HostKernel::Undoable,
            "accumulate" => HostKernel::Accumulate,
            "norm" => HostKernel::Norm,
            "copy" => HostKernel::Copy,
            other => {
                let known = "\"adam\", \"params_first\", \"moments\", \"undoable\", \"accumulate\", \"norm\" or \"copy\"";
                return Err(PyValueError::new_err(format!("kernel must be {known}, not {other:?}")));
            }
        };
        let time = Duration::try_from_secs_f64(seconds).map_err(|error| PyValueError::new_err(format!("seconds={seconds}: {error}")))?;
        let pool = pool(threads)?;
        Ok(py.detach(|| self.inner.lock().unwrap_or_else(PoisonError::into_inner).rate(&pool, kernel, time)))
    }
}
