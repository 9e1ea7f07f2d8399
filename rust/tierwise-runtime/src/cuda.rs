//! The CUDA device: copies, events and kernels through the driver API, which is looked for at run time.

mod clock;
mod driver;
mod kernels;

use crate::device::{Addition, ComputeStream, Device, Event, EventRef, Link, Queue, Transfer};
use crate::error::{Error, Result};
use clock::{Base, Clock, EventPool, Handle};
use cudarc::driver::sys;
use driver::Context;
use kernels::Kernels;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tierwise_kernels::{AdamSegment, GradSpan};

/// Largest piece of a copy: under a millisecond of a `PCIe` 5 link.
const PIECE_BYTES: usize = 32 << 20;
const SCRATCH_BYTES: usize = 1 << 16;
/// The clock's stream comes after those of the queues.
const CLOCK: usize = Queue::ALL.len();

/// Whether the NVIDIA driver is here and sees a GPU.
pub fn is_available() -> bool {
    device_count() > 0
}

fn device_count() -> i32 {
    let mut count = 0;
    // SAFETY: the library and its symbols were found first; the out pointer is a live local variable.
    let counted = driver::find_library().is_ok()
        && unsafe { sys::cuInit(0) == sys::CUresult::CUDA_SUCCESS && sys::cuDeviceGetCount(&raw mut count) == sys::CUresult::CUDA_SUCCESS };
    if counted { count } else { 0 }
}

/// One GPU, in the primary context that torch uses too.
pub struct CudaDevice {
    inner: Arc<Inner>,
}

/// What the device and its events share; released with the last of them.
struct Inner {
    /// In the order of [`Queue::ALL`], then the clock's; null where initialisation stopped.
    streams: [sys::CUstream; CLOCK + 1],
    kernels: Option<Kernels>,
    events: EventPool,
    clock: Option<Clock>,
    scratch: Mutex<Scratch>,
    /// Last: everything above lives in it.
    context: Context,
}

// SAFETY: streams, functions and device memory are handles that may be used from any thread; the driver locks.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// Device memory of the norm. The optimizer stream runs its users one after the other, so they share it.
#[derive(Default)]
struct Scratch {
    block_sums: Buffer,
    first_block: Buffer,
    sums: Buffer,
    /// What `first_block` will hold when the next kernel reads it.
    layout: Vec<u32>,
    /// Outgrown memory. Kernels that use it may be queued and freeing would wait for them; each doubling retires half.
    retired: Vec<u64>,
}

#[derive(Default)]
struct Buffer {
    address: u64,
    bytes: usize,
}

impl CudaDevice {
    /// Opens the GPU with this number among those the process sees.
    pub fn new(ordinal: usize) -> Result<Arc<Self>> {
        let context = Context::retain(ordinal)?;
        let mut inner = Inner {
            streams: [std::ptr::null_mut(); CLOCK + 1],
            kernels: None,
            events: EventPool::default(),
            clock: None,
            scratch: Mutex::default(),
            context,
        };
        inner.initialise()?;
        Ok(Arc::new(Self { inner: Arc::new(inner) }))
    }

    /// Free and total bytes of the GPU's memory.
    pub fn memory_info(&self) -> Result<(usize, usize)> {
        let _entered = self.inner.context.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the out pointers are live local variables.
        self.inner.context.check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free, total))
    }
}

impl Inner {
    fn initialise(&mut self) -> Result<()> {
        let _entered = self.context.enter()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the out pointers are live local variables.
        let code = unsafe { sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest) };
        self.context.check("cuCtxGetStreamPriorityRange", code)?;
        // Kernels of the optimizer must not delay the model's; copies may delay nothing but other copies, those of states not even these.
        for (stream, priority) in self.streams.iter_mut().zip([greatest, greatest, least, least, least, greatest]) {
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            // SAFETY: the out pointer is a field of this value.
            let code = unsafe { sys::cuStreamCreateWithPriority(&raw mut *stream, flags, priority) };
            self.context.check("cuStreamCreateWithPriority", code)?;
        }
        self.kernels = Some(Kernels::load(&self.context)?);
        self.clock = Some(Clock::start(&self.context, &self.events, self.streams[CLOCK])?);
        Ok(())
    }

    fn stream(&self, queue: Queue) -> sys::CUstream {
        self.streams[queue as usize]
    }

    fn kernels(&self) -> Result<&Kernels> {
        self.kernels.as_ref().ok_or_else(|| Error::Internal("the device is not initialised".into()))
    }

    fn record(self: &Arc<Self>, stream: sys::CUstream) -> Result<EventRef> {
        let _entered = self.context.enter()?;
        let clock = self.clock.as_ref().ok_or_else(|| Error::Internal("the device is not initialised".into()))?;
        let base = clock.base(&self.context, &self.events, self.streams[CLOCK])?;
        let handle = self.events.take(&self.context)?;
        let event = CudaEvent { handle, base: Some(base), time_ns: OnceLock::new(), inner: Arc::clone(self) };
        // SAFETY: the event is new or given back by its last owner; the stream is one of this device, or the caller's live one.
        self.context.check("cuEventRecord", unsafe { sys::cuEventRecord(handle.0, stream) })?;
        Ok(Arc::new(event))
    }

    fn wait(&self, stream: sys::CUstream, event: &EventRef) -> Result<()> {
        let _entered = self.context.enter()?;
        let Some(raw) = event.cuda_event() else {
            return Err(Error::Internal("a CUDA stream can only wait for an event of a CUDA device".into()));
        };
        let raw = std::ptr::with_exposed_provenance_mut(raw as usize);
        // SAFETY: `event` keeps the raw event alive during the call, and the driver remembers what it was recorded for.
        self.context.check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream, raw, 0) })
    }
}

impl Device for CudaDevice {
    fn name(&self) -> &str {
        self.inner.context.name()
    }

    fn now_ns(&self) -> u64 {
        self.inner.clock.as_ref().map_or(0, Clock::now_ns)
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn copy(&self, queue: Queue, transfers: &[Transfer]) -> Result<()> {
        let (to_device, call) = match queue.link() {
            Some(Link::HostToDevice) => (true, "cuMemcpyHtoDAsync"),
            Some(Link::DeviceToHost) => (false, "cuMemcpyDtoHAsync"),
            None => return Err(Error::Internal("copies go to a queue that has a direction".into())),
        };
        let context = &self.inner.context;
        let _entered = context.enter()?;
        let stream = self.inner.stream(queue);
        for transfer in transfers {
            for offset in (0..transfer.bytes).step_by(PIECE_BYTES) {
                let bytes = PIECE_BYTES.min(transfer.bytes - offset);
                let (dst, src) = (transfer.dst.wrapping_add(offset), transfer.src.wrapping_add(offset));
                // SAFETY: the device's caller keeps both ends alive and unaliased until an event recorded after this copy is done.
                let code = unsafe {
                    if to_device {
                        sys::cuMemcpyHtoDAsync_v2(dst as u64, src.cast(), bytes, stream)
                    } else {
                        sys::cuMemcpyDtoHAsync_v2(dst.cast(), src as u64, bytes, stream)
                    }
                };
                context.check(call, code)?;
            }
        }
        Ok(())
    }

    fn record(&self, queue: Queue) -> Result<EventRef> {
        self.inner.record(self.inner.stream(queue))
    }

    fn record_compute(&self, stream: ComputeStream) -> Result<EventRef> {
        self.inner.record(compute(stream))
    }

    fn queue_wait(&self, queue: Queue, event: &EventRef) -> Result<()> {
        self.inner.wait(self.inner.stream(queue), event)
    }

    fn compute_wait(&self, stream: ComputeStream, event: &EventRef) -> Result<()> {
        self.inner.wait(compute(stream), event)
    }

    fn adam(&self, segments: &[AdamSegment]) -> Result<()> {
        let Inner { context, .. } = &*self.inner;
        let _entered = context.enter()?;
        let (kernels, stream) = (self.inner.kernels()?, self.inner.stream(Queue::Optimizer));
        for segment in segments {
            // SAFETY: the device's caller keeps every array alive and unaliased until an event recorded after this call is done.
            unsafe { kernels.adam(context, stream, segment)? };
        }
        Ok(())
    }

    fn sum_squares(&self, spans: &[GradSpan], out: *mut f64) -> Result<()> {
        if spans.is_empty() {
            return Ok(());
        }
        let Inner { context, .. } = &*self.inner;
        let _entered = context.enter()?;
        let (kernels, stream) = (self.inner.kernels()?, self.inner.stream(Queue::Optimizer));
        let mut first_block = vec![0; spans.len() + 1];
        for (i, span) in spans.iter().enumerate() {
            first_block[i + 1] = first_block[i] + kernels::blocks(span.numel);
        }
        // Held over all launches: another thread's call must not come between them.
        let mut scratch = lock(&self.inner.scratch);
        scratch.prepare(context, stream, &first_block)?;
        for (span, first) in spans.iter().zip(&first_block) {
            let block_sums = scratch.block_sums.address + u64::from(*first) * size_of::<f32>() as u64;
            // SAFETY: the device's caller keeps the span alive as above; the scratch holds a sum for every block and outlives the stream.
            unsafe { kernels.sum_squares(context, stream, *span, block_sums)? };
        }
        let arrays = (scratch.block_sums.address, scratch.first_block.address, scratch.sums.address);
        // SAFETY: the scratch was made large enough for this layout, which the stream has written, and it outlives the stream.
        unsafe { kernels.sum_blocks(context, stream, arrays, spans.len() as u32)? };
        // SAFETY: the device's caller keeps one element per span alive at `out` until an event recorded after this call is done.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(out.cast(), scratch.sums.address, size_of::<f64>() * spans.len(), stream) };
        context.check("cuMemcpyDtoHAsync", code)
    }

    fn accumulate(&self, additions: &[Addition]) -> Result<()> {
        let Inner { context, .. } = &*self.inner;
        let _entered = context.enter()?;
        let (kernels, stream) = (self.inner.kernels()?, self.inner.stream(Queue::Optimizer));
        for addition in additions {
            // SAFETY: the device's caller keeps both arrays alive and unaliased until an event recorded after this call is done.
            unsafe { kernels.accumulate(context, stream, addition)? };
        }
        Ok(())
    }

    fn register_host(&self, ptr: *mut u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _entered = self.inner.context.enter()?;
        // SAFETY: the device's caller owns the range and unregisters it before freeing it.
        let code = unsafe { sys::cuMemHostRegister_v2(ptr.cast(), bytes, sys::CU_MEMHOSTREGISTER_PORTABLE) };
        self.inner.context.check("cuMemHostRegister", code)
    }

    fn unregister_host(&self, ptr: *mut u8) {
        if let Ok(_entered) = self.inner.context.enter() {
            // SAFETY: the address of a range that was registered. A refusal (at process exit) leaves nothing to do.
            unsafe { sys::cuMemHostUnregister(ptr.cast()) };
        }
    }

    fn synchronize(&self) -> Result<()> {
        let _entered = self.inner.context.enter()?;
        // Every stream is waited for, also when the first one has failed: memory may be freed after this call.
        let results = self.inner.streams.map(|stream| {
            // SAFETY: the streams live as long as `inner`.
            self.inner.context.check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) })
        });
        results.into_iter().collect()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Refused in a forked child and after the driver has shut down: then there is nothing to release.
        let Ok(_entered) = self.context.enter() else { return };
        let scratch = self.scratch.get_mut().unwrap_or_else(PoisonError::into_inner);
        let buffers = [&scratch.block_sums, &scratch.first_block, &scratch.sums].map(|buffer| buffer.address);
        if let Some(clock) = self.clock.take() {
            clock.stop(&self.events);
        }
        // SAFETY: streams and memory were made by this value, whose users are gone, and the streams are drained first. Refusals are
        // ignored: a failed context frees everything itself.
        unsafe {
            for stream in self.streams.iter().filter(|stream| !stream.is_null()) {
                sys::cuStreamSynchronize(*stream);
                sys::cuStreamDestroy_v2(*stream);
            }
            for address in buffers.into_iter().chain(scratch.retired.drain(..)).filter(|address| *address != 0) {
                sys::cuMemFree_v2(address);
            }
        }
        self.events.destroy();
        if let Some(kernels) = self.kernels.take() {
            kernels.unload();
        }
    }
}

impl Scratch {
    /// Makes room for the blocks and spans of a layout, and has the stream write it. The caller has entered the context.
    fn prepare(&mut self, context: &Context, stream: sys::CUstream, first_block: &[u32]) -> Result<()> {
        let blocks = first_block.last().copied().unwrap_or(0) as usize;
        self.block_sums.reserve(context, blocks * size_of::<f32>(), &mut self.retired)?;
        self.sums.reserve(context, first_block.len() * size_of::<f64>(), &mut self.retired)?;
        if self.first_block.reserve(context, size_of_val(first_block), &mut self.retired)? {
            self.layout.clear();
        }
        // The layers of a model have one layout, so this is rare. The values travel in the commands: a copy from pageable memory
        // would wait for the stream.
        if self.layout != first_block {
            self.layout.clear();
            for (address, value) in (self.first_block.address..).step_by(size_of::<u32>()).zip(first_block) {
                // SAFETY: the buffer has room for the layout and outlives the stream.
                context.check("cuMemsetD32Async", unsafe { sys::cuMemsetD32Async(address, *value, 1, stream) })?;
            }
            self.layout.extend_from_slice(first_block);
        }
        Ok(())
    }
}

impl Buffer {
    /// Whether the buffer had to be replaced.
    fn reserve(&mut self, context: &Context, bytes: usize, retired: &mut Vec<u64>) -> Result<bool> {
        if bytes <= self.bytes {
            return Ok(false);
        }
        let bytes = bytes.next_power_of_two().max(SCRATCH_BYTES);
        let mut address = 0;
        // SAFETY: the out pointer is a live local variable.
        context.check("cuMemAlloc", unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) })?;
        if self.address != 0 {
            retired.push(self.address);
        }
        *self = Buffer { address, bytes };
        Ok(true)
    }
}

/// A recorded event, which returns to the pool when nobody needs it any more.
struct CudaEvent {
    handle: Handle,
    /// Taken only when the event is dropped.
    base: Option<Arc<Base>>,
    time_ns: OnceLock<u64>,
    inner: Arc<Inner>,
}

impl Event for CudaEvent {
    fn is_done(&self) -> Result<bool> {
        let _entered = self.inner.context.enter()?;
        // SAFETY: this value owns the event.
        match unsafe { sys::cuEventQuery(self.handle.0) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => self.inner.context.check("cuEventQuery", code).map(|()| true),
        }
    }

    fn synchronize(&self) -> Result<()> {
        let _entered = self.inner.context.enter()?;
        // SAFETY: this value owns the event.
        self.inner.context.check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.handle.0) })
    }

    fn time_ns(&self) -> Option<u64> {
        if let Some(time) = self.time_ns.get() {
            return Some(*time);
        }
        let _entered = self.inner.context.enter().ok()?;
        let time = clock::time_ns(self.base.as_deref()?, self.handle)?;
        Some(*self.time_ns.get_or_init(|| time))
    }

    fn cuda_event(&self) -> Option<u64> {
        Some(self.handle.0.expose_provenance() as u64)
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        if self.inner.context.is_forked() {
            return;
        }
        if let Some(base) = self.base.take() {
            clock::release(base, &self.inner.events);
        }
        self.inner.events.give_back(self.handle);
    }
}

fn compute(stream: ComputeStream) -> sys::CUstream {
    std::ptr::with_exposed_provenance_mut(stream.0 as usize)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic under a lock is ours and leaves whole values: handles and addresses.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
