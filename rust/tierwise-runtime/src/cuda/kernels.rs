//! The kernels of `tierwise_kernels::cuda`: the loaded module, its functions, and how each is launched.

use super::driver::Context;
use crate::device::Addition;
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::ffi::{CString, c_void};
use tierwise_kernels::cuda::{self, THREADS, elementwise_grid};
use tierwise_kernels::{AdamSegment, Format, GradDtype, GradSpan, norm};

const FORMATS: [Format; 3] = [Format::SplitBf16, Format::Fp16Master, Format::Fp32];
const DTYPES: [GradDtype; 3] = [GradDtype::Bf16, GradDtype::Fp16, GradDtype::Fp32];

/// The module and its functions, looked up once: with lazy loading that also loads their code, which must not happen within a step.
pub(super) struct Kernels {
    module: sys::CUmodule,
    /// By format and gradient type, in the order of [`FORMATS`] and [`DTYPES`].
    adam: [[sys::CUfunction; 3]; 3],
    sum_squares: [sys::CUfunction; 3],
    accumulate: [sys::CUfunction; 3],
    add: [sys::CUfunction; 3],
    sum_blocks: sys::CUfunction,
}

impl Kernels {
    pub(super) fn load(context: &Context) -> Result<Kernels> {
        let image = CString::new(cuda::PTX).map_err(|error| Error::Internal(format!("the CUDA kernels: {error}")))?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a terminated string that is alive during the call; the caller has entered the context.
        let code = unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) };
        context.check("cuModuleLoadData", code)?;
        let null = std::ptr::null_mut();
        let mut kernels =
            Kernels { module, adam: [[null; 3]; 3], sum_squares: [null; 3], accumulate: [null; 3], add: [null; 3], sum_blocks: null };
        kernels.look_up(context).inspect_err(|_| kernels.unload())?;
        Ok(kernels)
    }

    fn look_up(&mut self, context: &Context) -> Result<()> {
        let module = self.module;
        let find = |name: &str| {
            let name = CString::new(name).map_err(|error| Error::Internal(error.to_string()))?;
            let mut function = std::ptr::null_mut();
            // SAFETY: the module is loaded; name and out pointer are alive during the call.
            let code = unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) };
            context.check("cuModuleGetFunction", code)?;
            Ok::<_, Error>(function)
        };
        for dtype in DTYPES {
            for format in FORMATS {
                self.adam[format as usize][dtype as usize] = find(cuda::adam_kernel(format, dtype))?;
            }
            self.sum_squares[dtype as usize] = find(cuda::sum_squares_kernel(dtype))?;
            self.accumulate[dtype as usize] = find(cuda::accumulate_kernel(dtype))?;
            self.add[dtype as usize] = find(cuda::add_kernel(dtype))?;
        }
        self.sum_blocks = find(cuda::SUM_BLOCKS)?;
        Ok(())
    }

    /// Frees the module; nothing that was launched from it may be running.
    pub(super) fn unload(&self) {
        // SAFETY: loaded once by this value; the caller has synchronised what runs its code. At process exit the driver may refuse.
        unsafe { sys::cuModuleUnload(self.module) };
    }

    /// # Safety
    /// As for [`launch`], for every array of the segment.
    pub(super) unsafe fn adam(&self, context: &Context, stream: sys::CUstream, segment: &AdamSegment) -> Result<()> {
        let AdamSegment { format, grad_dtype, numel, .. } = *segment;
        if numel == 0 {
            return Ok(());
        }
        let function = self.adam[format as usize][grad_dtype as usize];
        let (mut s, mut numel_argument) = (*segment, numel as u64);
        let mut arguments = [
            (&raw mut s.param).cast(),
            (&raw mut s.master).cast(),
            (&raw mut s.exp_avg).cast(),
            (&raw mut s.exp_avg_sq).cast(),
            (&raw mut s.grad).cast(),
            (&raw mut numel_argument).cast(),
            (&raw mut s.constants).cast(),
        ];
        // SAFETY: the arguments are those of `tw_adam_*`; the caller promises the arrays.
        unsafe { launch(context, stream, function, elementwise_grid(numel, context.multiprocessors()), &mut arguments) }
    }

    /// # Safety
    /// As for [`launch`], for the span and for one `f32` per block at `block_sums`.
    pub(super) unsafe fn sum_squares(&self, context: &Context, stream: sys::CUstream, span: GradSpan, block_sums: u64) -> Result<()> {
        if span.numel == 0 {
            return Ok(());
        }
        let (mut grad, mut numel, mut block_sums) = (span.ptr, span.numel as u64, block_sums);
        let mut arguments = [(&raw mut grad).cast(), (&raw mut numel).cast(), (&raw mut block_sums).cast()];
        let grid = blocks(span.numel);
        // SAFETY: the arguments are those of `tw_sum_squares_*`; the caller promises the arrays.
        unsafe { launch(context, stream, self.sum_squares[span.dtype as usize], grid, &mut arguments) }
    }

    /// # Safety
    /// As for [`launch`]: `first_block` has `spans + 1` elements, all valid in `block_sums`; `out` has `spans` elements.
    pub(super) unsafe fn sum_blocks(
        &self,
        context: &Context,
        stream: sys::CUstream,
        (block_sums, first_block, out): (u64, u64, u64),
        spans: u32,
    ) -> Result<()> {
        let (mut block_sums, mut first_block, mut spans, mut out) = (block_sums, first_block, spans, out);
        let grid = spans.div_ceil(THREADS);
        let mut arguments = [(&raw mut block_sums).cast(), (&raw mut first_block).cast(), (&raw mut spans).cast(), (&raw mut out).cast()];
        // SAFETY: the arguments are those of `tw_sum_blocks`; the caller promises the arrays.
        unsafe { launch(context, stream, self.sum_blocks, grid, &mut arguments) }
    }

    /// # Safety
    /// As for [`launch`], for the span and for `src.numel` elements at `dst`.
    pub(super) unsafe fn accumulate(&self, context: &Context, stream: sys::CUstream, addition: &Addition) -> Result<()> {
        let Addition { dst, sums, src, overwrite } = *addition;
        if src.numel == 0 {
            return Ok(());
        }
        let function = match sums {
            GradDtype::Fp32 => self.accumulate[src.dtype as usize],
            _ if sums == src.dtype => self.add[sums as usize],
            _ => return Err(Error::Internal(format!("sums of {:?} gradients in {sums:?}", src.dtype))),
        };
        let (mut dst, mut grad, mut numel, mut overwrite) = (dst, src.ptr, src.numel as u64, u32::from(overwrite));
        let mut arguments = [(&raw mut dst).cast(), (&raw mut grad).cast(), (&raw mut numel).cast(), (&raw mut overwrite).cast()];
        let grid = elementwise_grid(src.numel, context.multiprocessors());
        // SAFETY: the arguments are those of `tw_accumulate_*` and `tw_add_*`; the caller promises the arrays.
        unsafe { launch(context, stream, function, grid, &mut arguments) }
    }
}

/// Blocks of the norm's reduction tree, and the grid of its kernel.
pub(super) fn blocks(numel: usize) -> u32 {
    numel.div_ceil(norm::BLOCK_NUMEL) as u32
}

/// # Safety
/// The context is entered; `arguments` point to live values of the function's parameter types; every device address among them stays
/// valid and unaliased until the stream has passed this launch.
unsafe fn launch(
    context: &Context,
    stream: sys::CUstream,
    function: sys::CUfunction,
    grid: u32,
    arguments: &mut [*mut c_void],
) -> Result<()> {
    // SAFETY: promised by the caller; the driver copies the arguments before it returns.
    let code = unsafe { sys::cuLaunchKernel(function, grid, 1, 1, THREADS, 1, 1, 0, stream, arguments.as_mut_ptr(), std::ptr::null_mut()) };
    context.check("cuLaunchKernel", code)
}
