//! The engine's memory: what is bound where, and who may take how much.

use super::shared::{Shared, State};
use super::{Engine, unknown_chunk};
use crate::error::{Error, Result};
use crate::memory::{HostPlaces, Regions, host_sizes};
use std::sync::Arc;
use tierwise_core::ChunkId;
use tierwise_core::plan::{OptimizerClass, ParamHome};

impl Engine {
    /// Address and bytes of the host slab.
    pub fn host_slab(&self) -> (u64, u64) {
        (self.shared.host, self.shared.slab.bytes() as u64)
    }

    /// The process that the engine and its memory belong to.
    pub fn process(&self) -> u32 {
        self.owner
    }

    /// A handle that keeps the host slab mapped.
    pub fn keep_alive(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Offset of a payload in the host slab.
    pub fn host_offset(&self, chunk: ChunkId, payload: &str) -> Result<Option<u64>> {
        let state = self.lock()?;
        let places = &state.places.get(chunk.index()).ok_or_else(|| unknown_chunk(chunk))?.0;
        match payload {
            "param" => Ok(places.param),
            "master" => Ok(places.master),
            "exp_avg" => Ok(places.exp_avg),
            "exp_avg_sq" => Ok(places.exp_avg_sq),
            "grad" => Ok(places.grad),
            other => Err(Error::Usage(format!("unknown payload `{other}`; known are param, master, exp_avg, exp_avg_sq, grad"))),
        }
    }

    /// Gives device memory to a chunk.
    pub fn bind(&self, chunk: ChunkId, param: Option<u64>, states: Option<u64>, accumulator: Option<u64>) -> Result<()> {
        let mut state = self.lock()?;
        if chunk.index() >= state.places.len() {
            return Err(unknown_chunk(chunk));
        }
        let layout = state.scheduler.layout();
        let name = layout.chunks[chunk.index()].name.clone();
        let sizes = [layout.param_bytes(chunk), layout.state_bytes(chunk), layout.grad_acc_bytes(chunk)];
        for ((address, bytes), what) in [param, states, accumulator].into_iter().zip(sizes).zip(["param", "states", "accumulator"]) {
            let Some(address) = address else { continue };
            let state = &mut *state;
            let places = &mut state.places[chunk.index()].1;
            let place = match what {
                "param" => &mut places.param,
                "states" => &mut places.states,
                _ => &mut places.accumulator,
            };
            if *place == 0 {
                state.device_budget.reserve(bytes, &format!("{what} of `{name}`"))?;
            }
            *place = address;
        }
        Ok(())
    }

    /// Gives the slab that streamed chunks pass through.
    pub fn bind_slab(&self, address: u64) -> Result<()> {
        let mut state = self.lock()?;
        let bytes = state.scheduler.plan().stream_slab_bytes;
        if state.slab_address == 0 {
            state.device_budget.reserve(bytes, "the streaming slab")?;
        }
        state.slab_address = address;
        Ok(())
    }

    /// Gives the buffers that the states of streamed chunks pass through.
    pub fn bind_staging(&self, address: u64) -> Result<()> {
        let mut state = self.lock()?;
        let bytes = state.scheduler.plan().device.staging;
        if state.streaming.address == 0 {
            state.device_budget.reserve(bytes, "staging of optimizer states")?;
        }
        state.streaming.address = address;
        Ok(())
    }

    /// Moves a chunk to another class between steps; streamed parameters become resident with a class that is stepped on the device. The
    /// caller flushes before, and copies and binds what the new class needs.
    pub fn set_class(&self, chunk: ChunkId, class: OptimizerClass) -> Result<()> {
        let mut guard = self.lock()?;
        let state = &mut *guard;
        if chunk.index() >= state.places.len() {
            return Err(unknown_chunk(chunk));
        }
        let layout = state.scheduler.layout();
        let name = &layout.chunks[chunk.index()].name;
        let mut placement = state.scheduler.plan().chunks[chunk.index()];
        let before = placement.class;
        if class.steps_on_device() && placement.home == ParamHome::Streamed && state.places[chunk.index()].1.param == 0 {
            return Err(Error::Usage(format!("bind device memory for the parameters of `{name}` before it becomes resident")));
        }
        if let (OptimizerClass::Streamed, Some(problem)) = (class, state.streaming.missing_for(layout, chunk)) {
            return Err(Error::Usage(problem));
        }
        if state.streaming.chunk_is_away(chunk)? {
            return Err(Error::Usage(format!("the states of `{name}` are still on the device; call flush before its class changes")));
        }
        let old = host_sizes(layout, state.scheduler.plan(), chunk, placement);
        placement.class = class;
        if class.steps_on_device() {
            placement.home = ParamHome::Resident;
        }
        let new = host_sizes(layout, state.scheduler.plan(), chunk, placement);
        // First what can be refused, then what is taken.
        state.scheduler.set_class(chunk, class)?;
        if before == class {
            return Ok(());
        }
        let State { regions, places, scheduler, device_budget, .. } = state;
        let (host, device) = &mut places[chunk.index()];
        if let Err(error) = change_places(regions, host, old, new) {
            scheduler.set_class(chunk, before)?;
            return Err(error);
        }
        if class != OptimizerClass::Device && device.states != 0 {
            device_budget.release(scheduler.layout().state_bytes(chunk));
            device.states = 0;
        }
        if class == OptimizerClass::Host && device.accumulator != 0 {
            device_budget.release(scheduler.layout().grad_acc_bytes(chunk));
            device.accumulator = 0;
        }
        Ok(())
    }

    /// Counts device bytes that live outside the engine.
    pub fn account(&self, kind: &str, delta: i64) -> Result<()> {
        let mut guard = self.lock()?;
        let state = &mut *guard;
        let used = state.external.get(kind).copied().unwrap_or(0);
        if delta >= 0 {
            state.device_budget.reserve(delta as u64, kind)?;
            state.external.insert(kind.to_owned(), used + delta as u64);
        } else {
            let back = delta.unsigned_abs();
            let left = used.checked_sub(back).ok_or_else(|| Error::Usage(format!("{kind}: {back} bytes given back, {used} were taken")))?;
            state.device_budget.release(back);
            state.external.insert(kind.to_owned(), left);
        }
        if state.recorder.enabled() {
            let now = self.shared.device.now_ns();
            let (kind, used) = (format!("device {kind} bytes"), state.external[kind]);
            state.recorder.sample(&kind, now, used);
            let total = state.device_budget.used();
            state.recorder.sample("device bytes", now, total);
        }
        Ok(())
    }
}

/// Regions for payloads of other sizes; one that keeps its size stays where it is, with what is in it.
fn change_places(regions: &mut Regions, places: &mut HostPlaces, old: [u64; 5], new: [u64; 5]) -> Result<()> {
    let changed = |sizes: [u64; 5]| std::array::from_fn(|i| if old[i] == new[i] { 0 } else { sizes[i] });
    let taken = take_places(regions, changed(new))?.offsets();
    let gone: [u64; 5] = changed(old);
    let had = places.offsets();
    for (offset, bytes) in had.into_iter().zip(gone) {
        if let Some(offset) = offset.filter(|_| bytes > 0) {
            regions.give(offset, bytes);
        }
    }
    *places = HostPlaces::from_offsets(std::array::from_fn(|i| if old[i] == new[i] { had[i] } else { taken[i] }));
    Ok(())
}

pub(super) fn take_places(regions: &mut Regions, sizes: [u64; 5]) -> Result<HostPlaces> {
    let mut taken = [None; 5];
    for at in 0..taken.len() {
        if sizes[at] == 0 {
            continue;
        }
        match regions.take(sizes[at]) {
            Ok(offset) => taken[at] = Some(offset),
            Err(error) => {
                for (offset, bytes) in taken.into_iter().zip(sizes) {
                    if let Some(offset) = offset {
                        regions.give(offset, bytes);
                    }
                }
                return Err(error);
            }
        }
    }
    Ok(HostPlaces::from_offsets(taken))
}
