//! A disk that fails on purpose: seeded, in virtual time for tests of the queue, in real time as a backend of a store.

use super::memory::{Flag, copy};
use super::{Backend, Completion, Op, Wake};
use crate::Direction;
use crate::error::Result;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What goes wrong with one transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this error number and moves nothing.
    Errno(i32),
    /// It moves, and reports, this many bytes.
    Short(usize),
    /// A write that reports success and puts only this many bytes on the disk.
    Torn(usize),
    /// This bit of the transfer is wrong: on the disk after a write, in memory after a read.
    FlippedBit(usize),
    /// A write that reports success and puts nothing on the disk: what is read later is stale.
    Lost,
    /// It goes to, or comes from, this offset.
    Misdirected(u64),
    /// It reports more bytes than it was asked for.
    TooLong,
    /// It takes this much longer.
    Late(u64),
}

/// Small seeded random numbers (`SplitMix64`: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }

    /// True `per_mille` times in a thousand.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }
}

/// Decides what goes wrong with a transfer.
pub type FaultPlan = Box<dyn FnMut(&Op, &mut Random) -> Option<Fault> + Send>;

struct Started {
    op: Op,
    before: Option<u64>,
    fault: Option<Fault>,
}

/// The disk. Bytes move when a transfer ends, not when it starts, as a late DMA would.
pub struct FaultyDisk {
    bytes: Vec<u8>,
    alignment: usize,
    random: Random,
    plan: FaultPlan,
    /// By the time they end and the order in which they started.
    started: BTreeMap<(u64, u64), Started>,
    next: u64,
}

impl FaultyDisk {
    /// `bytes` of zeros. Transfers that are not aligned fail with EINVAL, as direct I/O does.
    pub fn new(bytes: usize, alignment: usize, seed: u64, plan: FaultPlan) -> FaultyDisk {
        FaultyDisk { bytes: vec![0; bytes], alignment, random: Random::new(seed), plan, started: BTreeMap::new(), next: 0 }
    }

    /// Starts a transfer.
    pub fn start(&mut self, now_ns: u64, op: Op) {
        let fault = (self.plan)(&op, &mut self.random);
        let late = if let Some(Fault::Late(extra)) = fault { extra } else { 0 };
        let ends = now_ns + 1_000 + self.random.below(50_000) + late;
        self.started.insert((ends, self.next), Started { op, before: op.checksum_before(), fault });
        self.next += 1;
    }

    /// When the next transfer ends.
    pub fn next_end_ns(&self) -> Option<u64> {
        self.started.first_key_value().map(|((ends, _), _)| *ends)
    }

    /// Addresses that transfers own: (address, bytes).
    pub fn owned_ranges(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.started.values().map(|started| (started.op.address, started.op.len))
    }

    /// Ends the next transfer that is due.
    pub fn end(&mut self, now_ns: u64) -> Option<Completion> {
        let first = self.started.first_entry().filter(|first| first.key().0 <= now_ns)?;
        let Started { op, before, fault } = first.remove();
        let result = self.effect(&op, fault);
        let checksum = before.or_else(|| result.ok().and_then(|moved| op.checksum_after(moved)));
        Some(Completion { id: op.id, result, checksum })
    }

    fn effect(&mut self, op: &Op, fault: Option<Fault>) -> std::result::Result<usize, i32> {
        let Op { direction, offset, address, len, .. } = *op;
        if !(offset as usize | address | len).is_multiple_of(self.alignment) {
            return Err(libc::EINVAL);
        }
        match fault {
            None | Some(Fault::Late(_)) => Ok(copy(&mut self.bytes, direction, offset, address, len)),
            Some(Fault::Errno(errno)) => Err(errno),
            Some(Fault::Short(moved)) => Ok(copy(&mut self.bytes, direction, offset, address, moved.min(len))),
            Some(Fault::Torn(moved)) => {
                copy(&mut self.bytes, direction, offset, address, moved.min(len));
                Ok(len)
            }
            Some(Fault::FlippedBit(bit)) => {
                let moved = copy(&mut self.bytes, direction, offset, address, len);
                let bit = bit % (len * 8);
                if direction == Direction::Write {
                    self.flip(offset * 8 + bit as u64);
                } else {
                    let byte: *mut u8 = std::ptr::with_exposed_provenance_mut(address + bit / 8);
                    // SAFETY: inside the range that the buffer's owner lends until the request ends.
                    unsafe { *byte ^= 1 << (bit % 8) };
                }
                Ok(moved)
            }
            Some(Fault::Lost) => Ok(len),
            Some(Fault::Misdirected(elsewhere)) => {
                copy(&mut self.bytes, direction, elsewhere, address, len);
                Ok(len)
            }
            Some(Fault::TooLong) => Ok(copy(&mut self.bytes, direction, offset, address, len) + 1),
        }
    }

    /// Flips a bit on the disk.
    pub fn flip(&mut self, bit: u64) {
        if let Some(byte) = self.bytes.get_mut((bit / 8) as usize) {
            *byte ^= 1 << (bit % 8);
        }
    }
}

/// A [`FaultyDisk`] in real time.
pub struct Faulty {
    disk: FaultyDisk,
    opened: Instant,
    wake: Arc<Flag>,
    depth: usize,
}

impl Faulty {
    /// The disk as a backend for `depth` transfers.
    pub fn new(disk: FaultyDisk, depth: usize) -> Faulty {
        Faulty { disk, opened: Instant::now(), wake: Arc::default(), depth }
    }

    fn now_ns(&self) -> u64 {
        self.opened.elapsed().as_nanos() as u64
    }
}

impl Backend for Faulty {
    fn max_in_flight(&self) -> usize {
        self.depth
    }

    fn submit(&mut self, op: Op) -> Result<()> {
        let now_ns = self.now_ns();
        self.disk.start(now_ns, op);
        Ok(())
    }

    fn reap(&mut self, timeout: Option<Duration>, ended: &mut Vec<Completion>) -> Result<()> {
        let now_ns = self.now_ns();
        let until = self.disk.next_end_ns().map(|ends| Duration::from_nanos(ends.saturating_sub(now_ns)));
        if until != Some(Duration::ZERO) {
            self.wake.wait(timeout.into_iter().chain(until).min());
        }
        let now_ns = self.now_ns();
        while let Some(completion) = self.disk.end(now_ns) {
            ended.push(completion);
        }
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.wake) as Arc<dyn Wake>
    }
}
