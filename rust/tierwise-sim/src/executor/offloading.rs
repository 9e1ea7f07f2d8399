//! Offloaded activations on the machine's lanes: the counterpart of the runtime's `engine/activations.rs`.

use super::machine::{Lane, Task, Token};
use super::offload::{Need, Offload, PARTS};
use super::stalls::Cause;
use super::{Run, SimError};
use tierwise_core::OpId;
use tierwise_core::trace::Phase;

impl Run<'_> {
    /// Device bytes of what a unit saved that leave the device.
    pub(super) fn offloaded_bytes(&self, unit: u32) -> u64 {
        let offloaded = self.offload.as_ref().is_some_and(|offload| offload.has(unit));
        if offloaded { self.setup.trace.units[unit as usize].offload_bytes } else { 0 }
    }

    /// Takes activations off the device that are on the host by now.
    pub(super) fn settle(&mut self) {
        let machine = &self.machine;
        if let Some(offload) = &mut self.offload {
            offload.settle(|copy| machine.ended_ns(*copy).is_some());
        }
        self.count_offloaded();
    }

    /// Brings the device's bytes up to date after some were freed.
    fn count_offloaded(&mut self) {
        let live = self.offload.as_ref().map_or(0, Offload::device_bytes);
        if live < self.offloaded_live {
            let freed = self.offloaded_live - live;
            self.device.release(freed);
            self.activations -= freed;
            self.offloaded_live = live;
            self.sample_device();
        }
    }

    /// Takes device bytes for a storage.
    fn take_offloaded(&mut self, unit: u32, part: u64, op: OpId) -> Result<(), SimError> {
        let bytes = self.offload.as_ref().map_or(0, |offload| offload.on_device(unit, part));
        self.reserve(bytes, 0, op)?;
        self.offloaded_live += bytes;
        Ok(())
    }

    /// Enqueues a part of an operation's work once it has room for what it saves, or once what it saved comes back.
    pub(super) fn work_offloading(&mut self, op: OpId, part: u64) -> Result<Option<Cause>, SimError> {
        let (unit, phase) = self.op(op);
        self.settle();
        // What was saved last is used first.
        let storage = if phase == Phase::Forward { part } else { PARTS - 1 - part };
        let Some(offload) = &self.offload else { return Ok(None) };
        let moves = phase == Phase::Forward || offload.is_out(unit, storage);
        let moved = if moves { offload.on_device(unit, storage) } else { 0 };
        let (saved, born) = if part == 0 { self.needs(op) } else { (0, 0) };
        // What came back ahead of its turn may have taken the room that there was when the operation was entered.
        if self.waits_for_memory(saved + born + moved) {
            return Ok(Some(Cause::Memory));
        }
        let Some(offload) = &mut self.offload else { return Ok(None) };
        if !offload.has(unit) {
            return self.work(op, Vec::new()).map(|()| None);
        }
        if phase == Phase::Forward {
            if offload.room_for(unit, storage).is_some() {
                return Ok(Some(Cause::Activations));
            }
            offload.save(unit, storage);
            self.take_offloaded(unit, storage, op)?;
            return self.work_part(op, part, Vec::new()).map(|()| None);
        }
        match offload.need(unit, storage) {
            Need::Nothing => {}
            Need::Wait(_) => return Ok(Some(Cause::Activations)),
            Need::Fetch(left) => self.fetch_activations(unit, storage, left, op)?,
        }
        let back = self.activations_back.remove(&(unit, storage)).filter(|back| self.machine.ended_ns(*back).is_none());
        self.fetch_ahead(op)?;
        self.work_part(op, part, back.map(|back| (back, Cause::Activations)).into_iter().collect())?;
        if let Some(offload) = &mut self.offload {
            offload.used(unit, storage);
        }
        self.count_offloaded();
        Ok(None)
    }

    /// A backward is entered: activations come back as far ahead as the window allows.
    pub(super) fn ask_back(&mut self, op: OpId) -> Result<(), SimError> {
        let (unit, _) = self.op(op);
        self.settle();
        if let Some(offload) = &mut self.offload {
            offload.enter_backward(unit);
        }
        self.fetch_ahead(op)
    }

    /// What is wanted comes back as far as there is room; what has none now comes when it is asked for.
    fn fetch_ahead(&mut self, op: OpId) -> Result<(), SimError> {
        loop {
            let room = self.room();
            let next = self.offload.as_mut().and_then(|offload| offload.fetch_ahead(|bytes| bytes <= room));
            let Some((unit, part, left)) = next else { return Ok(()) };
            self.fetch_activations(unit, part, left, op)?;
        }
    }

    fn fetch_activations(&mut self, unit: u32, part: u64, left: Token, op: OpId) -> Result<(), SimError> {
        self.take_offloaded(unit, part, op)?;
        // Whoever had the memory before may still be using it.
        let mut waits: Vec<Token> = self.machine.record(Lane::Compute).into_iter().collect();
        waits.push(left);
        let back = self.copy_activations(Lane::HostToDevice, unit, part, waits);
        self.activations_back.insert((unit, part), back);
        Ok(())
    }

    /// An operation's work is enqueued: what a forward saved is sent.
    pub(super) fn leave_offloading(&mut self, unit: u32, phase: Phase) {
        if phase == Phase::Backward {
            self.settle();
            return;
        }
        let sends = self.offload.as_ref().is_some_and(|offload| offload.has(unit));
        for part in 0..if sends { PARTS } else { 0 } {
            self.settle();
            let copy = self.offload.as_ref().is_some_and(|offload| offload.may_send(unit, part)).then(|| {
                let waits = self.machine.record(Lane::Compute).into_iter().collect();
                self.copy_activations(Lane::DeviceToHost, unit, part, waits)
            });
            if let Some(offload) = &mut self.offload {
                offload.leave(unit, part, copy);
            }
        }
    }

    fn copy_activations(&mut self, lane: Lane, unit: u32, part: u64, mut waits: Vec<Token>) -> Token {
        if lane == Lane::HostToDevice {
            waits.append(&mut self.link_waits);
        }
        let bytes = self.offload.as_ref().map_or(0, |offload| offload.bytes(unit, part));
        let name = format!("activations {}", self.setup.trace.units[unit as usize].name);
        self.machine.push(lane, Task { name, bytes, work: bytes as f64, waits, on_start: Vec::new(), on_end: Vec::new() })
    }
}
