//! The error type of the storage layer.

use crate::{Direction, Key};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What can go wrong between memory and disk.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The spill file cannot be made.
    #[error("cannot make a spill file of {bytes} bytes in {}: {call}: {}; {remedy}", directory.display(), os(*errno))]
    Create {
        /// Where.
        directory: PathBuf,
        /// Its size.
        bytes: u64,
        /// The call that failed.
        call: &'static str,
        /// Its error number.
        errno: i32,
        /// What to do.
        remedy: String,
    },
    /// The directory lies in memory, not on a disk.
    #[error(
        "{} is on {filesystem}, which keeps files in memory: spilling there saves nothing; choose a directory on an NVMe disk",
        directory.display()
    )]
    InMemory {
        /// The directory.
        directory: PathBuf,
        /// Name of its file system.
        filesystem: String,
    },
    /// The disk refused a transfer.
    #[error(
        "{direction} of {key}, generation {generation}, failed at byte {offset} of the spill file after {attempts} attempts: {}; {}",
        os(*errno), remedy_of(*errno)
    )]
    Transfer {
        /// Which way.
        direction: Direction,
        /// Whose bytes.
        key: Key,
        /// Their generation.
        generation: u64,
        /// Where in the file.
        offset: u64,
        /// How often it was tried.
        attempts: u32,
        /// The last error number.
        errno: i32,
    },
    /// The file ends where data should be, or the system moved more bytes than asked for.
    #[error(
        "{direction} of {key}, generation {generation}, at byte {offset} of the spill file: asked for {asked} bytes, the system moved {moved}; the spill file was truncated or its disk is defective"
    )]
    Impossible {
        /// Which way.
        direction: Direction,
        /// Whose bytes.
        key: Key,
        /// Their generation.
        generation: u64,
        /// Where in the file.
        offset: u64,
        /// Bytes asked for.
        asked: usize,
        /// Bytes moved.
        moved: usize,
    },
    /// What was read is not what was written.
    #[error(
        "{key}, generation {generation}: block {block} at byte {offset} of the spill file has checksum {found:#018x}, written was {expected:#018x} (read twice); the disk returned wrong data, continue from the last checkpoint on another disk"
    )]
    Corrupt {
        /// Whose bytes.
        key: Key,
        /// Their generation.
        generation: u64,
        /// Block inside the payload.
        block: u32,
        /// Where in the file.
        offset: u64,
        /// Checksum at writing.
        expected: u64,
        /// Checksum after reading.
        found: u64,
    },
    /// The generation asked for is not on disk.
    #[error("{key}: generation {asked} was asked for, {}", match stored { Some(stored) => format!("the spill file has generation {stored}"), None => "the spill file has none".to_owned() })]
    NotStored {
        /// Whose bytes.
        key: Key,
        /// Generation asked for.
        asked: u64,
        /// Generation on disk.
        stored: Option<u64>,
    },
    /// The spill file has no room.
    #[error(
        "{key}: {needed} bytes are needed, {free} of the spill file's {capacity} are free (the last copy is kept until the new one is complete); raise the NVMe budget or leave more payloads in memory"
    )]
    Full {
        /// Whose bytes.
        key: Key,
        /// Bytes that the extent takes.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// Bytes of the file.
        capacity: u64,
    },
    /// The operation was cancelled.
    #[error("{direction} of {key}, generation {generation}, was cancelled")]
    Cancelled {
        /// Which way.
        direction: Direction,
        /// Whose bytes.
        key: Key,
        /// Their generation.
        generation: u64,
    },
    /// The disk does not answer; the buffer still belongs to the operation.
    #[error(
        "{direction} of {key}, generation {generation}, is not finished after {waited:?}; the disk does not answer (see dmesg), its buffer must not be reused"
    )]
    Stalled {
        /// Which way.
        direction: Direction,
        /// Whose bytes.
        key: Key,
        /// Their generation.
        generation: u64,
        /// Time waited.
        waited: Duration,
    },
    /// A backend cannot be used here.
    #[error("the {backend} backend cannot be used: {reason}; unset {env} or set it to another backend", env = crate::backend::BACKEND_ENV)]
    Backend {
        /// Its name.
        backend: &'static str,
        /// Why not.
        reason: String,
        /// The system's error number, where a call failed.
        errno: Option<i32>,
    },
    /// The driver thread ended.
    #[error("the storage layer stopped: {0}")]
    Stopped(String),
    /// The store was used in a forked child process.
    #[error("this spill file belongs to process {owner}; it cannot be used in its forked child {child}")]
    Forked {
        /// Process that opened it.
        owner: u32,
        /// Process that called.
        child: u32,
    },
    /// The caller broke the contract.
    #[error("{0}")]
    Usage(String),
}

/// Result with the storage layer's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The error number: the system's where a call failed, else the one that a file system gives for the same fault.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Create { errno, .. } | Error::Transfer { errno, .. } => Some(*errno),
            Error::Backend { errno, .. } => *errno,
            Error::Impossible { .. } | Error::Corrupt { .. } => Some(libc::EIO),
            Error::Full { .. } => Some(libc::ENOSPC),
            Error::Stalled { .. } => Some(libc::ETIMEDOUT),
            Error::Cancelled { .. } => Some(libc::ECANCELED),
            Error::InMemory { .. } | Error::NotStored { .. } | Error::Stopped(_) | Error::Forked { .. } | Error::Usage(_) => None,
        }
    }

    /// The directory that could not be used, where the error is about one.
    pub fn directory(&self) -> Option<&Path> {
        match self {
            Error::Create { directory, .. } | Error::InMemory { directory, .. } => Some(directory),
            _ => None,
        }
    }
}

/// The system's text for an error number.
pub(crate) fn os(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// The error number of the call that just failed.
pub(crate) fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn remedy_of(errno: i32) -> &'static str {
    match errno {
        libc::ENOSPC | libc::EDQUOT => "free space on the disk or raise the quota, and continue from the last checkpoint",
        libc::EFBIG => "raise the file size limit (ulimit -f), and continue from the last checkpoint",
        libc::EAGAIN | libc::EINTR => "the system kept refusing; lower the queue depth",
        libc::EINVAL => "the file system refused the alignment; this is a defect, please report it",
        _ => "the disk is defective or gone (see dmesg); continue from the last checkpoint on another disk",
    }
}
