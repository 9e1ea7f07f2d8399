//! Runtime of Tierwise: devices, pinned slabs, workers and the engine that executes a plan.

mod activations;
pub mod cuda;
pub mod device;
pub mod emulated;
pub mod engine;
pub mod error;
mod execute;
mod gradients;
pub mod host_memory;
mod late;
mod memory;
mod record;
pub mod spill;
mod streaming;
mod workers;
