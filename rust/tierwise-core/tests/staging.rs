//! The staging machine against a disk and steps that end in any order: nothing is lost, nothing waits for ever, the disk is kept busy.

use proptest::prelude::*;
use std::collections::BTreeMap;
use tierwise_core::staging::{Buffer, PieceId, Staging, Transfer};

/// Disk, buffers and what a synchronous program would hold; values stand for bytes.
struct World {
    staging: Staging,
    /// Per piece and generation.
    disk: BTreeMap<(PieceId, u64), u64>,
    memory: Vec<Option<u64>>,
    expected: Vec<u64>,
    /// Transfers that the disk has, in the order of their submission.
    running: Vec<Transfer>,
    reads: u64,
    writes: u64,
}

impl World {
    /// The first `stepped` of the pieces are used by every step.
    fn new(pieces: usize, stepped: usize, buffers: u32) -> World {
        let mut world = World {
            staging: Staging::new(pieces, stepped, buffers),
            disk: BTreeMap::new(),
            memory: vec![None; buffers as usize],
            expected: vec![0; pieces],
            running: Vec::new(),
            reads: 0,
            writes: 0,
        };
        let mut transfers = Vec::new();
        world.staging.fill(&mut transfers);
        world.start(transfers);
        world
    }

    fn start(&mut self, transfers: Vec<Transfer>) {
        for transfer in transfers {
            match transfer {
                Transfer::Zero { piece, buffer } => {
                    assert_eq!(self.staging.generation(piece), 0);
                    self.memory[buffer as usize] = Some(0);
                }
                Transfer::Read { buffer, .. } => {
                    // Whatever was there is overwritten at any moment from now on.
                    self.memory[buffer as usize] = None;
                    self.reads += 1;
                    self.running.push(transfer);
                }
                Transfer::Write { .. } => {
                    self.writes += 1;
                    self.running.push(transfer);
                }
            }
        }
        self.check();
    }

    fn check(&self) {
        let mut held = std::collections::BTreeSet::new();
        for buffer in self.staging.buffers() {
            let (Buffer::Reading(piece) | Buffer::Clean(piece) | Buffer::Lent(piece) | Buffer::Writing(piece)) = buffer else { continue };
            assert!(held.insert(*piece), "{piece:?} is in two buffers");
        }
    }

    fn end(&mut self, which: usize) {
        let mut transfers = Vec::new();
        match self.running.remove(which) {
            Transfer::Read { piece, buffer, generation } => {
                let value = *self.disk.get(&(piece, generation)).expect("a generation is read that the disk has");
                self.memory[buffer as usize] = Some(value);
                self.staging.was_read(buffer, &mut transfers).unwrap();
            }
            Transfer::Write { piece, buffer, generation } => {
                self.disk.insert((piece, generation), self.memory[buffer as usize].expect("bytes to write"));
                // The last copy is gone only now.
                self.disk.remove(&(piece, generation - 1));
                self.staging.was_written(buffer, &mut transfers).unwrap();
            }
            Transfer::Zero { .. } => unreachable!(),
        }
        self.start(transfers);
    }

    /// Steps the next wanted piece if it is there.
    fn work(&mut self) -> Option<PieceId> {
        let (piece, buffer) = self.staging.take()?;
        let value = self.memory[buffer as usize].expect("a piece that is taken has been read");
        assert_eq!(value, self.expected[piece.index()], "{piece:?} is not the newest generation");
        self.expected[piece.index()] = value * 31 + piece.0 as u64 + 1;
        self.memory[buffer as usize] = Some(self.expected[piece.index()]);
        let mut transfers = Vec::new();
        self.staging.give_back(buffer, true, &mut transfers).unwrap();
        self.start(transfers);
        Some(piece)
    }

    fn want(&mut self, pieces: &[PieceId]) {
        let mut transfers = Vec::new();
        self.staging.want(pieces.iter().copied(), &mut transfers);
        self.start(transfers);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_order_of_ends_steps_every_wanted_piece_once_and_loses_nothing(
        pieces in 1_usize..12,
        frozen in 0_usize..5,
        buffers in 1_u32..6,
        steps in prop::collection::vec(prop::collection::vec(any::<bool>(), 12), 1..6),
        choices in prop::collection::vec(any::<u16>(), 0..400),
    ) {
        let mut world = World::new(pieces, pieces.saturating_sub(frozen), buffers);
        let mut choices = choices.into_iter();
        for step in steps {
            let wanted: Vec<PieceId> = (0..pieces).filter(|p| step[*p]).map(|p| PieceId(p as u32)).collect();
            world.want(&wanted);
            let mut stepped = Vec::new();
            while stepped.len() < wanted.len() {
                let choice = choices.next().unwrap_or(0) as usize;
                if choice % 3 != 1
                    && let Some(piece) = world.work()
                {
                    stepped.push(piece);
                    continue;
                }
                if world.running.is_empty() {
                    let piece = world.work();
                    prop_assert!(piece.is_some(), "everybody waits: {:?}", world.staging);
                    stepped.extend(piece);
                } else {
                    let which = choice / 3 % world.running.len();
                    world.end(which);
                }
            }
            prop_assert_eq!(stepped, wanted, "in the order in which they were wanted");
        }
        while !world.running.is_empty() {
            world.end(0);
        }
        prop_assert!(!world.staging.is_busy());
        // What was stepped is on the disk, in its newest generation.
        for (piece, expected) in world.expected.iter().enumerate().filter(|(_, value)| **value != 0) {
            let piece = PieceId(piece as u32);
            prop_assert_eq!(world.disk[&(piece, world.staging.generation(piece))], *expected);
        }
    }
}

#[test]
fn a_steady_step_reads_and_writes_every_piece_once() {
    let (pieces, buffers) = (20, 4);
    let mut world = World::new(pieces, pieces, buffers);
    let all: Vec<PieceId> = (0..pieces as u32).map(PieceId).collect();
    for step in 0..5 {
        let before = (world.reads, world.writes);
        world.want(&all);
        for _ in 0..pieces {
            while world.work().is_none() {
                world.end(0);
            }
        }
        while !world.running.is_empty() {
            world.end(0);
        }
        if step > 1 {
            assert_eq!((world.reads - before.0, world.writes - before.1), (pieces as u64, pieces as u64));
        }
        // Read ahead: the next step's first pieces are there before it is decided.
        let clean: Vec<PieceId> =
            world.staging.buffers().iter().filter_map(|b| if let Buffer::Clean(p) = b { Some(*p) } else { None }).collect();
        assert_eq!(clean.iter().map(|p| p.0).sum::<u32>(), (0..buffers).sum::<u32>(), "{clean:?}");
    }
}

#[test]
fn reads_and_writes_are_on_their_way_together() {
    let mut world = World::new(20, 20, 6);
    let all: Vec<PieceId> = (0..20).map(PieceId).collect();
    for _ in 0..2 {
        world.want(&all);
        let mut mixed = 0;
        for _ in 0..20 {
            while world.work().is_none() {
                world.end(0);
            }
            let reading = world.running.iter().any(|t| matches!(t, Transfer::Read { .. }));
            let writing = world.running.iter().any(|t| matches!(t, Transfer::Write { .. }));
            mixed += u32::from(reading && writing);
            if world.staging.generation(PieceId(19)) > 0 && world.staging.generation(PieceId(0)) == 2 {
                // In the second step there is something to read.
                assert!(!world.running.is_empty());
            }
        }
        if world.staging.generation(PieceId(0)) == 2 {
            assert!(mixed > 10, "reads and writes overlapped {mixed} times of 20");
        }
        while !world.running.is_empty() {
            world.end(0);
        }
    }
}

#[test]
fn a_piece_that_is_still_there_is_not_read_again() {
    let mut world = World::new(3, 3, 4);
    let all: Vec<PieceId> = (0..3).map(PieceId).collect();
    for _ in 0..3 {
        world.want(&all);
        for _ in 0..3 {
            while world.work().is_none() {
                world.end(0);
            }
        }
    }
    assert_eq!((world.reads, world.writes), (0, 9));
}

#[test]
fn pieces_that_no_step_uses_are_read_only_for_whoever_wants_them() {
    // Pieces 3 to 7 are frozen parameters: written once, and read by name.
    let mut world = World::new(8, 3, 2);
    let (all, stepped): (Vec<PieceId>, Vec<PieceId>) = ((0..8).map(PieceId).collect(), (0..3).map(PieceId).collect());
    let work = |world: &mut World, wanted: &[PieceId]| {
        world.want(wanted);
        for _ in wanted {
            while world.work().is_none() {
                world.end(0);
            }
        }
        while !world.running.is_empty() {
            world.end(0);
        }
    };
    work(&mut world, &all);
    world.staging.rewind();
    let mut transfers = Vec::new();
    world.staging.fill(&mut transfers);
    world.start(transfers);
    while !world.running.is_empty() {
        world.end(0);
    }
    for _ in 0..4 {
        let held: Vec<u32> =
            world.staging.buffers().iter().filter_map(|b| if let Buffer::Clean(p) = b { Some(p.0) } else { None }).collect();
        assert!(held.iter().all(|p| *p < 3) && held.len() == 2, "{held:?}");
        let before = (world.reads, world.writes);
        work(&mut world, &stepped);
        assert_eq!((world.reads - before.0, world.writes - before.1), (3, 3));
    }
}

#[test]
fn calls_that_do_not_fit_are_errors() {
    let mut staging = Staging::new(2, 2, 1);
    let mut transfers = Vec::new();
    for (outcome, what) in [
        (staging.was_read(0, &mut transfers), "read"),
        (staging.was_written(0, &mut transfers), "written"),
        (staging.give_back(7, true, &mut transfers), "given back"),
    ] {
        let message = outcome.unwrap_err().to_string();
        assert!(message.contains("staging buffer") && message.contains(what), "{message}");
    }
    assert_eq!(transfers, []);
}

#[test]
fn without_reading_ahead_only_what_is_wanted_is_read_and_stays() {
    let mut world = World::new(20, 20, 4);
    let all: Vec<PieceId> = (0..20).map(PieceId).collect();
    world.want(&all);
    for _ in 0..20 {
        while world.work().is_none() {
            world.end(0);
        }
    }
    while !world.running.is_empty() {
        world.end(0);
    }
    let before = world.reads;
    world.staging.set_ahead(false);
    for _ in 0..3 {
        // As a checkpoint does: one payload after the other of the same pieces.
        let mut transfers = Vec::new();
        world.staging.want([PieceId(9), PieceId(10), PieceId(11)], &mut transfers);
        world.start(transfers);
        for _ in 0..3 {
            let (_, buffer) = loop {
                match world.staging.take() {
                    Some(taken) => break taken,
                    None => world.end(0),
                }
            };
            let mut transfers = Vec::new();
            world.staging.give_back(buffer, false, &mut transfers).unwrap();
            world.start(transfers);
        }
        world.staging.rewind();
    }
    assert_eq!(world.reads - before, 3);
    world.staging.set_ahead(true);
    let mut transfers = Vec::new();
    world.staging.fill(&mut transfers);
    assert_eq!(transfers.len(), 3, "the next step's first pieces, one of which is still there: {transfers:?}");
}
