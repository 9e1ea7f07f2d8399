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
use crate::late::Late;
use crate::memory::{DevicePlaces, Regions, host_sizes};
use crate::record::Recorder;
use crate::spill::{self, Spill};
use crate::streaming::Streaming;
use crate::workers::{Job, worker};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;
use tierwise_core::budget::Budget;
use tierwise_core::layout::Layout;
use tierwise_core::plan::{ChunkPlan, LANDING_BUFFERS, NvmePlan, Plan, host_region_bytes};
use tierwise_core::scheduler::Scheduler;
use tierwise_core::slab::Guards;
use tierwise_core::trace::Trace;
use tierwise_core::{ChunkId, Tier};
use tierwise_io::store::{Slab, Store};
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
#[derive(Debug, Clone, Default)]
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
    /// Directory of the spill file, where the plan spills.
    pub nvme_path: Option<PathBuf>,
    /// Hard limit of the spill file's bytes.
    pub nvme_budget: u64,
}

/// The engine of one rank.
pub struct Engine {
    pub(crate) shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    owner: u32,
}

impl Engine {
    /// Maps the host slab of a plan, opens its spill file and starts the workers.
    pub fn new(layout: Layout, trace: Trace, plan: Plan, device: Arc<dyn Device>, config: &EngineConfig) -> Result<Self> {
        let path = config.nvme_path.clone();
        Self::with_store(layout, trace, plan, device, config, |nvme, staging| {
            let Some(path) = path else {
                return Err(Error::Usage("the plan spills states, but no nvme_path was given".to_owned()));
            };
            spill::open(&path, nvme, staging)
        })
    }

    /// An engine whose spill file the caller opens, given the plan and the memory to register: for tests over disks that fail.
    pub fn with_store(
        layout: Layout,
        trace: Trace,
        plan: Plan,
        device: Arc<dyn Device>,
        config: &EngineConfig,
        open: impl FnOnce(&NvmePlan, Slab) -> Result<Store>,
    ) -> Result<Self> {
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
        let landing_buffers = u64::from(plan.landing_buffers);
        if plan.landing_buffers < LANDING_BUFFERS {
            return Err(Error::Usage(format!(
                "landing_buffers is {landing_buffers}; a gradient lands while another is added: at least {LANDING_BUFFERS}"
            )));
        }
        let staging_bytes = host_region_bytes(plan.host.staging / landing_buffers);
        let chunk_bytes: u64 = layout
            .ids()
            .map(|c| host_sizes(&layout, &plan, c, plan.chunks[c.index()]).iter().map(|&b| host_region_bytes(b)).sum::<u64>())
            .sum();
        let activation_bytes = host_region_bytes(plan.host.activations);
        let spilled_bytes = plan.nvme.map_or(0, |nvme| nvme.staging_bytes());
        let total = spilled_bytes
            + chunk_bytes
            + landing_buffers * staging_bytes
            + host_region_bytes(plan.undo_bytes)
            + activation_bytes
            + host_region_bytes(config.host_spare_bytes)
            + norm_bytes;
        let mut host_budget = Budget::new(Tier::Host, config.host_budget);
        // The norms of parameters are bookkeeping, not payload: they do not count.
        host_budget.reserve(total - norm_bytes, "the host slab")?;
        let slab = HostSlab::new(total as usize, Some(device.clone()), pool.threads())?;
        let mut regions = Regions::new(total);
        // First, at the slab's own alignment: the disk may ask for more than a region has.
        let spill_base = regions.take(spilled_bytes)?;
        // Right behind it: gradients may go on to the disk from where they land.
        let staging = (0..landing_buffers).map(|_| regions.take(staging_bytes)).collect::<Result<Vec<u64>>>()?;
        let norms = regions.take(norm_bytes)?;
        let undo_base = regions.take(plan.undo_bytes)?;
        let activation_base = regions.take(activation_bytes)?;
        let host = slab.as_ptr() as u64;
        let mut places = Vec::with_capacity(layout.chunks.len());
        for chunk in layout.ids() {
            let sizes = host_sizes(&layout, &plan, chunk, plan.chunks[chunk.index()]);
            places.push((take_places(&mut regions, sizes)?, DevicePlaces::default()));
        }
        let mut nvme_budget = Budget::new(Tier::Nvme, config.nvme_budget);
        let spill = match plan.nvme {
            None => None,
            Some(nvme) => {
                nvme_budget.reserve(nvme.file_bytes, "the spill file")?;
                let landing_bytes = if plan.chunks.iter().any(ChunkPlan::spills_grads) { landing_buffers * staging_bytes } else { 0 };
                // SAFETY: the store is dropped before the slab: by the engine, at the latest with `Shared`, whose state comes first.
                let staging = unsafe { Slab::new((host + spill_base) as *mut u8, (spilled_bytes + landing_bytes) as usize) };
                let store = open(&nvme, staging)?;
                Some(Spill::new(&layout, &trace, &plan, nvme, store, host + spill_base, nvme_budget)?)
            }
        };
        let gradients = Gradients::new(&layout, host + norms, staging.into_iter().map(|s| host + s).collect());
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
            late: Late::default(),
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
            spill,
            external: std::collections::BTreeMap::new(),
            failed: None,
            started: false,
            open: std::collections::BTreeMap::new(),
        };
        let (adam_jobs, start_adam) = worker(WorkerId::Adam, device.clock());
        let (landed_jobs, start_landed) = worker(WorkerId::Landed, device.clock());
        let (landing_jobs, start_landing) = worker(WorkerId::Landing, device.clock());
        let (optimizer_jobs, start_optimizer) = worker(WorkerId::Optimizer, device.clock());
        let (states_jobs, start_states) = worker(WorkerId::States, device.clock());
        let (spill_jobs, start_spill) = worker(WorkerId::Spill, device.clock());
        let (read_jobs, start_reads) = worker(WorkerId::Reads, device.clock());
        let (write_jobs, start_writes) = worker(WorkerId::Writes, device.clock());
        let (fetch_jobs, start_fetches) = worker(WorkerId::Fetches, device.clock());
        let (fetched_jobs, start_fetched) = worker(WorkerId::Fetched, device.clock());
        let spills = state.spill.is_some();
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            clock: device.clock(),
            device,
            pool,
            host,
            slab,
            adam_jobs,
            spill_jobs,
            disk_jobs: [read_jobs, write_jobs],
            fetch_jobs: [fetch_jobs, fetched_jobs],
            landed_jobs,
            landing_jobs,
            optimizer_jobs,
            states_jobs,
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let mut wanted = vec![start_adam, start_landed, start_landing, start_optimizer, start_states];
        if spills {
            wanted.extend([start_spill, start_reads, start_writes, start_fetches, start_fetched]);
        }
        let workers = wanted.into_iter().map(|worker| worker.start(shared.clone())).collect::<Result<Vec<_>>>()?;
        Ok(Engine { shared, workers, owner: std::process::id() })
    }

    pub(crate) fn lock(&self) -> Result<MutexGuard<'_, State>> {
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
        let shared = &self.shared;
        let ([reads, writes], [fetches, fetched]) = (&shared.disk_jobs, &shared.fetch_jobs);
        let device_jobs = [&shared.adam_jobs, &shared.landed_jobs, &shared.landing_jobs, &shared.optimizer_jobs, &shared.states_jobs];
        for jobs in device_jobs.into_iter().chain([&shared.spill_jobs, reads, writes, fetches, fetched]) {
            let _ = jobs.send(Job::last());
        }
        shared.notify();
        for worker in std::mem::take(&mut self.workers) {
            let _ = worker.join();
        }
        // Cancels what the disk has, and waits until it has let go of the staging buffers.
        let store = self.shared.lock().spill.as_mut().and_then(Spill::close);
        drop(store);
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
