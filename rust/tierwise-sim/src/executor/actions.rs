//! Carrying out the scheduler's actions, and the way of gradients: the counterpart of the runtime's `execute.rs` and `gradients.rs`.

use super::landing::{Arrived, What};
use super::machine::{HostPass, Lane, Task, Token};
use super::stalls::Cause;
use super::{Effect, Run, SimError};
use tierwise_core::plan::OptimizerClass;
use tierwise_core::plan::ParamHome;
use tierwise_core::scheduler::{Action, Event, Progress};
use tierwise_core::{ChunkId, Tier};

impl Run<'_> {
    /// Carries out actions in order. Everything here only enqueues.
    pub(super) fn execute(&mut self, actions: &[Action]) {
        for action in actions {
            match *action {
                Action::Fetch { chunk, offset, demand, .. } => self.fetch(chunk, offset, demand),
                // A spilled chunk's step sends its parameters piece by piece.
                Action::Refresh { chunk } if self.setup.plan.chunks[chunk.index()].home == ParamHome::Spilled => {}
                Action::Refresh { chunk } => {
                    let waits = self.commit.into_iter().collect();
                    self.copy_params(chunk, "refresh", waits, Cause::Optimizer);
                }
                Action::Release { chunk, offset } => {
                    if let Some(token) = self.release {
                        let end = offset + self.setup.layout.param_bytes(chunk);
                        self.guards.protect(offset, end, token);
                    }
                }
                Action::Step { chunk, tier: Tier::Device, .. } => match self.setup.plan.chunks[chunk.index()].class {
                    OptimizerClass::Streamed => self.step_streamed(chunk),
                    _ => self.step_on_device(chunk),
                },
                Action::Step { chunk, tier: Tier::Nvme, .. } => self.step_spilled(chunk),
                Action::Step { chunk, .. } if self.scheduler.owes_moments(chunk) => {
                    self.owe_moments(chunk);
                    // The moments are read only.
                    let bytes = self.step_bytes(chunk) - self.moment_bytes(chunk);
                    let more = self.setup.hardware.params_first_work(bytes) - bytes as f64;
                    let token = self.step_on_host(chunk, "step", bytes, more, Event::StepDone { chunk });
                    self.machine.is_pass(token, HostPass::Params);
                }
                Action::Step { chunk, .. } => {
                    self.step_on_host(chunk, "step", self.step_bytes(chunk), 0.0, Event::StepDone { chunk });
                }
                Action::Moments { chunk } => self.step_moments(chunk),
                Action::Speculate { chunk, .. } => self.speculate(chunk),
                Action::Undo { chunk } => {
                    let bytes = 2 * self.setup.layout.undo_bytes(chunk);
                    let work = self.setup.hardware.copy_work(self.setup.layout.undo_bytes(chunk));
                    let event = Effect::Post(Event::UndoDone { chunk });
                    self.enqueue(Lane::HostAdam, "undo", chunk, bytes, work, Vec::new(), Vec::new(), vec![event]);
                }
                Action::Forget { chunk } => {
                    let held = std::mem::take(&mut self.held[chunk.index()]);
                    self.free_gradients(held);
                }
                Action::Accept { .. } | Action::Decided(_) => {}
            }
        }
    }

    fn speculate(&mut self, chunk: ChunkId) {
        let (hardware, layout) = (self.setup.hardware, self.setup.layout);
        let step = self.step_bytes(chunk);
        let undo = layout.undo_bytes(chunk);
        let more = hardware.undoable_work(step, undo) - undo as f64;
        let token = self.step_on_host(chunk, "speculate", step + undo, more, Event::SpeculateDone { chunk });
        self.machine.is_pass(token, HostPass::Undoable);
    }

    fn chunk_name(&self, chunk: ChunkId) -> &str {
        &self.setup.layout.chunks[chunk.index()].name
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of a task, in their order")]
    pub(super) fn enqueue(
        &mut self,
        lane: Lane,
        what: &str,
        chunk: ChunkId,
        bytes: u64,
        work: f64,
        waits: Vec<Token>,
        on_start: Vec<Effect>,
        on_end: Vec<Effect>,
    ) -> Token {
        let name = format!("{what} {}", self.chunk_name(chunk));
        let mut waits = waits;
        if lane == Lane::HostToDevice {
            waits.append(&mut self.link_waits);
        }
        self.machine.push(lane, Task { name, bytes, work, waits, on_start, on_end })
    }

    /// Copies a chunk's parameters from its home to the device.
    fn copy_params(&mut self, chunk: ChunkId, what: &str, waits: Vec<Token>, cause: Cause) {
        let bytes = self.setup.layout.param_bytes(chunk);
        let token = self.enqueue(Lane::HostToDevice, what, chunk, bytes, bytes as f64, waits, Vec::new(), Vec::new());
        self.written[chunk.index()] = Some(self.gather_after_step(chunk, token).unwrap_or((token, cause)));
    }

    fn fetch(&mut self, chunk: ChunkId, offset: u64, demand: bool) {
        let end = offset + self.setup.layout.param_bytes(chunk);
        let waits = self.guards.reuse(offset, end);
        if self.setup.plan.chunks[chunk.index()].home == ParamHome::Fetched {
            // Whatever is copied next comes after them, and so do its own copies.
            self.link_waits.extend(waits);
            self.fetch_spilled(chunk, offset);
            return;
        }
        self.copy_params(chunk, if demand { "demand fetch" } else { "fetch" }, waits, Cause::Fetch);
    }

    /// Bytes that one step of a chunk moves, its final gradient included.
    pub(super) fn step_bytes(&self, chunk: ChunkId) -> u64 {
        let layout = self.setup.layout;
        let state = &layout.chunks[chunk.index()];
        self.final_grad_bytes(chunk) + 2 * state.state_numel * (layout.precision.param_bytes() + layout.precision.state_bytes())
    }

    /// Bytes of a chunk's moments.
    pub(super) fn moment_bytes(&self, chunk: ChunkId) -> u64 {
        8 * self.setup.layout.chunks[chunk.index()].state_numel
    }

    pub(super) fn final_grad_bytes(&self, chunk: ChunkId) -> u64 {
        self.setup.layout.final_grad_bytes(chunk, self.setup.plan.accumulation)
    }

    fn step_on_device(&mut self, chunk: ChunkId) {
        let bytes = self.step_bytes(chunk);
        let waits = self.commit.into_iter().collect();
        let read = std::mem::take(&mut self.held[chunk.index()]);
        self.leaving_bytes += read;
        let freed = vec![Effect::FreeGradients(read)];
        let token = self.enqueue(Lane::Optimizer, "step", chunk, bytes, bytes as f64, waits, Vec::new(), freed);
        self.written[chunk.index()] = Some(self.gather_after_step(chunk, token).unwrap_or((token, Cause::Optimizer)));
    }

    fn step_on_host(&mut self, chunk: ChunkId, what: &str, bytes: u64, more_work: f64, done: Event) -> Token {
        // A copy that nobody waited for may still read the parameters that are about to be rewritten.
        let waits = self.written[chunk.index()].map(|(token, _)| token).into_iter().collect();
        let work = bytes as f64 + more_work + self.setup.hardware.gap_work();
        self.enqueue(Lane::HostAdam, what, chunk, bytes, work, waits, Vec::new(), vec![Effect::Post(done)])
    }

    /// Takes over the gradients of a chunk; gives what the training thread waits for if it cannot yet.
    pub(super) fn hand_over(&mut self, chunk: ChunkId) -> Result<Option<Cause>, SimError> {
        let plan = self.setup.plan;
        let bytes = self.setup.layout.grad_bytes(chunk);
        let accumulates = plan.accumulation > 1;
        let sums_on_device = plan.sums_on_device(chunk);
        let on_host = plan.chunks[chunk.index()].class.on_cpu();
        let leaves = on_host && !sums_on_device;
        let spilled = plan.chunks[chunk.index()].spills_grads();
        let lands = accumulates || spilled;
        if leaves {
            let room = self.in_flight_bytes == 0 || self.in_flight_bytes + bytes <= plan.grad_in_flight_bytes;
            let waits = lands && self.staging_free == 0 || self.spilled.lands(chunk);
            if !room || waits {
                return Ok(Some(Cause::Gradients));
            }
        }
        if self.apply(&Event::GradsHanded { chunk })? != Progress::Done {
            return Ok(Some(Cause::Optimizer));
        }
        let last = self.scheduler.is_last_backward();
        let produced: Vec<Token> = self.machine.record(Lane::Compute).into_iter().collect();
        let produced = self.reduce(chunk, produced, last);
        let landed = last.then(|| self.grad_landed(chunk));
        // The first micro-batch overwrites its accumulator, later ones read it.
        let sum = self.setup.layout.grad_acc_bytes(chunk);
        let added = bytes + if self.is_first_micro_batch() { sum } else { 2 * sum };
        if leaves {
            self.in_flight_bytes += bytes;
            self.staging_free -= u32::from(lands);
            let what = match (spilled, accumulates) {
                (true, true) => What::AddOnDisk { first: self.is_first_micro_batch() },
                (true, false) => What::Write,
                (false, true) => What::Add { added },
                (false, false) => What::Norm,
            };
            if spilled {
                self.spilled.set_landing(chunk);
            }
            let arrived = vec![Effect::Landed { bytes }, Effect::Arrived(Arrived { chunk, what, landed })];
            self.enqueue(Lane::DeviceToHost, "gradients", chunk, bytes, bytes as f64, produced, Vec::new(), arrived);
        } else {
            if accumulates {
                self.leaving_bytes += bytes;
                let freed = vec![Effect::FreeGradients(bytes)];
                self.enqueue(Lane::Optimizer, "accumulate", chunk, added, added as f64, produced.clone(), Vec::new(), freed);
            } else {
                self.held[chunk.index()] += bytes;
            }
            if let Some(landed) = landed {
                let read = self.final_grad_bytes(chunk);
                let landed = vec![Effect::Post(landed)];
                let (of_device, of_sums) = if on_host { (Vec::new(), landed) } else { (landed, Vec::new()) };
                let reduced = self.enqueue(Lane::Optimizer, "norm", chunk, read, read as f64, produced, Vec::new(), of_device);
                if on_host {
                    // Sums that were taken on the device leave once; their norm was taken there too.
                    self.enqueue(Lane::DeviceToHost, "gradient sums", chunk, read, read as f64, vec![reduced], Vec::new(), of_sums);
                }
            }
        }
        Ok(None)
    }

    /// Every parameter's share of the norm: its value only decides whether the norm is above the limit of 1.
    fn grad_landed(&self, chunk: ChunkId) -> Event {
        let sum = if self.setup.clips { 4.0 } else { 0.0 };
        let params = &self.setup.layout.chunks[chunk.index()].params;
        Event::GradLanded { chunk, sums: params.iter().filter(|p| p.trainable).map(|p| (p.index, sum)).collect() }
    }
}
