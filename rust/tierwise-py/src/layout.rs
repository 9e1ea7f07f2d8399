//! `Layout`.

use crate::parse;
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use tierwise_core::ChunkId;
use tierwise_core::layout::{self, ChunkLayout, ParamSpec, Precision, Sums};

/// Chunks and the element offsets of their parameters.
#[pyclass(frozen, module = "tierwise._core")]
pub struct Layout {
    pub inner: layout::Layout,
}

/// A precision by its name.
pub fn precision(name: &str) -> PyResult<Precision> {
    match name {
        "bf16" => Ok(Precision::Bf16),
        "fp16" => Ok(Precision::Fp16),
        "fp32" => Ok(Precision::Fp32),
        other => Err(PyValueError::new_err(format!("precision must be \"bf16\", \"fp16\" or \"fp32\", not {other:?}"))),
    }
}

impl Layout {
    fn chunk(&self, chunk: u32) -> PyResult<&ChunkLayout> {
        self.inner.chunks.get(chunk as usize).ok_or_else(|| PyIndexError::new_err(format!("chunk {chunk} of {}", self.inner.chunks.len())))
    }
}

#[pymethods]
impl Layout {
    #[new]
    #[allow(clippy::type_complexity)]
    #[pyo3(signature = (precision, chunks, sums = "fp32"))]
    fn new(precision: &str, chunks: Vec<(String, Vec<(String, u64, bool)>)>, sums: &str) -> PyResult<Self> {
        let sums = match sums {
            "fp32" => Sums::Fp32,
            own if own == precision => Sums::Gradient,
            other => return Err(PyValueError::new_err(format!("sums must be \"fp32\" or the precision {precision:?}, not {other:?}"))),
        };
        let chunks = chunks
            .into_iter()
            .map(|(name, params)| {
                let specs = params.into_iter().map(|(name, numel, trainable)| ParamSpec { name, numel, trainable });
                (name, specs.collect())
            })
            .collect();
        Ok(Layout { inner: layout::Layout::new(self::precision(precision)?, chunks).with_sums(sums) })
    }

    #[getter]
    fn precision(&self) -> &'static str {
        match self.inner.precision {
            Precision::Bf16 => "bf16",
            Precision::Fp16 => "fp16",
            Precision::Fp32 => "fp32",
        }
    }

    #[getter]
    fn num_chunks(&self) -> usize {
        self.inner.chunks.len()
    }

    fn param_offsets(&self, chunk: u32) -> PyResult<Vec<u64>> {
        Ok(self.chunk(chunk)?.params.iter().map(|p| p.offset).collect())
    }

    fn param_indices(&self, chunk: u32) -> PyResult<Vec<u32>> {
        Ok(self.chunk(chunk)?.params.iter().map(|p| p.index).collect())
    }

    fn numel(&self, chunk: u32) -> PyResult<u64> {
        Ok(self.chunk(chunk)?.numel)
    }

    fn state_numel(&self, chunk: u32) -> PyResult<u64> {
        Ok(self.chunk(chunk)?.state_numel)
    }

    fn param_bytes(&self, chunk: u32) -> PyResult<u64> {
        self.chunk(chunk).map(|_| self.inner.param_bytes(ChunkId(chunk)))
    }

    fn grad_bytes(&self, chunk: u32) -> PyResult<u64> {
        self.chunk(chunk).map(|_| self.inner.grad_bytes(ChunkId(chunk)))
    }

    fn grad_acc_bytes(&self, chunk: u32) -> PyResult<u64> {
        self.chunk(chunk).map(|_| self.inner.grad_acc_bytes(ChunkId(chunk)))
    }

    fn state_bytes(&self, chunk: u32) -> PyResult<u64> {
        self.chunk(chunk).map(|_| self.inner.state_bytes(ChunkId(chunk)))
    }

    fn to_json(&self) -> PyResult<String> {
        serde_json::to_string(&self.inner).map_err(|e| PyValueError::new_err(e.to_string()))
    }

    #[staticmethod]
    fn from_json(text: &str) -> PyResult<Self> {
        Ok(Layout { inner: parse(text, "layout")? })
    }
}
