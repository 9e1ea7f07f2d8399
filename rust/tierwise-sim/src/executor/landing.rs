//! The worker that takes gradients where they have landed: the counterpart of the runtime's `gradients/landing.rs`. One after the other, in
//! the order in which they landed, it adds them to their sums, takes their norm, or gives them to the disk.

use super::machine::{Lane, Task};
use super::{Effect, Run, SimError};
use std::collections::VecDeque;
use tierwise_core::ChunkId;
use tierwise_core::scheduler::Event;

/// A gradient that has landed, and what follows if it was the last of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrived {
    pub chunk: ChunkId,
    pub what: What,
    pub landed: Option<Event>,
}

/// What is done with it.
#[derive(Debug, Clone, PartialEq)]
pub enum What {
    /// It is at home: its norm.
    Norm,
    /// It is added to its sum in memory, which moves so many bytes; then the norm.
    Add { added: u64 },
    /// The disk writes it while its norm is taken.
    Write,
    /// It is added to its sum on the disk, of which there is none before the first micro-batch.
    AddOnDisk { first: bool },
}

/// The worker.
#[derive(Default)]
pub struct Landing {
    queue: VecDeque<Arrived>,
    busy: bool,
}

impl Run<'_> {
    /// A gradient has landed.
    pub(super) fn arrived(&mut self, arrived: Arrived) -> Result<(), SimError> {
        self.landing.queue.push_back(arrived);
        self.next_landing()
    }

    /// The worker is done with what it had.
    pub(super) fn landing_ended(&mut self) -> Result<(), SimError> {
        self.landing.busy = false;
        self.next_landing()
    }

    fn next_landing(&mut self) -> Result<(), SimError> {
        while !self.landing.busy
            && let Some(arrived) = self.landing.queue.pop_front()
        {
            // What late moments still read is added after them, by who writes them.
            let Some(Arrived { chunk, what, landed }) = self.wait_for_moments(arrived) else { continue };
            self.landing.busy = true;
            match what {
                What::Norm | What::Add { .. } => {
                    let added = if let What::Add { added } = what { Some(added) } else { None };
                    for task in self.adding(chunk, added, landed, Lane::Landing, Effect::LandingEnded) {
                        self.machine.push(Lane::Landing, task);
                    }
                }
                What::Write => self.write_landed(chunk, landed),
                What::AddOnDisk { first } => self.add_on_disk(chunk, first, landed)?,
            }
        }
        Ok(())
    }

    /// Adding a gradient to its sum, and taking the norm of a final one, on a lane; `then` is what the last of it means.
    pub(super) fn adding(&self, chunk: ChunkId, added: Option<u64>, landed: Option<Event>, lane: Lane, then: Effect) -> Vec<Task<Effect>> {
        let name = &self.setup.layout.chunks[chunk.index()].name;
        let task = |what: &str, bytes: u64, work: f64, on_end: Vec<Effect>| {
            let (waits, on_start) = (Vec::new(), Vec::new());
            Task { name: format!("{what} {name}"), bytes, work, waits, on_start, on_end }
        };
        let hardware = self.setup.hardware;
        let added = added.map(|added| {
            let work = if lane == Lane::Landing { hardware.addition_work(added) } else { hardware.addition_work_of_adam(added) };
            task("accumulate", added, work, vec![Effect::FreeStaging])
        });
        let norm = landed.map(|landed| {
            let read = self.final_grad_bytes(chunk);
            task("norm", read, read as f64, vec![Effect::Post(landed)])
        });
        let mut tasks: Vec<Task<Effect>> = added.into_iter().chain(norm).collect();
        if let Some(last) = tasks.last_mut() {
            last.on_end.push(then);
        }
        tasks
    }
}
