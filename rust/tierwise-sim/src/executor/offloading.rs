//! Offloaded activations on the machine's lanes: the counterpart of the runtime's `engine/activations.rs`.

use super::machine::{Lane, Task, Token};
use super::offload::{Need, Offload};
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

    /// Takes device bytes for activations.
    fn take_offloaded(&mut self, unit: u32, op: OpId) -> Result<(), SimError> {
        self.reserve(self.offloaded_bytes(unit), 0, op)?;
        self.offloaded_live += self.offloaded_bytes(unit);
        Ok(())
    }

    /// Enqueues an operation's work once it has room for what it saves, or once what it saved comes back.
    pub(super) fn work_offloading(&mut self, op: OpId) -> Result<Option<Cause>, SimError> {
        let (unit, phase) = self.op(op);
        self.settle();
        let (saved, born) = self.needs(op);
        let moved = if phase == Phase::Forward || self.is_away(unit) { self.offloaded_bytes(unit) } else { 0 };
        // What came back ahead of its turn may have taken the room that there was when the operation was entered.
        if self.waits_for_memory(saved + born + moved) {
            return Ok(Some(Cause::Memory));
        }
        let offloaded = self.offload.as_ref().is_some_and(|offload| offload.has(unit));
        if !offloaded {
            return self.work(op, Vec::new()).map(|()| None);
        }
        let Some(offload) = &mut self.offload else { return Ok(None) };
        if phase == Phase::Forward {
            if offload.room_for(unit).is_some() {
                return Ok(Some(Cause::Activations));
            }
            offload.save(unit);
            self.take_offloaded(unit, op)?;
            return self.work(op, Vec::new()).map(|()| None);
        }
        match offload.need(unit) {
            Need::Nothing => {}
            Need::Wait(_) => return Ok(Some(Cause::Activations)),
            Need::Fetch(unit, left) => self.fetch_activations(unit, left, op)?,
        }
        let back = self.activations_back[unit as usize].take().filter(|back| self.machine.ended_ns(*back).is_none());
        self.work(op, back.map(|back| (back, Cause::Activations)).into_iter().collect()).map(|()| None)
    }

    /// A backward is entered: activations come back as far ahead as the window allows.
    pub(super) fn ask_back(&mut self, op: OpId) -> Result<(), SimError> {
        let (unit, _) = self.op(op);
        self.settle();
        let Some(offload) = &mut self.offload else { return Ok(()) };
        for at in offload.enter_backward(unit) {
            // What has no room now comes when it is asked for.
            let unit = self.offload.as_ref().map_or(unit, |offload| offload.unit(at));
            if self.offloaded_bytes(unit) > self.room() {
                break;
            }
            let Some((unit, left)) = self.offload.as_mut().and_then(|offload| offload.fetch_ahead(at)) else { break };
            self.fetch_activations(unit, left, op)?;
        }
        Ok(())
    }

    fn is_away(&self, unit: u32) -> bool {
        self.offload.as_ref().is_some_and(|offload| offload.is_out(unit))
    }

    fn fetch_activations(&mut self, unit: u32, left: Token, op: OpId) -> Result<(), SimError> {
        self.take_offloaded(unit, op)?;
        // Whoever had the memory before may still be using it.
        let mut waits: Vec<Token> = self.machine.record(Lane::Compute).into_iter().collect();
        waits.push(left);
        self.activations_back[unit as usize] = Some(self.copy_activations(Lane::HostToDevice, unit, waits));
        Ok(())
    }

    /// An operation's work is enqueued: what a forward saved is sent, what a backward read is gone.
    pub(super) fn leave_offloading(&mut self, unit: u32, phase: Phase) {
        if self.offload.is_none() {
            return;
        }
        if phase == Phase::Backward {
            self.settle();
            if let Some(offload) = &mut self.offload {
                offload.leave_backward(unit);
            }
            self.count_offloaded();
            return;
        }
        let sends = self.offload.as_ref().is_some_and(|offload| offload.has(unit));
        if sends {
            self.settle();
        }
        let copy = self.offload.as_ref().is_some_and(|offload| offload.may_send(unit)).then(|| {
            let waits = self.machine.record(Lane::Compute).into_iter().collect();
            self.copy_activations(Lane::DeviceToHost, unit, waits)
        });
        if let Some(offload) = &mut self.offload {
            offload.leave(unit, copy);
        }
    }

    fn copy_activations(&mut self, lane: Lane, unit: u32, waits: Vec<Token>) -> Token {
        let bytes = self.offload.as_ref().map_or(0, |offload| offload.bytes(unit));
        let name = format!("activations {}", self.setup.trace.units[unit as usize].name);
        self.machine.push(lane, Task { name, bytes, work: bytes as f64, waits, on_start: Vec::new(), on_end: Vec::new() })
    }
}
