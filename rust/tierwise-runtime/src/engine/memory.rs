//! The engine's memory: what is bound where, and who may take how much.

use super::shared::Shared;
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

    /// Moves a chunk to another class between steps; a streamed one becomes resident with the device class. The caller flushes before, and
    /// copies and binds what the new class needs.
    pub fn set_class(&self, chunk: ChunkId, class: OptimizerClass) -> Result<()> {
        let mut guard = self.lock()?;
        let state = &mut *guard;
        if chunk.index() >= state.places.len() {
            return Err(unknown_chunk(chunk));
        }
        let mut placement = state.scheduler.plan().chunks[chunk.index()];
        if class == OptimizerClass::Device && placement.home == ParamHome::Streamed && state.places[chunk.index()].1.param == 0 {
            let name = &state.scheduler.layout().chunks[chunk.index()].name;
            return Err(Error::Usage(format!("bind device memory for the parameters of `{name}` before it becomes resident")));
        }
        let old = host_sizes(state.scheduler.layout(), state.scheduler.plan(), chunk, placement);
        let accumulates = state.scheduler.plan().accumulation > 1;
        placement.class = class;
        if class == OptimizerClass::Device {
            placement.home = ParamHome::Resident;
        }
        let new = host_sizes(state.scheduler.layout(), state.scheduler.plan(), chunk, placement);
        let before = state.scheduler.plan().chunks[chunk.index()].class;
        // First what can be refused, then what is taken.
        state.scheduler.set_class(chunk, class)?;
        if before == class {
            return Ok(());
        }
        if class == OptimizerClass::Host {
            let places = match take_places(&mut state.regions, new) {
                Ok(places) => places,
                Err(error) => {
                    state.scheduler.set_class(chunk, before)?;
                    return Err(error);
                }
            };
            let layout = state.scheduler.layout();
            let freed = layout.state_bytes(chunk) + if accumulates { layout.grad_acc_bytes(chunk) } else { 0 };
            state.places[chunk.index()].0 = places;
            let device = &mut state.places[chunk.index()].1;
            if device.states != 0 {
                state.device_budget.release(freed);
            }
            device.states = 0;
            device.accumulator = 0;
        } else {
            let places = std::mem::take(&mut state.places[chunk.index()].0);
            let offsets = [places.param, places.master, places.exp_avg, places.exp_avg_sq, places.grad];
            for (offset, bytes) in offsets.into_iter().zip(old) {
                if let Some(offset) = offset {
                    state.regions.give(offset, bytes);
                }
            }
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
    let [param, master, exp_avg, exp_avg_sq, grad] = taken;
    Ok(HostPlaces { param, master, exp_avg, exp_avg_sq, grad })
}
