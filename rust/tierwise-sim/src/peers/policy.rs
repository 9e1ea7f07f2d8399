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
    /// torch's first `FullyShardedDataParallel` as LLM-Foundry ran it in 2023: prefetching after a layer's backward, gradients reduced in bf16.
    Fsdp1,
    /// torch FSDP2 with `CPUOffloadPolicy`.
    FsdpOffload,
}

/// A policy as data. Bytes are per element of a rank's part, unless they are said to be whole.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(clippy::struct_excessive_bools, reason = "independent properties of a system, not states of one thing")]
pub struct Traits {
    /// Parameters are split and gathered before every use.
    pub gathers: bool,
    /// In backward, parameters are gathered only after the gradients of the unit before were reduced: both are on one communicator.
    pub gathers_late: bool,
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
    /// Bytes of a gradient's buffer on the host that go there and back in every micro-batch, before the final gradient leaves.
    pub bounced_grad_bytes: u64,
    /// Elements of a bucket: gradients are reduced, and copied, when the next would not fit into it, and after backward. 0: a layer at a time.
    pub bucket_elements: u64,
    /// Whether reductions, norms and copies of gradients are on one stream, one after the other.
    pub grads_on_one_stream: bool,
    /// Device memory bytes that the norm of a gradient, in 64 bit, and its conversion read and write.
    pub grad_traffic_bytes: u64,
    /// Bytes of accumulated gradients copied each way between micro-batches.
    pub accumulate_bytes: u64,
    /// Host memory bytes that one thread alone reads: a norm on the CPU.
    pub one_thread_bytes: u64,
    /// Host memory bytes that clipping, the optimizer and conversions read and write, with all threads.
    pub host_traffic_bytes: u64,
    /// Bytes of host memory that every step takes from the system afresh.
    pub fresh_bytes: u64,
    /// Bytes of rewritten parameters copied to the device after the host's step.
    pub refresh_bytes: u64,
    /// Whether they are converted on the device, where they are whole for a moment.
    pub refresh_on_device: bool,
    /// Whether that copy comes from memory that is not pinned, whatever was asked for.
    pub refresh_is_pageable: bool,
    /// Device memory bytes that the device's optimizer reads and writes.
    pub device_traffic_bytes: u64,
    /// Bytes of optimizer states of parameters that the device steps although the optimizer is offloaded.
    pub kept_state_bytes: u64,
    /// Bytes of pinned host memory, buffer by buffer; torch rounds each up to a power of two.
    pub pinned_bytes: &'static [u64],
    /// The same for buffers that are pinned tensor by tensor.
    pub pinned_by_tensor_bytes: u64,
    /// The same for buffers that are pinned in sub-groups of parameters.
    pub pinned_by_sub_group_bytes: u64,
    /// Bytes of a pinned buffer for all gradients, whatever share of them the CPU steps.
    pub staging_bytes: u64,
    /// Bytes of other host memory.
    pub host_bytes: u64,
    /// Nanoseconds that its hooks add to the training thread per layer, in forward and in backward with recomputation.
    pub hook_ns: [u64; 2],
}

/// DeepSpeed's `reduce_bucket_size`, in elements.
const DEEPSPEED_BUCKET: u64 = 500_000_000;

/// Two buckets in bf16, with `overlap_comm`.
const DEEPSPEED_BUCKETS: u64 = 2 * 2 * DEEPSPEED_BUCKET;

/// DeepSpeed's `sub_group_size`, in elements: sub-groups of ZeRO 3 have at least so many.
pub const SUB_GROUP: u64 = 1_000_000_000;

/// Nothing split, everything on the device: 2 bytes each of parameters and gradients, 12 of fp32 masters and moments. Clipping reads a
/// gradient and scales it (6), it is made fp32 (6), the fused AdamW reads four and writes three fp32 numbers (28), and the parameter is
/// rounded from its master (6).
const DDP: Traits = Traits {
    gathers: false,
    gathers_late: false,
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
    bounced_grad_bytes: 0,
    bucket_elements: 0,
    grads_on_one_stream: false,
    grad_traffic_bytes: 0,
    accumulate_bytes: 0,
    one_thread_bytes: 0,
    host_traffic_bytes: 0,
    fresh_bytes: 0,
    refresh_bytes: 0,
    refresh_on_device: false,
    refresh_is_pageable: false,
    device_traffic_bytes: 46,
    kept_state_bytes: 0,
    pinned_bytes: &[],
    pinned_by_tensor_bytes: 0,
    pinned_by_sub_group_bytes: 0,
    staging_bytes: 0,
    host_bytes: 0,
    hook_ns: [0, 0],
};

/// What hooks add to the training thread per LLaMA layer of 13 modules, in forward and in backward with recomputation:
/// benchmarks/peer_times.py (DeepSpeed 0.19.8, torch 2.15) on one core of a shared cloud machine. The GPU's part of their calls is not in it.
const ZERO2_HOOK_NS: [u64; 2] = [0, 890_000];
const ZERO3_HOOK_NS: [u64; 2] = [3_340_000, 5_610_000];
const FSDP2_HOOK_NS: [u64; 2] = [750_000, 1_110_000];

impl Policy {
    /// All of them.
    pub const ALL: [Policy; 9] = [
        Policy::Ddp,
        Policy::Zero1,
        Policy::Zero2,
        Policy::Zero3,
        Policy::Zero2Offload,
        Policy::Zero3Offload,
        Policy::Fsdp,
        Policy::Fsdp1,
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
            Policy::Fsdp1 => "fsdp1",
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
                bucket_elements: DEEPSPEED_BUCKET,
                all_reduces: false,
                device_state_bytes: 16,
                device_traffic_bytes: 36,
                ..DDP
            },
            Policy::Zero2 => Traits { splits_grads: true, hook_ns: ZERO2_HOOK_NS, ..Policy::Zero1.traits() },
            Policy::Zero3 => Traits { gathers: true, hook_ns: ZERO3_HOOK_NS, ..Policy::Zero2.traits() },
            // DeepSpeed, runtime/zero/stage_1_and_2.py. On the host: fp32 master and gradient and a bf16 staging copy, pinned; two
            // moments. The norm of a gradient is taken in fp64 on the GPU (18), where it is also made fp32 (6) before it is
            // copied. The step scales gradients (8) and runs Adam (28); the fp32 master goes to the GPU whole and is converted there.
            Policy::Zero2Offload => Traits {
                device_grad_bytes: 0,
                device_state_bytes: 0,
                device_traffic_bytes: 0,
                offload_grad_bytes: 4,
                grads_on_one_stream: true,
                grad_traffic_bytes: 24,
                accumulate_bytes: 2,
                host_traffic_bytes: 36,
                refresh_bytes: 4,
                refresh_on_device: true,
                pinned_bytes: &[4, 4, 2],
                host_bytes: 8,
                ..Policy::Zero2.traits()
            },
            // runtime/zero/stage3.py of 0.19.8. `partition_grads` copies a gradient to its bf16 buffer on the host and back; in later
            // micro-batches the buffer comes first and goes again. In the last one its norm is taken, it is made fp32 and copied out.
            // All of this is on one stream, and nobody waits for it before backward's end. The fp32 master is copied to the bf16 parameter by a
            // `copy_` that waits: torch (ATen native/cuda/Copy.cu) then converts on the CPU (6), into memory that is fresh every time and not
            // pinned. Only gradients, by sub-group, and their bf16 buffer are pinned; master and moments are not. Sub-groups
            // that Twin-Flow leaves to the GPU keep master, gradient and moments there (16), stepped like the rest.
            Policy::Zero3Offload => Traits {
                gathers: true,
                bounced_grad_bytes: 2,
                accumulate_bytes: 0,
                host_traffic_bytes: 42,
                fresh_bytes: 2,
                refresh_bytes: 2,
                refresh_on_device: false,
                refresh_is_pageable: true,
                kept_state_bytes: 16,
                device_traffic_bytes: 44,
                pinned_bytes: &[],
                pinned_by_sub_group_bytes: 4,
                staging_bytes: 2,
                host_bytes: 12,
                hook_ns: ZERO3_HOOK_NS,
                ..Policy::Zero2Offload.traits()
            },
            // fp32 shards, gradients and moments; gathered in bf16, reduced in fp32. Clipping reads and scales (12), AdamW as above (28).
            Policy::Fsdp => Traits {
                device_traffic_bytes: 40,
                gathers: true,
                splits_states: true,
                splits_grads: true,
                device_grad_bytes: 4,
                device_param_bytes: 4,
                device_state_bytes: 8,
                reduce_bytes: 4,
                all_reduces: false,
                hook_ns: FSDP2_HOOK_NS,
                ..DDP
            },
            // torch distributed/fsdp/_runtime_utils.py with `BackwardPrefetch.BACKWARD_POST`, the default of composer's FSDP: after a layer's
            // backward its gradients are reduced, and then the next layer is gathered. One process group is one NCCL stream, so both are
            // waited for. Mixed precision PURE gathers and reduces in bf16.
            // Its hooks were not measured.
            Policy::Fsdp1 => Traits { gathers_late: true, reduce_bytes: 2, hook_ns: [0, 0], ..Policy::Fsdp.traits() },
            // torch distributed/fsdp/_fully_shard. The fp32 shard is copied to the device for every use and cast there; gradients are reduced in
            // fp32 and copied to pinned memory, which a copy to the CPU that does not block takes per tensor, as shards are pinned. The norm on the CPU (4) runs on one thread: torch's reduction of a whole tensor to one number
            // is parallel over outputs only (ATen native/cpu/Reduce.h). Scaling (8) and the fused AdamW (28) use all.
            Policy::FsdpOffload => Traits {
                device_grad_bytes: 0,
                device_param_bytes: 0,
                device_state_bytes: 0,
                device_traffic_bytes: 0,
                fetch_bytes: 4,
                offload_grad_bytes: 4,
                one_thread_bytes: 4,
                host_traffic_bytes: 36,
                pinned_by_tensor_bytes: 8,
                host_bytes: 8,
                ..Policy::Fsdp.traits()
            },
        }
    }
}
