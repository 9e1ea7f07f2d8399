//! Spilled states: the spill file, its staging buffers, and the transfers between them that the core's staging machine asks for.
//!
//! A piece is one buffer, one read and one write: `[param,] master, exp_avg, exp_avg_sq` of its elements, one after the other. Parameters
//! that are fetched before each use are read without their states, so they are an extent of their own: two reads and two writes. So are
//! gradients, which come from elsewhere (see `grads`). Parameters of a frozen chunk have no states: they are written when they are set, and
//! no step ever takes them.

pub mod access;
mod fetch;
mod grads;
mod step;
pub(crate) mod sums;

use crate::device::EventRef;
use crate::engine::{Shared, State};
use crate::error::{Error, Result};
use crate::memory::StepBases;
use crate::workers::Job;
use fetch::Fetches;
use grads::Grads;
use std::path::Path;
use tierwise_core::ChunkId;
use tierwise_core::budget::Budget;
use tierwise_core::layout::Layout;
use tierwise_core::plan::{NvmePlan, OptimizerClass, ParamHome, Plan};
use tierwise_core::staging::{Piece, PieceId, Pieces, Staging, Transfer};
use tierwise_core::trace::Trace;
use tierwise_io::buffer::Buffer;
use tierwise_io::error::{Error as DiskError, Result as DiskResult};
use tierwise_io::store::{Slab, Store, StoreConfig};
use tierwise_io::ticket::Ticket;
use tierwise_io::{Direction, Key, Priority};

/// Opens the spill file of a plan in a directory; `staging` is the memory that transfers use.
pub fn open(directory: &Path, plan: &NvmePlan, staging: Slab) -> Result<Store> {
    let config =
        StoreConfig { block_bytes: plan.block_bytes as usize, slabs: vec![staging], ..StoreConfig::new(directory, plan.file_bytes) };
    Store::open(config).map_err(|source| {
        let what = format!("nvme_path `{}`", directory.display());
        Error::Storage { what, path: Some(directory.to_owned()), source: Box::new(source) }
    })
}

/// What the engine knows of its spilled states.
pub struct Spill {
    fetches: Fetches,
    grads: Grads,
    pieces: Pieces,
    staging: Staging,
    store: Option<Store>,
    /// Address of the first staging buffer.
    base: u64,
    plan: NvmePlan,
    /// Bytes per element of the payloads, in their order: parameter, master, first and second moment. Per chunk, the parameter's may be 0.
    elements: Vec<[u64; 4]>,
    budget: Budget,
    /// Per buffer: the copy to the device that reads it.
    copied: Vec<Option<EventRef>>,
    /// Whether a caller reads or changes states by name.
    accessing: bool,
    /// When the latest transfer of each direction ended, and the latest fetch, so that spans of a track do not overlap.
    last_end_ns: [u64; 3],
    /// Nanoseconds that steps waited for a piece.
    waited_ns: u64,
}

/// Payloads of a piece by name, in their order.
pub const PAYLOADS: [&str; 4] = ["param", "master", "exp_avg", "exp_avg_sq"];

impl Spill {
    /// Nothing spilled yet: every piece reads as zeros until it is written.
    pub fn new(layout: &Layout, trace: &Trace, plan: &Plan, nvme: NvmePlan, store: Store, base: u64, budget: Budget) -> Result<Spill> {
        let fetched: Vec<bool> = plan.chunks.iter().map(|placed| placed.home == ParamHome::Fetched).collect();
        let param_bytes = nvme.piece_numel * layout.precision.param_bytes();
        if fetched.contains(&true) && !param_bytes.is_multiple_of(store.alignment() as u64) {
            return Err(Error::Usage(format!(
                "the disk asks for addresses that are multiples of {}, which the {param_bytes} bytes of a piece's parameters are not",
                store.alignment()
            )));
        }
        let pieces = Pieces::new(layout, trace, plan);
        let grads = Grads::new(layout, plan, nvme, pieces.len(), base + nvme.staging_bytes(), store.alignment() as u64)?;
        let precision = layout.precision;
        let elements = plan
            .chunks
            .iter()
            .map(|placed| {
                let param = if placed.home.is_spilled() { precision.param_bytes() } else { 0 };
                if placed.class == OptimizerClass::Frozen { [param, 0, 0, 0] } else { [param, precision.master_bytes(), 4, 4] }
            })
            .collect();
        Ok(Spill {
            fetches: Fetches::new(fetched, base + u64::from(nvme.buffers) * nvme.buffer_bytes, nvme),
            staging: Staging::new(pieces.len(), pieces.stepped(), nvme.buffers),
            pieces,
            grads,
            store: Some(store),
            base,
            plan: nvme,
            elements,
            budget,
            copied: vec![None; nvme.buffers as usize],
            accessing: false,
            last_end_ns: [0; 3],
            waited_ns: 0,
        })
    }

    /// Whether parameters of a chunk are on their way from the disk into the slab, and their last copy is not submitted yet.
    pub fn fetches(&self, chunk: ChunkId) -> bool {
        self.fetches.fetching.is_pending(chunk)
    }

    /// Whether something is being stepped, accessed or written.
    pub fn is_busy(&self) -> bool {
        self.accessing || self.staging.is_busy() || self.fetches.fetching.is_busy() || self.grads.is_busy()
    }

    /// Whether a gradient of a chunk, or its sum, is on its way to the disk.
    pub fn lands(&self, chunk: ChunkId) -> bool {
        self.grads.lands(chunk)
    }

    /// A gradient of a chunk was handed over that goes to the disk.
    pub(crate) fn set_landing(&mut self, chunk: ChunkId) {
        self.grads.set_landing(chunk, true);
    }

    /// Takes the store out, to be dropped.
    pub fn close(&mut self) -> Option<Store> {
        self.store.take()
    }

    /// Adds counters to the engine's.
    pub fn describe(&self, value: &mut serde_json::Value) -> Result<()> {
        let Some(store) = &self.store else { return Ok(()) };
        let metrics = store.metrics().map_err(|source| Error::Storage {
            what: "the spill file".to_owned(),
            path: store.setup().directory.clone(),
            source: Box::new(source),
        })?;
        value["nvme_bytes"] = metrics.used_bytes.into();
        value["nvme_file_bytes"] = self.budget.used().into();
        value["nvme_budget_bytes"] = self.budget.limit().into();
        value["nvme_read_bytes"] = metrics.read.bytes.into();
        value["nvme_written_bytes"] = metrics.write.bytes.into();
        value["nvme_read_ns"] = metrics.read.in_flight_ns.into();
        value["nvme_write_ns"] = metrics.write.in_flight_ns.into();
        value["nvme_busy_ns"] = metrics.busy_ns.into();
        value["nvme_transfer_ns"] = (metrics.read.transfer_ns + metrics.write.transfer_ns).into();
        value["nvme_wait_ns"] = self.waited_ns.into();
        value["nvme_retries"] = (metrics.retries + metrics.rereads + metrics.short_transfers).into();
        value["nvme_payload_bytes"] = self.plan.payload_bytes.into();
        value["nvme_staging_bytes"] = self.plan.staging_bytes().into();
        value["nvme_fetched_bytes"] = self.fetches.bytes().into();
        value["nvme_grad_bytes"] = self.grads.bytes().into();
        value["nvme_buffers"] = serde_json::to_value(self.staging.buffers()).unwrap_or_default();
        value["nvme"] = serde_json::to_value(store.setup()).unwrap_or_default();
        Ok(())
    }

    fn address(&self, buffer: u32) -> u64 {
        self.base + u64::from(buffer) * self.plan.buffer_bytes
    }

    /// Address of a payload of a piece in its buffer; bytes per element.
    fn payload(&self, piece: Piece, buffer: u32, payload: usize) -> (u64, u64) {
        let elements = self.elements[piece.chunk.index()];
        let before: u64 = elements[..payload].iter().sum();
        let mut offset = before * piece.numel;
        if self.fetches.of(piece.chunk) && payload > 0 {
            // States start where those of a whole piece do, which is aligned for a transfer of their own.
            offset += (self.plan.piece_numel - piece.numel) * elements[0];
        }
        (self.address(buffer) + offset, elements[payload])
    }

    /// What is transferred for a piece: (name on the disk, address, bytes) of each extent.
    fn extents(&self, id: PieceId, buffer: u32) -> Vec<(Key, u64, u64)> {
        let piece = self.pieces.get(id);
        let key = self.key(id);
        if !self.fetches.of(piece.chunk) {
            return vec![(key, self.address(buffer), piece.bytes)];
        }
        let (param, element) = self.payload(piece, buffer, 0);
        let bytes = piece.numel * element;
        let mut extents = vec![(param_key(key), param, bytes)];
        if piece.bytes > bytes {
            extents.push((key, self.payload(piece, buffer, 1).0, piece.bytes - bytes));
        }
        extents
    }

    /// Bases of the payloads in a buffer, as if all of the chunk were there; `param` is its base elsewhere, where it is not spilled.
    fn bases(&self, piece: Piece, buffer: u32, param: u64) -> StepBases {
        let base = |payload: usize| {
            let (address, bytes) = self.payload(piece, buffer, payload);
            address.wrapping_sub(piece.first * bytes)
        };
        let spilled = self.elements[piece.chunk.index()][0] > 0;
        StepBases { param: if spilled { base(0) } else { param }, master: base(1), exp_avg: base(2), exp_avg_sq: base(3) }
    }

    /// The piece's name on the disk.
    fn key(&self, piece: PieceId) -> Key {
        let chunk = self.pieces.get(piece).chunk;
        let first = self.pieces.of_chunk(chunk).next().map_or(0, |first| first.0);
        Key { chunk: chunk.0, payload: piece.0 - first }
    }
}

/// The name on the disk of a piece's parameters, where they are an extent of their own.
fn param_key(key: Key) -> Key {
    Key { payload: key.payload | 1 << 31, ..key }
}

/// A piece for people.
fn piece_name(state: &State, piece: Piece) -> String {
    let name = &state.scheduler.layout().chunks[piece.chunk.index()].name;
    let placed = state.scheduler.plan().chunks[piece.chunk.index()];
    let payloads = match (placed.class, placed.home.is_spilled()) {
        (OptimizerClass::Frozen, _) => "param",
        (_, true) => "param, master, exp_avg, exp_avg_sq",
        (_, false) => "master, exp_avg, exp_avg_sq",
    };
    format!("spilled {payloads} of `{name}`, elements {} to {}", piece.first, piece.first + piece.numel)
}

impl Shared {
    /// Starts to read what the first steps need.
    pub(crate) fn read_ahead(&self, state: &mut State) -> Result<()> {
        let Some(spill) = &mut state.spill else { return Ok(()) };
        let mut transfers = Vec::new();
        spill.staging.fill(&mut transfers);
        self.transfer(state, &transfers)
    }

    /// Starts transfers in their order.
    pub(crate) fn transfer(&self, state: &mut State, transfers: &[Transfer]) -> Result<()> {
        for transfer in transfers {
            let outcome = match *transfer {
                Transfer::Read { piece, buffer, generation } => self.submit(state, Direction::Read, piece, buffer, generation),
                Transfer::Write { piece, buffer, generation } => self.submit(state, Direction::Write, piece, buffer, generation),
                Transfer::Zero { piece, buffer } => {
                    let spill = spill(state)?;
                    for (_, address, bytes) in spill.extents(piece, buffer) {
                        // SAFETY: the buffer is in the slab that `self` keeps alive, and the staging machine has just given it to this piece.
                        unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes as usize) };
                    }
                    Ok(())
                }
            };
            self.or_stop(state, outcome)?;
        }
        if !transfers.is_empty() {
            self.notify();
        }
        Ok(())
    }

    fn submit(&self, state: &mut State, direction: Direction, id: PieceId, buffer: u32, generation: u64) -> Result<()> {
        let spill = spill(state)?;
        let piece = spill.pieces.get(id);
        let copied = spill.copied[buffer as usize].take();
        let Some(store) = &spill.store else { return Err(Error::Stopped("the spill file is closed".to_owned())) };
        let mut tickets = Vec::new();
        let mut outcome = Ok(());
        let mut ends = None;
        for (key, address, bytes) in spill.extents(id, buffer) {
            ends = self.disk_work(key, direction, bytes, Priority::Soon);
            // SAFETY: the store is closed before the slab is freed, and the staging machine leaves the buffer to this transfer until it is
            // told of its end.
            let mut bytes = unsafe { Buffer::new(address as *mut u8, bytes as usize) };
            let ticket = match direction {
                Direction::Read => store.read(key, generation, &mut bytes, Priority::Soon),
                Direction::Write => store.write(key, generation, &bytes, Priority::Soon),
            };
            match ticket {
                Ok(ticket) => tickets.push(ticket),
                Err(error) => outcome = Err(error),
            }
        }
        let path = store.setup().directory.clone();
        let what = piece_name(state, piece);
        outcome.map_err(|source| Error::Storage { what: what.clone(), path: path.clone(), source: Box::new(source) })?;
        let submitted = self.device.now_ns();
        // A buffer that is written may also be on its way to the device; it is reused after both.
        self.disk_jobs[direction as usize].send(Job::new(copied, move |shared| {
            tickets.iter().try_for_each(Ticket::wait).map_err(|source| Error::Storage { what, path, source: Box::new(source) })?;
            await_clock(ends.as_ref())?;
            shared.transferred(direction, buffer, piece, submitted)
        }))
    }

    fn transferred(&self, direction: Direction, buffer: u32, piece: Piece, submitted: u64) -> Result<()> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut transfers = Vec::new();
        match direction {
            Direction::Read => spill(state)?.staging.was_read(buffer, &mut transfers)?,
            Direction::Write => spill(state)?.staging.was_written(buffer, &mut transfers)?,
        }
        let name = format!("{} {}", if direction == Direction::Read { "read" } else { "write" }, chunk_name(state, piece.chunk));
        self.note(state, direction, name, piece.bytes, submitted)?;
        self.transfer(state, &transfers)?;
        drop(guard);
        self.notify();
        Ok(())
    }

    /// Waits for what the disk was asked for. A read may find that the write of what it wants has failed before whoever waits for that write
    /// was told: that one says why, and the read says what it found only if nobody does. Not for reads by the worker that waits for writes,
    /// which would wait for itself.
    fn await_disk(&self, asked: &DiskResult<Ticket>, failed: impl FnOnce(DiskError) -> Error) -> Result<()> {
        let error = match asked.as_ref().map_err(DiskError::clone).and_then(Ticket::wait) {
            Ok(()) => return Ok(()),
            Err(source @ DiskError::NotStored { .. }) => failed(source),
            Err(source) => return Err(failed(source)),
        };
        // The write was submitted before, so its worker gets to it first.
        self.disk_jobs[Direction::Write as usize].send(Job::new(None, move |_| Err(error)))?;
        let mut state = self.lock();
        loop {
            Shared::healthy(&state)?;
            if self.stopping() {
                return Err(Error::Stopped("the engine is being dropped".to_owned()));
            }
            state = self.wait_for_news(state);
        }
    }

    /// A transfer that was submitted then has ended now.
    fn note(&self, state: &mut State, direction: Direction, name: String, bytes: u64, submitted: u64) -> Result<()> {
        let end = self.device.now_ns();
        let spill = spill(state)?;
        let start = spill.last_end_ns[direction as usize].max(submitted);
        spill.last_end_ns[direction as usize] = end;
        if state.recorder.enabled() {
            let track = if direction == Direction::Read { "nvme read" } else { "nvme write" };
            state.recorder.span(track, name, bytes, start, end);
            let used = state.spill.as_ref().and_then(|s| s.store.as_ref()).and_then(|s| s.metrics().ok()).map_or(0, |m| m.used_bytes);
            state.recorder.sample("nvme bytes", end, used);
        }
        Ok(())
    }
}

/// What ends when a clock says so, and not only with its ticket.
fn await_clock(ends: Option<&EventRef>) -> Result<()> {
    ends.map_or(Ok(()), |ends| ends.synchronize())
}

fn chunk_name(state: &State, chunk: ChunkId) -> &str {
    &state.scheduler.layout().chunks[chunk.index()].name
}

fn spill(state: &mut State) -> Result<&mut Spill> {
    state.spill.as_mut().ok_or_else(|| Error::Internal("nothing is spilled".to_owned()))
}
