//! A step as a list of tasks on lanes, each after the tasks that it waits for; and its execution.

use crate::executor::Stalls;
use crate::executor::machine::{Ended, Lane, Machine, Task, Token};
use crate::executor::stalls::Cause;
use crate::hardware::Hardware;
use std::collections::BTreeMap;
use tierwise_core::timeline::{Sample, Span, Timeline};

/// Change of the device's bytes: parameters and activations, gathered and saved.
#[derive(Debug, Clone, Copy)]
pub struct Change(pub i64);

/// Tasks that are enqueued and run.
pub struct Program<'a> {
    machine: Machine<'a, Change>,
    causes: BTreeMap<usize, Cause>,
}

/// What a program did from one moment on.
#[derive(Debug, Default)]
pub struct Record {
    pub end_ns: u64,
    pub compute_ns: u64,
    pub busy_compute_ns: u64,
    pub stalls: Stalls,
    pub h2d_bytes: u64,
    pub d2h_bytes: u64,
    pub communicated_ns: u64,
    pub busy_ns: BTreeMap<String, u64>,
    pub device_peak_bytes: u64,
    pub device_peak_at: String,
    pub timeline: Timeline,
}

impl<'a> Program<'a> {
    pub fn new(hardware: &'a Hardware) -> Self {
        Program { machine: Machine::new(hardware), causes: BTreeMap::new() }
    }

    /// Enqueues a task; `cause` is what whoever waits for it waits for.
    pub fn push(&mut self, lane: Lane, name: String, bytes: u64, work: f64, waits: Vec<Token>, cause: Cause) -> Token {
        self.push_with(lane, name, bytes, work, waits, cause, 0, 0)
    }

    /// The same with device bytes that are taken when it begins and given back when it ends.
    #[allow(clippy::too_many_arguments, reason = "the fields of a task, in their order")]
    pub fn push_with(
        &mut self,
        lane: Lane,
        name: String,
        bytes: u64,
        work: f64,
        waits: Vec<Token>,
        cause: Cause,
        taken: i64,
        given: i64,
    ) -> Token {
        let effects = |change: i64| if change == 0 { Vec::new() } else { vec![Change(change)] };
        let task = Task { name, bytes, work, waits, on_start: effects(taken), on_end: effects(-given) };
        let token = self.machine.push(lane, task);
        self.causes.insert(token.index(), cause);
        token
    }

    /// Runs everything; measures from the end of task `from` on. `base` are device bytes that stay.
    pub fn run(mut self, from: Token, base: u64) -> Record {
        let mut record = Record::default();
        let mut device = base as i64;
        let mut start: Option<u64> = None;
        loop {
            while let Some(began) = self.machine.begin_one() {
                let now = self.machine.now_ns();
                for Change(bytes) in &began.effects {
                    device += bytes;
                }
                if device as u64 > record.device_peak_bytes {
                    record.device_peak_bytes = device as u64;
                    began.lane.track().clone_into(&mut record.device_peak_at);
                }
                let Some(start) = start else { continue };
                if began.lane == Lane::Compute && now > began.idle_since_ns.max(start) {
                    let last = began.waits.iter().max_by_key(|token| self.machine.ended_ns(**token));
                    let cause = last.and_then(|token| self.causes.get(&token.index()).copied()).unwrap_or(Cause::Launch);
                    let since = began.idle_since_ns.max(start);
                    record.stalls.add(cause, now - since);
                    record.timeline.spans.push(Span {
                        track: "compute wait".to_owned(),
                        name: cause.name().to_owned(),
                        start_ns: since - start,
                        duration_ns: now - since,
                        bytes: 0,
                    });
                }
                if !began.effects.is_empty() {
                    record.sample(now - start, device as u64);
                }
            }
            let Some((at, lane)) = self.machine.next_end() else { break };
            self.machine.advance(at);
            let Some(ended) = self.machine.end(lane) else { continue };
            for Change(bytes) in &ended.effects {
                device += bytes;
            }
            if let Some(start) = start {
                record.ended(&ended, start, at, device as u64);
                record.end_ns = at - start;
            } else if self.machine.ended_ns(from).is_some() {
                start = Some(at);
                record.sample(0, device as u64);
            }
        }
        record.timeline.spans.sort_by(|a, b| (a.start_ns, &a.track, &a.name).cmp(&(b.start_ns, &b.track, &b.name)));
        record
    }
}

impl Record {
    fn sample(&mut self, at_ns: u64, value: u64) {
        self.timeline.samples.push(Sample { counter: "device bytes".to_owned(), at_ns, value });
    }

    fn ended(&mut self, ended: &Ended<Change>, start: u64, now: u64, device: u64) {
        let began = ended.start_ns.max(start);
        let busy = now - began;
        match ended.lane {
            Lane::Compute => {
                self.compute_ns += ended.work as u64;
                self.busy_compute_ns += busy;
            }
            Lane::HostToDevice => self.h2d_bytes += ended.bytes,
            Lane::DeviceToHost => self.d2h_bytes += ended.bytes,
            Lane::Gather | Lane::Reduce => self.communicated_ns += ended.work as u64,
            Lane::Optimizer | Lane::HostAdam | Lane::Landing => {}
        }
        *self.busy_ns.entry(ended.lane.track().to_owned()).or_default() += busy;
        self.timeline.spans.push(Span {
            track: ended.lane.track().to_owned(),
            name: ended.name.clone(),
            start_ns: began - start,
            duration_ns: busy,
            bytes: ended.bytes,
        });
        if !ended.effects.is_empty() {
            self.sample(now - start, device);
        }
    }
}
