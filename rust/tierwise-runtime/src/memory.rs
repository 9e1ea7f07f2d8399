//! Addresses: where every payload of every chunk is, on the host and on the device.

use crate::error::{Error, Result};
use tierwise_core::ChunkId;
use tierwise_core::layout::{Layout, ParamLayout, Precision, Sums};
use tierwise_core::plan::{ChunkPlan, Plan, host_region_bytes};
use tierwise_kernels::{AdamConstants, AdamSegment, Format, GradDtype, GradSpan, UndoRecord};

/// Host payloads of one chunk: offsets in the host slab.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostPlaces {
    /// Parameters in the model's precision.
    pub param: Option<u64>,
    /// Master completion.
    pub master: Option<u64>,
    /// First moment.
    pub exp_avg: Option<u64>,
    /// Second moment.
    pub exp_avg_sq: Option<u64>,
    /// Kept gradient or accumulator.
    pub grad: Option<u64>,
}

impl HostPlaces {
    /// All payloads, in the order of [`host_sizes`].
    pub fn offsets(&self) -> [Option<u64>; 5] {
        [self.param, self.master, self.exp_avg, self.exp_avg_sq, self.grad]
    }

    /// The same from their offsets.
    pub fn from_offsets([param, master, exp_avg, exp_avg_sq, grad]: [Option<u64>; 5]) -> Self {
        HostPlaces { param, master, exp_avg, exp_avg_sq, grad }
    }
}

/// Device payloads of one chunk: addresses, 0 if unbound.
#[derive(Debug, Clone, Copy, Default)]
pub struct DevicePlaces {
    /// Resident parameters.
    pub param: u64,
    /// Master completion, first and second moment, one after the other.
    pub states: u64,
    /// Accumulator of gradients.
    pub accumulator: u64,
}

/// Byte sizes of the host payloads of a chunk in the order param, master, `exp_avg`, `exp_avg_sq`, grad; 0 if it has none there.
pub fn host_sizes(layout: &Layout, plan: &Plan, chunk: ChunkId, placement: ChunkPlan) -> [u64; 5] {
    let n = layout.chunks[chunk.index()].state_numel;
    let param = if placement.has_host_params() { layout.param_bytes(chunk) } else { 0 };
    let grad = if placement.has_host_grads() { layout.final_grad_bytes(chunk, plan.accumulation) } else { 0 };
    if !placement.class.states_on_host() {
        return [param, 0, 0, 0, grad];
    }
    [param, n * layout.precision.master_bytes(), n * 4, n * 4, grad]
}

/// First-fit regions of the host slab, handed out at start and when a chunk changes its class.
#[derive(Debug, Default)]
pub struct Regions {
    free: Vec<(u64, u64)>,
}

impl Regions {
    /// Everything free.
    pub fn new(bytes: u64) -> Self {
        Regions { free: vec![(0, bytes)] }
    }

    /// Takes a region.
    pub fn take(&mut self, bytes: u64) -> Result<u64> {
        let bytes = host_region_bytes(bytes);
        if bytes == 0 {
            return Ok(0);
        }
        let Some(found) = self.free.iter_mut().find(|(_, len)| *len >= bytes) else {
            let free: u64 = self.free.iter().map(|(_, len)| len).sum();
            return Err(Error::Usage(format!("the host slab has no region of {bytes} bytes left ({free} bytes free)")));
        };
        let offset = found.0;
        found.0 += bytes;
        found.1 -= bytes;
        self.free.retain(|(_, len)| *len > 0);
        Ok(offset)
    }

    /// Gives a region back.
    pub fn give(&mut self, offset: u64, bytes: u64) {
        let bytes = host_region_bytes(bytes);
        if bytes == 0 {
            return;
        }
        let at = self.free.partition_point(|(start, _)| *start < offset);
        self.free.insert(at, (offset, bytes));
        let mut merged: Vec<(u64, u64)> = Vec::with_capacity(self.free.len());
        for &(start, len) in &self.free {
            match merged.last_mut() {
                Some(last) if last.0 + last.1 == start => last.1 += len,
                _ => merged.push((start, len)),
            }
        }
        self.free = merged;
    }
}

/// The kernel's name for a precision's storage.
pub fn format(precision: Precision) -> Format {
    match precision {
        Precision::Bf16 => Format::SplitBf16,
        Precision::Fp16 => Format::Fp16Master,
        Precision::Fp32 => Format::Fp32,
    }
}

/// The kernel's name for a precision's gradients.
pub fn grad_dtype(precision: Precision) -> GradDtype {
    match precision {
        Precision::Bf16 => GradDtype::Bf16,
        Precision::Fp16 => GradDtype::Fp16,
        Precision::Fp32 => GradDtype::Fp32,
    }
}

/// The type of a final gradient: of a sum, where gradients are added up.
pub fn final_dtype(layout: &Layout, accumulates: bool) -> GradDtype {
    match (accumulates, layout.sums) {
        (true, Sums::Fp32) => GradDtype::Fp32,
        (true, Sums::Gradient) | (false, _) => grad_dtype(layout.precision),
    }
}

/// Base addresses of the payloads that one optimizer step of a chunk touches.
#[derive(Debug, Clone, Copy)]
pub struct StepBases {
    /// Parameters.
    pub param: u64,
    /// Master completion (0 for fp32).
    pub master: u64,
    /// First moment.
    pub exp_avg: u64,
    /// Second moment.
    pub exp_avg_sq: u64,
}

impl StepBases {
    /// Bases of states that lie one after the other, as on the device.
    pub fn contiguous(param: u64, states: u64, layout: &Layout, chunk: ChunkId) -> Self {
        let n = layout.chunks[chunk.index()].state_numel;
        let exp_avg = states + n * layout.precision.master_bytes();
        StepBases { param, master: states, exp_avg, exp_avg_sq: exp_avg + n * 4 }
    }

    /// The step of one parameter.
    pub fn segment(&self, precision: Precision, param: &ParamLayout, grad: u64, dtype: GradDtype, constants: AdamConstants) -> AdamSegment {
        self.part(precision, param.offset, param.numel, grad, dtype, constants)
    }

    /// Where the step of one parameter puts what it overwrites, if it may have to be undone.
    pub fn record(&self, precision: Precision, param: &ParamLayout) -> UndoRecord {
        let at = |base: u64, bytes: u64| base + param.offset * bytes;
        UndoRecord {
            param: at(self.param, precision.param_bytes()) as *mut u8,
            master: at(self.master, precision.master_bytes()) as *mut u8,
            exp_avg: at(self.exp_avg, 4) as *mut f32,
            exp_avg_sq: at(self.exp_avg_sq, 4) as *mut f32,
        }
    }

    /// The step of `numel` elements from `first` of the chunk, whose gradients start at `grad`.
    pub fn part(&self, precision: Precision, first: u64, numel: u64, grad: u64, dtype: GradDtype, constants: AdamConstants) -> AdamSegment {
        let master_bytes = precision.master_bytes();
        // The base of a piece in the middle of a chunk lies before its buffer.
        let at = |base: u64, bytes: u64| base.wrapping_add(first * bytes);
        AdamSegment {
            format: format(precision),
            grad_dtype: dtype,
            numel: numel as usize,
            param: at(self.param, precision.param_bytes()) as *mut u8,
            master: if master_bytes == 0 { std::ptr::null_mut() } else { at(self.master, master_bytes) as *mut u8 },
            exp_avg: at(self.exp_avg, 4) as *mut f32,
            exp_avg_sq: at(self.exp_avg_sq, 4) as *mut f32,
            grad: grad as *const u8,
            constants,
        }
    }
}

/// A parameter's gradient inside a payload that starts at `base`.
pub fn span(base: u64, param: &ParamLayout, dtype: GradDtype) -> GradSpan {
    GradSpan { ptr: (base + param.offset * dtype.bytes() as u64) as *const u8, dtype, numel: param.numel as usize }
}
