//! `io_uring`: one ring, one thread; registered file, registered buffers where the system allows them.

use super::{Backend, Completion, Op, Wake};
use crate::Direction;
use crate::error::{Error, Result, last_errno, os};
use crate::spill_file::SpillFile;
use io_uring::{IoUring, opcode, squeue, types};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Marks the poll of the wake-up descriptor among completions.
const WAKE: u64 = u64::MAX;
/// The kernel registers at most this much per buffer.
const REGISTERED_BYTES_MAX: usize = 1 << 30;

/// A ring and what it has in flight.
pub struct Uring {
    // Dropped first: closing the ring cancels what refers to the rest.
    ring: IoUring,
    /// Keeps the descriptor alive that the ring has registered.
    _file: Arc<SpillFile>,
    /// Given to this backend and not yet to the kernel.
    waiting: VecDeque<Op>,
    /// The kernel's.
    moving: BTreeMap<u64, Moving>,
    /// Writes whose checksum is to be taken while they move.
    unsummed: VecDeque<u64>,
    /// Ended, and not yet reported.
    landed: VecDeque<(Moving, std::result::Result<usize, i32>)>,
    wake: Arc<EventFd>,
    wake_armed: bool,
    /// Woken since the last [`Backend::reap`]: the queue may have something that it did not have when it was last asked.
    woken: bool,
    depth: usize,
    write_flags: i32,
    /// Registered ranges (address, bytes), in the order of their indices.
    registered: Vec<(usize, usize)>,
    registered_note: Option<String>,
}

struct Moving {
    op: Op,
    checksum: Option<u64>,
}

struct EventFd(OwnedFd);

impl EventFd {
    fn clear(&self) {
        let mut count = 0u64;
        // SAFETY: the descriptor is owned and does not block, the target is 8 writable bytes.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}

impl Wake for EventFd {
    fn wake(&self) {
        let one = 1u64;
        // SAFETY: the descriptor is owned, the source is 8 readable bytes. The counter cannot overflow, so the write cannot fail.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }
}

impl Uring {
    /// A ring for `depth` transfers. `slabs` (address, bytes) are registered where allowed; they outlive the ring.
    pub fn open(file: Arc<SpillFile>, depth: usize, slabs: &[(usize, usize)]) -> Result<Uring> {
        let refused = |call: &str, errno: i32| Error::Backend {
            backend: "io_uring",
            reason: format!("{call}: {}{}", os(errno), hint(errno)),
            errno: Some(errno),
        };
        // One more for the wake-up poll.
        let entries = (depth + 1).next_power_of_two() as u32;
        // Completions are then worked off by this thread when it waits, not by interrupting it. Older kernels do not know the flags.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(entries)
            .or_else(|_| IoUring::new(entries))
            .map_err(|e| refused("io_uring_setup", e.raw_os_error().unwrap_or(0)))?;
        if !ring.params().is_feature_ext_arg() {
            return Err(Error::Backend { backend: "io_uring", reason: "the kernel is older than 5.11".to_owned(), errno: None });
        }
        ring.submitter().register_files(&[file.raw_fd()]).map_err(|e| refused("io_uring_register", e.raw_os_error().unwrap_or(0)))?;
        // SAFETY: no pointers; the descriptor is owned by what is returned.
        let event = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if event < 0 {
            return Err(refused("eventfd", last_errno()));
        }
        // SAFETY: the call above returned a new descriptor that nobody else owns.
        let wake = Arc::new(EventFd(unsafe { OwnedFd::from_raw_fd(event) }));
        let mut uring = Uring {
            ring,
            write_flags: file.write_flags(),
            _file: file,
            waiting: VecDeque::new(),
            moving: BTreeMap::new(),
            unsummed: VecDeque::new(),
            landed: VecDeque::new(),
            wake,
            wake_armed: false,
            woken: false,
            depth,
            registered: Vec::new(),
            registered_note: None,
        };
        uring.register(slabs);
        Ok(uring)
    }

    /// Bytes of registered buffers, and why there are none or fewer.
    pub fn registered(&self) -> (u64, Option<String>) {
        (self.registered.iter().map(|(_, bytes)| *bytes as u64).sum(), self.registered_note.clone())
    }

    fn register(&mut self, slabs: &[(usize, usize)]) {
        let parts: Vec<(usize, usize)> = slabs
            .iter()
            .flat_map(|&(address, bytes)| {
                (0..bytes).step_by(REGISTERED_BYTES_MAX).map(move |from| (address + from, REGISTERED_BYTES_MAX.min(bytes - from)))
            })
            .collect();
        if parts.is_empty() {
            return;
        }
        let iovecs: Vec<libc::iovec> = parts
            .iter()
            .map(|&(address, bytes)| libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(address), iov_len: bytes })
            .collect();
        // SAFETY: whoever named the slabs in `StoreConfig` keeps them alive for as long as the store.
        match unsafe { self.ring.submitter().register_buffers(&iovecs) } {
            Ok(()) => self.registered = parts,
            Err(error) => {
                let hint = if error.raw_os_error() == Some(libc::ENOMEM) { " (raise ulimit -l)" } else { "" };
                self.registered_note = Some(format!("buffers are not registered: {error}{hint}"));
            }
        }
    }

    fn entry(&self, op: &Op) -> squeue::Entry {
        let file = types::Fixed(0);
        let ptr: *mut u8 = std::ptr::with_exposed_provenance_mut(op.address);
        let len = op.len as u32;
        let index = self.registered.iter().position(|&(start, bytes)| op.address >= start && op.address + op.len <= start + bytes);
        let entry = match (op.direction, index) {
            (Direction::Read, None) => opcode::Read::new(file, ptr, len).offset(op.offset).build(),
            (Direction::Write, None) => opcode::Write::new(file, ptr, len).offset(op.offset).rw_flags(self.write_flags).build(),
            (Direction::Read, Some(index)) => opcode::ReadFixed::new(file, ptr, len, index as u16).offset(op.offset).build(),
            (Direction::Write, Some(index)) => {
                opcode::WriteFixed::new(file, ptr, len, index as u16).offset(op.offset).rw_flags(self.write_flags).build()
            }
        };
        entry.user_data(op.id.0)
    }

    fn push(&mut self, entry: &squeue::Entry) -> Result<()> {
        // SAFETY: a transfer's memory is kept by the buffer's owner until the request ends, and it ends only with this completion; the
        // wake-up poll refers to no memory.
        if unsafe { self.ring.submission().push(entry) }.is_err() {
            return Err(Error::Stopped(format!("more than {} transfers were given to the ring", self.depth)));
        }
        Ok(())
    }

    fn arm_wake(&mut self) -> Result<()> {
        if !self.wake_armed {
            let entry = opcode::PollAdd::new(types::Fd(self.wake.0.as_raw_fd()), libc::POLLIN as u32).build().user_data(WAKE);
            self.push(&entry)?;
            self.wake_armed = true;
        }
        Ok(())
    }

    /// Gives the kernel what it may have, and lets it work off what has ended.
    fn advance(&mut self) -> Result<()> {
        self.collect()?;
        while self.moving.len() < self.depth
            && let Some(op) = self.waiting.pop_front()
        {
            let entry = self.entry(&op);
            self.push(&entry)?;
            if op.direction == Direction::Write && op.block.done == 0 {
                self.unsummed.push_back(op.id.0);
            }
            self.moving.insert(op.id.0, Moving { op, checksum: None });
        }
        let outcome = {
            let submission = self.ring.submission();
            if submission.is_empty() && !submission.taskrun() {
                return Ok(());
            }
            drop(submission);
            self.ring.submit()
        };
        // What the kernel does not take now, the next call or wait submits.
        outcome.map(drop).or_else(|error| if transient(&error) { Ok(()) } else { Err(broken(&error)) })?;
        self.collect()
    }

    fn collect(&mut self) -> Result<()> {
        while let Some(entry) = self.ring.completion().next() {
            if entry.user_data() == WAKE {
                self.wake_armed = false;
                self.woken = true;
                self.wake.clear();
            } else if let Some(moving) = self.moving.remove(&entry.user_data()) {
                self.landed.push_back((moving, usize::try_from(entry.result()).map_err(|_| -entry.result())));
            } else {
                return Err(Error::Stopped(format!("the ring completed transfer {}, which it does not have", entry.user_data())));
            }
        }
        Ok(())
    }

    /// Waits until something has ended or the time is over.
    fn wait(&mut self, timeout: Option<Duration>) -> Result<()> {
        self.arm_wake()?;
        let outcome = match timeout {
            None => self.ring.submit_and_wait(1),
            Some(timeout) => {
                let time = types::Timespec::from(timeout);
                self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&time))
            }
        };
        match outcome {
            Err(error) if !transient(&error) && error.raw_os_error() != Some(libc::ETIME) => Err(broken(&error)),
            _ => Ok(()),
        }
    }
}

impl Backend for Uring {
    fn max_in_flight(&self) -> usize {
        self.depth + self.depth / 2
    }

    fn submit(&mut self, op: Op) -> Result<()> {
        self.waiting.push_back(op);
        // The next `reap` hands over all of them at once.
        Ok(())
    }

    fn reap(&mut self, timeout: Option<Duration>, ended: &mut Vec<Completion>) -> Result<()> {
        self.advance()?;
        if let Some((Moving { op, checksum }, result)) = self.landed.pop_front() {
            // One at a time: what replaces it is submitted before the next one's checksum.
            let checksum = checksum.or_else(|| op.checksum_before()).or_else(|| result.ok().and_then(|moved| op.checksum_after(moved)));
            ended.push(Completion { id: op.id, result, checksum });
        } else if let Some(id) = self.unsummed.pop_front() {
            if let Some(moving) = self.moving.get_mut(&id) {
                moving.checksum = moving.op.checksum_before();
            }
        } else if !self.woken {
            self.wait(timeout)?;
        }
        self.woken = false;
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.wake) as Arc<dyn Wake>
    }
}

impl Drop for Uring {
    /// The kernel may still move what is in flight; its buffers' owners are told of the end only after this.
    fn drop(&mut self) {
        self.waiting.clear();
        while !self.moving.is_empty() && self.wait(None).and_then(|()| self.collect()).is_ok() {}
        // Closing a ring lets go of these later, in the background: the slabs would stay pinned and the file's space taken for a while.
        // Where there is nothing to unregister, refusing is right.
        let _ = self.ring.submitter().unregister_buffers();
        let _ = self.ring.submitter().unregister_files();
    }
}

fn broken(error: &std::io::Error) -> Error {
    Error::Backend { backend: "io_uring", reason: format!("io_uring_enter: {error}"), errno: error.raw_os_error() }
}

fn transient(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

fn hint(errno: i32) -> &'static str {
    match errno {
        libc::EPERM | libc::EACCES => " (the container's seccomp profile or sysctl kernel.io_uring_disabled forbids it)",
        libc::ENOSYS => " (the kernel was built without it)",
        libc::ENOMEM => " (raise ulimit -l)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spill_file::Naming;
    use std::time::Instant;

    /// The wake-up that comes while `reap` gives the kernel its turn is as good as one that comes while it waits.
    #[test]
    fn a_wake_up_before_the_wait_is_not_lost() {
        let directory = std::env::temp_dir();
        let Ok(file) = SpillFile::create(&directory, 1 << 20, Naming::Anonymous) else { return };
        let Ok(mut uring) = Uring::open(Arc::new(file), 4, &[]) else { return };
        let mut ended = Vec::new();
        uring.reap(Some(Duration::from_millis(1)), &mut ended).unwrap();
        assert!(uring.wake_armed);
        uring.waker().wake();
        std::thread::sleep(Duration::from_millis(20));
        let started = Instant::now();
        uring.reap(Some(Duration::from_secs(20)), &mut ended).unwrap();
        assert!(started.elapsed() < Duration::from_secs(10), "the driver slept over a request");
    }
}
