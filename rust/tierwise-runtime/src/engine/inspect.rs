//! Looking into the engine: counters, residencies, the timeline; and what checkpoints restore.

use super::Engine;
use crate::error::{Error, Result};
use tierwise_core::scheduler::Turn;

impl Engine {
    /// The limit of the gradient norm.
    pub fn max_norm(&self) -> Result<Option<f64>> {
        Ok(self.lock()?.scheduler.max_norm())
    }

    /// Changes the limit of the gradient norm for steps that are not decided yet.
    pub fn set_max_norm(&self, value: Option<f64>) -> Result<()> {
        self.lock()?.scheduler.set_max_norm(value);
        Ok(())
    }

    /// Steps taken by every parameter.
    pub fn param_steps(&self) -> Result<Vec<u64>> {
        Ok(self.lock()?.param_steps.clone())
    }

    /// Sets the steps taken by every parameter.
    pub fn set_param_steps(&self, steps: Vec<u64>) -> Result<()> {
        let mut state = self.lock()?;
        if steps.len() != state.param_steps.len() {
            return Err(Error::Usage(format!("{} step counts for {} parameters", steps.len(), state.param_steps.len())));
        }
        state.param_steps = steps;
        Ok(())
    }

    /// Counters as JSON.
    pub fn stats(&self) -> Result<serde_json::Value> {
        let mut guard = self.lock()?;
        let state = &mut *guard;
        let mut value = serde_json::to_value(state.scheduler.counters()).unwrap_or_default();
        let external: u64 = state.external.values().sum();
        value["device"] = self.shared.device.name().into();
        value["threads"] = self.shared.pool.threads().into();
        value["wait_ns"] = state.recorder.waited_ns().into();
        value["device_bytes"] = state.device_budget.used().into();
        value["device_peak_bytes"] = state.device_budget.peak().into();
        value["device_budget_bytes"] = state.device_budget.limit().into();
        value["device_static_bytes"] = (state.device_budget.used() - external).into();
        for (kind, bytes) in &state.external {
            value[format!("device_{kind}_bytes")] = (*bytes).into();
        }
        value["host_bytes"] = state.host_budget.used().into();
        value["host_peak_bytes"] = state.host_budget.peak().into();
        value["host_budget_bytes"] = state.host_budget.limit().into();
        value["slab_used_bytes"] = state.scheduler.slab_used().into();
        let (activations, peak) = state.activations.bytes();
        value["host_activation_bytes"] = activations.into();
        value["host_activation_peak_bytes"] = peak.into();
        value["activation_out_bytes"] = state.activations.out_bytes.into();
        value["activation_in_bytes"] = state.activations.in_bytes.into();
        value["h2d_bytes"] = state.gradients.h2d_bytes.into();
        value["d2h_bytes"] = state.gradients.d2h_bytes.into();
        value["states_visiting_chunks"] = state.streaming.away().into();
        value["states_visited_bytes"] = state.streaming.visited_bytes.into();
        if let Some(spill) = &state.spill {
            spill.describe(&mut value)?;
        }
        Ok(value)
    }

    /// Every chunk's residency, for tests and messages.
    pub fn residency(&self) -> Result<serde_json::Value> {
        Ok(self.lock()?.scheduler.snapshot())
    }

    /// Starts recording the scheduler's decisions afresh, or stops.
    pub fn record_decisions(&self, enabled: bool) -> Result<()> {
        self.lock()?.scheduler.record(enabled);
        Ok(())
    }

    /// Decisions recorded since this was asked last.
    pub fn decisions(&self) -> Result<Vec<Turn>> {
        Ok(self.lock()?.scheduler.take_record())
    }

    /// Starts recording afresh, or stops it.
    pub fn record_timeline(&self, enabled: bool) -> Result<()> {
        let mut state = self.lock()?;
        state.recorder.enable(enabled);
        let (now, device, host) = (self.shared.device.now_ns(), state.device_budget.used(), state.host_budget.used());
        state.recorder.sample("device bytes", now, device);
        state.recorder.sample("host bytes", now, host);
        Ok(())
    }

    /// What was recorded, as trace-event JSON.
    pub fn timeline(&self) -> Result<String> {
        let mut state = self.lock()?;
        Ok(state.recorder.timeline().to_perfetto())
    }
}
