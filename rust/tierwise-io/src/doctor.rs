//! What a directory is good for as the NVMe tier: what will be used, why not better, and how fast it is.

use crate::error::{Error, Result};
use crate::filesystem::Filesystem;
use crate::pages::Pages;
use crate::store::{Setup, Store, StoreConfig};
use crate::ticket::Ticket;
use crate::{Key, Priority};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Payloads in flight: enough to keep the queue full across their ends.
const PAYLOADS_IN_FLIGHT: usize = 4;
/// Bytes of a payload: two full queues.
const PAYLOAD_BYTES: usize = 128 << 20;

/// How much a measurement may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeLimits {
    /// Bytes of the spill file, about.
    pub bytes: u64,
    /// Time of all passes together; what is in flight then is waited for.
    pub time: Duration,
}

impl Default for ProbeLimits {
    /// 1 GiB, 6 s.
    fn default() -> Self {
        ProbeLimits { bytes: 1 << 30, time: Duration::from_secs(6) }
    }
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiskReport {
    /// The directory.
    pub directory: PathBuf,
    /// What a store there uses.
    pub setup: Setup,
    /// Bytes that may be taken there.
    pub available_bytes: u64,
    /// Sequential writes to blocks that were written before, in 10^6 bytes per second.
    pub write_mb_per_s: f64,
    /// Sequential reads, in 10^6 bytes per second.
    pub read_mb_per_s: f64,
    /// Bytes that were written, and read, for it.
    pub measured_bytes: u64,
    /// What is not as good as it could be, each with what to do.
    pub advice: Vec<String>,
}

/// Opens a store in `directory`, measures it and removes it.
pub fn probe(directory: &Path, limits: ProbeLimits) -> Result<DiskReport> {
    let filesystem = Filesystem::of(directory)?;
    if filesystem.in_memory {
        return Err(Error::InMemory { directory: directory.to_owned(), filesystem: filesystem.name });
    }
    let config = StoreConfig::new(directory, 0);
    let block = config.block_bytes as u64;
    // A disk that is nearly full is measured with less: half of the rest stays free.
    let bytes = limits.bytes.min(filesystem.available_bytes / 2) / block * block;
    let smallest = 2 * PAYLOADS_IN_FLIGHT as u64 * block;
    if bytes < smallest {
        return Err(Error::Usage(format!(
            "{} has {} bytes available and the limit is {}; a measurement needs {smallest}, and as much free beside it",
            directory.display(),
            filesystem.available_bytes,
            limits.bytes
        )));
    }
    let payload = (bytes / (2 * PAYLOADS_IN_FLIGHT as u64) / block * block).min(PAYLOAD_BYTES as u64) as usize;
    let count = (bytes / payload as u64) as usize - PAYLOADS_IN_FLIGHT;
    let pages = Pages::new(PAYLOADS_IN_FLIGHT * payload, 2 << 20)?;
    let store = Store::open(StoreConfig { capacity_bytes: bytes, ..config })?;
    let measure = Measure { store: &store, pages: &pages, payload, time: limits.time / 3 };
    // The first write of a block also changes the file system's books; training writes each block many times.
    let written = measure.pass(count, |key, slot| measure.write(key, 1, slot))?.0;
    let (rewritten, write_bytes_per_s) = measure.pass(written, |key, slot| measure.write(key, 2, slot))?;
    let (_, read_bytes_per_s) = measure.pass(rewritten, |key, slot| measure.read(key, 2, slot))?;
    let setup = store.setup().clone();
    Ok(DiskReport {
        directory: directory.to_owned(),
        advice: advice(&setup, &filesystem),
        setup,
        available_bytes: filesystem.available_bytes,
        write_mb_per_s: write_bytes_per_s / 1e6,
        read_mb_per_s: read_bytes_per_s / 1e6,
        measured_bytes: (rewritten * payload) as u64,
    })
}

/// `pages` outlives the store's operations: every pass waits for all of its own, also after an error.
struct Measure<'a> {
    store: &'a Store,
    pages: &'a Pages,
    payload: usize,
    time: Duration,
}

impl Measure<'_> {
    fn write(&self, key: Key, generation: u64, slot: usize) -> Result<Ticket> {
        // SAFETY: nobody changes the pages during a pass of writes, and they outlive it.
        let buffer = unsafe { self.pages.buffer(slot * self.payload, self.payload) };
        self.store.write(key, generation, &buffer, Priority::Soon)
    }

    fn read(&self, key: Key, generation: u64, slot: usize) -> Result<Ticket> {
        // SAFETY: the slot's last operation has ended, and the pages outlive the pass.
        let mut buffer = unsafe { self.pages.buffer(slot * self.payload, self.payload) };
        self.store.read(key, generation, &mut buffer, Priority::Soon)
    }

    /// Moves up to `count` payloads while there is time, at least one; returns how many, and bytes per second.
    fn pass(&self, count: usize, submit: impl Fn(Key, usize) -> Result<Ticket>) -> Result<(usize, f64)> {
        let started = Instant::now();
        let mut tickets = VecDeque::new();
        let mut outcome = Ok(());
        let mut moved = 0;
        while moved < count && (moved == 0 || started.elapsed() < self.time) && outcome.is_ok() {
            if tickets.len() == PAYLOADS_IN_FLIGHT
                && let Some(ticket) = tickets.pop_front()
            {
                outcome = Ticket::wait(&ticket);
            }
            match submit(Key { chunk: moved as u32, payload: 0 }, moved % PAYLOADS_IN_FLIGHT) {
                Ok(ticket) => tickets.push_back(ticket),
                Err(error) => outcome = outcome.and(Err(error)),
            }
            moved += 1;
        }
        for ticket in tickets {
            outcome = outcome.and(ticket.wait());
        }
        outcome?;
        Ok((moved, (moved * self.payload) as f64 / started.elapsed().as_secs_f64()))
    }
}

fn advice(setup: &Setup, filesystem: &Filesystem) -> Vec<String> {
    let mut advice = Vec::new();
    if let Some(note) = &setup.backend_note {
        advice.push(format!("transfers use threads, which cost more CPU time: {note}"));
    }
    if let Some(note) = &setup.direct_io_note {
        advice.push(format!(
            "transfers go through the page cache ({note}): reads were measured from memory, writes wait for the disk; use a directory on ext4 or XFS on a local NVMe disk"
        ));
    }
    if filesystem.network {
        advice.push(format!("{} is a network file system; use a local NVMe disk", filesystem.name));
    }
    if filesystem.name == "overlayfs" {
        advice.push("overlayfs is a container's own layer; mount a directory of an NVMe disk into the container".to_owned());
    }
    advice
}
