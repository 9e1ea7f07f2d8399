//! One clock for events on the device and for the host: events timed against a base event that is replaced every few seconds.
//!
//! The driver gives the time between two events as `f32` milliseconds: exact to half a microsecond for 8 seconds, to 4 for a minute.

use super::driver::Context;
use super::lock;
use crate::error::Result;
use cudarc::driver::sys;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const BASE_AGE: Duration = Duration::from_secs(4);
/// An idle stream passes an event in about 10 us; one that shares a hardware queue with a busy stream may not.
const PATIENCE: Duration = Duration::from_micros(200);
const RETRY: Duration = Duration::from_millis(250);

/// A reached event and its time on the device's clock.
pub(super) struct Base {
    pub(super) event: Handle,
    offset_ns: u64,
}

/// A raw event. Driver events may be used from any thread.
#[derive(Clone, Copy)]
pub(super) struct Handle(pub(super) sys::CUevent);

// SAFETY: the driver locks; who owns the event and may reuse it is decided by the pool and the event's one owner.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// Events that nobody uses; creating one costs more than recording it.
#[derive(Default)]
pub(super) struct EventPool(Mutex<Vec<Handle>>);

impl EventPool {
    /// The caller has entered the context.
    pub(super) fn take(&self, context: &Context) -> Result<Handle> {
        if let Some(event) = lock(&self.0).pop() {
            return Ok(event);
        }
        let mut event = std::ptr::null_mut();
        // A thread that waits sleeps: the CPU optimizer needs the cores.
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        // SAFETY: the out pointer is a live local variable.
        context.check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
        Ok(Handle(event))
    }

    pub(super) fn give_back(&self, event: Handle) {
        lock(&self.0).push(event);
    }

    /// The caller has entered the context and is the pool's last user.
    pub(super) fn destroy(&self) {
        for Handle(event) in lock(&self.0).drain(..) {
            // SAFETY: created by `take`; whoever had it gave it back.
            unsafe { sys::cuEventDestroy_v2(event) };
        }
    }
}

pub(super) struct Clock {
    state: Mutex<State>,
    last_now_ns: AtomicU64,
}

struct State {
    base: Arc<Base>,
    /// When the base was reached, on the host.
    anchor: Instant,
    renew_at: Instant,
}

impl Clock {
    /// Starts the clock at 0. The caller has entered the context.
    pub(super) fn start(context: &Context, events: &EventPool, stream: sys::CUstream) -> Result<Clock> {
        let event = events.take(context)?;
        let before = Instant::now();
        // SAFETY: event and stream are alive and of the entered context.
        unsafe {
            context.check("cuEventRecord", sys::cuEventRecord(event.0, stream))?;
            context.check("cuEventSynchronize", sys::cuEventSynchronize(event.0))?;
        }
        let anchor = before + before.elapsed() / 2;
        let state = State { base: Arc::new(Base { event, offset_ns: 0 }), anchor, renew_at: anchor + BASE_AGE };
        Ok(Clock { state: Mutex::new(state), last_now_ns: AtomicU64::new(0) })
    }

    /// Host time on the device's clock; never goes back, although the two crystals drift apart between bases.
    pub(super) fn now_ns(&self) -> u64 {
        let now = {
            let state = lock(&self.state);
            state.base.offset_ns + state.anchor.elapsed().as_nanos() as u64
        };
        self.last_now_ns.fetch_max(now, Ordering::Relaxed).max(now)
    }

    /// The base for an event that is recorded now. The caller has entered the context.
    pub(super) fn base(&self, context: &Context, events: &EventPool, stream: sys::CUstream) -> Result<Arc<Base>> {
        let mut state = lock(&self.state);
        if Instant::now() < state.renew_at {
            return Ok(Arc::clone(&state.base));
        }
        let event = events.take(context)?;
        let before = Instant::now();
        // SAFETY: event and stream are alive and of the entered context.
        context.check("cuEventRecord", unsafe { sys::cuEventRecord(event.0, stream) })?;
        let reached = loop {
            // SAFETY: as above.
            match unsafe { sys::cuEventQuery(event.0) } {
                sys::CUresult::CUDA_ERROR_NOT_READY if before.elapsed() < PATIENCE => std::hint::spin_loop(),
                sys::CUresult::CUDA_ERROR_NOT_READY => break None,
                code => {
                    context.check("cuEventQuery", code)?;
                    break elapsed_ns(state.base.event, event);
                }
            }
        };
        let took = before.elapsed();
        if let Some(elapsed) = reached {
            let base = Arc::new(Base { event, offset_ns: state.base.offset_ns + elapsed });
            release(std::mem::replace(&mut state.base, base), events);
            state.anchor = before + took / 2;
            state.renew_at = state.anchor + BASE_AGE;
        } else {
            events.give_back(event);
            state.renew_at = before + RETRY;
        }
        Ok(Arc::clone(&state.base))
    }

    /// Gives the current base's event back, at the end.
    pub(super) fn stop(self, events: &EventPool) {
        let state = self.state.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        release(state.base, events);
    }
}

/// Drops one use of a base; the last one gives its event back.
pub(super) fn release(base: Arc<Base>, events: &EventPool) {
    if let Some(base) = Arc::into_inner(base) {
        events.give_back(base.event);
    }
}

/// Time of a reached event on the device's clock; `None` if it has not been reached.
pub(super) fn time_ns(base: &Base, event: Handle) -> Option<u64> {
    elapsed_ns(base.event, event).map(|elapsed| base.offset_ns + elapsed)
}

fn elapsed_ns(from: Handle, to: Handle) -> Option<u64> {
    let mut milliseconds = 0.0_f32;
    // SAFETY: both events are alive and recorded; the caller has entered the context.
    let code = unsafe { sys::cuEventElapsedTime(&raw mut milliseconds, from.0, to.0) };
    // Engines stamp the same timer with small skews, so a time just before the base counts as the base's.
    (code == sys::CUresult::CUDA_SUCCESS).then(|| (f64::from(milliseconds.max(0.0)) * 1e6).round() as u64)
}
