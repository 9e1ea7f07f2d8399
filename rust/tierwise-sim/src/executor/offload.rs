//! Offloaded activations: which units' saved bytes leave in forward and come back in backward, and what waits for room in the window.
//!
//! The counterpart of Python's `gemini/offload.py`, [`PARTS`] storages per forward of an offloaded unit; `H` stands for its copy to the host.

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

/// Storages of a unit, of equal size: enough that they leave, come back and are used one while others move, as the dozen of a real layer do.
pub const PARTS: u64 = 8;

/// What of a whole belongs to a part; all parts together are the whole.
pub fn part_of(whole: u64, part: u64) -> u64 {
    whole * (part + 1) / PARTS - whole * part / PARTS
}

#[derive(Debug, Clone)]
struct Visit<H> {
    unit: u32,
    part: u64,
    state: State,
    copy: Option<H>,
}

/// All offloaded activations of a micro-batch.
#[derive(Debug, Clone)]
pub struct Offload<H> {
    /// Per unit: bytes that its storages take in the window, in host memory and on the links, and those that they take on the device.
    sizes: Vec<Option<[u64; 2]>>,
    window_bytes: u64,
    /// Bytes of the window in use, and of the device.
    live: [u64; 2],
    /// One per storage of any unit's forward, in their order.
    visits: Vec<Visit<H>>,
    leaving: VecDeque<usize>,
    /// What is wanted back, in its order.
    ahead: VecDeque<usize>,
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
        let (live, visits, leaving, ahead) = ([0; 2], Vec::new(), VecDeque::new(), VecDeque::new());
        sizes.iter().any(Option::is_some).then(|| Offload { sizes, window_bytes, live, visits, leaving, ahead, region })
    }

    /// Whether a unit's activations are offloaded.
    pub fn has(&self, unit: u32) -> bool {
        self.sizes[unit as usize].is_some()
    }

    /// Bytes of a unit's storage on the links.
    pub fn bytes(&self, unit: u32, part: u64) -> u64 {
        self.sizes[unit as usize].map_or(0, |[bytes, _]| part_of(bytes, part))
    }

    /// The same on the device.
    pub fn on_device(&self, unit: u32, part: u64) -> u64 {
        self.sizes[unit as usize].map_or(0, |[_, bytes]| part_of(bytes, part))
    }

    /// Device bytes of all storages.
    pub fn device_bytes(&self) -> u64 {
        self.live[1]
    }

    /// Device bytes that copies to the host will free.
    pub fn leaving_bytes(&self) -> u64 {
        let leaving = self.leaving.iter().map(|&at| &self.visits[at]).filter(|visit| visit.state != State::Reclaimed);
        leaving.map(|visit| self.on_device(visit.unit, visit.part)).sum()
    }

    /// A micro-batch begins: storages of the one before that still leave are all that is left of it.
    pub fn begin(&mut self) {
        self.visits = self.leaving.iter().map(|&at| self.visits[at].clone()).collect();
        self.leaving = (0..self.visits.len()).collect();
        self.ahead.clear();
    }

    /// Takes storages off the device whose copies have ended.
    pub fn settle(&mut self, has_left: impl Fn(&H) -> bool) {
        while let Some(&at) = self.leaving.front() {
            if !self.visits[at].copy.as_ref().is_some_and(&has_left) {
                return;
            }
            self.leaving.pop_front();
            let Visit { unit, part, state, .. } = self.visits[at];
            match state {
                State::Reclaimed => self.visits[at].state = State::Back,
                State::Freed => {
                    self.count(unit, part, false);
                    self.region[1] -= self.bytes(unit, part);
                }
                _ => {
                    self.count(unit, part, false);
                    self.visits[at].state = State::Out;
                }
            }
        }
    }

    /// The copy that a unit's forward has to wait for before it saves a storage.
    pub fn room_for(&self, unit: u32, part: u64) -> Option<&H> {
        let full = self.live[0] + self.bytes(unit, part) > self.window_bytes;
        self.leaving.front().filter(|_| full).and_then(|&at| self.visits[at].copy.as_ref())
    }

    /// A unit's forward saves a storage.
    pub fn save(&mut self, unit: u32, part: u64) {
        self.count(unit, part, true);
    }

    /// Whether a storage that a unit's forward saved can be sent: the region may still hold what the micro-batch before left there.
    pub fn may_send(&self, unit: u32, part: u64) -> bool {
        let [bytes, used] = self.region;
        self.has(unit) && used + self.bytes(unit, part) <= bytes
    }

    /// A unit's forward is over; of a storage, `copy` is what was enqueued if it was sent. Storages are told of in their order.
    pub fn leave(&mut self, unit: u32, part: u64, copy: Option<H>) {
        let state = if copy.is_some() {
            self.region[1] += self.bytes(unit, part);
            self.leaving.push_back(self.visits.len());
            State::Leaving
        } else {
            // What stays takes nothing of the window.
            self.live[0] -= self.bytes(unit, part);
            State::Kept
        };
        self.visits.push(Visit { unit, part, state, copy });
    }

    /// A unit's backward is entered: what it and the units before it saved stays where it is still there; the others are wanted back, as far
    /// as the window reaches.
    pub fn enter_backward(&mut self, unit: u32) {
        self.ahead.clear();
        let mut reach = 0;
        let own = self.visits.iter().rposition(|visit| visit.unit == unit && visit.state != State::Freed);
        for at in (0..own.map_or(0, |own| own + 1)).rev() {
            // A whole unit is looked at before the next.
            if reach > self.window_bytes && self.visits[at].part == PARTS - 1 {
                break;
            }
            match self.visits[at].state {
                State::Leaving => self.visits[at].state = State::Reclaimed,
                State::Out => {
                    reach += self.bytes(self.visits[at].unit, self.visits[at].part);
                    self.ahead.push_back(at);
                }
                State::Kept | State::Reclaimed | State::Back | State::Freed => {}
            }
        }
    }

    /// Whether a storage is in host memory only.
    pub fn is_out(&self, unit: u32, part: u64) -> bool {
        self.own(unit, part).is_some_and(|at| self.visits[at].state == State::Out)
    }

    /// The next storage that is wanted back, if the window has room for it, and `room` says that the device has: its unit, its part and the
    /// copy that took it away.
    pub fn fetch_ahead(&mut self, room: impl Fn(u64) -> bool) -> Option<(u32, u64, H)> {
        while let Some(&at) = self.ahead.front() {
            let Visit { unit, part, state, .. } = self.visits[at];
            if state == State::Out {
                if self.live[0] + self.bytes(unit, part) > self.window_bytes || !room(self.on_device(unit, part)) {
                    return None;
                }
                self.ahead.pop_front();
                return self.fetch(at).map(|copy| (unit, part, copy));
            }
            self.ahead.pop_front();
        }
        None
    }

    fn fetch(&mut self, at: usize) -> Option<H> {
        let Visit { unit, part, copy, .. } = self.visits[at].clone();
        self.count(unit, part, true);
        self.visits[at].state = State::Back;
        copy
    }

    /// What a unit's backward needs before it can use a storage.
    pub fn need(&mut self, unit: u32, part: u64) -> Need<H> {
        let Some(at) = self.own(unit, part).filter(|_| self.is_out(unit, part)) else { return Need::Nothing };
        if let Some(copy) = self.room_for(unit, part) {
            return Need::Wait(copy.clone());
        }
        self.fetch(at).map_or(Need::Nothing, Need::Fetch)
    }

    /// A unit's backward has used a storage: it is gone, at the latest when its copy to the host is done.
    pub fn used(&mut self, unit: u32, part: u64) {
        let Some(at) = self.own(unit, part) else { return };
        match self.visits[at].state {
            State::Back => {
                self.count(unit, part, false);
                self.region[1] -= self.bytes(unit, part);
            }
            State::Out => self.region[1] -= self.bytes(unit, part),
            State::Kept => self.live[1] -= self.on_device(unit, part),
            // They go with their copy.
            State::Leaving | State::Reclaimed | State::Freed => {}
        }
        self.visits[at].state = State::Freed;
    }

    /// The latest visit of a storage that is still needed.
    fn own(&self, unit: u32, part: u64) -> Option<usize> {
        self.visits.iter().rposition(|visit| visit.unit == unit && visit.part == part && visit.state != State::Freed)
    }

    fn count(&mut self, unit: u32, part: u64, more: bool) {
        for (live, bytes) in [self.bytes(unit, part), self.on_device(unit, part)].into_iter().enumerate() {
            self.live[live] = if more { self.live[live] + bytes } else { self.live[live] - bytes };
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
    /// The storage has to come back now, after this copy.
    Fetch(H),
}
