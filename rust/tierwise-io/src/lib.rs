//! The NVMe tier of Tierwise: one spill file per rank, moved by `io_uring` or by threads, verified by checksums.
//!
//! [`store::Store`] is what an engine uses. Its decisions are made by [`queue::Queue`], which knows no threads, no clock and no
//! memory; a [`backend::Backend`] carries them out. Tests drive the same queue in virtual time against [`backend::faulty`].
//!
//! ```
//! use tierwise_io::backend::BackendKind;
//! use tierwise_io::pages::Pages;
//! use tierwise_io::store::{Store, StoreConfig};
//! use tierwise_io::{Key, Priority};
//!
//! # fn main() -> tierwise_io::error::Result<()> {
//! let slab = Pages::new(8 << 20, 4096)?;
//! // `backend: None` takes the best one that works in a directory on an NVMe disk.
//! let config = StoreConfig { backend: Some(BackendKind::Memory), ..StoreConfig::new("/mnt/nvme", 64 << 20) };
//! let store = Store::open(config)?;
//! let exp_avg = Key { chunk: 3, payload: 1 };
//! // SAFETY: the slab outlives the store, and these ranges are left alone until their tickets have ended.
//! let (out, mut back) = unsafe { (slab.buffer(0, 4 << 20), slab.buffer(4 << 20, 4 << 20)) };
//! store.write(exp_avg, 1, &out, Priority::Background)?.wait()?;
//! store.read(exp_avg, 1, &mut back, Priority::Demand)?.wait()?;
//! # Ok(())
//! # }
//! ```
//!
//! Linux only: direct I/O, `fallocate`, `O_TMPFILE` and `io_uring` are what this crate is about.

#![cfg(target_os = "linux")]

pub mod backend;
mod blocks;
pub mod buffer;
pub mod checksum;
pub mod doctor;
mod driver;
pub mod error;
pub mod filesystem;
pub mod metrics;
pub mod pages;
pub mod queue;
pub mod raw;
pub mod spill_file;
pub mod store;
pub mod ticket;

use serde::{Deserialize, Serialize};

/// What an extent of the spill file belongs to: one payload of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// Index of the chunk.
    pub chunk: u32,
    /// Which of the chunk's payloads, or which piece of them; the engine numbers them.
    pub payload: u32,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "payload {} of chunk {}", self.payload, self.chunk)
    }
}

/// Which way bytes move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Disk to memory.
    Read,
    /// Memory to disk.
    Write,
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Direction::Read => "read",
            Direction::Write => "write",
        })
    }
}

/// Who is served first; requests of one priority are served in the order they came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// Somebody waits for it now.
    Demand,
    /// The step needs it next.
    Soon,
    /// Fetched ahead.
    Prefetch,
    /// Written back while nothing else has to move.
    Background,
}
