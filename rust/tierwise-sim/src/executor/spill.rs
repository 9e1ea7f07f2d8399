//! Spilled states in virtual time: the core's staging machine with lanes instead of a disk; the counterpart of the runtime's `spill`.

mod fetch;
mod sums;

use super::machine::{Lane, Task, Token};
use super::stalls::Cause;
use super::{Effect, Run, Setup, SimError};
use std::collections::{BTreeMap, VecDeque};
use sums::Adding;
use tierwise_core::budget::Budget;
use tierwise_core::fetching::{FetchRequest, Fetching};
use tierwise_core::grad_buffers::{GradBuffers, GradRead};
use tierwise_core::plan::ParamHome;
use tierwise_core::scheduler::Event;
use tierwise_core::staging::{Piece, PieceId, Pieces, Staging, Transfer};
use tierwise_core::{ChunkId, Tier};

/// A step that takes pieces as they come.
struct Step {
    chunk: ChunkId,
    left: usize,
    /// A copy that may still read the parameters that are about to be rewritten.
    waits: Vec<Token>,
}

/// What of a piece is an extent of its own on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Extent {
    /// States, and parameters where they are not read alone.
    States,
    /// Parameters that are fetched.
    Params,
    /// A gradient or its sum.
    Gradient,
}

/// What is spilled, and where it is on its way.
pub(super) struct Spilled {
    pieces: Pieces,
    staging: Staging,
    steps: VecDeque<Step>,
    /// The piece and its buffer that a step has taken, while it waits for the gradient.
    taken: Option<(PieceId, u32)>,
    /// The piece that is being stepped, and the buffer of its gradient, if that is spilled.
    stepping: Option<(PieceId, Option<u32>)>,
    grads: GradBuffers,
    /// Per chunk: whether what was handed over last is not all on the disk yet.
    landing: Vec<bool>,
    /// A sum on the disk that is being added to.
    adding: Option<Adding>,
    fetching: Fetching,
    /// The worker that waits for fetched parameters: the reads, in the order in which they were asked for.
    fetches: VecDeque<(Token, FetchRequest, PieceId, u32)>,
    /// The latest write of every extent, which its reads come after.
    written: BTreeMap<(PieceId, Extent), Token>,
    /// The worker that waits for writes: what each means, in the order in which it was told of them.
    writes: VecDeque<(Vec<Token>, Vec<Effect>)>,
    /// Per buffer: the copy to the device that reads it.
    copied: Vec<Option<Token>>,
}

impl Spilled {
    pub fn new(setup: &Setup) -> Result<Spilled, SimError> {
        let pieces = Pieces::new(setup.layout, setup.trace, setup.plan);
        let nvme = setup.plan.nvme.unwrap_or_default();
        if setup.plan.nvme.is_some() {
            if setup.hardware.nvme.is_none() {
                return Err(SimError::Mismatch(format!("the plan spills {} bytes, the machine has no disk", nvme.payload_bytes)));
            }
            Budget::new(Tier::Nvme, setup.nvme_budget).reserve(nvme.file_bytes, "the spill file")?;
        }
        let chunks = setup.layout.chunks.len();
        Ok(Spilled {
            staging: Staging::new(pieces.len(), pieces.stepped(), nvme.buffers),
            grads: GradBuffers::new(pieces.len(), nvme.grad_buffers),
            fetching: Fetching::new(chunks, nvme.fetch_buffers),
            pieces,
            steps: VecDeque::new(),
            taken: None,
            stepping: None,
            landing: vec![false; chunks],
            adding: None,
            fetches: VecDeque::new(),
            written: BTreeMap::new(),
            writes: VecDeque::new(),
            copied: vec![None; nvme.buffers as usize],
        })
    }

    /// Whether a gradient of a chunk, or its sum, is on its way to the disk.
    pub fn lands(&self, chunk: ChunkId) -> bool {
        self.landing[chunk.index()]
    }

    /// A gradient of a chunk was handed over that goes to the disk.
    pub fn set_landing(&mut self, chunk: ChunkId) {
        self.landing[chunk.index()] = true;
    }

    /// The disk has all of it.
    pub fn grad_was_written(&mut self, chunk: ChunkId) {
        self.landing[chunk.index()] = false;
    }
}

impl Run<'_> {
    pub(super) fn step_spilled(&mut self, chunk: ChunkId) {
        let pieces: Vec<PieceId> = self.spilled.pieces.of_chunk(chunk).collect();
        let waits = self.written[chunk.index()].map(|(token, _)| token).into_iter().collect();
        self.spilled.steps.push_back(Step { chunk, left: pieces.len(), waits });
        let (mut transfers, mut reads) = (Vec::new(), Vec::new());
        if self.setup.plan.chunks[chunk.index()].spills_grads() {
            self.spilled.grads.want(pieces.clone(), &mut reads);
        }
        self.spilled.staging.want(pieces, &mut transfers);
        self.transfer(&transfers);
        self.read_grads(&reads);
        self.step_piece();
    }

    /// Bytes of an element's gradient, or of its sum.
    fn grad_element(&self) -> u64 {
        self.setup.layout.final_grad_element(self.setup.plan.accumulation)
    }

    /// A read of the disk, which begins after the latest write of the same.
    fn read_task(&self, what: &str, id: PieceId, extent: Extent, bytes: u64, done: Vec<Effect>) -> Task<Effect> {
        let waits = self.spilled.written.get(&(id, extent)).copied().into_iter().collect();
        let name = format!("{what} {}", self.setup.layout.chunks[self.spilled.pieces.get(id).chunk.index()].name);
        Task { name, bytes, work: bytes as f64, waits, on_start: Vec::new(), on_end: done }
    }

    fn disk_read(&mut self, what: &str, id: PieceId, extent: Extent, bytes: u64, done: Vec<Effect>) -> Token {
        let task = self.read_task(what, id, extent, bytes, done);
        self.machine.push(Lane::DiskRead, task)
    }

    fn disk_write(&mut self, what: &str, id: PieceId, extent: Extent, bytes: u64) -> Token {
        let chunk = self.spilled.pieces.get(id).chunk;
        let token = self.enqueue(Lane::DiskWrite, what, chunk, bytes, bytes as f64, Vec::new(), Vec::new(), Vec::new());
        self.spilled.written.insert((id, extent), token);
        token
    }

    /// The worker that waits for writes is told of some, and of what their end means.
    fn await_writes(&mut self, writes: Vec<Token>, meaning: Vec<Effect>) -> Result<(), SimError> {
        self.spilled.writes.push_back((writes, meaning));
        self.settle_writes()
    }

    /// Passes on which writes have ended.
    pub(super) fn settle_writes(&mut self) -> Result<(), SimError> {
        while let Some((writes, _)) = self.spilled.writes.front()
            && writes.iter().all(|token| self.machine.ended_ns(*token).is_some())
        {
            if let Some((_, meaning)) = self.spilled.writes.pop_front() {
                self.effects(meaning)?;
            }
        }
        Ok(())
    }

    fn read_grads(&mut self, reads: &[GradRead]) {
        for read in reads {
            let bytes = self.spilled.pieces.get(read.piece).numel * self.grad_element();
            self.disk_read("read gradient", read.piece, Extent::Gradient, bytes, vec![Effect::GradRead(read.buffer)]);
        }
    }

    pub(super) fn grad_was_read(&mut self, buffer: u32) {
        self.spilled.grads.was_read(buffer);
        self.step_piece();
    }

    /// A gradient buffer is free again; those that wait for one are read, for steps first.
    pub(super) fn give_grad_back(&mut self, buffer: u32) -> Result<(), SimError> {
        let mut reads = Vec::new();
        self.spilled.grads.give_back(buffer, &mut reads);
        self.read_grads(&reads);
        self.add_pieces()
    }

    /// The disk writes a chunk's gradient from where it has landed, while its norm is taken.
    pub(super) fn write_landed(&mut self, chunk: ChunkId, landed: Option<Event>) {
        let element = self.grad_element();
        let pieces: Vec<PieceId> = self.spilled.pieces.of_chunk(chunk).collect();
        let write = |id: PieceId| {
            let bytes = self.spilled.pieces.get(id).numel * element;
            self.disk_write("write gradient", id, Extent::Gradient, bytes)
        };
        let writes = pieces.into_iter().map(write).collect();
        let read = self.final_grad_bytes(chunk);
        let done = vec![Effect::LandedOnDisk { chunk, writes, landed }];
        self.enqueue(Lane::Landing, "norm", chunk, read, read as f64, Vec::new(), Vec::new(), done);
    }

    /// The norm of a gradient was taken where it landed; that is free when the disk has all of it too.
    pub(super) fn landed_on_disk(&mut self, chunk: ChunkId, writes: Vec<Token>, landed: Option<Event>) -> Result<(), SimError> {
        self.await_writes(writes, vec![Effect::FreeStaging, Effect::GradWritten(chunk)])?;
        if let Some(landed) = landed {
            self.apply(&landed)?;
        }
        self.landing_ended()
    }

    /// Steps the next piece if it is there and no other is being stepped.
    fn step_piece(&mut self) {
        let spilled = &mut self.spilled;
        if spilled.stepping.is_some() {
            return;
        }
        let Some(step) = spilled.steps.front() else { return };
        let (chunk, waits) = (step.chunk, step.waits.clone());
        if spilled.taken.is_none() {
            spilled.taken = spilled.staging.take();
        }
        let Some((id, buffer)) = spilled.taken else { return };
        let grad = spilled.grads.take(id);
        if grad.is_none() && self.setup.plan.chunks[chunk.index()].spills_grads() {
            return;
        }
        spilled.taken = None;
        spilled.stepping = Some((id, grad));
        let share = spilled.pieces.get(id).numel as f64 / self.setup.layout.chunks[chunk.index()].state_numel as f64;
        let bytes = (self.step_bytes(chunk) as f64 * share) as u64;
        let work = bytes as f64 + self.setup.hardware.gap_work();
        self.enqueue(Lane::SpillAdam, "step", chunk, bytes, work, waits, Vec::new(), vec![Effect::Stepped(buffer)]);
    }

    pub(super) fn was_stepped(&mut self, buffer: u32) -> Result<(), SimError> {
        let Some((id, grad)) = self.spilled.stepping.take() else {
            return Err(SimError::Mismatch("a piece was stepped that nobody took".to_owned()));
        };
        let piece = self.spilled.pieces.get(id);
        if self.setup.plan.chunks[piece.chunk.index()].home == ParamHome::Spilled {
            let bytes = piece.numel * self.setup.layout.precision.param_bytes();
            let waits = self.commit.into_iter().collect();
            let copied = self.enqueue(Lane::HostToDevice, "refresh", piece.chunk, bytes, bytes as f64, waits, Vec::new(), Vec::new());
            let last = self.spilled.steps.front().is_some_and(|step| step.left == 1);
            let gathered = if last { self.gather_after_step(piece.chunk, copied) } else { None };
            self.written[piece.chunk.index()] = Some(gathered.unwrap_or((copied, Cause::Optimizer)));
            self.spilled.copied[buffer as usize] = Some(copied);
        }
        if let Some(grad) = grad {
            self.give_grad_back(grad)?;
        }
        let mut transfers = Vec::new();
        self.spilled.staging.give_back(buffer, true, &mut transfers)?;
        self.transfer(&transfers);
        if let Some(step) = self.spilled.steps.front_mut() {
            step.left -= 1;
            if step.left == 0 {
                self.spilled.steps.pop_front();
                self.apply(&Event::StepDone { chunk: piece.chunk })?;
            }
        }
        self.step_piece();
        Ok(())
    }

    pub(super) fn was_read(&mut self, buffer: u32) -> Result<(), SimError> {
        let mut transfers = Vec::new();
        self.spilled.staging.was_read(buffer, &mut transfers)?;
        self.transfer(&transfers);
        self.step_piece();
        Ok(())
    }

    pub(super) fn was_written(&mut self, buffer: u32) -> Result<(), SimError> {
        let mut transfers = Vec::new();
        self.spilled.staging.was_written(buffer, &mut transfers)?;
        self.transfer(&transfers);
        self.step_piece();
        Ok(())
    }

    /// What is transferred for a piece.
    fn extents(&self, piece: Piece) -> Vec<(Extent, u64)> {
        if self.setup.plan.chunks[piece.chunk.index()].home != ParamHome::Fetched {
            return vec![(Extent::States, piece.bytes)];
        }
        let params = piece.numel * self.setup.layout.precision.param_bytes();
        let mut extents = vec![(Extent::Params, params)];
        if piece.bytes > params {
            extents.push((Extent::States, piece.bytes - params));
        }
        extents
    }

    fn transfer(&mut self, transfers: &[Transfer]) {
        for transfer in transfers {
            match *transfer {
                Transfer::Zero { .. } => {}
                Transfer::Read { piece: id, buffer, .. } => {
                    let extents = self.extents(self.spilled.pieces.get(id));
                    let last = extents.len() - 1;
                    for (at, (extent, bytes)) in extents.into_iter().enumerate() {
                        let done = if at == last { vec![Effect::Read(buffer)] } else { Vec::new() };
                        self.disk_read("read", id, extent, bytes, done);
                    }
                }
                Transfer::Write { piece: id, buffer, .. } => {
                    // It may also be on its way to the device; the buffer is reused after both.
                    let mut writes: Vec<Token> = self.spilled.copied[buffer as usize].take().into_iter().collect();
                    for (extent, bytes) in self.extents(self.spilled.pieces.get(id)) {
                        writes.push(self.disk_write("write", id, extent, bytes));
                    }
                    // Nothing of it has ended yet.
                    self.spilled.writes.push_back((writes, vec![Effect::Written(buffer)]));
                }
            }
        }
    }
}
