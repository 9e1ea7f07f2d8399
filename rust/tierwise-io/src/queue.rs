//! The queue: which transfer is started next, what a completion means, when a request has ended. Sans-IO.
//!
//! A request moves one payload; it is cut into blocks, and at most [`Limits::queue_depth`] block transfers are in flight. A write goes to
//! free blocks and replaces the last complete copy only when all its blocks are on the disk. Whoever drives the queue hands every
//! operation of [`Queue::poll`] to a disk and every completion to [`Queue::complete`], with a time that never goes back.

mod request;
mod table;

use crate::backend::{BlockRef, Completion, Op, OpId};
use crate::buffer::Buffer;
use crate::checksum::seed;
use crate::error::{Error, Result};
use crate::metrics::{BusyClock, Metrics};
use crate::{Direction, Key, Priority};
use request::{Phase, Progress, Request};
use std::collections::{BTreeMap, BTreeSet};
use table::{Source, Table};

/// Transfers of one block in a row that may move nothing before the request fails.
pub const MAX_FRUITLESS_TRANSFERS: u32 = 20;
/// Wait before the first repetition after EAGAIN; doubled each time.
const FIRST_DELAY_NS: u64 = 100_000;
/// Longest wait before a repetition.
const MAX_DELAY_NS: u64 = 100_000_000;

/// Sizes that the queue works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Block transfers in flight at once.
    pub queue_depth: usize,
    /// Bytes of a block: a multiple of the alignment.
    pub block_bytes: usize,
    /// What addresses, offsets and lengths are multiples of.
    pub alignment: usize,
    /// Blocks of the spill file.
    pub blocks: u32,
}

/// Names a request of one queue, in the order of submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// A request that has ended; its buffer belongs to the caller again.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Which.
    pub request: RequestId,
    /// How.
    pub outcome: Result<()>,
}

#[derive(Debug, Clone, Copy)]
struct Flight {
    request: RequestId,
    block: u32,
    len: usize,
    since_ns: u64,
}

/// What a completion means for its block.
enum Verdict {
    Done,
    Again { due_ns: u64 },
    Failed(Error),
}

/// The state machine.
#[derive(Debug)]
pub struct Queue {
    limits: Limits,
    table: Table,
    requests: BTreeMap<RequestId, Request>,
    /// Requests with blocks to submit.
    ready: BTreeSet<(Priority, RequestId)>,
    /// Blocks whose next attempt is due later.
    delayed: BTreeSet<(u64, RequestId, u32)>,
    in_flight: BTreeMap<OpId, Flight>,
    finished: Vec<Finished>,
    next_request: u64,
    next_op: u64,
    metrics: Metrics,
    busy: [BusyClock; 2],
}

impl Queue {
    /// An empty spill file.
    pub fn new(limits: Limits) -> Result<Queue> {
        let Limits { queue_depth, block_bytes, alignment, blocks } = limits;
        if queue_depth == 0 || blocks == 0 || alignment == 0 || block_bytes == 0 || !block_bytes.is_multiple_of(alignment) {
            return Err(Error::Usage(format!(
                "block_bytes={block_bytes} has to be a positive multiple of the alignment {alignment}, queue_depth={queue_depth} and blocks={blocks} at least 1"
            )));
        }
        Ok(Queue {
            limits,
            table: Table::new(blocks, block_bytes),
            requests: BTreeMap::new(),
            ready: BTreeSet::new(),
            delayed: BTreeSet::new(),
            in_flight: BTreeMap::new(),
            finished: Vec::new(),
            next_request: 0,
            next_op: 0,
            metrics: Metrics::default(),
            busy: Default::default(),
        })
    }

    /// Writes a new generation of a payload. The last complete one stays readable until this one is complete.
    pub fn write(&mut self, key: Key, generation: u64, buffer: Buffer, priority: Priority) -> Result<RequestId> {
        self.check(key, buffer)?;
        let id = RequestId(self.next_request);
        let extent = self.table.begin_write(key, generation, buffer.len(), id)?;
        self.insert(Request {
            key,
            generation,
            direction: Direction::Write,
            buffer,
            priority,
            extent,
            phase: Phase::Moving,
            queued: (0..self.block_count(buffer)).collect(),
            delayed: 0,
            in_flight: 0,
            blocks: vec![Progress::default(); self.block_count(buffer) as usize],
        });
        Ok(id)
    }

    /// Reads one generation of a payload, after its write where that is not complete yet.
    pub fn read(&mut self, key: Key, generation: u64, buffer: Buffer, priority: Priority) -> Result<RequestId> {
        self.check(key, buffer)?;
        let id = RequestId(self.next_request);
        let (extent, phase) = match self.table.begin_read(key, generation, buffer.len())? {
            Source::Stored(extent) => (extent, Phase::Moving),
            Source::Writing(extent, write) => (extent, Phase::Waiting(write)),
        };
        if let Phase::Waiting(write) = phase
            && self.requests.get(&write).is_some_and(|write| write.priority > priority)
        {
            self.set_priority(write, priority);
        }
        self.insert(Request {
            key,
            generation,
            direction: Direction::Read,
            buffer,
            priority,
            extent,
            phase,
            queued: (0..self.block_count(buffer)).collect(),
            delayed: 0,
            in_flight: 0,
            blocks: vec![Progress::default(); self.block_count(buffer) as usize],
        });
        Ok(id)
    }

    /// Ends a request as cancelled: at once if none of its transfers is in flight, else when the last one has come back, because until
    /// then the disk owns the buffer. A request that has ended stays as it ended.
    pub fn cancel(&mut self, id: RequestId) {
        if let Some(request) = self.requests.get(&id) {
            let Request { direction, key, generation, .. } = *request;
            self.drain(id, Error::Cancelled { direction, key, generation });
        }
    }

    /// Changes who is served first.
    pub fn set_priority(&mut self, id: RequestId, priority: Priority) {
        if let Some(request) = self.requests.get_mut(&id) {
            let old = std::mem::replace(&mut request.priority, priority);
            if self.ready.remove(&(old, id)) {
                self.ready.insert((priority, id));
            }
        }
    }

    /// Gives a payload's blocks back.
    pub fn forget(&mut self, key: Key) -> Result<()> {
        self.table.forget(key)
    }

    /// Generation of the last complete copy.
    pub fn stored(&self, key: Key) -> Option<u64> {
        self.table.stored(key)
    }

    /// The next transfer to hand to the disk, if one may start.
    pub fn poll(&mut self, now_ns: u64) -> Option<Op> {
        while let Some(&(due_ns, id, block)) = self.delayed.first().filter(|(due_ns, ..)| *due_ns <= now_ns) {
            self.delayed.remove(&(due_ns, id, block));
            if let Some(request) = self.requests.get_mut(&id) {
                request.delayed -= 1;
                request.queued.push_front(block);
                self.ready.insert((request.priority, id));
            }
        }
        if self.in_flight.len() >= self.limits.queue_depth {
            return None;
        }
        let &(priority, id) = self.ready.first()?;
        let request = self.requests.get_mut(&id)?;
        let block = request.queued.pop_front()?;
        if request.queued.is_empty() {
            self.ready.remove(&(priority, id));
        }
        request.in_flight += 1;
        let Limits { block_bytes, alignment, .. } = self.limits;
        let start = block as usize * block_bytes;
        let bytes = block_bytes.min(request.buffer.len() - start);
        let at = offset(&self.table, request, block, block_bytes);
        let progress = &mut request.blocks[block as usize];
        progress.attempts += 1;
        let len = bytes.next_multiple_of(alignment) - progress.done;
        let op = Op {
            id: OpId(self.next_op),
            direction: request.direction,
            offset: at + progress.done as u64,
            address: request.buffer.address() + start + progress.done,
            len,
            block: BlockRef {
                address: request.buffer.address() + start,
                bytes,
                done: progress.done,
                seed: seed(request.key, request.generation, block),
            },
        };
        self.next_op += 1;
        self.busy[request.direction as usize].start(now_ns);
        self.in_flight.insert(op.id, Flight { request: id, block, len, since_ns: now_ns });
        Some(op)
    }

    /// When [`Queue::poll`] has something new without a completion.
    pub fn next_wakeup_ns(&self) -> Option<u64> {
        self.delayed.first().map(|(due_ns, ..)| *due_ns)
    }

    /// What the disk says about a transfer. A completion of a transfer that is not in flight is an error: the disk cannot be trusted then.
    pub fn complete(&mut self, now_ns: u64, completion: &Completion) -> Result<()> {
        let Some(flight) = self.in_flight.remove(&completion.id) else {
            return Err(Error::Stopped(format!("the disk completed transfer {}, which is not in flight", completion.id.0)));
        };
        let id = flight.request;
        let Some(request) = self.requests.get_mut(&id) else {
            return Err(Error::Stopped(format!("transfer {} belongs to no request", completion.id.0)));
        };
        request.in_flight -= 1;
        let counters = self.metrics.direction(request.direction);
        counters.in_flight_ns += self.busy[request.direction as usize].end(now_ns);
        counters.transfer_ns += now_ns.saturating_sub(flight.since_ns);
        counters.bytes += completion.result.map_or(0, |moved| moved.min(flight.len) as u64);
        if matches!(request.phase, Phase::Moving) {
            match self.judge(now_ns, flight, completion) {
                Verdict::Done => {}
                Verdict::Again { due_ns } => {
                    if let Some(request) = self.requests.get_mut(&id) {
                        request.delayed += 1;
                        self.delayed.insert((due_ns, id, flight.block));
                    }
                }
                Verdict::Failed(error) => self.drain(id, error),
            }
        }
        self.finish_if_idle(id);
        Ok(())
    }

    /// Requests that ended since the last call.
    pub fn take_finished(&mut self) -> Vec<Finished> {
        std::mem::take(&mut self.finished)
    }

    /// Requests that have not ended.
    pub fn pending(&self) -> usize {
        self.requests.len()
    }

    /// Transfers that the disk has.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Bytes of free blocks.
    pub fn free_bytes(&self) -> u64 {
        self.table.free_bytes()
    }

    /// What was counted.
    pub fn metrics(&self) -> Metrics {
        Metrics { used_bytes: self.table.used_bytes(), ..self.metrics }
    }

    fn check(&self, key: Key, buffer: Buffer) -> Result<()> {
        let (address, alignment) = (buffer.address(), self.limits.alignment);
        if buffer.is_empty() || !address.is_multiple_of(alignment) {
            return Err(Error::Usage(format!(
                "{key}: a buffer of {} bytes at {address:#x} cannot be moved; it needs at least 1 byte and an address that is a multiple of {alignment}",
                buffer.len()
            )));
        }
        Ok(())
    }

    fn block_count(&self, buffer: Buffer) -> u32 {
        buffer.len().div_ceil(self.limits.block_bytes) as u32
    }

    fn insert(&mut self, request: Request) {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        if matches!(request.phase, Phase::Moving) {
            self.ready.insert((request.priority, id));
        }
        self.requests.insert(id, request);
    }

    fn judge(&mut self, now_ns: u64, flight: Flight, completion: &Completion) -> Verdict {
        let Limits { block_bytes, alignment, .. } = self.limits;
        let Some(request) = self.requests.get_mut(&flight.request) else { return Verdict::Done };
        let at = offset(&self.table, request, flight.block, block_bytes);
        let Request { key, generation, direction, .. } = *request;
        let progress = &mut request.blocks[flight.block as usize];
        let offset = at + progress.done as u64;
        if direction == Direction::Write && progress.done == 0 {
            progress.checksum = completion.checksum;
        }
        let moved = match completion.result {
            Ok(moved) => moved,
            Err(errno) => {
                progress.fruitless += 1;
                let again = matches!(errno, libc::EINTR | libc::EAGAIN) && progress.fruitless < MAX_FRUITLESS_TRANSFERS;
                if !again {
                    return Verdict::Failed(Error::Transfer { direction, key, generation, offset, attempts: progress.attempts, errno });
                }
                self.metrics.retries += 1;
                return Verdict::Again { due_ns: now_ns + if errno == libc::EINTR { 0 } else { delay_ns(progress.fruitless) } };
            }
        };
        let impossible = Error::Impossible { direction, key, generation, offset, asked: flight.len, moved };
        // The file was allocated in full, so its end cannot be inside it.
        if moved > flight.len || (moved == 0 && direction == Direction::Read) {
            return Verdict::Failed(impossible);
        }
        if moved < flight.len {
            self.metrics.short_transfers += 1;
            // What is left has to start at a multiple of the alignment, so part of it may move twice.
            let kept = (progress.done + moved) / alignment * alignment;
            progress.fruitless = if kept > progress.done { 0 } else { progress.fruitless + 1 };
            progress.done = kept;
            if progress.fruitless >= MAX_FRUITLESS_TRANSFERS {
                return Verdict::Failed(impossible);
            }
            return Verdict::Again { due_ns: now_ns };
        }
        let found = if direction == Direction::Write { progress.checksum } else { completion.checksum };
        let Some(found) = found else {
            return Verdict::Failed(Error::Stopped(format!(
                "{direction} of {key}: the backend took no checksum of block {}",
                flight.block
            )));
        };
        if direction == Direction::Read {
            let expected = self.table.extent(request.extent).checksums[flight.block as usize];
            if found != expected {
                if progress.reread {
                    return Verdict::Failed(Error::Corrupt { key, generation, block: flight.block, offset: at, expected, found });
                }
                // Wrong on the way or wrong on the disk: a second read tells.
                *progress = Progress { reread: true, attempts: progress.attempts, ..Progress::default() };
                self.metrics.rereads += 1;
                return Verdict::Again { due_ns: now_ns };
            }
        }
        Verdict::Done
    }

    /// Nothing more is submitted for the request; it ends with the first error it met.
    fn drain(&mut self, id: RequestId, error: Error) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if matches!(request.phase, Phase::Draining(_)) {
            return;
        }
        request.phase = Phase::Draining(error);
        request.queued.clear();
        request.delayed = 0;
        self.ready.remove(&(request.priority, id));
        self.delayed.retain(|(_, other, _)| *other != id);
        self.finish_if_idle(id);
    }

    fn finish_if_idle(&mut self, id: RequestId) {
        if !self.requests.get(&id).is_some_and(Request::idle) {
            return;
        }
        let Some(request) = self.requests.remove(&id) else { return };
        let outcome = match request.phase {
            Phase::Draining(error) => Err(error),
            Phase::Moving | Phase::Waiting(_) => Ok(()),
        };
        match &outcome {
            Ok(()) => {}
            Err(Error::Cancelled { .. }) => self.metrics.cancelled += 1,
            Err(_) => self.metrics.failed += 1,
        }
        self.metrics.direction(request.direction).requests += 1;
        let succeeded = outcome.is_ok();
        self.finished.push(Finished { request: id, outcome });
        if request.direction == Direction::Read {
            self.table.end_read(request.extent);
            return;
        }
        let readers: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, read)| matches!(read.phase, Phase::Waiting(write) if write == id))
            .map(|(id, _)| *id)
            .collect();
        if succeeded {
            // Every block passed `judge`, which refuses a write without a checksum.
            self.table.finish_write(request.key, request.blocks.iter().filter_map(|block| block.checksum).collect());
        } else {
            self.table.abort_write(request.key);
        }
        for reader in readers {
            if succeeded {
                if let Some(read) = self.requests.get_mut(&reader) {
                    read.phase = Phase::Moving;
                    self.ready.insert((read.priority, reader));
                }
            } else {
                let (key, asked) = (request.key, request.generation);
                self.drain(reader, Error::NotStored { key, asked, stored: self.table.stored(key) });
            }
        }
    }
}

/// Where a block of a request lies in the spill file.
fn offset(table: &Table, request: &Request, block: u32, block_bytes: usize) -> u64 {
    u64::from(table.extent(request.extent).blocks[block as usize]) * block_bytes as u64
}

fn delay_ns(fruitless: u32) -> u64 {
    (FIRST_DELAY_NS << fruitless.min(16)).min(MAX_DELAY_NS)
}
