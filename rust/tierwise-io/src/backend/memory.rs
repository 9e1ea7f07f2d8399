//! A disk in host memory: what the others are compared with, and what machines without a disk train on.

use super::{Backend, Completion, Op, Wake};
use crate::Direction;
use crate::error::Result;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// The disk.
pub struct Memory {
    bytes: Vec<u8>,
    ended: VecDeque<Completion>,
    wake: Arc<Flag>,
    depth: usize,
}

/// A wake-up that is kept until somebody waits.
#[derive(Default)]
pub(super) struct Flag {
    set: Mutex<bool>,
    changed: Condvar,
}

impl Wake for Flag {
    fn wake(&self) {
        *self.set.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_one();
    }
}

impl Flag {
    /// Waits for the wake-up or the end of the time, and takes it.
    pub(super) fn wait(&self, timeout: Option<Duration>) {
        let set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        let mut set = match timeout {
            None => self.changed.wait_while(set, |set| !*set).unwrap_or_else(PoisonError::into_inner),
            Some(timeout) => self.changed.wait_timeout_while(set, timeout, |set| !*set).unwrap_or_else(PoisonError::into_inner).0,
        };
        *set = false;
    }
}

impl Memory {
    /// `bytes` of zeros.
    pub fn new(bytes: usize, depth: usize) -> Memory {
        Memory { bytes: vec![0; bytes], ended: VecDeque::new(), wake: Arc::default(), depth }
    }
}

/// Moves up to `len` bytes; fewer where the disk ends.
pub(super) fn copy(disk: &mut [u8], direction: Direction, offset: u64, address: usize, len: usize) -> usize {
    let start = (offset as usize).min(disk.len());
    let len = len.min(disk.len() - start);
    let disk = disk[start..start + len].as_mut_ptr();
    match direction {
        // SAFETY: the buffer's owner keeps the range alive and leaves it alone until the request ends; the disk's memory is a borrowed
        // slice of `len` bytes, so the two do not overlap.
        Direction::Read => unsafe { std::ptr::copy_nonoverlapping(disk, std::ptr::with_exposed_provenance_mut(address), len) },
        // SAFETY: as above.
        Direction::Write => unsafe { std::ptr::copy_nonoverlapping(std::ptr::with_exposed_provenance(address), disk, len) },
    }
    len
}

impl Backend for Memory {
    fn max_in_flight(&self) -> usize {
        self.depth
    }

    fn submit(&mut self, op: Op) -> Result<()> {
        let before = op.checksum_before();
        let moved = copy(&mut self.bytes, op.direction, op.offset, op.address, op.len);
        self.ended.push_back(Completion { id: op.id, result: Ok(moved), checksum: before.or_else(|| op.checksum_after(moved)) });
        Ok(())
    }

    fn reap(&mut self, timeout: Option<Duration>, ended: &mut Vec<Completion>) -> Result<()> {
        if self.ended.is_empty() {
            self.wake.wait(timeout);
        }
        ended.extend(self.ended.drain(..));
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.wake) as Arc<dyn Wake>
    }
}
