//! Late moments, and landed gradients that wait for them: the counterpart of the runtime's `late.rs`. Who adds a gradient is settled when it has
//! landed; in the runtime, when the landing worker comes to it.

use super::machine::{Lane, Task};
use super::{Effect, Run, SimError};
use std::collections::{BTreeMap, VecDeque};
use tierwise_core::ChunkId;
use tierwise_core::scheduler::Event;

/// A gradient that has landed in a buffer: what adding it moves, and what follows if it was the last.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrived {
    pub added: u64,
    pub landed: Option<Event>,
}

/// Chunks that owe moments, or whose landed gradients are being added: of how many steps, and what waits.
pub type Waiting = BTreeMap<ChunkId, (u32, VecDeque<Arrived>)>;

impl Run<'_> {
    /// The parameters' pass of a step is asked for: its moments will follow.
    pub(super) fn owe_moments(&mut self, chunk: ChunkId) {
        self.waiting.entry(chunk).or_default().0 += 1;
    }

    /// Writes the moments that a step left, behind all steps that were asked for before.
    pub(super) fn step_moments(&mut self, chunk: ChunkId) {
        let bytes = self.final_grad_bytes(chunk) + 2 * self.moment_bytes(chunk);
        self.enqueue(Lane::HostAdam, "moments", chunk, bytes, bytes as f64, Vec::new(), Vec::new(), vec![Effect::Moments(chunk)]);
    }

    /// Moments are written: what landed meanwhile is added, before the next step.
    pub(super) fn moments_ended(&mut self, chunk: ChunkId) -> Result<(), SimError> {
        self.apply(&Event::MomentsDone { chunk })?;
        self.add_waiting(chunk);
        Ok(())
    }

    pub(super) fn add_waiting(&mut self, chunk: ChunkId) {
        let Some((steps, waiting)) = self.waiting.get_mut(&chunk) else { return };
        if let Some(arrived) = waiting.pop_front() {
            self.add_arrived(chunk, arrived, Lane::HostAdam, Some(Effect::AddWaiting(chunk)));
            return;
        }
        *steps -= 1;
        if *steps == 0 {
            self.waiting.remove(&chunk);
        }
    }

    /// A gradient has landed in a buffer.
    pub(super) fn arrived(&mut self, chunk: ChunkId, arrived: Arrived) {
        match self.waiting.get_mut(&chunk) {
            Some((_, waiting)) => waiting.push_back(arrived),
            None => self.add_arrived(chunk, arrived, Lane::Landing, None),
        }
    }

    /// Adds it in its turn, or at once by the worker that wrote the moments, and takes the norm of a final sum.
    fn add_arrived(&mut self, chunk: ChunkId, arrived: Arrived, lane: Lane, then: Option<Effect>) {
        let Arrived { added, landed } = arrived;
        let name = |what: &str| format!("{what} {}", self.setup.layout.chunks[chunk.index()].name);
        let task = |name: String, bytes: u64, work: f64, on_end: Vec<Effect>| {
            let (waits, on_start) = (Vec::new(), Vec::new());
            Task { name, bytes, work, waits, on_start, on_end }
        };
        let hardware = self.setup.hardware;
        let mut freed = vec![Effect::FreeStaging];
        let mut then: Vec<Effect> = then.into_iter().collect();
        let norm = landed.map(|landed| {
            let on_end = std::iter::once(Effect::Post(landed)).chain(then.drain(..)).collect();
            let read = self.final_grad_bytes(chunk);
            task(name("norm"), read, read as f64, on_end)
        });
        freed.append(&mut then);
        let work = if lane == Lane::Landing { hardware.addition_work(added) } else { hardware.addition_work_of_adam(added) };
        let accumulate = task(name("accumulate"), added, work, freed);
        if lane == Lane::Landing {
            for task in std::iter::once(accumulate).chain(norm) {
                self.machine.push(lane, task);
            }
        } else {
            for task in norm.into_iter().chain([accumulate]) {
                self.machine.push_next(lane, task);
            }
        }
    }
}
