//! The NVMe tier as an engine sees it: payloads go out and come back by key and generation.

use crate::backend::memory::Memory;
use crate::backend::{self, Backend, BackendKind};
use crate::buffer::Buffer;
use crate::driver::{self, Shared};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::queue::{Limits, Queue};
use crate::spill_file::{MIN_ALIGNMENT, Naming, SpillFile};
use crate::ticket::Ticket;
use crate::{Direction, Key, Priority};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

/// Memory that most operations will use: registered with the ring, so that the kernel pins it once and not per transfer.
#[derive(Debug, Clone, Copy)]
pub struct Slab {
    address: usize,
    bytes: usize,
}

impl Slab {
    /// `bytes` from `ptr`.
    ///
    /// # Safety
    /// The range stays allocated for as long as any store that it was given to.
    pub unsafe fn new(ptr: *mut u8, bytes: usize) -> Slab {
        Slab { address: ptr.expose_provenance(), bytes }
    }
}

/// Where and how to spill.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Directory on an NVMe disk; every rank makes a file of its own there.
    pub directory: PathBuf,
    /// Size of the spill file, rounded down to blocks. It has to hold every payload's [`StoreConfig::extent_bytes`], and once more those
    /// that are rewritten at the same time: the last copy is kept until the new one is complete.
    pub capacity_bytes: u64,
    /// Bytes of a block: of a transfer, of a checksum, and the unit in which the file is handed out.
    pub block_bytes: usize,
    /// Transfers in flight at once (`io_uring`).
    pub queue_depth: usize,
    /// Transfers in flight at once (threads).
    pub threads: usize,
    /// The backend; `None` takes the best that works. [`backend::BACKEND_ENV`] overrides it.
    pub backend: Option<BackendKind>,
    /// Memory to register with the ring.
    pub slabs: Vec<Slab>,
    /// After this time without any completion a wait ends with [`Error::Stalled`].
    pub stall_timeout: Duration,
    /// How the file is kept out of the directory.
    pub naming: Naming,
}

impl StoreConfig {
    /// Defaults: 4 MiB blocks, 32 of them in flight, 16 threads, 120 s.
    pub fn new(directory: impl Into<PathBuf>, capacity_bytes: u64) -> StoreConfig {
        StoreConfig {
            directory: directory.into(),
            capacity_bytes,
            block_bytes: 4 << 20,
            queue_depth: 32,
            threads: 16,
            backend: None,
            slabs: Vec::new(),
            stall_timeout: Duration::from_secs(120),
            naming: Naming::Anonymous,
        }
    }

    /// Bytes of the spill file that a payload of `bytes` takes.
    pub fn extent_bytes(&self, bytes: u64) -> u64 {
        bytes.next_multiple_of(self.block_bytes as u64)
    }
}

/// What is used, and why it is not better.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Name of the backend.
    pub backend: String,
    /// Why it is not `io_uring`, where it was not chosen.
    pub backend_note: Option<String>,
    /// Whether transfers bypass the page cache.
    pub direct_io: bool,
    /// Why they do not.
    pub direct_io_note: Option<String>,
    /// What buffer addresses have to be multiples of.
    pub alignment: usize,
    /// Transfers that the disk has at once.
    pub queue_depth: usize,
    /// Bytes of memory registered with the ring.
    pub registered_bytes: u64,
    /// Why not all that was named.
    pub registered_note: Option<String>,
    /// The directory of the spill file; `None` in memory.
    pub directory: Option<PathBuf>,
    /// The directory's file system; `None` in memory.
    pub filesystem: Option<String>,
    /// Size of the spill file.
    pub capacity_bytes: u64,
    /// Spill files of dead processes that were removed.
    pub stale_removed: Vec<PathBuf>,
}

/// One rank's spill file with its driver thread.
pub struct Store {
    shared: Arc<Shared>,
    driver: Option<JoinHandle<()>>,
    setup: Setup,
    block_bytes: usize,
}

impl Store {
    /// Makes and allocates the spill file; a full disk is an error here, not in the middle of a step.
    pub fn open(config: StoreConfig) -> Result<Store> {
        let kind = BackendKind::from_env()?.or(config.backend);
        let blocks = config.capacity_bytes / config.block_bytes.max(1) as u64;
        let Some(blocks) = u32::try_from(blocks).ok().filter(|&blocks| blocks > 0) else {
            return Err(Error::Usage(format!(
                "capacity_bytes={} is {blocks} blocks of {} bytes; a spill file has 1 to {} blocks",
                config.capacity_bytes,
                config.block_bytes,
                u32::MAX
            )));
        };
        let bytes = u64::from(blocks) * config.block_bytes as u64;
        let limits = Limits { queue_depth: config.queue_depth, block_bytes: config.block_bytes, alignment: MIN_ALIGNMENT, blocks };
        let mut setup = Setup {
            backend: BackendKind::Memory.name().to_owned(),
            backend_note: None,
            direct_io: false,
            direct_io_note: None,
            alignment: MIN_ALIGNMENT,
            queue_depth: config.queue_depth,
            registered_bytes: 0,
            registered_note: None,
            directory: None,
            filesystem: None,
            capacity_bytes: bytes,
            stale_removed: Vec::new(),
        };
        let stall_timeout = config.stall_timeout;
        if kind == Some(BackendKind::Memory) {
            setup.direct_io_note = Some("nothing is spilled: the memory backend keeps it in RAM".to_owned());
            let open = move || Ok((Box::new(Memory::new(bytes as usize, limits.queue_depth)) as Box<dyn Backend>, limits, setup));
            return Store::start(open, stall_timeout);
        }
        let file = Arc::new(SpillFile::create(&config.directory, bytes, config.naming)?);
        setup.direct_io = file.direct();
        setup.direct_io_note = file.direct_note().map(str::to_owned);
        setup.alignment = file.alignment();
        setup.directory = Some(config.directory.clone());
        setup.filesystem = Some(file.filesystem().name.clone());
        setup.stale_removed = file.stale_removed().to_vec();
        let open = move || {
            let slabs: Vec<(usize, usize)> = config.slabs.iter().map(|slab| (slab.address, slab.bytes)).collect();
            let opened = backend::open(&file, kind, config.queue_depth, config.threads, &slabs)?;
            opened.kind.name().clone_into(&mut setup.backend);
            setup.backend_note = opened.note;
            setup.registered_bytes = opened.registered_bytes;
            setup.registered_note = opened.registered_note;
            setup.queue_depth = if opened.kind == BackendKind::Threads { config.threads } else { config.queue_depth };
            let queue_depth = opened.backend.max_in_flight();
            Ok((opened.backend, Limits { alignment: setup.alignment, queue_depth, ..limits }, setup))
        };
        Store::start(open, stall_timeout)
    }

    /// A store over a backend of the caller's, for tests of what stands on it.
    pub fn with_backend(
        limits: Limits,
        stall_timeout: Duration,
        open: impl FnOnce() -> Result<Box<dyn Backend>> + Send + 'static,
    ) -> Result<Store> {
        let setup = Setup {
            backend: "custom".to_owned(),
            backend_note: None,
            direct_io: false,
            direct_io_note: None,
            alignment: limits.alignment,
            queue_depth: limits.queue_depth,
            registered_bytes: 0,
            registered_note: None,
            directory: None,
            filesystem: None,
            capacity_bytes: u64::from(limits.blocks) * limits.block_bytes as u64,
            stale_removed: Vec::new(),
        };
        Store::start(move || Ok((open()?, limits, setup)), stall_timeout)
    }

    /// The ring belongs to the thread that makes it, so the driver thread opens the backend and reports.
    fn start(open: impl FnOnce() -> Result<(Box<dyn Backend>, Limits, Setup)> + Send + 'static, stall_timeout: Duration) -> Result<Store> {
        let (report, ready) = channel();
        let run = move || {
            driver::block_signals();
            let opened = open().and_then(|(backend, limits, setup)| Ok((Queue::new(limits)?, backend, limits, setup)));
            match opened {
                Ok((queue, backend, limits, setup)) => {
                    let shared = Arc::new(Shared::new(queue, backend.waker(), stall_timeout));
                    if report.send(Ok((Arc::clone(&shared), limits, setup))).is_ok() {
                        driver::run(&shared, backend);
                    }
                }
                // The receiver waits until this or the end of the thread.
                Err(error) => drop(report.send(Err(error))),
            }
        };
        let thread = std::thread::Builder::new()
            .name("tierwise-io".to_owned())
            .spawn(run)
            .map_err(|error| Error::Stopped(format!("cannot start the driver thread: {error}")))?;
        let (shared, limits, setup) = ready.recv().map_err(|_| Error::Stopped("the driver thread panicked at its start".to_owned()))??;
        Ok(Store { shared, driver: Some(thread), setup, block_bytes: limits.block_bytes })
    }

    /// What is used, and why it is not better.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// What buffer addresses have to be multiples of, and lengths are rounded up to.
    pub fn alignment(&self) -> usize {
        self.setup.alignment
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Writes a generation of a payload, beside the last complete one, which it replaces when all of it is on the disk. Generations
    /// of a key only grow; one write of a key is in flight at a time.
    pub fn write(&self, key: Key, generation: u64, buffer: &Buffer, priority: Priority) -> Result<Ticket> {
        self.submit(Direction::Write, key, generation, *buffer, priority)
    }

    /// Reads the generation that was last written, or is being written, into a buffer of its size. After an error the buffer's content
    /// is undefined; without one it is what was written.
    pub fn read(&self, key: Key, generation: u64, buffer: &mut Buffer, priority: Priority) -> Result<Ticket> {
        self.submit(Direction::Read, key, generation, *buffer, priority)
    }

    fn submit(&self, direction: Direction, key: Key, generation: u64, buffer: Buffer, priority: Priority) -> Result<Ticket> {
        let (request, slot) = self.shared.submit(|queue| match direction {
            Direction::Read => queue.read(key, generation, buffer, priority),
            Direction::Write => queue.write(key, generation, buffer, priority),
        })?;
        Ok(Ticket { slot, shared: Arc::clone(&self.shared), request, direction, key, generation })
    }

    /// Waits until everything submitted so far has ended; the outcomes are their tickets'.
    pub fn flush(&self) -> Result<()> {
        self.shared.check_process()?;
        self.shared.flush()
    }

    /// Gives a payload's blocks back.
    pub fn forget(&self, key: Key) -> Result<()> {
        self.shared.check_process()?;
        self.shared.with_queue(|queue| queue.forget(key))
    }

    /// Generation of a payload's last complete copy.
    pub fn stored(&self, key: Key) -> Result<Option<u64>> {
        self.shared.check_process()?;
        Ok(self.shared.with_queue(|queue| queue.stored(key)))
    }

    /// Bytes of the spill file that are free.
    pub fn free_bytes(&self) -> Result<u64> {
        self.shared.check_process()?;
        Ok(self.shared.with_queue(|queue| queue.free_bytes()))
    }

    /// What was counted.
    pub fn metrics(&self) -> Result<Metrics> {
        self.shared.check_process()?;
        Ok(self.shared.metrics())
    }
}

impl Drop for Store {
    /// Cancels what has not ended and waits until the disk has let go of every buffer.
    fn drop(&mut self) {
        let driver = self.driver.take();
        if self.shared.check_process().is_err() {
            // The thread does not exist in a forked child; neither joining nor detaching it is possible.
            std::mem::forget(driver);
            return;
        }
        self.shared.close();
        if let Some(driver) = driver {
            // A panic of the driver was reported to every ticket.
            let _ = driver.join();
        }
    }
}
