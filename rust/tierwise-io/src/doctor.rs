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

/// Blocks of the smallest spill file that says something.
const SMALLEST_BLOCKS: u64 = 8;

/// How much a measurement may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeLimits {
    /// Bytes of the spill file, about.
    pub bytes: u64,
    /// Time of all passes together; what is in flight at the end of each is waited for, about as long again at most.
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

/// Opens a store in `directory`, measures it at the depth at which an engine uses it, and removes it.
pub fn probe(directory: &Path, limits: ProbeLimits) -> Result<DiskReport> {
    let filesystem = Filesystem::of(directory)?;
    if filesystem.in_memory {
        return Err(Error::InMemory { directory: directory.to_owned(), filesystem: filesystem.name });
    }
    let config = StoreConfig::new(directory, 0);
    let block = config.block_bytes as u64;
    let smallest = SMALLEST_BLOCKS * block;
    if limits.bytes < smallest {
        return Err(Error::Usage(format!("a measurement needs {smallest} bytes, the limit is {}", limits.bytes)));
    }
    // A disk that is nearly full is measured with less: half of the rest stays free.
    let blocks = limits.bytes.min(filesystem.available_bytes / 2) / block;
    if blocks < SMALLEST_BLOCKS {
        return Err(Error::Create {
            directory: directory.to_owned(),
            bytes: smallest,
            call: "measuring",
            errno: libc::ENOSPC,
            remedy: format!("{} bytes are available there, and as much as is measured stays free", filesystem.available_bytes),
        });
    }
    // Some more than the queue holds, so that it stays full across their ends; the last copy of each stays until it is rewritten.
    let most = (config.queue_depth.max(config.threads) * 3 / 2).min(blocks as usize / 4);
    let count = blocks as usize - most;
    let pages = Pages::new(most * config.block_bytes, 2 << 20)?;
    let store = Store::open(StoreConfig { capacity_bytes: blocks * block, ..config })?;
    let mut measure = Measure { store: &store, pages: &pages, in_flight: 1, time: limits.time / 3 };
    // One block alone says how many a slow disk may be given at once without taking much longer than the limit.
    let (_, first) = measure.pass(1, |key, slot| measure.write(key, 1, slot))?;
    let in_time = first * measure.time.as_secs_f64() / block as f64;
    measure.in_flight = (in_time as usize).clamp(1, most);
    // The first write of a block also changes the file system's books; training writes each block many times.
    let written = measure.pass(count, |key, slot| measure.write(key, 2, slot))?.0;
    let (rewritten, write_bytes_per_s) = measure.pass(written, |key, slot| measure.write(key, 3, slot))?;
    let (_, read_bytes_per_s) = measure.pass(rewritten, |key, slot| measure.read(key, 3, slot))?;
    let setup = store.setup().clone();
    Ok(DiskReport {
        directory: directory.to_owned(),
        advice: advice(&setup, &filesystem),
        setup,
        available_bytes: filesystem.available_bytes,
        write_mb_per_s: write_bytes_per_s / 1e6,
        read_mb_per_s: read_bytes_per_s / 1e6,
        measured_bytes: rewritten as u64 * block,
    })
}

/// `pages` outlives the store's operations: every pass waits for all of its own, also after an error.
struct Measure<'a> {
    store: &'a Store,
    pages: &'a Pages,
    /// Blocks that the disk has at once.
    in_flight: usize,
    time: Duration,
}

impl Measure<'_> {
    fn write(&self, key: Key, generation: u64, slot: usize) -> Result<Ticket> {
        // SAFETY: nobody changes the pages during a pass of writes, and they outlive it.
        let buffer = unsafe { self.pages.buffer(slot * self.store.block_bytes(), self.store.block_bytes()) };
        self.store.write(key, generation, &buffer, Priority::Soon)
    }

    fn read(&self, key: Key, generation: u64, slot: usize) -> Result<Ticket> {
        // SAFETY: the slot's last operation has ended, and the pages outlive the pass.
        let mut buffer = unsafe { self.pages.buffer(slot * self.store.block_bytes(), self.store.block_bytes()) };
        self.store.read(key, generation, &mut buffer, Priority::Soon)
    }

    /// Moves up to `count` blocks while there is time, at least one; returns how many, and bytes per second.
    fn pass(&self, count: usize, submit: impl Fn(Key, usize) -> Result<Ticket>) -> Result<(usize, f64)> {
        let started = Instant::now();
        let mut tickets = VecDeque::new();
        let mut outcome = Ok(());
        let mut moved = 0;
        while moved < count && (moved == 0 || started.elapsed() < self.time) && outcome.is_ok() {
            if tickets.len() == self.in_flight
                && let Some(ticket) = tickets.pop_front()
            {
                outcome = Ticket::wait(&ticket);
            }
            match submit(Key { chunk: moved as u32, payload: 0 }, moved % self.in_flight) {
                Ok(ticket) => tickets.push_back(ticket),
                Err(error) => outcome = outcome.and(Err(error)),
            }
            moved += 1;
        }
        for ticket in tickets {
            outcome = outcome.and(ticket.wait());
        }
        outcome?;
        Ok((moved, (moved * self.store.block_bytes()) as f64 / started.elapsed().as_secs_f64()))
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
