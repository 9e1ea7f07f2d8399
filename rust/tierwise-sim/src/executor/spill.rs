//! Spilled states in virtual time: the core's staging machine with lanes instead of a disk; the counterpart of the runtime's `spill`.

use super::machine::{Lane, Token};
use super::stalls::Cause;
use super::{Effect, Run, Setup, SimError};
use std::collections::VecDeque;
use tierwise_core::budget::Budget;
use tierwise_core::grad_buffers::{GradBuffers, GradRead};
use tierwise_core::plan::ParamHome;
use tierwise_core::scheduler::Event;
use tierwise_core::staging::{PieceId, Pieces, Staging, Transfer};
use tierwise_core::{ChunkId, Tier};

/// A step that takes pieces as they come.
struct Step {
    chunk: ChunkId,
    left: usize,
    /// A copy that may still read the parameters that are about to be rewritten.
    waits: Vec<Token>,
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
    /// Per chunk: whether what was handed over last is not all on the disk yet, and the task that writes it.
    landing: Vec<bool>,
    grad_written: Vec<Option<Token>>,
    /// Per buffer: the copy to the device that reads it.
    copied: Vec<Option<Token>>,
}

impl Spilled {
    pub fn new(setup: &Setup) -> Result<Spilled, SimError> {
        let pieces = Pieces::new(setup.layout, setup.trace, setup.plan);
        let buffers = setup.plan.nvme.map_or(0, |nvme| nvme.buffers);
        if let Some(nvme) = setup.plan.nvme {
            if setup.hardware.nvme.is_none() {
                return Err(SimError::Mismatch(format!("the plan spills {} bytes, the machine has no disk", nvme.payload_bytes)));
            }
            Budget::new(Tier::Nvme, setup.nvme_budget).reserve(nvme.file_bytes, "the spill file")?;
        }
        let staging = Staging::new(pieces.len(), pieces.stepped(), buffers);
        let grad_buffers = setup.plan.nvme.map_or(0, |nvme| nvme.grad_buffers);
        let chunks = setup.layout.chunks.len();
        Ok(Spilled {
            grads: GradBuffers::new(pieces.len(), grad_buffers),
            pieces,
            staging,
            steps: VecDeque::new(),
            taken: None,
            stepping: None,
            landing: vec![false; chunks],
            grad_written: vec![None; chunks],
            copied: vec![None; buffers as usize],
        })
    }

    /// Whether a gradient of a chunk, or its sum, is on its way to the disk.
    pub fn lands(&self, chunk: ChunkId) -> bool {
        self.landing[chunk.index()]
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

    fn read_grads(&mut self, reads: &[GradRead]) {
        for read in reads {
            let piece = self.spilled.pieces.get(read.piece);
            let bytes = piece.numel * self.setup.layout.final_grad_element(self.setup.plan.accumulation);
            let waits = self.spilled.grad_written[piece.chunk.index()].into_iter().collect();
            let done = vec![Effect::GradRead(read.buffer)];
            self.enqueue(Lane::DiskRead, "read gradient", piece.chunk, bytes, bytes as f64, waits, Vec::new(), done);
        }
    }

    pub(super) fn grad_was_read(&mut self, buffer: u32) {
        self.spilled.grads.was_read(buffer);
        self.step_piece();
    }

    /// A chunk's gradient has `copied` to where it lands: the norm is taken there while the disk writes it, or it is added to the sum that the
    /// disk reads and writes again. `landed` is what the norm's end means.
    pub(super) fn land_on_disk(&mut self, chunk: ChunkId, copied: Token, landed: Option<Effect>) {
        let plan = self.setup.plan;
        let bytes = self.setup.layout.grad_bytes(chunk);
        let sum = self.setup.layout.final_grad_bytes(chunk, plan.accumulation);
        self.spilled.landing[chunk.index()] = true;
        let mut waits = vec![copied];
        let mut freed = vec![Effect::GradWritten(chunk)];
        if plan.accumulation > 1 {
            let first = self.is_first_micro_batch();
            if !first {
                let mut before = vec![copied];
                before.extend(self.spilled.grad_written[chunk.index()]);
                waits.push(self.enqueue(Lane::DiskRead, "read sum", chunk, sum, sum as f64, before, Vec::new(), Vec::new()));
            }
            let added = bytes + if first { sum } else { 2 * sum };
            let done = vec![Effect::FreeStaging];
            waits = vec![self.enqueue(Lane::Landing, "accumulate", chunk, added, added as f64, waits, Vec::new(), done)];
        } else {
            freed.push(Effect::FreeStaging);
        }
        let write = self.enqueue(Lane::DiskWrite, "write gradient", chunk, sum, sum as f64, waits, Vec::new(), freed);
        self.spilled.grad_written[chunk.index()] = Some(write);
        if let Some(landed) = landed {
            self.enqueue(Lane::Landing, "norm", chunk, sum, sum as f64, vec![copied], Vec::new(), vec![landed]);
        }
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
        self.enqueue(Lane::HostAdam, "step", chunk, bytes, bytes as f64, waits, Vec::new(), vec![Effect::Stepped(buffer)]);
    }

    pub(super) fn was_stepped(&mut self, buffer: u32) -> Result<(), SimError> {
        let Some((id, grad)) = self.spilled.stepping.take() else {
            return Err(SimError::Mismatch("a piece was stepped that nobody took".to_owned()));
        };
        if let Some(grad) = grad {
            let mut reads = Vec::new();
            self.spilled.grads.give_back(grad, &mut reads);
            self.read_grads(&reads);
        }
        let piece = self.spilled.pieces.get(id);
        if self.setup.plan.chunks[piece.chunk.index()].home == ParamHome::Spilled {
            let bytes = piece.numel * self.setup.layout.precision.param_bytes();
            let waits = self.commit.into_iter().collect();
            let copied = self.enqueue(Lane::HostToDevice, "refresh", piece.chunk, bytes, bytes as f64, waits, Vec::new(), Vec::new());
            self.written[piece.chunk.index()] = Some((copied, Cause::Optimizer));
            self.spilled.copied[buffer as usize] = Some(copied);
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

    fn transfer(&mut self, transfers: &[Transfer]) {
        for transfer in transfers {
            match *transfer {
                Transfer::Zero { .. } => {}
                Transfer::Read { piece, buffer, .. } => {
                    let piece = self.spilled.pieces.get(piece);
                    let done = vec![Effect::Read(buffer)];
                    self.enqueue(Lane::DiskRead, "read", piece.chunk, piece.bytes, piece.bytes as f64, Vec::new(), Vec::new(), done);
                }
                Transfer::Write { piece, buffer, .. } => {
                    let piece = self.spilled.pieces.get(piece);
                    let waits = self.spilled.copied[buffer as usize].take().into_iter().collect();
                    let done = vec![Effect::Written(buffer)];
                    self.enqueue(Lane::DiskWrite, "write", piece.chunk, piece.bytes, piece.bytes as f64, waits, Vec::new(), done);
                }
            }
        }
    }
}
