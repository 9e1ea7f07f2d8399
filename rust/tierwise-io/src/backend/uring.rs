//! `io_uring`: one ring, one thread; registered file, registered buffers where the system allows them.

use super::{Backend, Completion, Op, OpId, Wake};
use crate::Direction;
use crate::error::{Error, Result, last_errno, os};
use crate::spill_file::SpillFile;
use io_uring::{IoUring, opcode, squeue, types};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Marks the poll of the wake-up descriptor among completions.
const WAKE: u64 = u64::MAX;
/// The kernel registers at most this much per buffer.
const REGISTERED_BYTES_MAX: usize = 1 << 30;

/// A ring and what it has in flight.
pub struct Uring {
    // Dropped first: closing the ring waits for or cancels what refers to the rest.
    ring: IoUring,
    /// Keeps the descriptor alive that the ring has registered.
    _file: Arc<SpillFile>,
    in_flight: BTreeMap<u64, (Op, Option<u64>)>,
    wake: Arc<EventFd>,
    wake_armed: bool,
    depth: usize,
    write_flags: i32,
    /// Registered ranges (address, bytes), in the order of their indices.
    registered: Vec<(usize, usize)>,
    registered_note: Option<String>,
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
        let refused =
            |call: &str, errno: i32| Error::Backend { backend: "io_uring", reason: format!("{call}: {}{}", os(errno), hint(errno)) };
        // One more for the wake-up poll.
        let entries = (depth + 1).next_power_of_two() as u32;
        // Completions are then worked off by this thread when it waits, not by interrupting it. Older kernels do not know the flags.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries)
            .or_else(|_| IoUring::new(entries))
            .map_err(|e| refused("io_uring_setup", e.raw_os_error().unwrap_or(0)))?;
        if !ring.params().is_feature_ext_arg() {
            return Err(Error::Backend { backend: "io_uring", reason: "the kernel is older than 5.11".to_owned() });
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
            in_flight: BTreeMap::new(),
            wake,
            wake_armed: false,
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

    /// Takes one completion, so that the caller can start the next transfer before this one's checksum holds up others.
    fn pop(&mut self, ended: &mut Vec<Completion>) -> bool {
        let Some(entry) = self.ring.completion().next() else { return false };
        if entry.user_data() == WAKE {
            self.wake_armed = false;
            self.wake.clear();
        } else if let Some((op, before)) = self.in_flight.remove(&entry.user_data()) {
            let result = usize::try_from(entry.result()).map_err(|_| -entry.result());
            let checksum = before.or_else(|| result.ok().and_then(|moved| op.checksum_after(moved)));
            ended.push(Completion { id: op.id, result, checksum });
        } else {
            ended.push(Completion { id: OpId(entry.user_data()), result: Err(libc::EIO), checksum: None });
        }
        true
    }
}

impl Backend for Uring {
    fn max_in_flight(&self) -> usize {
        self.depth
    }

    fn submit(&mut self, op: Op) -> Result<()> {
        let checksum = op.checksum_before();
        let entry = self.entry(&op);
        self.push(&entry)?;
        self.in_flight.insert(op.id.0, (op, checksum));
        // At once: the next operation's checksum should be computed while this one moves. What the kernel does not take now, the next
        // wait submits.
        match self.ring.submit() {
            Ok(_) => Ok(()),
            Err(error) if transient(&error) => Ok(()),
            Err(error) => Err(Error::Backend { backend: "io_uring", reason: format!("io_uring_enter: {error}") }),
        }
    }

    fn reap(&mut self, timeout: Option<Duration>, ended: &mut Vec<Completion>) -> Result<()> {
        if self.pop(ended) {
            return Ok(());
        }
        self.arm_wake()?;
        let outcome = match timeout {
            None => self.ring.submit_and_wait(1),
            Some(timeout) => {
                let time = types::Timespec::from(timeout);
                self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&time))
            }
        };
        match outcome {
            Ok(_) => {}
            Err(error) if transient(&error) || error.raw_os_error() == Some(libc::ETIME) => {}
            Err(error) => return Err(Error::Backend { backend: "io_uring", reason: format!("io_uring_enter: {error}") }),
        }
        self.pop(ended);
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.wake) as Arc<dyn Wake>
    }
}

impl Drop for Uring {
    /// The kernel may still move what is in flight; its buffers' owners are told of the end only after this.
    fn drop(&mut self) {
        let mut ended = Vec::new();
        while !self.in_flight.is_empty() && self.reap(None, &mut ended).is_ok() {}
        // Closing a ring lets go of these later, in the background: the slabs would stay pinned and the file's space taken for a while.
        // Where there is nothing to unregister, refusing is right.
        let _ = self.ring.submitter().unregister_buffers();
        let _ = self.ring.submitter().unregister_files();
    }
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
