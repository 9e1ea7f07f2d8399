//! The real queue against a disk that fails by a seed, in virtual time: thousands of schedules, each checked against what was written.

#![cfg(target_os = "linux")]

mod common;

use common::{content, key};
use std::collections::BTreeMap;
use tierwise_io::backend::faulty::{Fault, FaultyDisk, Random};
use tierwise_io::error::Error;
use tierwise_io::pages::Pages;
use tierwise_io::queue::{Limits, Queue, RequestId};
use tierwise_io::{Direction, Key, Priority};

/// A block of 4 units of alignment: four places where a transfer can be cut at the right place, and many at wrong ones.
const ALIGNMENT: usize = 16;
const BLOCK_BYTES: usize = 64;
const BLOCKS: u32 = 24;
const KEYS: u32 = 6;
const SCHEDULES: u64 = 12_000;

/// How bad the disk of a schedule is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disk {
    /// Only faults that a retry repairs: every request has to succeed.
    Transient,
    /// Errors that it reports.
    Errors,
    /// Errors that it does not report.
    Silent,
}

fn fault(disk: Disk, len: usize, random: &mut Random) -> Option<Fault> {
    let errno = |errno| Some(Fault::Errno(errno));
    match random.below(100) {
        0..8 => errno(libc::EINTR),
        8..16 => errno(libc::EAGAIN),
        16..30 => Some(Fault::Short(1 + random.below(len as u64) as usize)),
        30..36 => Some(Fault::Late(random.below(200_000_000))),
        36..40 if disk != Disk::Transient => errno(libc::EIO),
        40..42 if disk != Disk::Transient => errno(libc::ENOSPC),
        42 if disk != Disk::Transient => Some(Fault::TooLong),
        43 if disk != Disk::Transient => Some(Fault::Short(0)),
        44..46 if disk == Disk::Silent => Some(Fault::Torn(random.below(len as u64) as usize)),
        46..48 if disk == Disk::Silent => Some(Fault::FlippedBit(random.next_u64() as usize)),
        48..50 if disk == Disk::Silent => Some(Fault::Lost),
        50..52 if disk == Disk::Silent => Some(Fault::Misdirected(random.below(u64::from(BLOCKS)) * BLOCK_BYTES as u64)),
        _ => None,
    }
}

struct Pending {
    direction: Direction,
    key: Key,
    generation: u64,
    pages: Pages,
    len: usize,
    cancelled: bool,
    depends_on: Option<RequestId>,
}

struct World {
    queue: Queue,
    disk: FaultyDisk,
    random: Random,
    kind: Disk,
    now_ns: u64,
    pending: BTreeMap<RequestId, Pending>,
    /// The last generation whose write succeeded, and its length.
    stored: BTreeMap<Key, (u64, usize)>,
    next_generation: u64,
    log: Log,
}

/// What all schedules together met: a schedule that meets nothing tests nothing.
#[derive(Debug, Default)]
struct Log {
    succeeded: u64,
    cancelled: u64,
    transfer_errors: u64,
    impossible: u64,
    corrupt: u64,
    lost_dependency: u64,
    full: u64,
}

impl World {
    fn new(seed: u64) -> World {
        let kind = [Disk::Transient, Disk::Errors, Disk::Silent][(seed % 3) as usize];
        let mut random = Random::new(seed);
        let limits = Limits { queue_depth: 1 + random.below(8) as usize, block_bytes: BLOCK_BYTES, alignment: ALIGNMENT, blocks: BLOCKS };
        let plan = Box::new(move |op: &tierwise_io::backend::Op, random: &mut Random| fault(kind, op.len, random));
        World {
            queue: Queue::new(limits).unwrap(),
            disk: FaultyDisk::new(BLOCKS as usize * BLOCK_BYTES, ALIGNMENT, random.next_u64(), plan),
            random,
            kind,
            now_ns: 0,
            pending: BTreeMap::new(),
            stored: BTreeMap::new(),
            next_generation: 1,
            log: Log::default(),
        }
    }

    fn priority(&mut self) -> Priority {
        [Priority::Demand, Priority::Soon, Priority::Prefetch, Priority::Background][self.random.below(4) as usize]
    }

    fn write_of(&self, key: Key) -> Option<(RequestId, &Pending)> {
        self.pending.iter().find(|(_, p)| p.direction == Direction::Write && p.key == key).map(|(id, p)| (*id, p))
    }

    fn act(&mut self) {
        let key = key(self.random.below(u64::from(KEYS)) as u32);
        let priority = self.priority();
        match self.random.below(10) {
            0..4 => self.write(key, priority),
            4..8 => self.read(key, priority),
            8 => {
                let choice = self.random.below(self.pending.len().max(1) as u64) as usize;
                if let Some((&id, pending)) = self.pending.iter_mut().nth(choice) {
                    pending.cancelled = true;
                    self.queue.cancel(id);
                }
                self.collect();
            }
            _ => {
                let choice = self.random.below(self.pending.len().max(1) as u64) as usize;
                if let Some(&id) = self.pending.keys().nth(choice) {
                    self.queue.set_priority(id, priority);
                }
            }
        }
    }

    fn write(&mut self, key: Key, priority: Priority) {
        let busy = self.write_of(key).is_some();
        let generation = self.next_generation;
        self.next_generation += 1;
        let len = 1 + self.random.below(5 * BLOCK_BYTES as u64) as usize;
        let mut pages = Pages::new(len, ALIGNMENT).unwrap();
        pages.as_mut_slice()[..len].copy_from_slice(&content(key, generation, len));
        let needed = (len.div_ceil(BLOCK_BYTES) * BLOCK_BYTES) as u64;
        // SAFETY: the pages are kept in `pending`, untouched, until the request has ended.
        match self.queue.write(key, generation, unsafe { pages.buffer(0, len) }, priority) {
            Ok(id) => {
                assert!(!busy);
                let pending = Pending { direction: Direction::Write, key, generation, pages, len, cancelled: false, depends_on: None };
                self.pending.insert(id, pending);
            }
            Err(Error::Full { free, .. }) => {
                assert!(!busy && free < needed && free == self.queue.free_bytes());
                self.log.full += 1;
            }
            Err(Error::Usage(_)) => assert!(busy),
            Err(error) => panic!("{error}"),
        }
    }

    fn read(&mut self, key: Key, priority: Priority) {
        let writing = self.write_of(key).map(|(id, write)| (id, write.generation, write.len));
        let stored = self.stored.get(&key).copied();
        let (depends_on, (generation, len)) = match (writing, stored) {
            (Some((id, generation, len)), stored) if stored.is_none() || self.random.chance(500) => (Some(id), (generation, len)),
            (_, Some(stored)) => (None, stored),
            (_, None) => {
                let pages = Pages::new(1, ALIGNMENT).unwrap();
                // SAFETY: refused before anything moves.
                let outcome = self.queue.read(key, 1, unsafe { pages.buffer(0, 1) }, priority);
                assert!(matches!(outcome, Err(Error::NotStored { stored: None, .. })), "{outcome:?}");
                return;
            }
        };
        let mut pages = Pages::new(len, ALIGNMENT).unwrap();
        pages.as_mut_slice().fill(0xee);
        // SAFETY: the pages are kept in `pending`, untouched, until the request has ended.
        let id = self.queue.read(key, generation, unsafe { pages.buffer(0, len) }, priority).unwrap();
        self.pending.insert(id, Pending { direction: Direction::Read, key, generation, pages, len, cancelled: false, depends_on });
    }

    /// One thing happens: a transfer starts or ends, or time passes.
    fn advance(&mut self) {
        // A lazy driver is allowed, too: sometimes nothing is submitted although it could be.
        while self.random.chance(800) {
            let Some(op) = self.queue.poll(self.now_ns) else { break };
            self.disk.start(self.now_ns, op);
        }
        let next = self.disk.next_end_ns().into_iter().chain(self.queue.next_wakeup_ns()).min();
        self.now_ns = self.now_ns.max(next.unwrap_or(self.now_ns));
        if let Some(completion) = self.disk.end(self.now_ns) {
            self.queue.complete(self.now_ns, &completion).unwrap();
        }
        self.collect();
    }

    fn collect(&mut self) {
        for finished in self.queue.take_finished() {
            let pending = self.pending.remove(&finished.request).expect("a request ends once");
            self.check(&pending, finished.outcome);
        }
    }

    fn check(&mut self, pending: &Pending, outcome: Result<(), Error>) {
        let Pending { direction, key, generation, len, cancelled, .. } = *pending;
        let right = pending.pages.as_slice()[..len] == content(key, generation, len);
        assert!(direction == Direction::Read || right, "a write changed its source");
        let range = pending.pages.as_ptr() as usize..pending.pages.as_ptr() as usize + pending.pages.bytes();
        let owned = self.disk.owned_ranges().any(|(address, _)| range.contains(&address));
        assert!(!owned, "{direction} of {key} ended while the disk still owns its buffer");
        let what = format!("{:?} disk, {direction} of {key}, generation {generation}: {outcome:?}", self.kind);
        match outcome {
            Ok(()) => {
                assert!(right, "wrong bytes passed for right: {what}");
                self.log.succeeded += 1;
                if direction == Direction::Write {
                    self.stored.insert(key, (generation, len));
                }
            }
            Err(Error::Cancelled { .. }) => {
                assert!(cancelled, "{what}");
                self.log.cancelled += 1;
            }
            Err(Error::NotStored { .. }) => {
                assert!(pending.depends_on.is_some(), "{what}");
                self.log.lost_dependency += 1;
            }
            Err(Error::Transfer { errno, .. }) => {
                assert!(self.kind != Disk::Transient && matches!(errno, libc::EIO | libc::ENOSPC), "{what}");
                self.log.transfer_errors += 1;
            }
            Err(Error::Impossible { .. }) => {
                assert!(self.kind != Disk::Transient, "{what}");
                self.log.impossible += 1;
            }
            Err(Error::Corrupt { .. }) => {
                assert!(self.kind == Disk::Silent && direction == Direction::Read, "{what}");
                self.log.corrupt += 1;
            }
            Err(error) => panic!("{what}: {error}"),
        }
        assert_eq!(self.queue.stored(key), self.stored.get(&key).map(|(generation, _)| *generation), "the last good copy: {what}");
    }

    /// Everything ends in bounded virtual time and steps.
    fn drain(&mut self) {
        let deadline = self.now_ns + 3_600_000_000_000;
        let mut steps = 0;
        while self.queue.pending() > 0 {
            self.advance();
            steps += 1;
            assert!(steps < 100_000 && self.now_ns < deadline, "{} requests never end", self.queue.pending());
        }
        assert!(self.pending.is_empty() && self.queue.in_flight() == 0);
    }

    /// Every last good copy can be read, unless the disk lied when it was written; in the end all space is free.
    fn finish(&mut self) {
        self.drain();
        let stored: Vec<(Key, (u64, usize))> = self.stored.iter().map(|(key, stored)| (*key, *stored)).collect();
        let extents: usize = stored.iter().map(|(_, (_, len))| len.div_ceil(BLOCK_BYTES)).sum();
        assert_eq!(self.queue.free_bytes(), ((BLOCKS as usize - extents) * BLOCK_BYTES) as u64);
        for (key, _) in &stored {
            self.read(*key, Priority::Demand);
        }
        self.drain();
        for (key, _) in stored {
            self.queue.forget(key).unwrap();
        }
        assert_eq!(self.queue.free_bytes(), (BLOCKS as usize * BLOCK_BYTES) as u64);
    }
}

fn run(seed: u64) -> Log {
    let mut world = World::new(seed);
    for _ in 0..40 {
        world.act();
        for _ in 0..world.random.below(6) {
            world.advance();
        }
    }
    world.finish();
    world.log
}

/// Seeds that failed once.
const KEPT: [u64; 0] = [];

#[test]
fn seeded_fault_schedules_hold_the_invariants() {
    let mut sum = Log::default();
    let seeds = match std::env::var("TIERWISE_FAULT_SEED") {
        Ok(seed) => vec![seed.parse().expect("TIERWISE_FAULT_SEED is a number")],
        Err(_) => KEPT.into_iter().chain(0..SCHEDULES).collect(),
    };
    let one = seeds.len() == 1;
    for seed in seeds {
        let outcome = std::panic::catch_unwind(|| run(seed));
        let Ok(log) = outcome else {
            panic!("schedule {seed} failed (above); run it alone with TIERWISE_FAULT_SEED={seed}, then add it to KEPT");
        };
        sum.succeeded += log.succeeded;
        sum.cancelled += log.cancelled;
        sum.transfer_errors += log.transfer_errors;
        sum.impossible += log.impossible;
        sum.corrupt += log.corrupt;
        sum.lost_dependency += log.lost_dependency;
        sum.full += log.full;
    }
    println!("{sum:?}");
    let all = [sum.succeeded, sum.cancelled, sum.transfer_errors, sum.impossible, sum.corrupt, sum.lost_dependency, sum.full];
    assert!(one || all.into_iter().all(|count| count > 1000), "the schedules miss something: {sum:?}");
}

#[test]
fn equal_seeds_give_equal_schedules() {
    for seed in 0..30 {
        assert_eq!(format!("{:?}", run(seed)), format!("{:?}", run(seed)), "schedule {seed}");
    }
}
