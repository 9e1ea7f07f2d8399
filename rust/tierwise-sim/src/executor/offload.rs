//! Offloaded activations: which units' saved bytes leave in forward and come back in backward, and what waits for room in the window.
//!
//! The counterpart of Python's `gemini/offload.py`, one storage per forward of an offloaded unit; `H` stands for its copy to the host.

use std::collections::VecDeque;
use tierwise_core::plan::{ActivationPlan, Plan};
use tierwise_core::trace::Trace;

/// Where a storage is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// On the device for good: nothing is offloaded, or the host had no room.
    Kept,
    /// On the device until its copy to the host is done.
    Leaving,
    /// The same, but backward wants it: it stays.
    Reclaimed,
    /// In host memory only.
    Out,
    /// Back on the device, or on its way there.
    Back,
    /// Nobody needs it any more.
    Freed,
}

#[derive(Debug, Clone)]
struct Visit<H> {
    unit: u32,
    state: State,
    copy: Option<H>,
}

/// All offloaded activations of a micro-batch.
#[derive(Debug, Clone)]
pub struct Offload<H> {
    /// Per unit: bytes that its storage takes in the window, in host memory and on the links, and those that it takes on the device.
    sizes: Vec<Option<[u64; 2]>>,
    window_bytes: u64,
    /// Bytes of the window in use, and of the device.
    live: [u64; 2],
    /// One per forward of any unit, in their order.
    visits: Vec<Visit<H>>,
    leaving: VecDeque<usize>,
    /// Bytes of the host's region, and of those in use.
    region: [u64; 2],
}

impl<H: Clone> Offload<H> {
    /// Of a plan; none if it offloads nothing.
    pub fn new(trace: &Trace, plan: &Plan) -> Option<Self> {
        let sizes: Vec<_> = trace
            .units
            .iter()
            .zip(&plan.activations)
            .map(|(unit, kept)| (*kept == ActivationPlan::Offload).then_some([unit.offload_host_bytes, unit.offload_bytes]))
            .collect();
        let window_bytes = plan.offload_window_bytes;
        let region = [plan.host.activations, 0];
        let (live, visits, leaving) = ([0; 2], Vec::new(), VecDeque::new());
        sizes.iter().any(Option::is_some).then(|| Offload { sizes, window_bytes, live, visits, leaving, region })
    }

    /// Whether a unit's activations are offloaded.
    pub fn has(&self, unit: u32) -> bool {
        self.sizes[unit as usize].is_some()
    }

    /// Bytes of a unit's storage on the links.
    pub fn bytes(&self, unit: u32) -> u64 {
        self.sizes[unit as usize].map_or(0, |[bytes, _]| bytes)
    }

    /// Device bytes of all storages.
    pub fn device_bytes(&self) -> u64 {
        self.live[1]
    }

    /// Device bytes that copies to the host will free.
    pub fn leaving_bytes(&self) -> u64 {
        let leaving = self.leaving.iter().map(|&at| &self.visits[at]).filter(|visit| visit.state != State::Reclaimed);
        leaving.map(|visit| self.sizes[visit.unit as usize].map_or(0, |[_, device]| device)).sum()
    }

    /// A micro-batch begins: storages of the one before that still leave are all that is left of it.
    pub fn begin(&mut self) {
        self.visits = self.leaving.iter().map(|&at| self.visits[at].clone()).collect();
        self.leaving = (0..self.visits.len()).collect();
    }

    /// Takes storages off the device whose copies have ended.
    pub fn settle(&mut self, has_left: impl Fn(&H) -> bool) {
        while let Some(&at) = self.leaving.front() {
            if !self.visits[at].copy.as_ref().is_some_and(&has_left) {
                return;
            }
            self.leaving.pop_front();
            match self.visits[at].state {
                State::Reclaimed => self.visits[at].state = State::Back,
                State::Freed => {
                    self.count(self.visits[at].unit, false);
                    self.region[1] -= self.bytes(self.visits[at].unit);
                }
                _ => {
                    self.count(self.visits[at].unit, false);
                    self.visits[at].state = State::Out;
                }
            }
        }
    }

    /// The copy that a unit's forward has to wait for before it saves anything.
    pub fn room_for(&self, unit: u32) -> Option<&H> {
        let full = self.live[0] + self.bytes(unit) > self.window_bytes;
        self.leaving.front().filter(|_| full).and_then(|&at| self.visits[at].copy.as_ref())
    }

    /// A unit's forward saves.
    pub fn save(&mut self, unit: u32) {
        self.count(unit, true);
    }

    /// Whether what a unit's forward saved can be sent: the region may still hold what the micro-batch before left there.
    pub fn may_send(&self, unit: u32) -> bool {
        let [bytes, used] = self.region;
        self.has(unit) && used + self.bytes(unit) <= bytes
    }

    /// A unit's forward is over; `copy` is what was enqueued if something was sent.
    pub fn leave(&mut self, unit: u32, copy: Option<H>) {
        let state = if copy.is_some() {
            self.region[1] += self.bytes(unit);
            self.leaving.push_back(self.visits.len());
            State::Leaving
        } else {
            // What stays takes nothing of the window.
            self.live[0] -= self.bytes(unit);
            State::Kept
        };
        self.visits.push(Visit { unit, state, copy });
    }

    /// A unit's backward is entered: what it and the units before it saved stays where it is still there. Gives the others in the order in
    /// which they are wanted back, each with whether it is this unit's own.
    pub fn enter_backward(&mut self, unit: u32) -> Vec<usize> {
        let mut wanted = Vec::new();
        let mut reach = 0;
        let Some(own) = self.own(unit) else { return wanted };
        for at in (0..=own).rev() {
            if reach > self.window_bytes {
                break;
            }
            match self.visits[at].state {
                State::Leaving => self.visits[at].state = State::Reclaimed,
                State::Out => {
                    reach += self.bytes(self.visits[at].unit);
                    wanted.push(at);
                }
                State::Kept | State::Reclaimed | State::Back | State::Freed => {}
            }
        }
        wanted
    }

    /// The unit of a storage.
    pub fn unit(&self, at: usize) -> u32 {
        self.visits[at].unit
    }

    /// Whether what a unit saved is in host memory only.
    pub fn is_out(&self, unit: u32) -> bool {
        self.own(unit).is_some_and(|at| self.visits[at].state == State::Out)
    }

    /// Asks for a storage back if the window has room for it; gives its unit and the copy that took it away.
    pub fn fetch_ahead(&mut self, at: usize) -> Option<(u32, H)> {
        if self.live[0] + self.bytes(self.visits[at].unit) > self.window_bytes {
            return None;
        }
        self.fetch(at)
    }

    fn fetch(&mut self, at: usize) -> Option<(u32, H)> {
        let Visit { unit, state, copy } = self.visits[at].clone();
        if state != State::Out {
            return None;
        }
        self.count(unit, true);
        self.visits[at].state = State::Back;
        Some((unit, copy?))
    }

    /// What a unit's backward needs before it can begin.
    pub fn need(&mut self, unit: u32) -> Need<H> {
        let Some(at) = self.own(unit).filter(|_| self.is_out(unit)) else { return Need::Nothing };
        if let Some(copy) = self.room_for(unit) {
            return Need::Wait(copy.clone());
        }
        match self.fetch(at) {
            Some((unit, copy)) => Need::Fetch(unit, copy),
            None => Need::Nothing,
        }
    }

    /// A unit's backward is over: what it saved is gone, at the latest when its copy to the host is done.
    pub fn leave_backward(&mut self, unit: u32) {
        let Some(at) = self.own(unit) else { return };
        match self.visits[at].state {
            State::Back => {
                self.count(unit, false);
                self.region[1] -= self.bytes(unit);
            }
            State::Out => self.region[1] -= self.bytes(unit),
            State::Kept => self.live[1] -= self.sizes[unit as usize].map_or(0, |[_, device]| device),
            // They go with their copy.
            State::Leaving | State::Reclaimed | State::Freed => {}
        }
        self.visits[at].state = State::Freed;
    }

    /// The latest visit of a unit that is still needed.
    fn own(&self, unit: u32) -> Option<usize> {
        self.visits.iter().rposition(|visit| visit.unit == unit && visit.state != State::Freed)
    }

    fn count(&mut self, unit: u32, more: bool) {
        let Some(sizes) = self.sizes[unit as usize] else { return };
        for (live, bytes) in self.live.iter_mut().zip(sizes) {
            *live = if more { *live + bytes } else { *live - bytes };
        }
    }
}

/// What a backward needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Need<H> {
    /// Nothing that is not there or on its way.
    Nothing,
    /// This copy to the host has to be done first.
    Wait(H),
    /// A unit's storage has to come back now, after this copy.
    Fetch(u32, H),
}
