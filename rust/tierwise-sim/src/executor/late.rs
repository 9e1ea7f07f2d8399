//! Late moments, and landed gradients that wait for them: the counterpart of the runtime's `late.rs`.

use super::landing::{Arrived, What};
use super::machine::{HostPass, Lane};
use super::{Effect, Run, SimError};
use std::collections::{BTreeMap, VecDeque};
use tierwise_core::ChunkId;
use tierwise_core::scheduler::Event;

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
        let work = self.setup.hardware.moments_work(bytes);
        let token = self.enqueue(Lane::HostAdam, "moments", chunk, bytes, work, Vec::new(), Vec::new(), vec![Effect::Moments(chunk)]);
        self.machine.is_pass(token, HostPass::Moments);
    }

    /// Moments are written: what landed meanwhile is added, before the next step.
    pub(super) fn moments_ended(&mut self, chunk: ChunkId) -> Result<(), SimError> {
        self.apply(&Event::MomentsDone { chunk })?;
        self.add_waiting(chunk);
        Ok(())
    }

    /// The landing worker comes to a gradient: it is given back, unless it has to wait for moments.
    pub(super) fn wait_for_moments(&mut self, arrived: Arrived) -> Option<Arrived> {
        match self.waiting.get_mut(&arrived.chunk) {
            Some((_, waiting)) => {
                waiting.push_back(arrived);
                None
            }
            None => Some(arrived),
        }
    }

    /// Adds the next gradient that waited for a chunk's moments, ahead of all steps: the worker that wrote them goes on with it.
    pub(super) fn add_waiting(&mut self, chunk: ChunkId) {
        let Some((steps, waiting)) = self.waiting.get_mut(&chunk) else { return };
        if let Some(Arrived { what, landed, .. }) = waiting.pop_front() {
            let added = if let What::Add { added } = what { Some(added) } else { None };
            for task in self.adding(chunk, added, landed, Lane::HostAdam, Effect::AddWaiting(chunk)).into_iter().rev() {
                self.machine.push_next(Lane::HostAdam, task);
            }
            return;
        }
        *steps -= 1;
        if *steps == 0 {
            self.waiting.remove(&chunk);
        }
    }
}
