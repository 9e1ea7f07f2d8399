//! Gradient buffers under random orders of events: nobody's buffer is another's, steps get theirs in order, and everybody gets one in the end.

use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};
use tierwise_core::grad_buffers::{GradBuffers, GradRead};
use tierwise_core::staging::PieceId;

/// What the executor knows beside the machine.
struct World {
    buffers: GradBuffers,
    /// Reads that have not ended.
    reading: Vec<GradRead>,
    /// Who has each buffer: a piece for a step (`Some`), or an addition.
    owners: BTreeMap<u32, Option<PieceId>>,
    /// Pieces that steps want, in their order.
    wanted: VecDeque<PieceId>,
    generations: Vec<u64>,
}

impl World {
    fn own(&mut self, reads: Vec<GradRead>) {
        for read in reads {
            assert_eq!(read.generation, self.generations[read.piece.index()]);
            assert!(self.owners.insert(read.buffer, Some(read.piece)).is_none(), "buffer {} was in use", read.buffer);
            self.reading.push(read);
        }
    }

    /// One event of those that are possible; false if none is.
    fn event(&mut self, choice: usize, adding: bool) -> bool {
        let borrowed: Vec<u32> = self.owners.iter().filter(|(_, owner)| owner.is_none()).map(|(buffer, _)| *buffer).collect();
        let mut events = Vec::new();
        events.extend((0..self.reading.len()).map(|i| (0, i)));
        events.extend((0..borrowed.len()).map(|i| (1, i)));
        if adding {
            events.push((2, 0));
        }
        let next = self.wanted.front().copied();
        let taken = next.and_then(|piece| self.buffers.take(piece));
        if let (Some(piece), Some(buffer)) = (next, taken) {
            // A step takes, steps and gives back.
            self.wanted.pop_front();
            assert_eq!(self.owners.remove(&buffer), Some(Some(piece)));
            assert!(self.reading.iter().all(|read| read.buffer != buffer), "it was not read yet");
            let mut reads = Vec::new();
            self.buffers.give_back(buffer, &mut reads);
            self.own(reads);
            return true;
        }
        if events.is_empty() {
            return false;
        }
        match events[choice % events.len()] {
            (0, at) => {
                let read = self.reading.swap_remove(at);
                self.buffers.was_read(read.buffer);
            }
            (1, at) => {
                self.owners.remove(&borrowed[at]);
                let mut reads = Vec::new();
                self.buffers.give_back(borrowed[at], &mut reads);
                self.own(reads);
            }
            _ => {
                if let Some(buffer) = self.buffers.borrow() {
                    assert!(self.owners.insert(buffer, None).is_none(), "buffer {buffer} was in use");
                }
            }
        }
        true
    }
}

proptest! {
    #[test]
    fn every_step_and_addition_gets_its_buffers(
        pieces in 1_u32..12,
        buffers in 1_u32..6,
        rounds in prop::collection::vec(prop::collection::vec((any::<usize>(), any::<bool>()), 0..40), 1..5),
    ) {
        let mut world = World {
            buffers: GradBuffers::new(pieces as usize, buffers),
            reading: Vec::new(),
            owners: BTreeMap::new(),
            wanted: VecDeque::new(),
            generations: vec![0; pieces as usize],
        };
        for round in rounds {
            let all: Vec<PieceId> = (0..pieces).map(PieceId).collect();
            for piece in &all {
                world.generations[piece.index()] += 1;
                prop_assert_eq!(world.buffers.next_generation(*piece), world.generations[piece.index()]);
            }
            world.wanted.extend(&all);
            let mut reads = Vec::new();
            world.buffers.want(all, &mut reads);
            world.own(reads);
            for (choice, adding) in round {
                world.event(choice, adding);
            }
            // Whatever happened, it comes to an end.
            let mut events = 0;
            while !world.wanted.is_empty() || !world.owners.is_empty() {
                prop_assert!(world.event(0, false), "everybody waits: {:?}", world.buffers);
                events += 1;
                prop_assert!(events < 1000);
            }
            prop_assert!(!world.buffers.is_busy());
        }
    }
}

#[test]
fn a_step_waits_for_its_turn_and_its_read() {
    let mut buffers = GradBuffers::new(3, 2);
    let mut reads = Vec::new();
    buffers.next_generation(PieceId(0));
    buffers.want([PieceId(0), PieceId(1), PieceId(2)], &mut reads);
    assert_eq!(reads.iter().map(|read| (read.piece.0, read.generation)).collect::<Vec<_>>(), [(0, 1), (1, 0)]);
    assert_eq!(buffers.take(PieceId(0)), None, "it is not there yet");
    buffers.was_read(reads[1].buffer);
    assert_eq!(buffers.take(PieceId(1)), None, "another is before it");
    buffers.was_read(reads[0].buffer);
    assert_eq!(buffers.borrow(), None, "no buffer is free");
    assert_eq!(buffers.take(PieceId(0)), Some(reads[0].buffer));
    let mut more = Vec::new();
    buffers.give_back(reads[0].buffer, &mut more);
    assert_eq!(more.iter().map(|read| read.piece.0).collect::<Vec<_>>(), [2]);
}
