//! `Device`.

use crate::errors;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::Arc;
use tierwise_runtime::cuda::CudaDevice;
use tierwise_runtime::device::{self, Queue};
use tierwise_runtime::emulated::{EmulatedConfig, EmulatedDevice};

/// A device that the engine drives.
#[pyclass(frozen, module = "tierwise._core")]
pub struct Device {
    pub inner: Arc<dyn device::Device>,
    emulated: Option<Arc<EmulatedDevice>>,
}

#[pymethods]
impl Device {
    #[staticmethod]
    #[pyo3(signature = (ordinal = 0))]
    fn cuda(py: Python<'_>, ordinal: usize) -> PyResult<Self> {
        let inner = py.detach(|| CudaDevice::new(ordinal)).map_err(|e| errors::runtime(py, &e))?;
        Ok(Device { inner, emulated: None })
    }

    #[staticmethod]
    #[pyo3(signature = (*, h2d_bytes_per_second = None, d2h_bytes_per_second = None, latency_ns = 0, threads = None))]
    fn emulated(
        h2d_bytes_per_second: Option<f64>,
        d2h_bytes_per_second: Option<f64>,
        latency_ns: u64,
        threads: Option<usize>,
    ) -> PyResult<Self> {
        for speed in [h2d_bytes_per_second, d2h_bytes_per_second].into_iter().flatten() {
            if speed.is_nan() || speed <= 0.0 {
                return Err(PyValueError::new_err(format!("a link speed must be positive bytes per second, not {speed}")));
            }
        }
        if threads == Some(0) {
            return Err(PyValueError::new_err("threads must be at least 1, not 0"));
        }
        let defaults = EmulatedConfig::default();
        let threads = threads.unwrap_or(defaults.threads);
        let emulated = EmulatedDevice::new(EmulatedConfig { h2d_bytes_per_second, d2h_bytes_per_second, latency_ns, threads, ..defaults });
        Ok(Device { inner: emulated.clone(), emulated: Some(emulated) })
    }

    #[staticmethod]
    fn cuda_is_available() -> bool {
        tierwise_runtime::cuda::is_available()
    }

    #[getter]
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn fail_next(&self, queue: &str, message: &str) -> PyResult<()> {
        let queue = match queue {
            "h2d" => Queue::HostToDevice,
            "d2h" => Queue::DeviceToHost,
            "optimizer" => Queue::Optimizer,
            "states_in" => Queue::StatesIn,
            "states_out" => Queue::StatesOut,
            other => {
                let known = "\"h2d\", \"d2h\", \"optimizer\", \"states_in\" or \"states_out\"";
                return Err(PyValueError::new_err(format!("queue must be {known}, not {other:?}")));
            }
        };
        match &self.emulated {
            Some(device) => {
                device.fail_next(queue, message);
                Ok(())
            }
            None => Err(PyValueError::new_err("only the emulated device can be told to fail")),
        }
    }
}
