//! Fused `AdamW`, gradient norms, accumulation and conversion: CPU kernels with run-time SIMD dispatch, and the CUDA source that gives
//! the same bits.
//!
//! Every function that takes addresses blocks until its last write is done and runs on the threads of a [`Pool`].

pub mod accumulate;
pub mod adam;
pub mod convert;
pub mod cuda;
pub mod dispatch;
mod element;
pub mod measure;
pub mod norm;
pub mod pool;

use half::{bf16, f16};

pub use pool::Pool;

/// How a parameter and its fp32 master are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// bf16 parameter; the master is the parameter plus a signed 16-bit low half.
    SplitBf16,
    /// fp16 parameter and a separate fp32 master.
    Fp16Master,
    /// The fp32 parameter is the master.
    Fp32,
}

impl Format {
    /// Bytes of an element of the parameter.
    pub fn param_bytes(self) -> usize {
        match self {
            Format::SplitBf16 | Format::Fp16Master => 2,
            Format::Fp32 => 4,
        }
    }

    /// Bytes of an element of the master beside the parameter.
    pub fn master_bytes(self) -> usize {
        match self {
            Format::SplitBf16 => 2,
            Format::Fp16Master => 4,
            Format::Fp32 => 0,
        }
    }
}

/// Element type of a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GradDtype {
    /// bfloat16
    Bf16,
    /// IEEE half
    Fp16,
    /// IEEE single
    Fp32,
}

impl GradDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            GradDtype::Bf16 => size_of::<bf16>(),
            GradDtype::Fp16 => size_of::<f16>(),
            GradDtype::Fp32 => size_of::<f32>(),
        }
    }
}

/// Gradient elements of one parameter.
#[derive(Debug, Clone, Copy)]
pub struct GradSpan {
    /// First element.
    pub ptr: *const u8,
    /// Element type.
    pub dtype: GradDtype,
    /// Number of elements.
    pub numel: usize,
}

/// One gradient on its way into its sum.
#[derive(Debug, Clone, Copy)]
pub struct Addition {
    /// The sum, of as many elements as `src`.
    pub dst: *mut u8,
    /// What the sum holds: fp32, or the type of `src`.
    pub sums: GradDtype,
    /// The gradient of a micro-batch.
    pub src: GradSpan,
    /// `dst = src` (the first micro-batch) instead of `dst += src`.
    pub overwrite: bool,
}

// SAFETY: only addresses; whoever hands them over says how long they are valid and who else may use them.
unsafe impl Send for Addition {}
// SAFETY: as above.
unsafe impl Sync for Addition {}

/// Hyperparameters of one parameter, as `torch.optim` names them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamHyper {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// `AdamW` (decay the weight) or `Adam` (add to the gradient).
    pub decoupled: bool,
}

/// Constants of one parameter's step, computed once in f64 and rounded once to f32. The CUDA kernel takes the same struct by value.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamConstants {
    /// Multiplies every gradient first (clip coefficient times inverse loss scale).
    pub grad_scale: f32,
    /// `beta1`
    pub beta1: f32,
    /// `1 - beta1`
    pub one_minus_beta1: f32,
    /// `beta2`
    pub beta2: f32,
    /// `1 - beta2`
    pub one_minus_beta2: f32,
    /// `sqrt(1 - beta2^step)`
    pub bias_correction2_sqrt: f32,
    /// `eps`
    pub eps: f32,
    /// `lr / (1 - beta1^step)`
    pub step_size: f32,
    /// `1 - lr * weight_decay` for `AdamW`, 1 for `Adam`.
    pub decay: f32,
    /// `weight_decay` for `Adam`, 0 for `AdamW`.
    pub l2: f32,
}

impl AdamConstants {
    /// The constants of `step` (the first step is 1).
    ///
    /// `grad_scale` is the clip coefficient times the inverse loss scale. Bias corrections are computed in f64 and rounded once.
    ///
    /// # Panics
    /// If `step` is 0, where the bias corrections divide by zero.
    pub fn new(hyper: &AdamHyper, step: u64, grad_scale: f32) -> Self {
        assert!(step >= 1, "Adam steps count from 1, got step 0");
        let bias_correction1 = 1.0 - hyper.beta1.powf(step as f64);
        let bias_correction2 = 1.0 - hyper.beta2.powf(step as f64);
        Self {
            grad_scale,
            beta1: hyper.beta1 as f32,
            one_minus_beta1: (1.0 - hyper.beta1) as f32,
            beta2: hyper.beta2 as f32,
            one_minus_beta2: (1.0 - hyper.beta2) as f32,
            bias_correction2_sqrt: bias_correction2.sqrt() as f32,
            eps: hyper.eps as f32,
            step_size: (hyper.lr / bias_correction1) as f32,
            decay: if hyper.decoupled { (1.0 - hyper.lr * hyper.weight_decay) as f32 } else { 1.0 },
            l2: if hyper.decoupled { 0.0 } else { hyper.weight_decay as f32 },
        }
    }
}

/// One parameter's step.
#[derive(Debug, Clone, Copy)]
pub struct AdamSegment {
    /// Storage format.
    pub format: Format,
    /// Element type of the gradient.
    pub grad_dtype: GradDtype,
    /// Number of elements.
    pub numel: usize,
    /// bf16 parameter, fp16 parameter or fp32 parameter.
    pub param: *mut u8,
    /// Low half (`i16`), fp32 master, or null for [`Format::Fp32`].
    pub master: *mut u8,
    /// First moment.
    pub exp_avg: *mut f32,
    /// Second moment.
    pub exp_avg_sq: *mut f32,
    /// Gradient.
    pub grad: *const u8,
    /// Constants.
    pub constants: AdamConstants,
}

/// Where a step that may have to be undone puts what it overwrites: arrays of as many elements and bytes as the segment's.
#[derive(Debug, Clone, Copy)]
pub struct UndoRecord {
    /// Of the parameter.
    pub param: *mut u8,
    /// Of the master; not used for [`Format::Fp32`].
    pub master: *mut u8,
    /// Of the first moment.
    pub exp_avg: *mut f32,
    /// Of the second moment.
    pub exp_avg_sq: *mut f32,
}

// SAFETY: only addresses; whoever hands them over says how long they are valid and who else may use them.
unsafe impl Send for UndoRecord {}
// SAFETY: as above.
unsafe impl Sync for UndoRecord {}

// SAFETY: a segment or span is a set of addresses; whoever runs a kernel on it promises that they are valid and unaliased meanwhile.
unsafe impl Send for AdamSegment {}
// SAFETY: as above; the kernels never write through a span.
unsafe impl Send for GradSpan {}
// SAFETY: as above.
unsafe impl Sync for AdamSegment {}
// SAFETY: as above.
unsafe impl Sync for GradSpan {}
