//! The error type of the runtime.

use std::path::PathBuf;

/// What can go wrong while a plan is executed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A tier would exceed its budget.
    #[error(transparent)]
    Budget(#[from] tierwise_core::budget::BudgetExceeded),
    /// The scheduler refused an event.
    #[error(transparent)]
    Schedule(#[from] tierwise_core::scheduler::ScheduleError),
    /// The device refused an operation.
    #[error("{device}: {call} failed: {message}")]
    Device {
        /// Name of the device.
        device: String,
        /// The call.
        call: &'static str,
        /// What the driver said.
        message: String,
    },
    /// The operating system refused memory.
    #[error("cannot map {bytes} bytes of host memory: {message}")]
    HostMemory {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        message: String,
    },
    /// The disk, or the spill file on it, failed.
    #[error("{what}: {source}")]
    Storage {
        /// What was read or written, by name.
        what: String,
        /// The directory of the spill file.
        path: Option<PathBuf>,
        /// What the storage layer says: generation, place, error number, remedy.
        source: tierwise_io::error::Error,
    },
    /// The disk failed a worker earlier; the step is stopped with its error.
    #[error("the engine stopped: {what}: {source}")]
    StoppedByDisk {
        /// What was read or written, by name.
        what: String,
        /// The directory of the spill file.
        path: Option<PathBuf>,
        /// What the storage layer said.
        source: tierwise_io::error::Error,
    },
    /// A staging buffer was used against its state.
    #[error(transparent)]
    Staging(#[from] tierwise_core::staging::StagingError),
    /// A worker failed earlier; the step is stopped with its error.
    #[error("the engine stopped: {0}")]
    Stopped(String),
    /// The engine was called in a forked child process.
    #[error(
        "this engine belongs to process {owner}; it cannot be used in its forked child {child} (load the data there, train in the parent)"
    )]
    Forked {
        /// Process that built the engine.
        owner: u32,
        /// Process that called it.
        child: u32,
    },
    /// The caller asked to stop waiting (Ctrl-C).
    #[error("interrupted")]
    Interrupted,
    /// The engine broke its own contract, or the system refused it something: never the caller's fault.
    #[error("internal error: {0}")]
    Internal(String),
    /// The caller broke the engine's contract.
    #[error("{0}")]
    Usage(String),
}

/// Result with the runtime's error.
pub type Result<T> = std::result::Result<T, Error>;
