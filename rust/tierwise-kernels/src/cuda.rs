//! CUDA kernels with the bits of the CPU kernels, as PTX that the driver compiles at run time.
//!
//! Source: `cuda/kernels.cu`; `build_ptx.py` makes `cuda/kernels.ptx` of it. The target is `sm_80` and PTX 8.0: every GPU from Ampere on,
//! every driver from CUDA 12.0 on. All pointers are device pointers (or mapped host memory), naturally aligned; where an array starts at
//! a multiple of 16 bytes it is moved 16 bytes at a time, else element by element, with the same bits. No kernel uses dynamic shared
//! memory. `numel` may be 0 where the grid is not derived from it.
//!
//! | kernel | arguments, in order | launch geometry |
//! |---|---|---|
//! | `tw_adam_{format}_{grad}` | `param`, `master`, `f32* exp_avg`, `f32* exp_avg_sq`, `grad`, `u64 numel`, [`AdamConstants`] by value (40 bytes) | [`THREADS`] threads; any grid, best [`elementwise_grid`]; grid-stride |
//! | `tw_sum_squares_{grad}` | `grad`, `u64 numel`, `f32* block_out` | exactly [`THREADS`] threads; grid = `numel.div_ceil(`[`BLOCK_NUMEL`]`)` blocks, each writes one element of `block_out` |
//! | `tw_sum_blocks` | `f32* block_sums`, `u32* span_first_block` (`span_count + 1` entries), `u32 span_count`, `f64* out` | one thread per span: any block size, grid covers `span_count` |
//! | `tw_accumulate_{grad}` | `f32* dst`, `src`, `u64 numel`, `u32 overwrite` (0 or 1) | as `tw_adam` |
//!
//! `{format}` is `split`, `fp16` or `fp32` ([`Format::SplitBf16`], [`Format::Fp16Master`], [`Format::Fp32`]; `master` is not accessed in
//! the last and may be null); `{grad}` is `bf16`, `fp16` or `fp32`. `tw_sum_squares` of each span, its blocks following those of the span
//! before, and then one `tw_sum_blocks` give what [`crate::norm::sum_squares`] gives; `out` may be mapped host memory.

use crate::norm::BLOCK_NUMEL;
use crate::{Format, GradDtype};

#[cfg(doc)]
use crate::AdamConstants;

/// The module to load.
pub const PTX: &str = include_str!("cuda/kernels.ptx");

/// Threads of a CUDA block.
pub const THREADS: u32 = 256;

/// Name of the kernel that adds each span's block sums.
pub const SUM_BLOCKS: &str = "tw_sum_blocks";

/// Name of the Adam kernel.
pub fn adam_kernel(format: Format, grad: GradDtype) -> &'static str {
    match (format, grad) {
        (Format::SplitBf16, GradDtype::Bf16) => "tw_adam_split_bf16",
        (Format::SplitBf16, GradDtype::Fp16) => "tw_adam_split_fp16",
        (Format::SplitBf16, GradDtype::Fp32) => "tw_adam_split_fp32",
        (Format::Fp16Master, GradDtype::Bf16) => "tw_adam_fp16_bf16",
        (Format::Fp16Master, GradDtype::Fp16) => "tw_adam_fp16_fp16",
        (Format::Fp16Master, GradDtype::Fp32) => "tw_adam_fp16_fp32",
        (Format::Fp32, GradDtype::Bf16) => "tw_adam_fp32_bf16",
        (Format::Fp32, GradDtype::Fp16) => "tw_adam_fp32_fp16",
        (Format::Fp32, GradDtype::Fp32) => "tw_adam_fp32_fp32",
    }
}

/// Name of the kernel that sums the squares of each norm block.
pub fn sum_squares_kernel(grad: GradDtype) -> &'static str {
    match grad {
        GradDtype::Bf16 => "tw_sum_squares_bf16",
        GradDtype::Fp16 => "tw_sum_squares_fp16",
        GradDtype::Fp32 => "tw_sum_squares_fp32",
    }
}

/// Name of the kernel that adds a gradient to an fp32 accumulator.
pub fn accumulate_kernel(grad: GradDtype) -> &'static str {
    match grad {
        GradDtype::Bf16 => "tw_accumulate_bf16",
        GradDtype::Fp16 => "tw_accumulate_fp16",
        GradDtype::Fp32 => "tw_accumulate_fp32",
    }
}

/// Name of the kernel that adds a gradient to an accumulator of its own type.
pub fn add_kernel(grad: GradDtype) -> &'static str {
    match grad {
        GradDtype::Bf16 => "tw_add_bf16",
        GradDtype::Fp16 => "tw_add_fp16",
        GradDtype::Fp32 => accumulate_kernel(grad),
    }
}

/// Blocks for `tw_adam` and `tw_accumulate`: a thread per 4 elements, at most 8 blocks for each of the device's multiprocessors.
pub fn elementwise_grid(numel: usize, multiprocessors: u32) -> u32 {
    let blocks = numel.div_ceil(4 * THREADS as usize).max(1);
    u32::try_from(blocks).unwrap_or(u32::MAX).min(8 * multiprocessors.max(1))
}

/// Blocks for `tw_sum_squares`.
pub fn sum_squares_grid(numel: usize) -> u32 {
    u32::try_from(numel.div_ceil(BLOCK_NUMEL)).expect("a span has less than 2^48 elements")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instructions() -> impl Iterator<Item = &'static str> {
        PTX.lines().map(str::trim).filter(|line| !line.starts_with("//"))
    }

    #[test]
    fn every_documented_kernel_is_an_entry_and_nothing_else_is() {
        let grads = [GradDtype::Bf16, GradDtype::Fp16, GradDtype::Fp32];
        let mut names = vec![SUM_BLOCKS];
        for grad in grads {
            names.extend([sum_squares_kernel(grad), accumulate_kernel(grad)]);
            names.extend(Some(add_kernel(grad)).filter(|_| grad != GradDtype::Fp32));
            names.extend([Format::SplitBf16, Format::Fp16Master, Format::Fp32].map(|format| adam_kernel(format, grad)));
        }
        let mut entries: Vec<&str> =
            instructions().filter_map(|line| line.strip_prefix(".visible .entry ")).map(|line| line.trim_end_matches('(')).collect();
        names.sort_unstable();
        entries.sort_unstable();
        assert_eq!(entries, names);
    }

    #[test]
    fn arithmetic_is_rounded_once_per_operation() {
        for line in instructions() {
            for forbidden in ["fma.", "mad.rn", "mad.f", ".approx", ".full", ".ftz", "call"] {
                assert!(!line.contains(forbidden), "'{forbidden}' in: {line}");
            }
            // Without an explicit rounding the driver's compiler may contract.
            let operation = line.rsplit("%p").next().unwrap_or(line);
            let operation = operation.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
            let opcode = operation.split_whitespace().next().unwrap_or("");
            let arithmetic = ["add.", "sub.", "mul.", "div.", "sqrt."].iter().any(|name| opcode.starts_with(name));
            if arithmetic && (opcode.ends_with("f32") || opcode.ends_with("f64")) {
                assert!(opcode.contains(".rn."), "no rounding in: {line}");
            }
        }
        for needed in ["div.rn.f32", "sqrt.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32", "add.rn.f64", "cvt.rn.f16.f32"] {
            assert!(PTX.contains(needed), "{needed} is missing");
        }
    }

    #[test]
    fn version_and_target_are_what_old_drivers_load() {
        let header: Vec<&str> = instructions().filter(|line| !line.is_empty()).take(3).collect();
        assert_eq!(header, [".version 8.0", ".target sm_80", ".address_size 64"]);
    }

    #[test]
    fn constants_have_the_layout_of_the_cuda_struct() {
        assert_eq!(size_of::<crate::AdamConstants>(), 40);
        assert_eq!(PTX.matches(".align 4 .b8 ").count(), 9 + 3, "9 Adam kernels take 40 bytes, 3 norm kernels have shared memory");
        assert_eq!(PTX.matches("_param_6[40]").count(), 9);
    }

    #[test]
    fn grids_cover_and_are_bounded() {
        assert_eq!((elementwise_grid(0, 132), elementwise_grid(1025, 132), elementwise_grid(1 << 40, 132)), (1, 2, 1056));
        assert_eq!((sum_squares_grid(0), sum_squares_grid(1), sum_squares_grid(65_537)), (0, 1, 2));
    }
}
