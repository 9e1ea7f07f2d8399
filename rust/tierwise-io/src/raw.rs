//! A raw loop over a spill file, without checksums, tables or tickets: what a disk gives at a depth, and the peer that the store is measured
//! against.

use crate::Direction;
use crate::error::{Error, Result, last_errno, os};
use crate::pages::Pages;
use crate::spill_file::SpillFile;
use io_uring::{IoUring, opcode, types};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A file, and the memory that its blocks are moved from and to.
pub struct Raw {
    file: SpillFile,
    pages: Arc<Pages>,
    block_bytes: usize,
    depth: usize,
    ring: bool,
}

/// What a run moved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moved {
    /// Bytes by [`Direction`].
    pub bytes: [u64; 2],
    /// From the first submission to the last end.
    pub seconds: f64,
}

impl Raw {
    /// A loop with `depth` blocks on their way, over `io_uring` or over as many threads. It goes through the pages block by block, at least
    /// `depth` blocks; whoever compares gives the same pages to both, because a virtual disk was seen to be a quarter slower to and from some
    /// memory than to and from other.
    pub fn new(file: SpillFile, block_bytes: usize, depth: usize, pages: Arc<Pages>, ring: bool) -> Result<Raw> {
        if depth == 0
            || !block_bytes.is_multiple_of(file.alignment())
            || file.bytes() < block_bytes as u64
            || pages.bytes() < depth * block_bytes
        {
            return Err(Error::Usage(format!(
                "a raw loop needs a depth of at least 1 (got {depth}), blocks ({block_bytes} bytes) that are multiples of {}, a file of at least one ({} bytes) and memory for all that are on their way ({} bytes)",
                file.alignment(),
                file.bytes(),
                pages.bytes()
            )));
        }
        Ok(Raw { file, pages, block_bytes, depth, ring })
    }

    /// Moves block after block, going through `kinds` again and again, for `time` and at least once; without a time every block once.
    pub fn run(&self, kinds: &[Direction], time: Option<Duration>) -> Result<Moved> {
        if kinds.is_empty() {
            return Err(Error::Usage("a raw loop needs something to do".to_owned()));
        }
        let started = Instant::now();
        let turns = Turns { kinds, blocks: (self.file.bytes() / self.block_bytes as u64) as usize, end: time.map(|time| started + time) };
        let bytes = if self.ring { self.over_ring(&turns)? } else { self.over_threads(&turns)? };
        Ok(Moved { bytes, seconds: started.elapsed().as_secs_f64() })
    }

    fn buffers(&self) -> usize {
        self.pages.bytes() / self.block_bytes
    }

    fn address(&self, buffer: usize) -> *mut u8 {
        self.pages.as_ptr().wrapping_add(buffer * self.block_bytes)
    }

    fn over_ring(&self, turns: &Turns) -> Result<[u64; 2]> {
        let refused = |error: std::io::Error| Error::Backend {
            backend: "io_uring",
            reason: format!("a raw loop: {error}"),
            errno: error.raw_os_error(),
        };
        let mut ring = IoUring::new(self.depth.next_power_of_two() as u32).map_err(refused)?;
        ring.submitter().register_files(&[self.file.raw_fd()]).map_err(refused)?;
        let mut free: VecDeque<usize> = (0..self.buffers()).collect();
        let mut in_flight = 0;
        let (mut turn, mut moved, mut failed) = (0, [0; 2], None);
        loop {
            while in_flight < self.depth
                && let Some(&buffer) = free.front()
                && let Some((direction, block)) = turns.get(turn).filter(|_| failed.is_none())
            {
                let (file, address, len) = (types::Fixed(0), self.address(buffer), self.block_bytes as u32);
                let offset = block as u64 * self.block_bytes as u64;
                let entry = match direction {
                    Direction::Read => opcode::Read::new(file, address, len).offset(offset).build(),
                    Direction::Write => opcode::Write::new(file, address, len).offset(offset).rw_flags(self.file.write_flags()).build(),
                };
                // SAFETY: the pages outlive the ring, which is left only when nothing is in flight; nobody looks at them meanwhile.
                if unsafe { ring.submission().push(&entry.user_data((buffer * 2 + direction as usize) as u64)) }.is_err() {
                    break;
                }
                free.pop_front();
                in_flight += 1;
                turn += 1;
            }
            if in_flight == 0 {
                return failed.map_or(Ok(moved), Err);
            }
            match ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                Err(error) => {
                    // What is in flight still moves into the pages, and is waited for.
                    failed = Some(refused(error));
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            for entry in ring.completion() {
                let (buffer, direction) = ((entry.user_data() / 2) as usize, (entry.user_data() % 2) as usize);
                free.push_back(buffer);
                in_flight -= 1;
                match usize::try_from(entry.result()) {
                    Ok(bytes) => moved[direction] += bytes as u64,
                    Err(_) => failed = Some(broken(-entry.result())),
                }
            }
        }
    }

    fn over_threads(&self, turns: &Turns) -> Result<[u64; 2]> {
        let next = AtomicUsize::new(0);
        let moved = [AtomicU64::new(0), AtomicU64::new(0)];
        let (fd, len, depth) = (self.file.raw_fd(), self.block_bytes, self.depth);
        let (start, buffers) = (self.pages.as_ptr().expose_provenance(), self.buffers());
        let work = |thread: usize| -> Result<()> {
            // Every thread has as many buffers of its own as there are for each.
            let own = buffers / depth;
            let mut turn = 0;
            while let Some((direction, block)) = turns.get(next.fetch_add(1, Ordering::Relaxed)) {
                let offset = (block * len) as libc::off_t;
                let address: *mut u8 = std::ptr::with_exposed_provenance_mut(start + (thread * own + turn % own) * len);
                turn += 1;
                // SAFETY: the buffer is this thread's, and the pages outlive the scope.
                let bytes = unsafe {
                    match direction {
                        Direction::Read => libc::pread(fd, address.cast(), len, offset),
                        Direction::Write => libc::pwrite(fd, address.cast(), len, offset),
                    }
                };
                let bytes = u64::try_from(bytes).map_err(|_| broken(last_errno()))?;
                moved[direction as usize].fetch_add(bytes, Ordering::Relaxed);
            }
            Ok(())
        };
        let work = &work;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..depth).map(|thread| scope.spawn(move || work(thread))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(broken(libc::EIO))))
        })?;
        Ok(moved.map(AtomicU64::into_inner))
    }
}

struct Turns<'a> {
    kinds: &'a [Direction],
    blocks: usize,
    end: Option<Instant>,
}

impl Turns<'_> {
    fn get(&self, turn: usize) -> Option<(Direction, usize)> {
        let more = self.end.map_or(turn < self.blocks, |end| turn < self.kinds.len() || Instant::now() < end);
        more.then(|| (self.kinds[turn % self.kinds.len()], turn % self.blocks))
    }
}

fn broken(errno: i32) -> Error {
    Error::Backend { backend: "raw loop", reason: format!("a transfer failed: {}", os(errno)), errno: Some(errno) }
}
