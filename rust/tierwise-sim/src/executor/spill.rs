//! Spilled states in virtual time: the core's staging machine with lanes instead of a disk; the counterpart of the runtime's `spill`.

use super::machine::{Lane, Token};
use super::stalls::Cause;
use super::{Effect, Run, Setup, SimError};
use std::collections::VecDeque;
use tierwise_core::budget::Budget;
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
    /// The piece that is being stepped.
    stepping: Option<PieceId>,
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
        let staging = Staging::new(pieces.len(), buffers);
        Ok(Spilled { pieces, staging, steps: VecDeque::new(), stepping: None, copied: vec![None; buffers as usize] })
    }
}

impl Run<'_> {
    pub(super) fn step_spilled(&mut self, chunk: ChunkId) {
        let pieces: Vec<PieceId> = self.spilled.pieces.of_chunk(chunk).collect();
        let waits = self.written[chunk.index()].map(|(token, _)| token).into_iter().collect();
        self.spilled.steps.push_back(Step { chunk, left: pieces.len(), waits });
        let mut transfers = Vec::new();
        self.spilled.staging.want(pieces, &mut transfers);
        self.transfer(&transfers);
        self.step_piece();
    }

    /// Steps the next piece if it is there and no other is being stepped.
    fn step_piece(&mut self) {
        let spilled = &mut self.spilled;
        if spilled.stepping.is_some() {
            return;
        }
        let Some(step) = spilled.steps.front() else { return };
        let (chunk, waits) = (step.chunk, step.waits.clone());
        let Some((id, buffer)) = spilled.staging.take() else { return };
        spilled.stepping = Some(id);
        let share = spilled.pieces.get(id).numel as f64 / self.setup.layout.chunks[chunk.index()].state_numel as f64;
        let bytes = (self.step_bytes(chunk) as f64 * share) as u64;
        self.enqueue(Lane::HostAdam, "step", chunk, bytes, bytes as f64, waits, Vec::new(), vec![Effect::Stepped(buffer)]);
    }

    pub(super) fn was_stepped(&mut self, buffer: u32) -> Result<(), SimError> {
        let Some(id) = self.spilled.stepping.take() else {
            return Err(SimError::Mismatch("a piece was stepped that nobody took".to_owned()));
        };
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
