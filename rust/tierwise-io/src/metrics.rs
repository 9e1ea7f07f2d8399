//! What the storage layer counts.

use crate::Direction;
use serde::{Deserialize, Serialize};

/// Counters of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DirectionMetrics {
    /// Bytes that the disk moved, padding and repetitions included.
    pub bytes: u64,
    /// Finished requests, failed ones included.
    pub requests: u64,
    /// Nanoseconds during which at least one transfer was in flight.
    pub in_flight_ns: u64,
    /// Sum over the transfers of the nanoseconds that each was in flight: over the store's `busy_ns`, the mean depth of the queue.
    pub transfer_ns: u64,
}

/// Counters since the store was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Metrics {
    /// Disk to memory.
    pub read: DirectionMetrics,
    /// Memory to disk.
    pub write: DirectionMetrics,
    /// Nanoseconds during which at least one request had not ended: from the submission of the first to the end of the last.
    pub busy_ns: u64,
    /// Transfers repeated after EINTR or EAGAIN.
    pub retries: u64,
    /// Transfers continued after fewer bytes than asked for.
    pub short_transfers: u64,
    /// Blocks read again after a wrong checksum.
    pub rereads: u64,
    /// Requests that ended as cancelled.
    pub cancelled: u64,
    /// Requests that ended with an error.
    pub failed: u64,
    /// Bytes of the spill file that hold data or are being written.
    pub used_bytes: u64,
}

impl Metrics {
    pub(crate) fn direction(&mut self, direction: Direction) -> &mut DirectionMetrics {
        match direction {
            Direction::Read => &mut self.read,
            Direction::Write => &mut self.write,
        }
    }
}

/// Measures the time during which something is in flight.
#[derive(Debug, Default)]
pub(crate) struct BusyClock {
    in_flight: u32,
    since_ns: u64,
}

impl BusyClock {
    pub(crate) fn start(&mut self, now_ns: u64) {
        if self.in_flight == 0 {
            self.since_ns = now_ns;
        }
        self.in_flight += 1;
    }

    /// Nanoseconds to add, not 0 only when the last one ends.
    pub(crate) fn end(&mut self, now_ns: u64) -> u64 {
        self.in_flight -= 1;
        if self.in_flight == 0 { now_ns.saturating_sub(self.since_ns) } else { 0 }
    }
}
