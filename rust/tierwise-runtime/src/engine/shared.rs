//! What the engine's callers and workers share, and how they wait for each other.

use super::{Hyper, KeepWaiting, POLL};
use crate::activations::Activations;
use crate::device::{Clock, Device, EventRef};
use crate::error::{Error, Result};
use crate::gradients::Gradients;
use crate::host_memory::HostSlab;
use crate::late::Late;
use crate::memory::{DevicePlaces, HostPlaces, Regions};
use crate::record::Recorder;
use crate::spill::Spill;
use crate::streaming::Streaming;
use crate::workers::Worker;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use tierwise_core::ChunkId;
use tierwise_core::budget::Budget;
use tierwise_core::scheduler::{Decision, Event, Progress, Scheduler};
use tierwise_core::slab::Guards;
use tierwise_io::{Direction, Key, Priority};
use tierwise_kernels::Pool;
use tierwise_kernels::convert::Copied;

/// What several threads share.
pub struct Shared {
    pub(crate) state: Mutex<State>,
    pub(crate) device: Arc<dyn Device>,
    pub(super) clock: Option<Arc<dyn Clock>>,
    pub(crate) pool: Pool,
    /// Address of the host slab.
    pub(crate) host: u64,
    pub(crate) slab: HostSlab,
    pub(crate) adam_jobs: Worker,
    /// Steps of spilled chunks, which wait for the disk.
    pub(crate) spill_jobs: Worker,
    /// Waits for reads, and for writes.
    pub(crate) disk_jobs: [Worker; 2],
    /// Waits for fetched parameters to be read, and to be on the device.
    pub(crate) fetch_jobs: [Worker; 2],
    pub(crate) landed_jobs: Worker,
    pub(crate) landing_jobs: Worker,
    pub(crate) optimizer_jobs: Worker,
    pub(crate) states_jobs: Worker,
    pub(crate) changed: Condvar,
    pub(super) stop: AtomicBool,
}

/// What the lock protects.
pub struct State {
    pub(crate) scheduler: Scheduler,
    pub(crate) places: Vec<(HostPlaces, DevicePlaces)>,
    pub(crate) regions: Regions,
    pub(crate) undo_base: u64,
    /// What undoes a chunk's step, of every chunk whose step may have to be undone.
    pub(crate) undo_records: std::collections::BTreeMap<ChunkId, Vec<Copied>>,
    /// Moments that host steps left, and what waits for them.
    pub(crate) late: Late,
    pub(crate) slab_address: u64,
    pub(crate) streaming: Streaming,
    /// Latest event after which a chunk's device parameters are the current generation.
    pub(crate) written: Vec<Option<EventRef>>,
    /// Ranges of the slab whose last readers are this event.
    pub(crate) guards: Guards<EventRef>,
    /// Where the compute stream was at the latest commit: everything that read the old generation is before it.
    pub(crate) commit_event: Option<EventRef>,
    /// Where the compute stream was when the latest unit was left.
    pub(crate) release_event: Option<EventRef>,
    pub(crate) gradients: Gradients,
    pub(crate) activations: Activations,
    pub(crate) hyper: Arc<Hyper>,
    pub(crate) speculation_hyper: Arc<Hyper>,
    pub(crate) commit_hyper: Arc<Hyper>,
    pub(crate) param_steps: Vec<u64>,
    pub(crate) decision: Option<Decision>,
    pub(crate) recorder: Recorder,
    pub(crate) device_budget: Budget,
    pub(crate) host_budget: Budget,
    pub(crate) spill: Option<Spill>,
    pub(super) external: std::collections::BTreeMap<String, u64>,
    pub(super) failed: Option<Error>,
    pub(super) started: bool,
    /// Where the compute stream was when each open unit was entered (only while recording).
    pub(super) open: std::collections::BTreeMap<(u32, bool), EventRef>,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // A poisoned lock means that a holder panicked; `fail` has or will have stopped the engine.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Stops the engine with an error; everybody who waits gets it.
    pub(crate) fn fail(&self, error: &Error) {
        self.stop_with(&mut self.lock(), error);
    }

    /// Passes on the outcome of work that must not be left half done: its error stops the engine.
    pub(crate) fn or_stop<T>(&self, state: &mut State, outcome: Result<T>) -> Result<T> {
        outcome.inspect_err(|error| self.stop_with(state, error))
    }

    fn stop_with(&self, state: &mut State, error: &Error) {
        if state.failed.is_none() {
            state.failed = Some(match error.clone() {
                stopped @ (Error::Stopped(_) | Error::StoppedByDisk { .. }) => stopped,
                Error::Storage { what, path, source } => Error::StoppedByDisk { what, path, source },
                other => Error::Stopped(other.to_string()),
            });
        }
        self.notify();
    }

    /// A worker is about to move so many bytes through host memory.
    pub(crate) fn host_work(&self, bytes: impl FnOnce() -> u64) {
        if let Some(clock) = &self.clock {
            clock.host_work(bytes());
        }
    }

    /// When a transfer that the disk gets now will have ended, where a clock says so.
    pub(crate) fn disk_work(&self, key: Key, direction: Direction, bytes: u64, priority: Priority) -> Option<EventRef> {
        self.clock.as_ref().map(|clock| clock.disk(key, direction, bytes, priority))
    }

    pub(crate) fn notify(&self) {
        if let Some(clock) = &self.clock {
            clock.news();
        }
        self.changed.notify_all();
    }

    /// A worker waits for a change, or a moment.
    pub(crate) fn wait_for_news<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        if let Some(clock) = &self.clock {
            clock.parks();
        }
        let waited = self.changed.wait_timeout(state, POLL);
        waited.unwrap_or_else(std::sync::PoisonError::into_inner).0
    }

    /// Hands an event to the scheduler and carries out its actions.
    pub(crate) fn apply(&self, state: &mut State, event: &Event) -> Result<Progress> {
        let mut actions = Vec::new();
        let progress = state.scheduler.step(event, &mut actions);
        // Even a refused event may have freed something before.
        let outcome = self.execute(state, &actions);
        self.or_stop(state, outcome)?;
        if !actions.is_empty() {
            self.notify();
        }
        Ok(progress?)
    }

    /// Hands over a completion from a worker.
    pub(crate) fn post(&self, event: &Event) -> Result<()> {
        let mut state = self.lock();
        self.apply(&mut state, event)?;
        drop(state);
        self.notify();
        Ok(())
    }

    pub(crate) fn healthy(state: &State) -> Result<()> {
        state.failed.clone().map_or(Ok(()), Err)
    }

    /// Waits until `ready` gives something.
    pub(crate) fn wait_for<'a, T>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        keep_waiting: KeepWaiting<'_>,
        mut ready: impl FnMut(&Self, &mut State) -> Result<Option<T>>,
    ) -> Result<(MutexGuard<'a, State>, T)> {
        loop {
            Self::healthy(&state)?;
            if let Some(value) = ready(self, &mut state)? {
                return Ok((state, value));
            }
            if let Some(clock) = &self.clock {
                drop(state);
                clock.pass()?;
                state = self.lock();
                continue;
            }
            let (guard, timeout) = self.changed.wait_timeout(state, POLL).unwrap_or_else(std::sync::PoisonError::into_inner);
            state = guard;
            if timeout.timed_out() {
                drop(state);
                if !keep_waiting() {
                    return Err(Error::Interrupted);
                }
                state = self.lock();
            }
        }
    }

    /// Hands over an event, repeating it until it takes effect.
    pub(crate) fn apply_waiting<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        keep_waiting: KeepWaiting<'_>,
        event: &Event,
    ) -> Result<MutexGuard<'a, State>> {
        let (state, ()) = self.wait_for(state, keep_waiting, |shared, state| {
            Ok(match shared.apply(state, event)? {
                Progress::Done => Some(()),
                Progress::Blocked { .. } => None,
            })
        })?;
        Ok(state)
    }

    pub(crate) fn wait_until<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        keep_waiting: KeepWaiting<'_>,
        mut ready: impl FnMut(&mut State) -> bool,
    ) -> Result<MutexGuard<'a, State>> {
        Ok(self.wait_for(state, keep_waiting, |_, state| Ok(ready(state).then_some(())))?.0)
    }
}
