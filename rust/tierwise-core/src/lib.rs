//! The sans-IO core of Tierwise: what a training step touches, where its bytes live, and what moves when.
//!
//! Data flows one way: [`trace`] -> [`planner`] -> [`plan`] -> [`scheduler`] -> [`timeline`]. Nothing here reads a clock,
//! starts a thread or touches memory that it does not own, so the runtime and the simulator share every decision.

#![forbid(unsafe_code)]

pub mod budget;
pub mod fetching;
pub mod grad_buffers;
pub mod layout;
pub mod plan;
pub mod planner;
pub mod residency;
pub mod scheduler;
pub mod slab;
pub mod staging;
pub mod streaming;
pub mod timeline;
pub mod trace;

use serde::{Deserialize, Serialize};

/// Index of a chunk in its [`layout::Layout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChunkId(pub u32);

/// Index of an operation in its [`trace::Trace`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OpId(pub u32);

impl ChunkId {
    /// The id as a vector index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl OpId {
    /// The id as a vector index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where bytes can live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// GPU memory, or the emulated device's.
    Device,
    /// Pinned host memory.
    Host,
    /// A spill file on disk.
    Nvme,
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Tier::Device => "device",
            Tier::Host => "host",
            Tier::Nvme => "nvme",
        })
    }
}
