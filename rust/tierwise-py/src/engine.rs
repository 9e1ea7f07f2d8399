//! `Engine` and `HostBuffer`.

use crate::device::Device;
use crate::functions::{HyperTuple, hyper};
use crate::layout::Layout;
use crate::{errors, parse};
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use tierwise_core::ChunkId;
use tierwise_core::plan::OptimizerClass;
use tierwise_core::trace::Phase;
use tierwise_runtime::device::ComputeStream;
use tierwise_runtime::engine::{self, EngineConfig, Hyper};
use tierwise_runtime::error::{Error, Result};
use tierwise_runtime::spill::access::Access;

/// A JSON value as Python objects.
pub fn to_python<'py>(py: Python<'py>, value: &serde_json::Value) -> PyResult<Bound<'py, PyAny>> {
    py.import("json")?.call_method1("loads", (value.to_string(),))
}

/// Runs something that does not wait for long, without the GIL.
fn call<T: Send>(py: Python<'_>, f: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(f).map_err(|e| errors::runtime(py, &e))
}

/// Runs something that may wait, without the GIL; a pending signal (Ctrl-C) ends the wait with its exception.
fn call_waiting<T: Send>(py: Python<'_>, f: impl FnOnce(&mut dyn FnMut() -> bool) -> Result<T> + Send) -> PyResult<T> {
    let mut raised: Option<PyErr> = None;
    let outcome = py.detach(|| {
        #[allow(clippy::redundant_closure_for_method_calls)] // The method is not general over lifetimes.
        f(&mut || match Python::attach(|py| py.check_signals()) {
            Ok(()) => true,
            Err(error) => {
                raised = Some(error);
                false
            }
        })
    });
    match (outcome, raised) {
        (Err(Error::Interrupted), Some(error)) => Err(error),
        (outcome, _) => outcome.map_err(|e| errors::runtime(py, &e)),
    }
}

fn phase(backward: bool) -> Phase {
    if backward { Phase::Backward } else { Phase::Forward }
}

/// Pinned host memory of an engine.
#[pyclass(frozen, module = "tierwise._core")]
pub struct HostBuffer {
    address: u64,
    bytes: u64,
    process: u32,
    /// Keeps the mapping alive while views of it exist.
    _owner: Arc<engine::Shared>,
}

#[pymethods]
impl HostBuffer {
    fn __len__(&self) -> usize {
        self.bytes as usize
    }

    /// # Safety
    /// Called by Python with a view to fill.
    #[allow(clippy::needless_pass_by_value)] // The slot's signature.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let (address, bytes) = (slf.get().address, slf.get().bytes);
        let (owner, process) = (slf.get().process, std::process::id());
        if owner != process {
            // The memory is not mapped there: a view would crash.
            return Err(PyBufferError::new_err(format!(
                "this memory belongs to process {owner}; its forked child {process} does not have it"
            )));
        }
        // SAFETY: `view` comes from Python; the view holds `slf`, which keeps the memory mapped.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), address as *mut c_void, bytes as ffi::Py_ssize_t, 0, flags) };
        if filled == 0 { Ok(()) } else { Err(PyErr::take(slf.py()).unwrap_or_else(|| PyBufferError::new_err("no buffer"))) }
    }
}

/// Executes a plan.
#[pyclass(frozen, module = "tierwise._core")]
pub struct Engine {
    inner: engine::Engine,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (layout, trace, plan, device, *, device_budget, host_budget, max_norm = None, threads = None, host_spare_bytes = 0, nvme_path = None, nvme_budget = 0))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        layout: &Layout,
        trace: &str,
        plan: &str,
        device: &Device,
        device_budget: u64,
        host_budget: u64,
        max_norm: Option<f64>,
        threads: Option<usize>,
        host_spare_bytes: u64,
        nvme_path: Option<std::path::PathBuf>,
        nvme_budget: u64,
    ) -> PyResult<Self> {
        let (trace, plan) = (parse(trace, "trace")?, parse(plan, "plan")?);
        let config = EngineConfig { device_budget, host_budget, max_norm, threads, host_spare_bytes, nvme_path, nvme_budget };
        let inner = call(py, || engine::Engine::new(layout.inner.clone(), trace, plan, device.inner.clone(), &config))?;
        Ok(Engine { inner })
    }

    #[getter]
    fn host_buffer(&self) -> HostBuffer {
        let (address, bytes) = self.inner.host_slab();
        HostBuffer { address, bytes, process: self.inner.process(), _owner: self.inner.keep_alive() }
    }

    fn host_offset(&self, py: Python<'_>, chunk: u32, payload: &str) -> PyResult<Option<u64>> {
        call(py, || self.inner.host_offset(ChunkId(chunk), payload))
    }

    #[pyo3(signature = (chunk, *, param = None, states = None, accumulator = None))]
    fn bind(&self, py: Python<'_>, chunk: u32, param: Option<u64>, states: Option<u64>, accumulator: Option<u64>) -> PyResult<()> {
        call(py, || self.inner.bind(ChunkId(chunk), param, states, accumulator))
    }

    fn bind_slab(&self, py: Python<'_>, address: u64) -> PyResult<()> {
        call(py, || self.inner.bind_slab(address))
    }

    fn bind_staging(&self, py: Python<'_>, address: u64) -> PyResult<()> {
        call(py, || self.inner.bind_staging(address))
    }

    fn set_class(&self, py: Python<'_>, chunk: u32, cls: &str) -> PyResult<()> {
        let class = match cls {
            "device" => OptimizerClass::Device,
            "streamed" => OptimizerClass::Streamed,
            "host" => OptimizerClass::Host,
            other => {
                return Err(PyValueError::new_err(format!("class must be \"device\", \"streamed\" or \"host\", not {other:?}")));
            }
        };
        call(py, || self.inner.set_class(ChunkId(chunk), class))
    }

    fn account(&self, py: Python<'_>, kind: &str, delta_bytes: i64) -> PyResult<()> {
        call(py, || self.inner.account(kind, delta_bytes))
    }

    fn start(&self, py: Python<'_>) -> PyResult<()> {
        call(py, || self.inner.start())
    }

    fn enter(&self, py: Python<'_>, unit: u32, backward: bool, stream: u64) -> PyResult<Option<Vec<(u32, u64)>>> {
        let slots = call_waiting(py, |keep| self.inner.enter(unit, phase(backward), ComputeStream(stream), keep))?;
        Ok((!slots.is_empty()).then(|| slots.into_iter().map(|(chunk, slot)| (chunk.0, slot)).collect()))
    }

    fn leave(&self, py: Python<'_>, unit: u32, backward: bool, stream: u64) -> PyResult<Option<Vec<u32>>> {
        let chunks = call(py, || self.inner.leave(unit, phase(backward), ComputeStream(stream)))?;
        Ok((!chunks.is_empty()).then(|| chunks.into_iter().map(|chunk| chunk.0).collect()))
    }

    fn forward_begin(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        call(py, || self.inner.forward_begin(ComputeStream(stream)))
    }

    fn touch(&self, py: Python<'_>, chunk: u32, stream: u64) -> PyResult<u64> {
        call_waiting(py, |keep| self.inner.touch(ChunkId(chunk), ComputeStream(stream), keep))
    }

    fn generation(&self, py: Python<'_>, chunk: u32) -> PyResult<u64> {
        call(py, || self.inner.generation(ChunkId(chunk)))
    }

    fn set_hyper(&self, py: Python<'_>, groups: Vec<HyperTuple>, group_of_param: Vec<i64>) -> PyResult<()> {
        let hyper = Hyper {
            groups: groups.into_iter().map(hyper).collect(),
            group_of_param: group_of_param.into_iter().map(|g| usize::try_from(g).ok()).collect(),
        };
        call(py, || self.inner.set_hyper(hyper))
    }

    #[pyo3(signature = (grad_scale = 1.0))]
    fn backward_begin(&self, py: Python<'_>, grad_scale: f64) -> PyResult<()> {
        call_waiting(py, |keep| self.inner.backward_begin(grad_scale, keep))
    }

    fn send_activation(&self, py: Python<'_>, unit: u32, address: u64, nbytes: u64, stream: u64) -> PyResult<Option<u64>> {
        call(py, || self.inner.send_activation(unit, address, nbytes, ComputeStream(stream)))
    }

    fn activation_has_left(&self, py: Python<'_>, ticket: u64, wait: bool, stream: u64) -> PyResult<bool> {
        call_waiting(py, |keep| self.inner.activation_has_left(ticket, wait, ComputeStream(stream), keep))
    }

    fn fetch_activation(&self, py: Python<'_>, ticket: u64, address: u64, stream: u64) -> PyResult<()> {
        call(py, || self.inner.fetch_activation(ticket, address, ComputeStream(stream)))
    }

    fn await_activation(&self, py: Python<'_>, ticket: u64, stream: u64) -> PyResult<()> {
        call_waiting(py, |keep| self.inner.await_activation(ticket, ComputeStream(stream), keep))
    }

    fn free_activation(&self, py: Python<'_>, ticket: u64) -> PyResult<()> {
        call(py, || self.inner.free_activation(ticket))
    }

    #[allow(clippy::needless_pass_by_value)] // Python lists arrive by value.
    fn grads(&self, py: Python<'_>, chunk: u32, grads: Vec<(usize, u64)>, stream: u64) -> PyResult<u64> {
        call_waiting(py, |keep| self.inner.grads(ChunkId(chunk), &grads, ComputeStream(stream), keep))
    }

    fn collect(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        call(py, || self.inner.collect())
    }

    fn backward_end(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        call(py, || self.inner.backward_end(ComputeStream(stream)))
    }

    #[pyo3(signature = (stream, grad_scale = 1.0))]
    fn commit(&self, py: Python<'_>, stream: u64, grad_scale: f64) -> PyResult<()> {
        call_waiting(py, |keep| self.inner.commit(grad_scale, ComputeStream(stream), keep))
    }

    fn drop_grads(&self, py: Python<'_>) -> PyResult<()> {
        call_waiting(py, |keep| self.inner.drop_grads(keep))
    }

    fn decision(&self, py: Python<'_>, wait: bool) -> PyResult<Option<(u64, f64, f64, bool)>> {
        let decision = call_waiting(py, |keep| self.inner.decision(wait, keep))?;
        Ok(decision.map(|d| (d.step, d.norm, d.coefficient, d.skipped)))
    }

    fn read_spilled(&self, py: Python<'_>, chunk: u32, payload: &str, first: u64, numel: u64, address: u64) -> PyResult<()> {
        call_waiting(py, |keep| self.inner.spilled(ChunkId(chunk), payload, (first, numel), Access::Read(address), keep))
    }

    fn write_spilled(&self, py: Python<'_>, chunk: u32, payload: &str, first: u64, numel: u64, address: u64) -> PyResult<()> {
        call_waiting(py, |keep| self.inner.spilled(ChunkId(chunk), payload, (first, numel), Access::Write(address), keep))
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        call_waiting(py, |keep| self.inner.flush(keep))
    }

    #[getter]
    fn max_norm(&self, py: Python<'_>) -> PyResult<Option<f64>> {
        call(py, || self.inner.max_norm())
    }

    #[setter]
    fn set_max_norm(&self, py: Python<'_>, value: Option<f64>) -> PyResult<()> {
        call(py, || self.inner.set_max_norm(value))
    }

    fn param_steps(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        call(py, || self.inner.param_steps())
    }

    fn set_param_steps(&self, py: Python<'_>, steps: Vec<u64>) -> PyResult<()> {
        call(py, || self.inner.set_param_steps(steps))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let stats = call(py, || self.inner.stats())?;
        to_python(py, &stats)
    }

    fn residency(&self, py: Python<'_>) -> PyResult<String> {
        Ok(call(py, || self.inner.residency())?.to_string())
    }

    fn record_timeline(&self, py: Python<'_>, enabled: bool) -> PyResult<()> {
        call(py, || self.inner.record_timeline(enabled))
    }

    fn timeline(&self, py: Python<'_>) -> PyResult<String> {
        call(py, || self.inner.timeline())
    }
}
