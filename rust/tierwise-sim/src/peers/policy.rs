//! What each policy keeps where, and what it moves.

use serde::Serialize;

/// Whose code runs the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// torch `DistributedDataParallel`, bf16 with fp32 masters, fused AdamW.
    Ddp,
    /// DeepSpeed ZeRO 1.
    Zero1,
    /// DeepSpeed ZeRO 2.
    Zero2,
    /// DeepSpeed ZeRO 3.
    Zero3,
    /// DeepSpeed ZeRO 2, optimizer on the CPU.
    Zero2Offload,
    /// DeepSpeed ZeRO 3, optimizer on the CPU.
    Zero3Offload,
    /// torch FSDP2, fp32 shards, bf16 compute.
    Fsdp,
    /// torch FSDP2 with `CPUOffloadPolicy`.
    FsdpOffload,
}

/// A policy as data. Bytes are per element of a rank's part, unless they are said to be whole.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(clippy::struct_excessive_bools, reason = "independent properties of a system, not states of one thing")]
pub struct Traits {
    /// Parameters are split and gathered before every use.
    pub gathers: bool,
    /// Optimizer states are split.
    pub splits_states: bool,
    /// Bytes of gradients that stay on the device until the step.
    pub device_grad_bytes: u64,
    /// Whether these are split.
    pub splits_grads: bool,
    /// Bytes of parameters that stay on the device.
    pub device_param_bytes: u64,
    /// Bytes of optimizer states on the device.
    pub device_state_bytes: u64,
    /// Bytes of fixed buffers on the device.
    pub buffer_bytes: u64,
    /// Bytes of an element on the wire when gradients are reduced.
    pub reduce_bytes: u64,
    /// Gradients are reduced by an all-reduce, in the last micro-batch only.
    pub all_reduces: bool,
    /// Bytes of parameters copied to the device before every use.
    pub fetch_bytes: u64,
    /// Bytes of the final gradient copied to the host.
    pub offload_grad_bytes: u64,
    /// Bytes of accumulated gradients copied each way between micro-batches.
    pub accumulate_bytes: u64,
    /// Host memory bytes that clipping, the optimizer and conversions read and write.
    pub host_traffic_bytes: u64,
    /// Bytes of rewritten parameters copied to the device after the host's step.
    pub refresh_bytes: u64,
    /// Whether that copy comes from fresh memory that is not pinned, whatever was asked for.
    pub refresh_is_pageable: bool,
    /// Device memory bytes that the device's optimizer reads and writes.
    pub device_traffic_bytes: u64,
    /// Bytes of pinned host memory, buffer by buffer; torch rounds each up to a power of two.
    pub pinned_bytes: &'static [u64],
    /// Bytes of other host memory.
    pub host_bytes: u64,
}

/// Two buckets of 5e8 elements in bf16: DeepSpeed's `reduce_bucket_size` with `overlap_comm`.
const DEEPSPEED_BUCKETS: u64 = 2_000_000_000;

/// Nothing split, everything on the device: 2 bytes each of parameters and gradients, 12 of fp32 masters and moments. The optimizer reads
/// a gradient (2), reads and writes the states (24) and writes the parameter (2).
const DDP: Traits = Traits {
    gathers: false,
    splits_states: false,
    // DDP's buckets are copies of the gradients unless `gradient_as_bucket_view` is set.
    device_grad_bytes: 4,
    splits_grads: false,
    device_param_bytes: 2,
    device_state_bytes: 12,
    buffer_bytes: 0,
    reduce_bytes: 2,
    all_reduces: true,
    fetch_bytes: 0,
    offload_grad_bytes: 0,
    accumulate_bytes: 0,
    host_traffic_bytes: 0,
    refresh_bytes: 0,
    refresh_is_pageable: false,
    device_traffic_bytes: 28,
    pinned_bytes: &[],
    host_bytes: 0,
};

impl Policy {
    /// All of them.
    pub const ALL: [Policy; 8] = [
        Policy::Ddp,
        Policy::Zero1,
        Policy::Zero2,
        Policy::Zero3,
        Policy::Zero2Offload,
        Policy::Zero3Offload,
        Policy::Fsdp,
        Policy::FsdpOffload,
    ];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Ddp => "ddp",
            Policy::Zero1 => "zero1",
            Policy::Zero2 => "zero2",
            Policy::Zero3 => "zero3",
            Policy::Zero2Offload => "zero2-offload",
            Policy::Zero3Offload => "zero3-offload",
            Policy::Fsdp => "fsdp",
            Policy::FsdpOffload => "fsdp-offload",
        }
    }

    /// What it keeps and moves.
    pub fn traits(self) -> Traits {
        match self {
            Policy::Ddp => DDP,
            // The step converts the rank's gradients to fp32 (4), which is alive together with the bf16 ones (2).
            Policy::Zero1 => Traits {
                splits_states: true,
                device_grad_bytes: 2,
                buffer_bytes: DEEPSPEED_BUCKETS,
                all_reduces: false,
                device_state_bytes: 16,
                device_traffic_bytes: 36,
                ..DDP
            },
            Policy::Zero2 => Traits { splits_grads: true, ..Policy::Zero1.traits() },
            Policy::Zero3 => Traits { gathers: true, ..Policy::Zero2.traits() },
            // On the host: fp32 master and gradient and a bf16 staging copy, pinned; two moments. A gradient is made fp32 on the GPU and
            // copied. The step scales gradients (8), runs Adam (28) and fills the staging copy (6).
            Policy::Zero2Offload => Traits {
                device_grad_bytes: 0,
                device_state_bytes: 0,
                device_traffic_bytes: 0,
                offload_grad_bytes: 4,
                accumulate_bytes: 2,
                host_traffic_bytes: 42,
                refresh_bytes: 2,
                pinned_bytes: &[4, 4, 2],
                host_bytes: 8,
                ..Policy::Zero2.traits()
            },
            // `copy_` from fp32 on the host to bf16 on the device converts into fresh host memory first.
            Policy::Zero3Offload => Traits { gathers: true, refresh_is_pageable: true, ..Policy::Zero2Offload.traits() },
            // fp32 shards, gradients and moments; gathered in bf16, reduced in fp32.
            Policy::Fsdp => Traits {
                gathers: true,
                splits_states: true,
                splits_grads: true,
                device_grad_bytes: 4,
                device_param_bytes: 4,
                device_state_bytes: 8,
                reduce_bytes: 4,
                all_reduces: false,
                ..DDP
            },
            // The fp32 shard is copied to the device for every use and cast there. The step takes the norm (4), scales (8), and steps (28).
            Policy::FsdpOffload => Traits {
                device_grad_bytes: 0,
                device_param_bytes: 0,
                device_state_bytes: 0,
                device_traffic_bytes: 0,
                fetch_bytes: 4,
                offload_grad_bytes: 4,
                host_traffic_bytes: 40,
                pinned_bytes: &[4, 4],
                host_bytes: 8,
                ..Policy::Fsdp.traits()
            },
        }
    }
}
