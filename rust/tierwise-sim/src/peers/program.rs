//! A step as a list of tasks on lanes, each after the tasks that it waits for; and its execution.

use crate::executor::machine::{Lane, Machine, Task, Token};
use crate::executor::stalls::Cause;
use crate::executor::tally::Tally;
use crate::hardware::Hardware;
use std::collections::BTreeMap;

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
    pub tally: Tally,
    pub end_ns: u64,
    pub device_peak_bytes: u64,
    pub device_peak_at: String,
}

impl<'a> Program<'a> {
    pub fn new(hardware: &'a Hardware, sustained: f64) -> Self {
        Program { machine: Machine::new(hardware).sustaining(sustained), causes: BTreeMap::new() }
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
        let mut started = false;
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
                if !started {
                    continue;
                }
                let since = began.idle_since_ns.max(record.tally.start_ns);
                if began.lane == Lane::Compute && now > since {
                    let last = began.waits.iter().max_by_key(|token| self.machine.ended_ns(**token));
                    let cause = last.and_then(|token| self.causes.get(&token.index()).copied()).unwrap_or(Cause::Launch);
                    record.tally.stalls.add(cause, now - since);
                    record.tally.waited(cause, since, now);
                }
                if !began.effects.is_empty() {
                    record.tally.sample("device bytes", now, device as u64);
                }
            }
            let Some((at, lane)) = self.machine.next_end() else { break };
            self.machine.advance(at);
            let Some(ended) = self.machine.end(lane) else { continue };
            for Change(bytes) in &ended.effects {
                device += bytes;
            }
            if started {
                record.tally.ended(&ended, at);
                if !ended.effects.is_empty() {
                    record.tally.sample("device bytes", at, device as u64);
                }
                record.end_ns = at - record.tally.start_ns;
            } else if self.machine.ended_ns(from).is_some() {
                started = true;
                record.tally = Tally::from(at);
                record.tally.sample("device bytes", at, device as u64);
            }
        }
        record.tally.close();
        record
    }
}
