//! A training step, event by event.

use super::shared::State;
use super::{Engine, Hyper, KeepWaiting, unknown_chunk, wait_for_event};
use crate::device::{ComputeStream, Queue};
use crate::error::{Error, Result};
use crate::spill::Spill;
use std::sync::{Arc, MutexGuard};
use tierwise_core::ChunkId;
use tierwise_core::plan::{OptimizerClass, ParamHome};
use tierwise_core::scheduler::{Decision, Event, Progress};
use tierwise_core::trace::Phase;

impl Engine {
    /// Everything is bound and filled, and nothing that was enqueued before still works on it.
    pub fn start(&self) -> Result<()> {
        let mut state = self.lock()?;
        let plan = state.scheduler.plan();
        let layout = state.scheduler.layout();
        for chunk in layout.ids() {
            let (placement, (_, device)) = (plan.chunks[chunk.index()], &state.places[chunk.index()]);
            let needs_states = placement.class == OptimizerClass::Device && layout.state_bytes(chunk) > 0;
            let missing = if placement.home == ParamHome::Resident && device.param == 0 && layout.param_bytes(chunk) > 0 {
                "param"
            } else if needs_states && device.states == 0 {
                "states"
            } else if plan.sums_on_device(chunk) && layout.grad_acc_bytes(chunk) > 0 && device.accumulator == 0 {
                "accumulator"
            } else {
                continue;
            };
            return Err(Error::Usage(format!("no device memory was bound for {missing} of `{}`", layout.chunks[chunk.index()].name)));
        }
        if plan.stream_slab_bytes > 0 && state.slab_address == 0 {
            return Err(Error::Usage("no device memory was bound for the streaming slab".to_owned()));
        }
        if let Some(problem) = state.streaming.missing(state.scheduler.layout(), state.scheduler.plan()) {
            return Err(Error::Usage(problem));
        }
        state.started = true;
        self.shared.read_ahead(&mut state)
    }

    /// Makes a unit's chunks readable on the compute stream; gives the slots of its streamed chunks.
    pub fn enter(&self, unit: u32, phase: Phase, stream: ComputeStream, keep_waiting: KeepWaiting<'_>) -> Result<Vec<(ChunkId, u64)>> {
        let state = self.lock_started()?;
        let state = self.make_readable(state, &Event::Enter { unit, phase }, stream, keep_waiting)?;
        let chunks = &state.scheduler.trace().units[unit as usize].chunks;
        Ok(chunks.iter().filter_map(|&c| state.scheduler.slot(c).map(|slot| (c, slot))).collect())
    }

    /// Hands over an `Enter` or `Touch` and makes the compute stream wait for what it reads.
    fn make_readable<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        event: &Event,
        stream: ComputeStream,
        keep_waiting: KeepWaiting<'_>,
    ) -> Result<MutexGuard<'a, State>> {
        let before = self.shared.device.record_compute(stream)?;
        state.release_event = Some(before.clone());
        let mut waited = false;
        if self.shared.apply(&mut state, event)? != Progress::Done {
            waited = true;
            state = self.shared.apply_waiting(state, keep_waiting, event)?;
        }
        let (chunks, name) = match *event {
            Event::Enter { unit, .. } => {
                let unit = &state.scheduler.trace().units[unit as usize];
                (unit.chunks.clone(), unit.name.clone())
            }
            Event::Touch { chunk } => (vec![chunk], state.scheduler.layout().chunks[chunk.index()].name.clone()),
            _ => return Err(Error::Internal("only Enter and Touch make chunks readable".to_owned())),
        };
        let copying = |state: &State| chunks.iter().any(|&c| state.spill.as_ref().is_some_and(|spill| spill.fetches(c)));
        if copying(&state) {
            // Nobody can wait for the event of a copy that was not submitted yet.
            waited = true;
            drop(state);
            let outcome = self.shared.wait_until(self.shared.lock(), keep_waiting, |state| !copying(state));
            state = match outcome {
                Ok(state) => state,
                Err(error) => {
                    if let (Event::Enter { unit, phase }, Error::Interrupted) = (event, &error) {
                        let mut state = self.lock()?;
                        self.shared.apply(&mut state, &Event::Leave { unit: *unit, phase: *phase })?;
                    }
                    return Err(error);
                }
            };
        }
        let mut events = Vec::new();
        for chunk in chunks {
            if let Some(event) = state.written[chunk.index()].clone() {
                let done = event.is_done();
                if self.shared.or_stop(&mut state, done)? {
                    state.written[chunk.index()] = None;
                } else {
                    events.push(event);
                }
            }
        }
        if !events.is_empty() {
            // What is read is pinned, so the lock need not be held.
            drop(state);
            waited = true;
            let outcome = events.iter().try_for_each(|event| {
                if !self.shared.device.is_asynchronous() {
                    wait_for_event(event, keep_waiting)?;
                }
                self.shared.device.compute_wait(stream, event)
            });
            state = self.lock()?;
            if matches!(outcome, Err(Error::Interrupted)) {
                if let Event::Enter { unit, phase } = *event {
                    self.shared.apply(&mut state, &Event::Leave { unit, phase })?;
                }
                return Err(Error::Interrupted);
            }
            self.shared.or_stop(&mut state, outcome)?;
        }
        let after = if waited { self.shared.device.record_compute(stream)? } else { before.clone() };
        if waited {
            state.recorder.wait(&name, before, after.clone());
        }
        if let (Event::Enter { unit, phase }, true) = (event, state.recorder.enabled()) {
            state.open.insert((*unit, *phase == Phase::Backward), after);
        }
        Ok(state)
    }

    /// The unit's work is enqueued; gives its streamed chunks that nothing uses any more.
    pub fn leave(&self, unit: u32, phase: Phase, stream: ComputeStream) -> Result<Vec<ChunkId>> {
        let mut state = self.lock_started()?;
        state.release_event = Some(self.shared.device.record_compute(stream)?);
        let entered = state.open.remove(&(unit, phase == Phase::Backward));
        if let (Some(end), true) = (state.release_event.clone(), state.recorder.enabled()) {
            let direction = if phase == Phase::Forward { "forward" } else { "backward" };
            let name = state.scheduler.trace().units.get(unit as usize).map_or("", |u| u.name.as_str());
            let name = format!("{name} {direction}");
            state.recorder.between("compute", name, 0, entered, &end);
        }
        self.shared.apply(&mut state, &Event::Leave { unit, phase })?;
        let plan = state.scheduler.plan();
        Ok(state.scheduler.trace().units[unit as usize]
            .chunks
            .iter()
            .copied()
            .filter(|c| plan.chunks[c.index()].home.is_streamed() && !state.scheduler.is_entered(*c))
            .collect())
    }

    /// The model's outermost forward starts: forgets what an interrupted one left entered.
    pub fn forward_begin(&self, stream: ComputeStream) -> Result<()> {
        let mut state = self.lock_started()?;
        state.release_event = Some(self.shared.device.record_compute(stream)?);
        self.shared.apply(&mut state, &Event::ForwardBegin)?;
        Ok(())
    }

    /// Makes one chunk readable until the next boundary; gives its slot.
    pub fn touch(&self, chunk: ChunkId, stream: ComputeStream, keep_waiting: KeepWaiting<'_>) -> Result<u64> {
        let state = self.lock_started()?;
        if chunk.index() >= state.places.len() {
            return Err(unknown_chunk(chunk));
        }
        let state = self.make_readable(state, &Event::Touch { chunk }, stream, keep_waiting)?;
        // Its reads come after this call; the boundary that releases it records where the stream is then.
        state.scheduler.slot(chunk).ok_or_else(|| Error::Usage(format!("chunk {} is not streamed", chunk.0)))
    }

    /// How often a chunk's parameters were rewritten.
    pub fn generation(&self, chunk: ChunkId) -> Result<u64> {
        let state = self.lock()?;
        if chunk.index() >= state.places.len() {
            return Err(unknown_chunk(chunk));
        }
        Ok(state.scheduler.generation(chunk))
    }

    /// Hyperparameters for coming steps.
    pub fn set_hyper(&self, hyper: Hyper) -> Result<()> {
        let mut state = self.lock()?;
        if hyper.group_of_param.len() != state.param_steps.len() {
            return Err(Error::Usage(format!("{} group indices for {} parameters", hyper.group_of_param.len(), state.param_steps.len())));
        }
        if let Some(group) = hyper.group_of_param.iter().flatten().find(|g| **g >= hyper.groups.len()) {
            return Err(Error::Usage(format!("group {group} of {}", hyper.groups.len())));
        }
        if *state.hyper != hyper {
            state.hyper = Arc::new(hyper);
        }
        Ok(())
    }

    /// A backward pass starts. Waits only if the previous step is still undecided.
    pub fn backward_begin(&self, grad_scale: f64, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        let state = self.lock_started()?;
        let mut state = self.shared.apply_waiting(state, keep_waiting, &Event::BackwardBegin { grad_scale })?;
        state.speculation_hyper = state.hyper.clone();
        self.shared.read_ahead(&mut state)
    }

    /// Hands over gradients as (position in the chunk, address); gives a ticket.
    pub fn grads(&self, chunk: ChunkId, grads: &[(usize, u64)], stream: ComputeStream, keep_waiting: KeepWaiting<'_>) -> Result<u64> {
        let state = self.lock_started()?;
        self.shared.hand_over(state, chunk, grads, stream, keep_waiting)
    }

    /// Tickets whose gradients may be freed, each once.
    pub fn collect(&self) -> Result<Vec<u64>> {
        Ok(self.lock()?.gradients.collect())
    }

    /// A backward pass ended.
    pub fn backward_end(&self, stream: ComputeStream) -> Result<()> {
        let mut state = self.lock()?;
        state.release_event = Some(self.shared.device.record_compute(stream)?);
        state.open.clear();
        self.shared.apply(&mut state, &Event::BackwardEnd)?;
        for chunk in state.scheduler.stale_partials() {
            let outcome = self.shared.reduce_stale(&mut state, chunk);
            self.shared.or_stop(&mut state, outcome)?;
        }
        Ok(())
    }

    /// `optimizer.step()`. Waits only if the previous step is still undecided.
    pub fn commit(&self, grad_scale: f64, stream: ComputeStream, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        let state = self.lock_started()?;
        let mut state = self.shared.wait_until(state, keep_waiting, |state| !state.scheduler.is_undecided())?;
        state.gradients.check_hyper(state.scheduler.layout(), &state.hyper)?;
        let event = self.shared.device.record_compute(stream)?;
        state.commit_event = Some(event.clone());
        state.release_event = Some(event);
        state.commit_hyper = state.hyper.clone();
        let hyper_changed = state.speculation_hyper != state.hyper;
        self.shared.apply(&mut state, &Event::Commit { grad_scale, hyper_changed })?;
        Ok(())
    }

    /// Forgets gradients that were not committed.
    pub fn drop_grads(&self, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        let state = self.lock()?;
        if !state.started {
            return Ok(());
        }
        drop(self.shared.apply_waiting(state, keep_waiting, &Event::DropGrads)?);
        Ok(())
    }

    /// How the latest committed step was decided.
    pub fn decision(&self, wait: bool, keep_waiting: KeepWaiting<'_>) -> Result<Option<Decision>> {
        let mut state = self.lock()?;
        if wait {
            state = self.shared.wait_until(state, keep_waiting, |state| !state.scheduler.is_undecided())?;
        } else if state.scheduler.is_undecided() {
            return Ok(None);
        }
        Ok(state.decision)
    }

    /// Waits until the visible state equals that of a synchronous optimizer.
    pub fn flush(&self, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        let state = self.lock()?;
        let mut state = self.shared.wait_until(state, keep_waiting, |state| !state.scheduler.has_in_flight())?;
        let mut actions = Vec::new();
        state.scheduler.settle(&mut actions)?;
        let outcome = self.shared.execute(&mut state, &actions);
        self.shared.or_stop(&mut state, outcome)?;
        let settled = |state: &mut State| {
            let spilling = state.spill.as_ref().is_some_and(Spill::is_busy);
            !(state.scheduler.is_busy()
                || state.gradients.has_readers()
                || state.streaming.away() > 0
                || spilling
                || !state.late.is_empty())
        };
        let state = self.shared.wait_until(state, keep_waiting, settled)?;
        let events = Queue::ALL.map(|queue| self.shared.device.record(queue));
        drop(state);
        for event in events {
            match event.and_then(|event| wait_for_event(&event, keep_waiting)) {
                Err(Error::Interrupted) => return Err(Error::Interrupted),
                outcome => outcome.inspect_err(|error| self.shared.fail(error))?,
            }
        }
        self.shared.device.synchronize().inspect_err(|error| self.shared.fail(error))
    }
}
