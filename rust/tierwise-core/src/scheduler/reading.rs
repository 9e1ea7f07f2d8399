//! Making chunks readable: pins, the slab, eviction by next use, prefetch in the order of the trace.

use super::event::{Action, Progress, ScheduleError};
use super::state::{Grad, Verdict, Work};
use super::{Scheduler, slot_bytes};
use crate::residency::Transition;
use crate::trace::Phase;
use crate::{ChunkId, Tier};

impl Scheduler {
    pub(super) fn enter(&mut self, unit: u32, phase: Phase, actions: &mut Vec<Action>) -> Result<Progress, ScheduleError> {
        let mut chunks = self.unit_chunks(unit)?;
        let before = self.cursor;
        self.release_touched(actions);
        // The cursor moves first: what the operation itself needs is then "now" for eviction.
        let expected = self.advance(unit, phase);
        for &chunk in &chunks {
            if let Some(on) = self.unready(chunk, actions)? {
                self.cursor = before;
                return Ok(Progress::Blocked { on });
            }
        }
        // Pinned one after the other, those on the device first, so that fetching one never evicts another of the same operation: the
        // decided copy of a speculated chunk could not be fetched again.
        chunks.sort_by_key(|c| !self.chunks[c.index()].param.readable_at(Tier::Device));
        if let Err(error) = self.fetch_and_pin(&chunks, phase, actions) {
            if chunks.len() < 2 {
                self.cursor = before;
                return Err(error);
            }
            // The first ones may have cut the room in pieces: again, with nothing else in the way.
            let left = self.clear_slab()?;
            // Among those that left may be the last decided copy of a speculated chunk.
            for &chunk in &chunks {
                if let Some(on) = self.unready(chunk, actions)? {
                    self.cursor = before;
                    return Ok(Progress::Blocked { on });
                }
            }
            let first = actions.len();
            if let Err(error) = self.fetch_and_pin(&chunks, phase, actions) {
                self.cursor = before;
                return Err(error);
            }
            if let Some(Action::Fetch { chunk, evicted, .. }) = actions.get_mut(first) {
                evicted.extend(left.into_iter().filter(|other| other != chunk));
            }
        }
        self.counters.off_trace += u64::from(!expected);
        self.prefetch(actions)?;
        Ok(Progress::Done)
    }

    pub(super) fn leave(&mut self, unit: u32, phase: Phase, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let chunks = self.unit_chunks(unit)?;
        // Checked for all before any of them is let go: an error changes nothing.
        if chunks.iter().any(|c| self.chunks[c.index()].pins(phase) == 0) {
            return Err(ScheduleError::NotEntered(self.trace.units[unit as usize].name.clone()));
        }
        self.release_touched(actions);
        for chunk in chunks {
            self.unpin(chunk, phase);
            if !self.chunks[chunk.index()].in_use() {
                self.release(chunk, actions);
            }
        }
        self.prefetch(actions)
    }

    pub(super) fn forward_begin(&mut self, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        self.release_touched(actions);
        for index in 0..self.chunks.len() {
            if std::mem::take(&mut self.chunks[index].forward_pins) > 0 && !self.chunks[index].in_use() {
                self.release(ChunkId(index as u32), actions);
            }
        }
        self.prefetch(actions)
    }

    pub(super) fn touch(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<Progress, ScheduleError> {
        if let Some(on) = self.unready(chunk, actions)? {
            return Ok(Progress::Blocked { on });
        }
        self.fetch_now(chunk, actions)?;
        self.chunks[chunk.index()].touched = true;
        Ok(Progress::Done)
    }

    pub(super) fn release_touched(&mut self, actions: &mut Vec<Action>) {
        for index in 0..self.chunks.len() {
            let chunk = &mut self.chunks[index];
            if std::mem::take(&mut chunk.touched) && !chunk.in_use() {
                self.release(ChunkId(index as u32), actions);
            }
        }
    }

    /// Says that nothing uses a chunk any more, while it still has the slot that its readers read.
    pub(super) fn release(&self, chunk: ChunkId, actions: &mut Vec<Action>) {
        if let Some(offset) = self.chunks[chunk.index()].slot {
            actions.push(Action::Release { chunk, offset });
        }
    }

    /// Makes the chunks of an operation present and keeps them; none of them if one has no place.
    pub(super) fn fetch_and_pin(&mut self, chunks: &[ChunkId], phase: Phase, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        for (i, &chunk) in chunks.iter().enumerate() {
            if let Err(error) = self.fetch_now(chunk, actions) {
                for &pinned in &chunks[..i] {
                    self.unpin(pinned, phase);
                }
                return Err(error);
            }
            self.pin(chunk, phase);
        }
        Ok(())
    }

    pub(super) fn pin(&mut self, chunk: ChunkId, phase: Phase) {
        match phase {
            Phase::Forward => self.chunks[chunk.index()].forward_pins += 1,
            Phase::Backward => self.chunks[chunk.index()].backward_pins += 1,
        }
    }

    pub(super) fn unpin(&mut self, chunk: ChunkId, phase: Phase) {
        match phase {
            Phase::Forward => self.chunks[chunk.index()].forward_pins -= 1,
            Phase::Backward => self.chunks[chunk.index()].backward_pins -= 1,
        }
    }

    /// The chunk itself if its parameters cannot be read (or copied for reading) now.
    pub(super) fn unready(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<Option<ChunkId>, ScheduleError> {
        let state = &self.chunks[chunk.index()];
        if self.committed.is_some() && state.grad != Grad::None {
            return Ok(Some(chunk));
        }
        match state.work {
            Work::Idle => Ok(None),
            Work::Speculating { then: Verdict::Undecided } | Work::Speculated if state.param.readable_at(Tier::Device) => Ok(None),
            // Read again before the decision, and no decided copy is left: the speculation has to go.
            Work::Speculated => {
                self.undo(chunk, false, actions)?;
                Ok(Some(chunk))
            }
            Work::Speculating { .. } | Work::Undoing { .. } | Work::Stepping => Ok(Some(chunk)),
        }
    }

    /// Fetches a chunk that compute waits for, unless it is on the device.
    pub(super) fn fetch_now(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        if self.chunks[chunk.index()].param.readable_at(Tier::Device) {
            return Ok(());
        }
        if self.fetch(chunk, self.cursor.max(0) as u64, true, actions)? {
            return Ok(());
        }
        let users: Vec<_> = self.slab.occupants().filter(|(_, c, _)| self.chunks[c.index()].in_use()).collect();
        Err(ScheduleError::NoSlot {
            chunk: self.name(chunk),
            needed: slot_bytes(self.layout.param_bytes(chunk)),
            slab: self.slab.bytes(),
            in_use: users.iter().map(|(_, _, bytes)| bytes).sum(),
            users: users.iter().map(|&(_, c, _)| format!("`{}`", self.name(c))).collect::<Vec<_>>().join(", "),
        })
    }

    /// Starts a copy into the slab if a place is allowed.
    pub(super) fn fetch(&mut self, chunk: ChunkId, needed_at: u64, demand: bool, actions: &mut Vec<Action>) -> Result<bool, ScheduleError> {
        let bytes = slot_bytes(self.layout.param_bytes(chunk));
        // Compute waits for a demanded chunk: whoever may leave is used later, also before the first operation.
        let needed_at = if demand { 0 } else { needed_at };
        let next_use = |c| self.next_use(c).map(|at| at.saturating_add(u64::from(demand)));
        let Some(place) = self.slab.place(bytes, needed_at, next_use) else { return Ok(false) };
        for &victim in &place.evict {
            self.drop_cache(victim)?;
            self.counters.evictions += 1;
        }
        self.slab.insert(chunk, place.offset, bytes);
        let state = &mut self.chunks[chunk.index()];
        state.param.advance(chunk, "param", Transition::Cache(Tier::Device))?;
        state.slot = Some(place.offset);
        self.counters.fetches += 1;
        self.counters.demand_fetches += u64::from(demand);
        actions.push(Action::Fetch { chunk, offset: place.offset, evicted: place.evict, demand });
        Ok(true)
    }

    /// Gives up every slot that nobody reads; gives whose they were.
    pub(super) fn clear_slab(&mut self) -> Result<Vec<ChunkId>, ScheduleError> {
        let occupants: Vec<ChunkId> = self.slab.occupants().map(|(_, chunk, _)| chunk).collect();
        let left: Vec<ChunkId> = occupants.into_iter().filter(|c| !self.chunks[c.index()].in_use()).collect();
        for &chunk in &left {
            self.drop_cache(chunk)?;
            self.counters.evictions += 1;
        }
        Ok(left)
    }

    pub(super) fn drop_cache(&mut self, chunk: ChunkId) -> Result<(), ScheduleError> {
        let state = &mut self.chunks[chunk.index()];
        state.param.advance(chunk, "param", Transition::DropCache)?;
        if let Some(slot) = state.slot.take() {
            self.slab.remove(slot);
        }
        Ok(())
    }

    /// Starts the copies of coming operations, in their order, while a place is allowed.
    pub(super) fn prefetch(&mut self, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        if self.slab.bytes() == 0 {
            return Ok(());
        }
        let ops = self.trace.ops.len() as i64;
        for ahead in 1..=ops {
            let at = self.cursor + ahead;
            let unit = self.trace.ops[(at % ops) as usize].unit as usize;
            for i in 0..self.trace.units[unit].chunks.len() {
                let chunk = self.trace.units[unit].chunks[i];
                let state = &self.chunks[chunk.index()];
                if state.param.readable_at(Tier::Device) {
                    continue;
                }
                let rewritten_before = at >= ops && self.is_rewritten(chunk);
                let fetchable = state.work == Work::Idle && !(self.committed.is_some() && state.grad != Grad::None);
                if rewritten_before || !fetchable || !self.fetch(chunk, at as u64, false, actions)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Whether the host rewrites the chunk's parameters before the trace wraps around.
    pub(super) fn is_rewritten(&self, chunk: ChunkId) -> bool {
        self.plan.chunks[chunk.index()].class.on_cpu() && self.is_last_micro_step()
    }

    pub(super) fn is_last_micro_step(&self) -> bool {
        self.micro_step + 1 >= self.plan.accumulation
    }

    /// Position of the next use of a chunk in the slab, `u64::MAX` if it is rewritten before, `None` if it may not leave.
    pub(super) fn next_use(&self, chunk: ChunkId) -> Option<u64> {
        if self.chunks[chunk.index()].in_use() {
            return None;
        }
        let uses = &self.uses[chunk.index()];
        let next = uses.partition_point(|&at| at <= self.cursor);
        Some(match uses.get(next) {
            Some(&at) => at as u64,
            None if self.is_rewritten(chunk) => u64::MAX,
            None => uses.first().map_or(u64::MAX, |&at| (at + self.trace.ops.len() as i64) as u64),
        })
    }

    /// Moves the cursor to the next occurrence of an operation; gives whether that is what the trace expects next.
    pub(super) fn advance(&mut self, unit: u32, phase: Phase) -> bool {
        let before = self.cursor;
        // A forward inside a backward recomputes for the backward that follows: the trace has no operation of its own for it.
        let recompute = self.in_backward && phase == Phase::Forward;
        let phase = if recompute { Phase::Backward } else { phase };
        let positions = &self.positions[unit as usize][phase as usize];
        let next = positions.partition_point(|&at| at <= before);
        if let Some(&at) = positions.get(next).or(positions.first()) {
            self.cursor = at - i64::from(recompute);
        }
        self.cursor == before + i64::from(!recompute)
    }
}
