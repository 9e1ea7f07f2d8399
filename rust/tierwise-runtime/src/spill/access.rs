//! Reading and changing spilled states by name, for checkpoints and the first fill. Nothing larger than a piece is in memory for it.

use super::{PAYLOADS, spill};
use crate::engine::{Engine, KeepWaiting, Shared, State};
use crate::error::{Error, Result};
use std::sync::MutexGuard;
use tierwise_core::ChunkId;
use tierwise_core::staging::PieceId;

/// What to do with elements of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Copy them to this address.
    Read(u64),
    /// Replace them with what is at this address.
    Write(u64),
}

impl Engine {
    /// Copies `numel` elements from `first` of a spilled payload to or from the caller's memory. The caller flushes before, and keeps that
    /// memory alive and to itself until the call returns.
    pub fn spilled(
        &self,
        chunk: ChunkId,
        payload: &str,
        (first, numel): (u64, u64),
        access: Access,
        keep_waiting: KeepWaiting<'_>,
    ) -> Result<()> {
        let state = self.lock()?;
        let index = PAYLOADS.iter().position(|p| *p == payload);
        let element = match (&state.spill, index) {
            (Some(spill), Some(index)) => spill.elements.get(chunk.index()).map_or(0, |e| e[index]),
            _ => 0,
        };
        let plan = state.scheduler.plan().chunks.get(chunk.index());
        let total = plan.map_or(0, |&placed| state.scheduler.layout().spilled_numel(chunk, placed));
        if element == 0 || first.checked_add(numel).is_none_or(|end| end > total) {
            return Err(Error::Usage(format!("chunk {} has no {numel} elements from {first} of a spilled `{payload}`", chunk.0)));
        }
        if numel == 0 {
            return Ok(());
        }
        let pieces: Vec<PieceId> = state.spill.iter().flat_map(|s| s.pieces.overlapping(chunk, first, numel).collect::<Vec<_>>()).collect();
        let mut state = self.shared.wait_until(state, keep_waiting, |state| !state.spill.as_ref().is_some_and(super::Spill::is_busy))?;
        let spilled = spill(&mut state)?;
        spilled.accessing = true;
        spilled.staging.set_ahead(false);
        let outcome = self.access(state, pieces, index.unwrap_or(0), (first, numel), access, keep_waiting);
        let mut state = self.shared.lock();
        let spilled = spill(&mut state)?;
        spilled.accessing = false;
        // The next backward pass starts to read ahead again: another access would only read it all in vain.
        spilled.staging.rewind();
        spilled.staging.set_ahead(true);
        drop(state);
        self.shared.notify();
        outcome
    }

    fn access<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        pieces: Vec<PieceId>,
        payload: usize,
        (first, numel): (u64, u64),
        access: Access,
        keep_waiting: KeepWaiting<'_>,
    ) -> Result<()> {
        let shared: &Shared = &self.shared;
        let count = pieces.len();
        let mut transfers = Vec::new();
        spill(&mut state)?.staging.want(pieces, &mut transfers);
        shared.transfer(&mut state, &transfers)?;
        for _ in 0..count {
            let (guard, (id, buffer)) = shared.wait_for(state, keep_waiting, |_, state| Ok(spill(state)?.staging.take()))?;
            state = guard;
            let spilled = spill(&mut state)?;
            let piece = spilled.pieces.get(id);
            let (address, element) = spilled.payload(piece, buffer, payload);
            let from = first.max(piece.first);
            let bytes = ((first + numel).min(piece.first + piece.numel) - from) * element;
            let inside = address + (from - piece.first) * element;
            let outside = (from - first) * element;
            drop(state);
            // SAFETY: the buffer is lent to this call, in the slab that `shared` keeps alive; the caller promises the other end.
            unsafe {
                match access {
                    Access::Read(to) => std::ptr::copy_nonoverlapping(inside as *const u8, (to + outside) as *mut u8, bytes as usize),
                    Access::Write(src) => std::ptr::copy_nonoverlapping((src + outside) as *const u8, inside as *mut u8, bytes as usize),
                }
            }
            state = shared.lock();
            let mut transfers = Vec::new();
            spill(&mut state)?.staging.give_back(buffer, matches!(access, Access::Write(_)), &mut transfers)?;
            shared.transfer(&mut state, &transfers)?;
        }
        Ok(())
    }
}
