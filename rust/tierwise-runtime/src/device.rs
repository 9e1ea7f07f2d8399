//! The device trait: what the engine asks of a GPU, or of host memory that behaves like one.

use crate::error::Result;
use std::sync::Arc;
use tierwise_io::{Direction, Key, Priority};
pub use tierwise_kernels::Addition;
use tierwise_kernels::{AdamSegment, GradSpan};

/// The device's own in-order queues. Compute runs on the caller's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Queue {
    /// Host-to-device copies.
    HostToDevice,
    /// Device-to-host copies.
    DeviceToHost,
    /// Optimizer steps, gradient norms and accumulation on the device.
    Optimizer,
    /// Host-to-device copies of optimizer states, beside everything on [`Queue::HostToDevice`]: they share its link.
    StatesIn,
    /// Device-to-host copies of optimizer states, beside everything on [`Queue::DeviceToHost`]: they share its link.
    StatesOut,
}

impl Queue {
    /// All queues, in the order of their numbers.
    pub const ALL: [Queue; 5] = [Queue::HostToDevice, Queue::DeviceToHost, Queue::Optimizer, Queue::StatesIn, Queue::StatesOut];

    /// The direction of its copies; `None` if it runs kernels.
    pub fn link(self) -> Option<Link> {
        match self {
            Queue::HostToDevice | Queue::StatesIn => Some(Link::HostToDevice),
            Queue::DeviceToHost | Queue::StatesOut => Some(Link::DeviceToHost),
            Queue::Optimizer => None,
        }
    }
}

/// A direction between host and device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Towards the device.
    HostToDevice,
    /// Towards the host.
    DeviceToHost,
}

/// The caller's compute stream: a raw `CUstream` on CUDA (0 is the legacy default stream), ignored by the emulated device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ComputeStream(pub u64);

/// One contiguous copy between host and device memory.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    /// Destination address.
    pub dst: *mut u8,
    /// Source address.
    pub src: *const u8,
    /// Bytes.
    pub bytes: usize,
}

// SAFETY: a transfer is an address pair; the engine keeps both ends alive until its event is done.
unsafe impl Send for Transfer {}

/// A point in a queue or compute stream.
pub trait Event: Send + Sync {
    /// Whether everything before it is done. An error of the work before it is returned here.
    fn is_done(&self) -> Result<bool>;
    /// Blocks the calling thread until everything before it is done.
    fn synchronize(&self) -> Result<()>;
    /// Blocks for at most `limit`; gives whether everything before it is done.
    fn synchronize_for(&self, limit: std::time::Duration) -> Result<bool> {
        let end = std::time::Instant::now() + limit;
        loop {
            if self.is_done()? {
                return Ok(true);
            }
            if std::time::Instant::now() >= end {
                return Ok(false);
            }
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    }
    /// When it was reached, in nanoseconds since the device's epoch; `None` before that.
    fn time_ns(&self) -> Option<u64>;
    /// The raw `CUevent`, where it is one: what another CUDA stream waits for.
    fn cuda_event(&self) -> Option<u64> {
        None
    }
}

/// A shared event.
pub type EventRef = Arc<dyn Event>;

/// A worker of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkerId {
    /// Runs host steps.
    Adam,
    /// Passes on that gradients have landed.
    Landed,
    /// Adds landed gradients and takes their norm.
    Landing,
    /// Passes on what the device's optimizer queue finished.
    Optimizer,
    /// Passes on that states are back on the host.
    States,
    /// Steps spilled chunks, piece by piece as the disk reads them.
    Spill,
    /// Waits for reads of the disk.
    Reads,
    /// Waits for writes to the disk.
    Writes,
    /// Waits for parameters that are read from the disk.
    Fetches,
    /// Waits until they are on the device.
    Fetched,
}

/// Time that is not the machine's: how the engine's threads wait where a test decides how long everything takes.
///
/// The engine's caller drives it: whenever it waits, [`Clock::pass`] lets the next thing happen.
pub trait Clock: Send + Sync {
    /// A worker's thread began; called on it.
    fn worker_started(&self, worker: WorkerId);
    /// A job was given to a worker.
    fn job_sent(&self, worker: WorkerId);
    /// A worker's job ended.
    fn job_done(&self, worker: WorkerId);
    /// A worker is about to move so many bytes through host memory; blocks while that would take.
    fn host_work(&self, bytes: u64);
    /// The disk gets a transfer of so many bytes; gives its end. It is over when the store says so and this is.
    fn disk(&self, key: Key, direction: Direction, bytes: u64, priority: Priority) -> EventRef;
    /// The calling worker waits until others have changed something. The engine's lock is held.
    fn parks(&self);
    /// Something has changed: every worker that waits for that looks again.
    fn news(&self);
    /// The caller waits for something: lets the next thing happen.
    fn pass(&self) -> Result<()>;
}

/// What the engine asks of a device. Every method only enqueues, unless it says that it blocks.
///
/// # Safety of pointers
/// The engine keeps every address it passes alive and unaliased until an event recorded after the call is done.
pub trait Device: Send + Sync {
    /// Name for messages, such as `NVIDIA H100 80GB HBM3` or `emulated`.
    fn name(&self) -> &str;
    /// Nanoseconds since the device's epoch, on the clock of [`Event::time_ns`].
    fn now_ns(&self) -> u64;
    /// Whether compute on the device runs asynchronously to the calling thread.
    fn is_asynchronous(&self) -> bool;
    /// Enqueues copies on a queue that has a direction, split into pieces.
    fn copy(&self, queue: Queue, transfers: &[Transfer]) -> Result<()>;
    /// Records an event after everything enqueued on a queue so far.
    fn record(&self, queue: Queue) -> Result<EventRef>;
    /// Records an event after everything that the caller enqueued on its compute stream so far.
    fn record_compute(&self, stream: ComputeStream) -> Result<EventRef>;
    /// Makes a queue wait for an event.
    fn queue_wait(&self, queue: Queue, event: &EventRef) -> Result<()>;
    /// Makes the caller's compute stream wait for an event. The emulated device blocks the calling thread.
    fn compute_wait(&self, stream: ComputeStream, event: &EventRef) -> Result<()>;
    /// Enqueues optimizer steps of device memory on `Optimizer`.
    fn adam(&self, segments: &[AdamSegment]) -> Result<()>;
    /// Enqueues sums of squares on `Optimizer`: one per span into `out[i]` (host memory, pinned on CUDA), in the reduction tree of
    /// [`tierwise_kernels::norm`].
    fn sum_squares(&self, spans: &[GradSpan], out: *mut f64) -> Result<()>;
    /// Enqueues additions into accumulators on `Optimizer`.
    fn accumulate(&self, additions: &[Addition]) -> Result<()>;
    /// Makes host memory reachable by asynchronous copies (page-locks it on CUDA). Blocks.
    fn register_host(&self, ptr: *mut u8, bytes: usize) -> Result<()>;
    /// Undoes [`Device::register_host`]. Blocks.
    fn unregister_host(&self, ptr: *mut u8);
    /// Blocks until everything enqueued on every queue is done.
    fn synchronize(&self) -> Result<()>;
    /// The clock that the engine's threads wait by; `None` for the machine's own time.
    fn clock(&self) -> Option<Arc<dyn Clock>> {
        None
    }
}
