//! Offloading of activations: out over the idle link in forward, back in backward ahead of their use.

use super::{Engine, KeepWaiting, wait_for_event};
use crate::activations::Away;
use crate::device::{ComputeStream, EventRef, Queue, Transfer};
use crate::error::{Error, Result};

impl Engine {
    /// Starts the copy of a storage that `unit` saved to the host, after everything enqueued on the compute stream; gives a ticket, or `None`
    /// if the activation region has no room. The storage stays alive and unchanged until [`Engine::activation_has_left`].
    pub fn send_activation(&self, unit: u32, src: u64, bytes: u64, stream: ComputeStream) -> Result<Option<u64>> {
        let mut guard = self.lock_started()?;
        let state = &mut *guard;
        if unit as usize >= state.scheduler.trace().units.len() || bytes == 0 {
            return Err(Error::Usage(format!("unit {unit} cannot send {bytes} bytes")));
        }
        let Some((offset, readers)) = state.activations.take(bytes) else { return Ok(None) };
        let copy = || -> Result<(Option<EventRef>, EventRef)> {
            self.shared.device.queue_wait(Queue::DeviceToHost, &self.shared.device.record_compute(stream)?)?;
            for reader in &readers {
                self.shared.device.queue_wait(Queue::DeviceToHost, reader)?;
            }
            let start = state.recorder.enabled().then(|| self.shared.device.record(Queue::DeviceToHost)).transpose()?;
            let dst = state.activations.address(offset) as *mut u8;
            self.shared.device.copy(Queue::DeviceToHost, &[Transfer { dst, src: src as *const u8, bytes: bytes as usize }])?;
            Ok((start, self.shared.device.record(Queue::DeviceToHost)?))
        };
        let outcome = copy();
        let (start, left) = self.shared.or_stop(state, outcome)?;
        let name = format!("activations {}", state.scheduler.trace().units[unit as usize].name);
        state.recorder.between("d2h", name, bytes, start, &left);
        state.gradients.d2h_bytes += bytes;
        Ok(Some(state.activations.keep(Away { offset, bytes, unit, left, back: None })))
    }

    /// Whether a storage is on the host; with `wait`, once it is.
    pub fn activation_has_left(&self, ticket: u64, wait: bool, stream: ComputeStream, keep_waiting: KeepWaiting<'_>) -> Result<bool> {
        let mut state = self.lock_started()?;
        let away = state.activations.get(ticket)?;
        let (left, unit) = (away.left.clone(), away.unit);
        let outcome = left.is_done();
        let done = self.shared.or_stop(&mut state, outcome)?;
        if done || !wait {
            return Ok(done);
        }
        drop(state);
        let before = self.shared.device.record_compute(stream)?;
        let start = self.shared.device.now_ns();
        let outcome = wait_for_event(&left, keep_waiting);
        let mut state = self.lock()?;
        if matches!(outcome, Err(Error::Interrupted)) {
            return outcome.map(|()| true);
        }
        self.shared.or_stop(&mut state, outcome)?;
        let name = format!("activations leaving {}", state.scheduler.trace().units[unit as usize].name);
        if self.shared.device.is_asynchronous() {
            // The device may well have work left.
            let end = self.shared.device.now_ns();
            state.recorder.span("thread wait", name, 0, start, end);
        } else {
            let after = self.shared.device.record_compute(stream)?;
            state.recorder.wait(&name, before, after);
        }
        Ok(true)
    }

    /// Starts the copy of a storage back to `dst`, after everything enqueued on the compute stream.
    pub fn fetch_activation(&self, ticket: u64, dst: u64, stream: ComputeStream) -> Result<()> {
        let mut guard = self.lock_started()?;
        let state = &mut *guard;
        let away = state.activations.get(ticket)?;
        let (offset, bytes, unit, left) = (away.offset, away.bytes, away.unit, away.left.clone());
        let copy = || -> Result<(Option<EventRef>, EventRef)> {
            // Whoever had the memory before may still be using it.
            self.shared.device.queue_wait(Queue::HostToDevice, &self.shared.device.record_compute(stream)?)?;
            self.shared.device.queue_wait(Queue::HostToDevice, &left)?;
            let start = state.recorder.enabled().then(|| self.shared.device.record(Queue::HostToDevice)).transpose()?;
            let src = state.activations.address(offset) as *const u8;
            self.shared.device.copy(Queue::HostToDevice, &[Transfer { dst: dst as *mut u8, src, bytes: bytes as usize }])?;
            Ok((start, self.shared.device.record(Queue::HostToDevice)?))
        };
        let outcome = copy();
        let (start, back) = self.shared.or_stop(state, outcome)?;
        let name = format!("activations {}", state.scheduler.trace().units[unit as usize].name);
        state.recorder.between("h2d", name, bytes, start, &back);
        state.gradients.h2d_bytes += bytes;
        state.activations.in_bytes += bytes;
        state.activations.get(ticket)?.back = Some(back);
        Ok(())
    }

    /// Makes the compute stream wait for the latest copy of a storage back to the device.
    pub fn await_activation(&self, ticket: u64, stream: ComputeStream, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        let mut state = self.lock_started()?;
        let away = state.activations.get(ticket)?;
        let (Some(back), unit) = (away.back.clone(), away.unit) else { return Ok(()) };
        let done = back.is_done();
        if self.shared.or_stop(&mut state, done)? {
            return Ok(());
        }
        let name = format!("activations {}", state.scheduler.trace().units[unit as usize].name);
        let before = self.shared.device.record_compute(stream)?;
        drop(state);
        let outcome = if self.shared.device.is_asynchronous() { Ok(()) } else { wait_for_event(&back, keep_waiting) };
        let outcome = outcome.and_then(|()| self.shared.device.compute_wait(stream, &back));
        let mut state = self.lock()?;
        if matches!(outcome, Err(Error::Interrupted)) {
            return outcome;
        }
        self.shared.or_stop(&mut state, outcome)?;
        let after = self.shared.device.record_compute(stream)?;
        state.recorder.wait(&name, before, after);
        Ok(())
    }

    /// Gives the host memory of a storage back.
    pub fn free_activation(&self, ticket: u64) -> Result<()> {
        self.lock()?.activations.free(ticket)
    }
}
