//! Module-level functions.

use crate::layout::{self, Layout};
use crate::{errors, parse};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::{Mutex, PoisonError};
use tierwise_core::layout::Precision;
use tierwise_kernels::{AdamConstants, AdamHyper, AdamSegment, Format, GradDtype, GradSpan, Pool, adam, convert, norm};

/// (lr, beta1, beta2, eps, `weight_decay`, decoupled)
pub type HyperTuple = (f64, f64, f64, f64, f64, bool);

/// Named fields of a hyperparameter tuple.
pub fn hyper((lr, beta1, beta2, eps, weight_decay, decoupled): HyperTuple) -> AdamHyper {
    AdamHyper { lr, beta1, beta2, eps, weight_decay, decoupled }
}

/// Plans a step.
#[pyfunction]
pub fn plan(py: Python<'_>, layout: &Layout, trace: &str, request: &str) -> PyResult<String> {
    let (trace, request) = (parse(trace, "trace")?, parse(request, "plan request")?);
    let plan = py.detach(|| tierwise_core::planner::plan(&layout.inner, &trace, &request)).map_err(|e| errors::planning(py, &e))?;
    serde_json::to_string(&plan).map_err(|e| PyValueError::new_err(e.to_string()))
}

/// How many threads the CPU kernels take.
#[pyfunction]
#[pyo3(signature = (threads = None))]
pub fn kernel_threads(threads: Option<usize>) -> PyResult<usize> {
    Pool::wanted(threads).map_err(PyValueError::new_err)
}

/// The pool of the latest call, kept because starting threads costs more than small calls.
static POOL: Mutex<Option<Kept>> = Mutex::new(None);

struct Kept {
    threads: Option<usize>,
    /// Process that started the pool's threads.
    owner: u32,
    pool: std::sync::Arc<Pool>,
}

fn pool(threads: Option<usize>) -> PyResult<std::sync::Arc<Pool>> {
    let mut kept = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let owner = std::process::id();
    match &*kept {
        Some(known) if known.threads == threads && known.owner == owner => return Ok(known.pool.clone()),
        _ => {}
    }
    let pool = std::sync::Arc::new(Pool::try_new(threads).map_err(PyValueError::new_err)?);
    let old = kept.replace(Kept { threads, owner, pool: pool.clone() });
    // A forked child has none of its parent's threads, so it cannot join them either.
    old.into_iter().filter(|old| old.owner != owner).for_each(std::mem::forget);
    Ok(pool)
}

/// Splits fp32 masters into bf16 parameters and int16 low halves.
#[pyfunction]
#[pyo3(signature = (src, hi, lo, numel, threads = None))]
pub fn split_master(py: Python<'_>, src: usize, hi: usize, lo: usize, numel: usize, threads: Option<usize>) -> PyResult<()> {
    let pool = pool(threads)?;
    // SAFETY: the caller vouches for the addresses, as the stub says.
    py.detach(|| unsafe { convert::split_f32(&pool, src as *const f32, hi as *mut u16, lo as *mut i16, numel) });
    Ok(())
}

/// Joins bf16 parameters and int16 low halves into fp32 masters.
#[pyfunction]
#[pyo3(signature = (hi, lo, dst, numel, threads = None))]
pub fn join_master(py: Python<'_>, hi: usize, lo: usize, dst: usize, numel: usize, threads: Option<usize>) -> PyResult<()> {
    let pool = pool(threads)?;
    // SAFETY: the caller vouches for the addresses, as the stub says.
    py.detach(|| unsafe { convert::join_f32(&pool, hi as *const u16, lo as *const i16, dst as *mut f32, numel) });
    Ok(())
}

/// One CPU optimizer step over raw memory.
#[pyfunction]
#[pyo3(signature = (precision, param, master, exp_avg, exp_avg_sq, grad, numel, hyper, step, grad_scale = 1.0, threads = None))]
#[allow(clippy::too_many_arguments)]
pub fn adam_step(
    py: Python<'_>,
    precision: &str,
    param: usize,
    master: usize,
    exp_avg: usize,
    exp_avg_sq: usize,
    grad: usize,
    numel: usize,
    hyper: HyperTuple,
    step: u64,
    grad_scale: f32,
    threads: Option<usize>,
) -> PyResult<()> {
    let (format, grad_dtype) = match layout::precision(precision)? {
        Precision::Bf16 => (Format::SplitBf16, GradDtype::Bf16),
        Precision::Fp16 => (Format::Fp16Master, GradDtype::Fp16),
        Precision::Fp32 => (Format::Fp32, GradDtype::Fp32),
    };
    let segment = AdamSegment {
        format,
        grad_dtype,
        numel,
        param: param as *mut u8,
        master: master as *mut u8,
        exp_avg: exp_avg as *mut f32,
        exp_avg_sq: exp_avg_sq as *mut f32,
        grad: grad as *const u8,
        constants: AdamConstants::new(&self::hyper(hyper), step, grad_scale),
    };
    let pool = pool(threads)?;
    // SAFETY: the caller vouches for the addresses, as the stub says.
    py.detach(|| unsafe { adam::adam_segments(&pool, &[segment]) });
    Ok(())
}

/// Sum of squares in the reduction tree that every device shares.
#[pyfunction]
#[pyo3(signature = (grad, dtype, numel, threads = None))]
pub fn sum_squares(py: Python<'_>, grad: usize, dtype: &str, numel: usize, threads: Option<usize>) -> PyResult<f64> {
    let dtype = match dtype {
        "bf16" => GradDtype::Bf16,
        "fp16" => GradDtype::Fp16,
        "fp32" => GradDtype::Fp32,
        other => return Err(PyValueError::new_err(format!("dtype must be \"bf16\", \"fp16\" or \"fp32\", not {other:?}"))),
    };
    let pool = pool(threads)?;
    let span = GradSpan { ptr: grad as *const u8, dtype, numel };
    // SAFETY: the caller vouches for the addresses, as the stub says.
    let sums = py.detach(|| unsafe { norm::sum_squares(&pool, &[span]) });
    Ok(sums.first().copied().unwrap_or(0.0))
}
