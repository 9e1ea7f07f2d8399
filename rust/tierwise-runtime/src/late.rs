//! Moments that host steps left for later, and gradients that have landed meanwhile: they are added to the sums that the moments still read
//! when those are done, in the order in which they came.

use crate::engine::{Shared, State};
use crate::error::{Error, Result};
use crate::execute::run_adam;
use crate::gradients::Then;
use crate::workers::Job;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tierwise_core::ChunkId;
use tierwise_core::scheduler::Event;
use tierwise_kernels::AdamSegment;
use tierwise_kernels::adam::Pass;

/// What is owed, and who waits for it.
#[derive(Default)]
pub struct Late {
    /// Steps whose moments were not asked for yet.
    owed: BTreeMap<ChunkId, (Vec<AdamSegment>, String)>,
    /// Chunks that owe moments, or whose landed gradients are being added.
    waiting: BTreeMap<ChunkId, Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// Steps that the chunk owes moments of: the next one may begin while gradients of the one before are being added.
    steps: u32,
    gradients: VecDeque<Then>,
}

impl Late {
    /// A step writes parameters only; its moments follow from the same segments.
    pub fn owe(&mut self, chunk: ChunkId, segments: Vec<AdamSegment>, name: String) {
        self.owed.insert(chunk, (segments, name));
        self.waiting.entry(chunk).or_default().steps += 1;
    }

    /// Whether nothing is owed and nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Gives `then` back if nothing has to be done before it.
    pub fn wait(&mut self, chunk: ChunkId, then: Then) -> Option<Then> {
        match self.waiting.get_mut(&chunk) {
            Some(waiting) => {
                waiting.gradients.push_back(then);
                None
            }
            None => Some(then),
        }
    }

    /// What waited for a chunk's moments, one after the other; nothing once the chunk waits for nothing more of that step.
    fn next(&mut self, chunk: ChunkId) -> Option<Then> {
        let waiting = self.waiting.get_mut(&chunk)?;
        let next = waiting.gradients.pop_front();
        if next.is_none() {
            waiting.steps -= 1;
            if waiting.steps == 0 {
                self.waiting.remove(&chunk);
            }
        }
        next
    }
}

impl Shared {
    /// Writes the moments that a chunk's step left, behind all steps that were asked for before.
    pub(crate) fn step_moments(&self, state: &mut State, chunk: ChunkId) -> Result<()> {
        let owed = state.late.owed.remove(&chunk);
        let (segments, name) = owed.ok_or_else(|| Error::Internal(format!("chunk {} owes no moments", chunk.0)))?;
        self.adam_jobs.send(Job::new(None, move |shared| {
            run_adam(shared, Pass::Moments, &segments, &format!("moments {name}"));
            shared.post(&Event::MomentsDone { chunk })?;
            loop {
                let next = shared.lock().late.next(chunk);
                let Some(then) = next else {
                    shared.notify();
                    return Ok(());
                };
                then(shared)?;
            }
        }))
    }

    /// Goes on with a gradient that has landed, at the latest when the moments of the step before are done.
    pub(crate) fn after_moments(self: &Arc<Self>, chunk: ChunkId, then: Then) -> Result<()> {
        let now = self.lock().late.wait(chunk, then);
        now.map_or(Ok(()), |then| then(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: ChunkId = ChunkId(3);

    fn gradient() -> Then {
        Box::new(|_| Ok(()))
    }

    #[test]
    fn gradients_wait_as_long_as_any_step_owes_moments() {
        let mut late = Late::default();
        assert!(late.wait(CHUNK, gradient()).is_some(), "nothing is owed");
        late.owe(CHUNK, Vec::new(), String::new());
        assert!(late.wait(CHUNK, gradient()).is_none());
        assert!(late.wait(ChunkId(4), gradient()).is_some(), "another chunk owes nothing");
        // Adding the gradient completed the next step, which was decided at once.
        assert!(late.next(CHUNK).is_some());
        late.owe(CHUNK, Vec::new(), String::new());
        assert!(late.next(CHUNK).is_none(), "the first step's moments are done");
        assert!(!late.is_empty());
        assert!(late.wait(CHUNK, gradient()).is_none(), "the second step's are not");
        assert!(late.next(CHUNK).is_some());
        assert!(late.next(CHUNK).is_none());
        assert!(late.is_empty());
        assert!(late.wait(CHUNK, gradient()).is_some());
    }
}
