//! Gradients, the decision over a committed step, and the optimizer steps that follow from it.

use super::event::{Action, Decision, Progress, ScheduleError};
use super::state::{Grad, Verdict, Work};
use super::{CLIP_TOLERATED, CLIP_WINDOW, Commit, Scheduler};
use crate::plan::{ClipMode, OptimizerClass};
use crate::residency::{Residency, Transition};
use crate::{ChunkId, Tier};

impl Scheduler {
    pub(super) fn grads_handed(&mut self, chunk: ChunkId) -> Result<Progress, ScheduleError> {
        let last = self.is_last_micro_step();
        let error = |reason| Err(ScheduleError::Gradient { chunk: self.name(chunk), reason });
        if self.plan.chunks[chunk.index()].class == OptimizerClass::Frozen {
            return error("no optimizer steps it");
        }
        let state = &self.chunks[chunk.index()];
        // Gradients of the next batch must not join an undecided step.
        if state.work != Work::Idle || self.committed.is_some() || self.must_keep_grad(chunk) {
            return Ok(Progress::Blocked { on: chunk });
        }
        match state.grad {
            Grad::None | Grad::Partial => {}
            Grad::PartialNow | Grad::InFlight | Grad::Landed => return error("they came twice in one backward pass"),
        }
        self.chunks[chunk.index()].grad = if last { Grad::InFlight } else { Grad::PartialNow };
        Ok(Progress::Done)
    }

    /// Whether the gradient that a chunk's late moments read would be overwritten: by one that goes straight to its place, or by a sum that
    /// was taken on the device. One that lands in a buffer is added to its sum when they are done.
    fn must_keep_grad(&self, chunk: ChunkId) -> bool {
        let overwrites = self.plan.accumulation == 1 || self.plan.sums_on_device(chunk) && self.is_last_micro_step();
        self.chunks[chunk.index()].owes_moments && overwrites
    }

    /// After the last backward pass: chunks whose gradients came in earlier micro-batches only. Their final gradient is already there; it
    /// counts as on its way until the caller hands over its `GradLanded`.
    pub fn stale_partials(&mut self) -> Vec<ChunkId> {
        let ended = self.micro_step >= self.plan.accumulation;
        let stale: Vec<ChunkId> = self.layout.ids().filter(|c| ended && self.chunks[c.index()].grad == Grad::Partial).collect();
        for chunk in &stale {
            self.chunks[chunk.index()].grad = Grad::InFlight;
        }
        stale
    }

    pub(super) fn grad_landed(&mut self, chunk: ChunkId, sums: &[(u32, f64)], actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        if self.chunks[chunk.index()].grad != Grad::InFlight {
            return Err(self.not_running(chunk, "gradient transfer"));
        }
        if self.chunks[chunk.index()].owes_moments {
            return Err(self.not_running(chunk, "gradient transfer that has to wait for its moments"));
        }
        let params = &self.layout.chunks[chunk.index()].params;
        // Indices run through a chunk's parameters without a gap.
        let own = params.first().map_or(0..0, |first| first.index..first.index + params.len() as u32);
        if sums.iter().any(|(index, _)| !own.contains(index)) {
            return Err(ScheduleError::Gradient { chunk: self.name(chunk), reason: "its sums of squares name another chunk's parameters" });
        }
        self.chunks[chunk.index()].grad = Grad::Landed;
        for &(index, sum) in sums {
            self.sums[index as usize] = Some(sum);
            self.partial_sum += sum;
        }
        if self.committed.is_none() && self.may_speculate(chunk) {
            self.chunks[chunk.index()].param.advance(chunk, "param", Transition::Speculate)?;
            self.chunks[chunk.index()].work = Work::Speculating { then: Verdict::Undecided };
            let undo_offset = self.undo_top;
            self.undo_used += self.layout.undo_bytes(chunk);
            self.undo_top += self.layout.undo_bytes(chunk);
            self.counters.speculated += 1;
            actions.push(Action::Speculate { chunk, grad_scale: self.speculation_scale as f32, undo_offset });
        }
        self.decide(actions)
    }

    pub(super) fn may_speculate(&self, chunk: ChunkId) -> bool {
        let wanted = match self.plan.clip_mode {
            ClipMode::Defer => false,
            ClipMode::Speculate => true,
            ClipMode::Auto => self.recent_clips.count_ones() <= CLIP_TOLERATED,
        };
        let norm = self.partial_sum.sqrt() * self.speculation_scale;
        // Negated so that a partial norm that is not a number stops it too.
        let within = norm <= self.max_norm.unwrap_or(f64::MAX);
        // Other units may still have to read the old generation in this backward; without a device copy they could not.
        let readable =
            !self.in_backward || self.uses_left_in_backward(chunk) == 0 || self.chunks[chunk.index()].param.readable_at(Tier::Device);
        wanted
            && within
            && readable
            // A spilled chunk waits for the decision: its undo record would be as large as what was spilled to save memory.
            && self.plan.chunks[chunk.index()].class == OptimizerClass::Host
            && self.undo_top + self.layout.undo_bytes(chunk) <= self.plan.undo_bytes
    }

    pub(super) fn uses_left_in_backward(&self, chunk: ChunkId) -> usize {
        let uses = &self.uses[chunk.index()];
        uses.len() - uses.partition_point(|&at| at <= self.cursor)
    }

    pub(super) fn backward_end(&mut self, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        for index in 0..self.chunks.len() {
            let chunk = &mut self.chunks[index];
            let used = chunk.in_use();
            chunk.backward_pins = 0;
            chunk.touched = false;
            if chunk.grad == Grad::PartialNow {
                chunk.grad = Grad::Partial;
            }
            if used && !chunk.in_use() {
                self.release(ChunkId(index as u32), actions);
            }
        }
        if !std::mem::take(&mut self.in_backward) {
            return Ok(());
        }
        self.micro_step += 1;
        // After the last micro-batch everything that the host steps is stale: the trace has ended until the decision.
        self.cursor = if self.micro_step < self.plan.accumulation { -1 } else { self.trace.ops.len() as i64 - 1 };
        if self.micro_step < self.plan.accumulation {
            self.prefetch(actions)?;
        }
        Ok(())
    }

    pub(super) fn commit(&mut self, grad_scale: f64, hyper_changed: bool, actions: &mut Vec<Action>) -> Result<Progress, ScheduleError> {
        if let Some(on) = self.undecided() {
            return Ok(Progress::Blocked { on });
        }
        let open = self.chunks.iter().any(|c| matches!(c.grad, Grad::Partial | Grad::PartialNow));
        if open && self.micro_step < self.plan.accumulation {
            let got = self.micro_step + u32::from(self.in_backward);
            return Err(ScheduleError::TooFewBackwards { got, planned: self.plan.accumulation });
        }
        self.release_touched(actions);
        self.committed = Some(Commit { grad_scale, hyper_changed });
        self.decide(actions)?;
        Ok(Progress::Done)
    }

    /// The chunk whose gradient a committed step waits for.
    pub(super) fn undecided(&self) -> Option<ChunkId> {
        self.committed?;
        let on_its_way = |c: &ChunkId| !matches!(self.chunks[c.index()].grad, Grad::None | Grad::Landed);
        Some(self.layout.ids().find(on_its_way).unwrap_or(ChunkId(0)))
    }

    /// Decides a committed step once every gradient has landed.
    pub(super) fn decide(&mut self, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let Some(commit) = self.committed else { return Ok(()) };
        if self.chunks.iter().any(|c| !matches!(c.grad, Grad::None | Grad::Landed)) {
            return Ok(());
        }
        // In parameter order, whatever the order of arrival.
        let total: f64 = self.sums.iter().flatten().sum();
        let norm = total.sqrt() * commit.grad_scale;
        let skipped = !norm.is_finite();
        let coefficient = match self.max_norm {
            Some(limit) if !skipped => (limit / (norm + 1e-6)).min(1.0),
            _ => 1.0,
        };
        self.counters.steps += 1;
        self.counters.skipped += u64::from(skipped);
        self.counters.clipped += u64::from(coefficient < 1.0);
        self.recent_clips = ((self.recent_clips << 1) | u32::from(coefficient < 1.0 || skipped)) & ((1 << CLIP_WINDOW) - 1);
        actions.push(Action::Decided(Decision { step: self.counters.steps, norm, coefficient, skipped }));
        self.committed = None;
        self.sums.fill(None);
        self.partial_sum = 0.0;
        self.micro_step = 0;
        self.cursor = -1;
        let accepted = coefficient >= 1.0 && !skipped && !commit.hyper_changed && {
            let (now, then) = (commit.grad_scale.to_bits(), self.speculation_scale.to_bits());
            now == then
        };
        let grad_scale = (coefficient * commit.grad_scale) as f32;
        let mut order: Vec<ChunkId> = self.layout.ids().filter(|c| self.chunks[c.index()].grad == Grad::Landed).collect();
        // By next forward deadline, not by arrival.
        order.sort_by_key(|c| (self.uses[c.index()].first().copied().unwrap_or(i64::MAX), c.0));
        let mut late = Vec::new();
        for chunk in order {
            self.chunks[chunk.index()].grad = Grad::None;
            match self.chunks[chunk.index()].work {
                Work::Idle if skipped => actions.push(Action::Forget { chunk }),
                Work::Idle => {
                    self.begin_step(chunk, grad_scale, actions)?;
                    late.extend(self.owes_moments(chunk).then_some(chunk));
                }
                Work::Speculating { .. } if accepted => {
                    self.chunks[chunk.index()].work = Work::Speculating { then: Verdict::Accept };
                }
                Work::Speculated if accepted => self.accept(chunk, actions)?,
                Work::Speculating { .. } => {
                    self.chunks[chunk.index()].work = Work::Speculating { then: Verdict::Undo { then_step: !skipped } };
                    self.push_undo(chunk, (!skipped).then_some(grad_scale), actions);
                }
                Work::Speculated => {
                    self.chunks[chunk.index()].work = Work::Undoing { then_step: !skipped };
                    self.push_undo(chunk, (!skipped).then_some(grad_scale), actions);
                }
                Work::Undoing { .. } | Work::Stepping => {
                    return Err(self.not_running(chunk, "decision"));
                }
            }
        }
        // Moments that these steps left, in the order in which gradients come next.
        late.sort_by_key(|c| (self.completes_at(*c), c.0));
        actions.extend(late.into_iter().map(|chunk| Action::Moments { chunk }));
        self.prefetch(actions)
    }

    /// Position of a chunk's last use, at which its gradient is complete.
    fn completes_at(&self, chunk: ChunkId) -> i64 {
        self.uses[chunk.index()].last().copied().unwrap_or(i64::MAX)
    }

    pub(super) fn push_undo(&mut self, chunk: ChunkId, then_step: Option<f32>, actions: &mut Vec<Action>) {
        self.counters.undone += 1;
        actions.push(Action::Undo { chunk });
        match then_step {
            Some(grad_scale) => actions.push(Action::Step { chunk, tier: Tier::Host, grad_scale }),
            None => actions.push(Action::Forget { chunk }),
        }
    }

    /// Undoes a finished speculation whose gradients stay (`drop` forgets them).
    pub(super) fn undo(&mut self, chunk: ChunkId, drop: bool, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        if self.chunks[chunk.index()].work != Work::Speculated {
            return Err(self.not_running(chunk, "speculation"));
        }
        self.chunks[chunk.index()].work = Work::Undoing { then_step: false };
        self.counters.undone += 1;
        actions.push(Action::Undo { chunk });
        if drop {
            actions.push(Action::Forget { chunk });
        }
        Ok(())
    }

    pub(super) fn begin_step(&mut self, chunk: ChunkId, grad_scale: f32, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let class = self.plan.chunks[chunk.index()].class;
        let on_device = class.steps_on_device();
        self.begin_write(chunk)?;
        if on_device {
            // Stream-ordered: whoever reads the parameters waits for the step's event.
            let state = &mut self.chunks[chunk.index()];
            state.param.advance(chunk, "param", Transition::FinishWrite)?;
            state.generation += 1;
        } else {
            let late = self.plan.late_moments && class == OptimizerClass::Host;
            let state = &mut self.chunks[chunk.index()];
            (state.work, state.owes_moments) = (Work::Stepping, late);
        }
        let tier = match class {
            OptimizerClass::Device | OptimizerClass::Streamed => Tier::Device,
            OptimizerClass::Nvme => Tier::Nvme,
            OptimizerClass::Host | OptimizerClass::Frozen => Tier::Host,
        };
        actions.push(Action::Step { chunk, tier, grad_scale });
        Ok(())
    }

    pub(super) fn begin_write(&mut self, chunk: ChunkId) -> Result<(), ScheduleError> {
        if matches!(self.chunks[chunk.index()].param, Residency::Cached { .. }) {
            self.drop_cache(chunk)?;
        }
        self.chunks[chunk.index()].param.advance(chunk, "param", Transition::BeginWrite)?;
        Ok(())
    }

    pub(super) fn accept(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let state = &mut self.chunks[chunk.index()];
        state.param.advance(chunk, "param", Transition::Accept)?;
        if let Some(slot) = state.slot.take() {
            self.slab.remove(slot);
        }
        self.release_undo(chunk);
        actions.push(Action::Accept { chunk });
        self.written(chunk, actions)
    }

    pub(super) fn release_undo(&mut self, chunk: ChunkId) {
        self.undo_used -= self.layout.undo_bytes(chunk);
        if self.undo_used == 0 {
            self.undo_top = 0;
        }
    }

    /// The host copy is the new generation: resident chunks go to the device at once.
    pub(super) fn written(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let state = &mut self.chunks[chunk.index()];
        state.work = Work::Idle;
        state.generation += 1;
        if self.plan.chunks[chunk.index()].home.is_resident() {
            state.param.advance(chunk, "param", Transition::Cache(Tier::Device))?;
            actions.push(Action::Refresh { chunk });
        }
        Ok(())
    }

    pub(super) fn step_done(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        if self.chunks[chunk.index()].work != Work::Stepping {
            return Err(self.not_running(chunk, "step"));
        }
        self.chunks[chunk.index()].param.advance(chunk, "param", Transition::FinishWrite)?;
        self.written(chunk, actions)?;
        self.prefetch(actions)
    }

    pub(super) fn moments_done(&mut self, chunk: ChunkId) -> Result<(), ScheduleError> {
        let state = &mut self.chunks[chunk.index()];
        if !state.owes_moments || state.work == Work::Stepping {
            return Err(self.not_running(chunk, "moments"));
        }
        state.owes_moments = false;
        Ok(())
    }

    pub(super) fn speculate_done(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let Work::Speculating { then } = self.chunks[chunk.index()].work else {
            return Err(self.not_running(chunk, "speculation"));
        };
        match then {
            Verdict::Undecided => self.chunks[chunk.index()].work = Work::Speculated,
            Verdict::Accept => self.accept(chunk, actions)?,
            Verdict::Undo { then_step } => self.chunks[chunk.index()].work = Work::Undoing { then_step },
        }
        self.prefetch(actions)
    }

    pub(super) fn undo_done(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let Work::Undoing { then_step } = self.chunks[chunk.index()].work else {
            return Err(self.not_running(chunk, "undo"));
        };
        self.chunks[chunk.index()].param.advance(chunk, "param", Transition::Undo)?;
        self.release_undo(chunk);
        if then_step {
            self.begin_write(chunk)?;
            self.chunks[chunk.index()].work = Work::Stepping;
        } else {
            self.chunks[chunk.index()].work = Work::Idle;
        }
        self.prefetch(actions)
    }

    pub(super) fn drop_grads(&mut self, actions: &mut Vec<Action>) -> Result<Progress, ScheduleError> {
        if self.committed.is_some() {
            // Those gradients belong to the committed step.
            return Ok(Progress::Done);
        }
        for chunk in self.layout.ids() {
            let state = &self.chunks[chunk.index()];
            if state.grad == Grad::InFlight || matches!(state.work, Work::Speculating { then: Verdict::Undecided }) {
                return Ok(Progress::Blocked { on: chunk });
            }
        }
        for chunk in self.layout.ids() {
            let had = std::mem::replace(&mut self.chunks[chunk.index()].grad, Grad::None);
            if self.chunks[chunk.index()].work == Work::Speculated {
                self.undo(chunk, true, actions)?;
            } else if had != Grad::None {
                actions.push(Action::Forget { chunk });
            }
        }
        self.sums.fill(None);
        self.partial_sum = 0.0;
        if self.micro_step > 0 {
            self.cursor = -1;
        }
        self.micro_step = 0;
        self.prefetch(actions)?;
        Ok(Progress::Done)
    }
}
