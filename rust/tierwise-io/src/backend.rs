//! What carries transfers out: `io_uring`, threads, memory, or a faulty disk.

pub mod faulty;
pub mod memory;
pub mod threads;
pub mod uring;

use crate::Direction;
use crate::checksum::checksum;
use crate::error::{Error, Result};
use crate::pages::Pages;
use crate::spill_file::SpillFile;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// Name of the environment variable that forces a backend.
pub const BACKEND_ENV: &str = "TIERWISE_IO_BACKEND";

/// Names a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// The block that a transfer belongs to.
#[derive(Debug, Clone, Copy)]
pub struct BlockRef {
    /// Address of its first byte.
    pub address: usize,
    /// Payload bytes, without the padding up to the alignment.
    pub bytes: usize,
    /// Bytes that earlier transfers moved.
    pub done: usize,
    /// Seed of its checksum.
    pub seed: u64,
}

/// One transfer between memory and the spill file.
#[derive(Debug, Clone, Copy)]
pub struct Op {
    /// Its name.
    pub id: OpId,
    /// Which way.
    pub direction: Direction,
    /// Byte of the file.
    pub offset: u64,
    /// Address in memory; [`crate::buffer::Buffer::new`] says who keeps it alive.
    pub address: usize,
    /// Bytes to move.
    pub len: usize,
    /// The block it is a part of.
    pub block: BlockRef,
}

impl Op {
    /// The checksum of a block that starts to be written.
    pub fn checksum_before(&self) -> Option<u64> {
        (self.direction == Direction::Write && self.block.done == 0).then(|| self.block.checksum())
    }

    /// The checksum of a block whose last bytes were just read.
    pub fn checksum_after(&self, moved: usize) -> Option<u64> {
        (self.direction == Direction::Read && moved == self.len).then(|| self.block.checksum())
    }
}

impl BlockRef {
    fn checksum(&self) -> u64 {
        // SAFETY: the buffer's owner keeps it alive, and does not write to it, until the request ends; it has not, because this block's
        // transfer is reported only after this.
        let bytes = unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(self.address), self.bytes) };
        checksum(bytes, self.seed)
    }
}

/// How a transfer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Which.
    pub id: OpId,
    /// Bytes moved, or the error number.
    pub result: std::result::Result<usize, i32>,
    /// [`Op::checksum_before`] or [`Op::checksum_after`].
    pub checksum: Option<u64>,
}

/// Carries transfers out. It lives on the driver thread.
pub trait Backend {
    /// Transfers to give it at once: what the disk has, and a few that wait here.
    fn max_in_flight(&self) -> usize;

    /// Starts a transfer. An error means that the backend is broken, not that the transfer failed.
    fn submit(&mut self, op: Op) -> Result<()>;

    /// Waits until a transfer has ended, [`Wake::wake`] was called or the time is over, and adds what ended. It may return early.
    fn reap(&mut self, timeout: Option<Duration>, ended: &mut Vec<Completion>) -> Result<()>;

    /// Ends [`Backend::reap`] from another thread.
    fn waker(&self) -> Arc<dyn Wake>;
}

/// Ends a wait of the driver thread.
pub trait Wake: Send + Sync {
    /// The next or current wait ends.
    fn wake(&self);
}

/// Which backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackendKind {
    /// One ring of the kernel.
    IoUring,
    /// A pool of threads that call `pread` and `pwrite`.
    Threads,
    /// Host memory: for tests and machines without a disk.
    Memory,
}

impl BackendKind {
    /// The name in [`BACKEND_ENV`].
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::IoUring => "io_uring",
            BackendKind::Threads => "threads",
            BackendKind::Memory => "memory",
        }
    }

    /// The backend that [`BACKEND_ENV`] forces.
    pub fn from_env() -> Result<Option<BackendKind>> {
        match std::env::var(BACKEND_ENV) {
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(value)) => Self::parse(&value.to_string_lossy()).map(Some),
            Ok(value) => Self::parse(&value).map(Some),
        }
    }

    fn parse(value: &str) -> Result<BackendKind> {
        [BackendKind::IoUring, BackendKind::Threads, BackendKind::Memory]
            .into_iter()
            .find(|kind| kind.name() == value)
            .ok_or_else(|| Error::Usage(format!("{BACKEND_ENV}='{value}' names no backend: set io_uring, threads or memory, or unset it")))
    }
}

/// A backend that was opened, and why it is not a better one.
pub(crate) struct Opened {
    pub backend: Box<dyn Backend>,
    pub kind: BackendKind,
    pub note: Option<String>,
    pub registered_bytes: u64,
    pub registered_note: Option<String>,
}

/// Opens `forced`, else `io_uring`, else threads. A backend counts as usable once it has written and read the spill file.
pub(crate) fn open(
    file: &Arc<SpillFile>,
    forced: Option<BackendKind>,
    depth: usize,
    threads: usize,
    slabs: &[(usize, usize)],
) -> Result<Opened> {
    let mut note = None;
    if forced != Some(BackendKind::Threads) {
        match uring::Uring::open(Arc::clone(file), depth, slabs).and_then(|mut ring| probe(&mut ring, file, "io_uring").map(|()| ring)) {
            Ok(ring) => {
                let (registered_bytes, registered_note) = ring.registered();
                return Ok(Opened { backend: Box::new(ring), kind: BackendKind::IoUring, note, registered_bytes, registered_note });
            }
            Err(error) if forced == Some(BackendKind::IoUring) => return Err(error),
            Err(error) => note = Some(error.to_string()),
        }
    }
    let mut pool = threads::Threads::open(file, threads)?;
    probe(&mut pool, file, "threads")?;
    Ok(Opened { backend: Box::new(pool), kind: BackendKind::Threads, note, registered_bytes: 0, registered_note: None })
}

/// One real block out and back: containers refuse `io_uring` at set-up, at submission or not at all.
fn probe(backend: &mut dyn Backend, file: &SpillFile, name: &'static str) -> Result<()> {
    let len = file.alignment();
    let pattern: Vec<u8> = (0..len).map(|i| (i * 31 + 7) as u8).collect();
    let mut pages = Pages::new(len, len)?;
    let broken = |reason: String, errno| Error::Backend { backend: name, reason: format!("a test transfer failed: {reason}"), errno };
    for direction in [Direction::Write, Direction::Read] {
        if direction == Direction::Write {
            pages.as_mut_slice().copy_from_slice(&pattern);
        } else {
            pages.as_mut_slice().fill(0);
        }
        let address = pages.as_ptr().expose_provenance();
        let block = BlockRef { address, bytes: len, done: 0, seed: 0 };
        backend.submit(Op { id: OpId(0), direction, offset: 0, address, len, block })?;
        let mut ended = Vec::new();
        while ended.is_empty() {
            backend.reap(None, &mut ended)?;
        }
        match ended[0].result {
            Ok(moved) if moved == len => {}
            Ok(moved) => return Err(broken(format!("{direction} moved {moved} of {len} bytes"), None)),
            Err(errno) => return Err(broken(format!("{direction}: {}", crate::error::os(errno)), Some(errno))),
        }
    }
    if pages.as_slice() != pattern {
        return Err(broken("read returned other bytes than were written".to_owned(), None));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backend_names_are_checked() {
        assert_eq!(BackendKind::parse("io_uring").ok(), Some(BackendKind::IoUring));
        assert_eq!(BackendKind::parse("memory").ok(), Some(BackendKind::Memory));
        let error = BackendKind::parse("uring").unwrap_err().to_string();
        assert!(error.contains("'uring'") && error.contains("io_uring, threads or memory"), "{error}");
    }
}
