//! The engine: drives a device from the scheduler's decisions.
//!
//! Callers' threads and workers take one lock, hand an event to the scheduler, and carry out its actions (which only enqueue) before they
//! give the lock back. So actions reach the device in the order of decisions. Waiting always happens without the lock.

mod activations;
mod inspect;
mod memory;
mod shared;
mod step;

pub use shared::{Shared, State};

use memory::take_places;

use crate::activations::Activations;
use crate::device::{Device, EventRef, WorkerId};
use crate::error::{Error, Result};
use crate::gradients::Gradients;
use crate::host_memory::HostSlab;
use crate::memory::{DevicePlaces, Regions, host_sizes};
use crate::record::Recorder;
use crate::streaming::Streaming;
use crate::workers::{Job, worker};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;
use tierwise_core::budget::Budget;
use tierwise_core::layout::Layout;
use tierwise_core::plan::{Plan, host_region_bytes};
use tierwise_core::scheduler::Scheduler;
use tierwise_core::slab::Guards;
use tierwise_core::trace::Trace;
use tierwise_core::{ChunkId, Tier};
use tierwise_kernels::{AdamHyper, Pool};

/// How long a caller sleeps between looks at its own interrupt flag.
const POLL: Duration = Duration::from_millis(50);

/// Asked while a caller waits; `false` makes the call return [`Error::Interrupted`].
pub type KeepWaiting<'a> = &'a mut dyn FnMut() -> bool;

/// Hyperparameters of every group, and the group of every parameter.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Hyper {
    /// Groups.
    pub groups: Vec<AdamHyper>,
    /// Group by global parameter index.
    pub group_of_param: Vec<Option<usize>>,
}

/// Limits and sizes of an engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineConfig {
    /// Hard limit of device bytes.
    pub device_budget: u64,
    /// Hard limit of pinned host bytes.
    pub host_budget: u64,
    /// Limit of the gradient norm.
    pub max_norm: Option<f64>,
    /// Threads of the CPU kernels.
    pub threads: Option<usize>,
    /// Host bytes kept for chunks that move there later.
    pub host_spare_bytes: u64,
}

/// The engine of one rank.
pub struct Engine {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    owner: u32,
}

impl Engine {
    /// Maps the host slab of a plan and starts the workers.
    pub fn new(layout: Layout, trace: Trace, plan: Plan, device: Arc<dyn Device>, config: EngineConfig) -> Result<Self> {
        if plan.chunks.len() != layout.chunks.len() || plan.activations.len() != trace.units.len() {
            return Err(Error::Usage(format!(
                "the plan is for {} chunks and {} units, the model has {} and {}",
                plan.chunks.len(),
                plan.activations.len(),
                layout.chunks.len(),
                trace.units.len()
            )));
        }
        let pool = Pool::try_new(config.threads).map_err(Error::Usage)?;
        let num_params: usize = layout.chunks.iter().map(|c| c.params.len()).sum();
        let norm_bytes = host_region_bytes(num_params as u64 * 8);
        let staging_bytes = host_region_bytes(plan.host.staging / 2);
        let chunk_bytes: u64 = layout
            .ids()
            .map(|c| host_sizes(&layout, &plan, c, plan.chunks[c.index()]).iter().map(|&b| host_region_bytes(b)).sum::<u64>())
            .sum();
        let activation_bytes = host_region_bytes(plan.host.activations);
        let total = chunk_bytes
            + 2 * staging_bytes
            + host_region_bytes(plan.undo_bytes)
            + activation_bytes
            + host_region_bytes(config.host_spare_bytes)
            + norm_bytes;
        let mut host_budget = Budget::new(Tier::Host, config.host_budget);
        // The norms of parameters are bookkeeping, not payload: they do not count.
        host_budget.reserve(total - norm_bytes, "the host slab")?;
        let slab = HostSlab::new(total as usize, Some(device.clone()), pool.threads())?;
        let mut regions = Regions::new(total);
        let norms = regions.take(norm_bytes)?;
        let staging = [regions.take(staging_bytes)?, regions.take(staging_bytes)?];
        let undo_base = regions.take(plan.undo_bytes)?;
        let activation_base = regions.take(activation_bytes)?;
        let host = slab.as_ptr() as u64;
        let mut places = Vec::with_capacity(layout.chunks.len());
        for chunk in layout.ids() {
            let sizes = host_sizes(&layout, &plan, chunk, plan.chunks[chunk.index()]);
            places.push((take_places(&mut regions, sizes)?, DevicePlaces::default()));
        }
        let gradients = Gradients::new(&layout, host + norms, staging.map(|s| host + s));
        let streaming = Streaming::new(layout.chunks.len(), plan.device.staging);
        let state = State {
            streaming,
            written: vec![None; layout.chunks.len()],
            param_steps: vec![0; num_params],
            scheduler: Scheduler::new(layout, trace, plan, config.max_norm),
            places,
            regions,
            undo_base: host + undo_base,
            undo_records: std::collections::BTreeMap::new(),
            slab_address: 0,
            guards: Guards::default(),
            commit_event: None,
            release_event: None,
            gradients,
            activations: Activations::new(host + activation_base, activation_bytes),
            hyper: Arc::default(),
            speculation_hyper: Arc::default(),
            commit_hyper: Arc::default(),
            decision: None,
            recorder: Recorder::default(),
            device_budget: Budget::new(Tier::Device, config.device_budget),
            host_budget,
            external: std::collections::BTreeMap::new(),
            failed: None,
            started: false,
            open: std::collections::BTreeMap::new(),
        };
        let (adam_jobs, start_adam) = worker(WorkerId::Adam, device.clock());
        let (landing_jobs, start_landing) = worker(WorkerId::Landing, device.clock());
        let (optimizer_jobs, start_optimizer) = worker(WorkerId::Optimizer, device.clock());
        let (states_jobs, start_states) = worker(WorkerId::States, device.clock());
        let shared = Arc::new(Shared {
            clock: device.clock(),
            device,
            pool,
            host,
            slab,
            adam_jobs,
            landing_jobs,
            optimizer_jobs,
            states_jobs,
            state: Mutex::new(state),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let workers = [start_adam, start_landing, start_optimizer, start_states];
        let workers = workers.into_iter().map(|worker| worker.start(shared.clone())).collect::<Result<_>>()?;
        Ok(Engine { shared, workers, owner: std::process::id() })
    }

    fn lock(&self) -> Result<MutexGuard<'_, State>> {
        let child = std::process::id();
        if child != self.owner {
            return Err(Error::Forked { owner: self.owner, child });
        }
        let state = self.shared.lock();
        Shared::healthy(&state)?;
        Ok(state)
    }

    /// The lock for calls that move things: all memory has to be there.
    fn lock_started(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.lock()?;
        if state.started { Ok(state) } else { Err(Error::Usage("start() was not called".to_owned())) }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if std::process::id() != self.owner {
            // The workers live in the parent; their handles mean nothing here.
            std::mem::take(&mut self.workers).into_iter().for_each(std::mem::forget);
            return;
        }
        self.shared.stop.store(true, Ordering::Release);
        // Copies read and write memory that is about to be freed.
        let _ = self.shared.device.synchronize();
        for jobs in [&self.shared.adam_jobs, &self.shared.landing_jobs, &self.shared.optimizer_jobs, &self.shared.states_jobs] {
            let _ = jobs.send(Job::last());
        }
        for worker in std::mem::take(&mut self.workers) {
            let _ = worker.join();
        }
        // What a worker was in the middle of may have started another copy.
        let _ = self.shared.device.synchronize();
    }
}

/// Waits for an event, looking at the caller's interrupt flag in between.
fn wait_for_event(event: &EventRef, keep_waiting: KeepWaiting<'_>) -> Result<()> {
    while !event.synchronize_for(POLL)? {
        if !keep_waiting() {
            return Err(Error::Interrupted);
        }
    }
    Ok(())
}

fn unknown_chunk(chunk: ChunkId) -> Error {
    Error::Usage(format!("chunk {} does not exist", chunk.0))
}
