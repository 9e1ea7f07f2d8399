//! The machine in virtual time: one lane per CUDA stream and worker, first in, first out but for the disk's reads, with rates that depend on
//! which of them are busy.

use super::sharing::{Rates, Speeds};
use crate::hardware::Hardware;
use std::collections::{BTreeMap, VecDeque};

/// What works one task after the other, in the order in which they were enqueued; the disk's reads in the order of their priorities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// The compute stream; work is nanoseconds.
    Compute,
    /// The host-to-device copy stream; work is bytes.
    HostToDevice,
    /// The device-to-host copy stream; work is bytes.
    DeviceToHost,
    /// The device optimizer's stream; work is bytes of device memory traffic.
    Optimizer,
    /// The host's Adam; work is bytes of host memory traffic.
    HostAdam,
    /// All-gathers; work is nanoseconds at full speed of the links.
    Gather,
    /// Reductions of gradients; work is nanoseconds at full speed of the links.
    Reduce,
    /// The worker that adds landed gradients and takes their norm; work is bytes of host memory traffic.
    Landing,
    /// The disk's reads; work is bytes.
    DiskRead,
    /// The disk's writes; work is bytes.
    DiskWrite,
    /// The copy stream of optimizer states that visit the device; work is bytes.
    StatesIn,
    /// The copy stream of optimizer states that go back; work is bytes.
    StatesOut,
    /// The host's Adam over what is spilled, on the same threads; work is bytes of host memory traffic.
    SpillAdam,
    /// The training thread of another system, which enqueues and blocks; work is nanoseconds.
    Thread,
}

/// All lanes, in the order in which tasks begin and end that do so at the same moment.
pub const LANES: [Lane; 14] = [
    Lane::Compute,
    Lane::HostToDevice,
    Lane::DeviceToHost,
    Lane::Optimizer,
    Lane::HostAdam,
    Lane::Gather,
    Lane::Reduce,
    Lane::Landing,
    Lane::DiskRead,
    Lane::DiskWrite,
    Lane::StatesIn,
    Lane::StatesOut,
    Lane::SpillAdam,
    Lane::Thread,
];

/// Those whose work runs on the kernels' threads, one task after the other.
const HOST_LANES: [Lane; 3] = [Lane::HostAdam, Lane::Landing, Lane::SpillAdam];

impl Lane {
    /// Its track of the timeline, named as the runtime names it (which has a track of its own for fetches, "nvme fetch").
    pub fn track(self) -> &'static str {
        match self {
            Lane::Compute => "compute",
            Lane::HostToDevice => "h2d",
            Lane::DeviceToHost => "d2h",
            Lane::Optimizer => "device optimizer",
            Lane::HostAdam => "host optimizer",
            Lane::SpillAdam => "host optimizer, spilled",
            Lane::Gather => "all-gather",
            Lane::Reduce => "reduce",
            Lane::Landing => "host norm",
            Lane::DiskRead => "nvme read",
            Lane::DiskWrite => "nvme write",
            Lane::StatesIn => "states in",
            Lane::StatesOut => "states out",
            Lane::Thread => "training thread",
        }
    }
}

/// A place in the order of all tasks ever enqueued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token(usize);

impl Token {
    /// The place as a number.
    pub fn index(self) -> usize {
        self.0
    }
}

/// A task of a lane.
#[derive(Debug)]
pub struct Task<E> {
    /// What it is, for the timeline.
    pub name: String,
    /// Bytes moved, for the timeline and the counters.
    pub bytes: u64,
    /// Amount of work in the lane's unit.
    pub work: f64,
    /// Tasks that have to end before.
    pub waits: Vec<Token>,
    /// What happens when it begins.
    pub on_start: Vec<E>,
    /// What happens when it ends.
    pub on_end: Vec<E>,
}

/// A task that began.
#[derive(Debug)]
pub struct Began<E> {
    /// Its lane.
    pub lane: Lane,
    /// When it was enqueued.
    pub enqueued_ns: u64,
    /// When the lane could have begun it, had it been enqueued and ready.
    pub idle_since_ns: u64,
    /// What it had to wait for.
    pub waits: Vec<Token>,
    /// What happens now.
    pub effects: Vec<E>,
}

/// A task that ended.
#[derive(Debug)]
pub struct Ended<E> {
    /// Its lane.
    pub lane: Lane,
    /// What it was.
    pub name: String,
    /// Bytes moved.
    pub bytes: u64,
    /// Amount of work in the lane's unit.
    pub work: f64,
    /// When it began.
    pub start_ns: u64,
    /// What happens now.
    pub effects: Vec<E>,
}

struct Queued<E> {
    token: Token,
    enqueued_ns: u64,
    urgent: bool,
    task: Task<E>,
}

struct Running<E> {
    queued: Queued<E>,
    start_ns: u64,
    /// How many tasks began before.
    order: u64,
    remaining: f64,
    /// How much of the work remains when others begin what comes next.
    tail: f64,
}

struct State<E> {
    queue: VecDeque<Queued<E>>,
    running: Option<Running<E>>,
    /// How many of the queue are urgent.
    urgent: usize,
    last: Option<Token>,
    idle_since_ns: u64,
}

/// The lanes and the clock.
pub struct Machine<'a, E> {
    speeds: Speeds<'a>,
    now_ns: u64,
    lanes: [State<E>; LANES.len()],
    /// How many tasks began.
    began: u64,
    /// Whether the kernels' threads finish one task before the next. Recordings of the engine that copied undo records, in pieces between
    /// which others had their turn, are simulated as if threads were shared.
    takes_turns: bool,
    /// What a step gets done in a tick, alone; nothing, where there is one thread.
    tick_work: f64,
    /// When every task ended.
    ended_ns: Vec<Option<u64>>,
    power: Power,
    /// Of what waits or runs of the host's Adam, unless it is a whole step.
    passes: BTreeMap<usize, HostPass>,
}

/// What the host's Adam does instead of a whole step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostPass {
    /// The first of two passes: parameters are written.
    Params,
    /// The second: moments are.
    Moments,
    /// A whole step with its undo record.
    Undoable,
}

/// The power limit: a device that computes without a pause slows down, one that often waits does not.
#[derive(Debug, Clone, Copy)]
struct Power {
    /// How many times longer work takes on a device that is always busy.
    sustained: f64,
    /// How busy compute was of late, 0 to 1: the average that the device's regulation sees.
    busy: f64,
}

/// With more runnable threads than processors a thread is descheduled now and then, for a tick (4 ms where Linux has 250 a second), with
/// part of its share of a step left. The others are taken to be done by then, half a tick early on average, and to begin what comes next. A
/// step that is shorter than a tick is hit less often. The latest recording does not confirm it (docs/simulator.md, the ninth file).
const TICK_NS: f64 = 4e6;

/// Over how long the regulation averages, and how busy compute may be before it slows down; both fitted (docs/simulator.md).
const POWER_NS: f64 = 50e6;
const POWER_BUSY: f64 = 0.7;

impl Power {
    fn pass(&mut self, computes: bool, ns: f64) {
        let goal = f64::from(u8::from(computes));
        self.busy = goal + (self.busy - goal) * (-ns / POWER_NS).exp();
    }

    /// How many times longer compute takes now.
    fn slowdown(&self) -> f64 {
        1.0 + (self.sustained - 1.0) * ((self.busy - POWER_BUSY) / (1.0 - POWER_BUSY)).max(0.0)
    }
}

impl<'a, E> Machine<'a, E> {
    /// Idle at time 0.
    pub fn new(hardware: &'a Hardware) -> Self {
        let lanes = LANES.map(|_| State { queue: VecDeque::new(), running: None, urgent: 0, last: None, idle_since_ns: 0 });
        let power = Power { sustained: 1.0, busy: 0.0 };
        let speeds = Speeds::new(hardware);
        let adam = speeds.rates(|lane| lane == Lane::HostAdam, None)[Lane::HostAdam as usize];
        let several = hardware.measured.as_ref().and_then(|m| m.host.last()).is_none_or(|row| row.threads > 1);
        Machine {
            speeds,
            now_ns: 0,
            lanes,
            began: 0,
            takes_turns: !hardware.copied_undo_records(),
            tick_work: if several { TICK_NS * adam } else { 0.0 },
            ended_ns: Vec::new(),
            power,
            passes: BTreeMap::new(),
        }
    }

    /// With compute that takes so many times longer at the power limit.
    #[must_use]
    pub fn sustaining(mut self, sustained: f64) -> Self {
        self.power.sustained = sustained;
        self
    }

    /// Nanoseconds since the start.
    pub fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Enqueues a task.
    pub fn push(&mut self, lane: Lane, task: Task<E>) -> Token {
        self.enqueue(lane, task, false)
    }

    /// Says what a task on the lane of the host's Adam does instead of a whole step.
    pub fn is_pass(&mut self, token: Token, pass: HostPass) {
        self.passes.insert(token.0, pass);
    }

    /// Enqueues a read of the disk that goes before all that are not urgent.
    pub fn push_urgent(&mut self, lane: Lane, task: Task<E>) -> Token {
        debug_assert_eq!(lane, Lane::DiskRead, "only the disk's reads have priorities");
        self.enqueue(lane, task, true)
    }

    fn enqueue(&mut self, lane: Lane, task: Task<E>, urgent: bool) -> Token {
        let token = Token(self.ended_ns.len());
        self.ended_ns.push(None);
        let state = &mut self.lanes[lane as usize];
        state.last = Some(token);
        state.urgent += usize::from(urgent);
        state.queue.push_back(Queued { token, enqueued_ns: self.now_ns, urgent, task });
        token
    }

    /// Enqueues a task ahead of all that wait.
    pub fn push_next(&mut self, lane: Lane, task: Task<E>) {
        let token = Token(self.ended_ns.len());
        self.ended_ns.push(None);
        let state = &mut self.lanes[lane as usize];
        state.last = state.last.or(Some(token));
        state.queue.push_front(Queued { token, enqueued_ns: self.now_ns, urgent: false, task });
    }

    /// Where a lane is: the latest task enqueued on it.
    pub fn record(&self, lane: Lane) -> Option<Token> {
        self.lanes[lane as usize].last
    }

    /// When a task ended.
    pub fn ended_ns(&self, token: Token) -> Option<u64> {
        self.ended_ns[token.0]
    }

    /// Whether a lane has something to do now.
    pub fn is_busy(&self, lane: Lane) -> bool {
        self.lanes[lane as usize].running.is_some()
    }

    /// Begins the next task that can begin now.
    pub fn begin_one(&mut self) -> Option<Began<E>> {
        for lane in LANES {
            let state = &mut self.lanes[lane as usize];
            if state.running.is_some() || state.queue.is_empty() {
                continue;
            }
            let ready = |q: &Queued<E>| q.task.waits.iter().all(|w| self.ended_ns[w.0].is_some());
            let next = if lane == Lane::DiskRead {
                // A read that waits for a write holds up no other.
                let urgent = if state.urgent > 0 { state.queue.iter().position(|q| q.urgent && ready(q)) } else { None };
                urgent.or_else(|| state.queue.iter().position(ready))
            } else {
                state.queue.front().is_some_and(ready).then_some(0)
            };
            let Some(mut queued) = next.and_then(|at| state.queue.remove(at)) else { continue };
            state.urgent -= usize::from(queued.urgent);
            let began = Began {
                lane,
                enqueued_ns: queued.enqueued_ns,
                idle_since_ns: state.idle_since_ns,
                waits: std::mem::take(&mut queued.task.waits),
                effects: std::mem::take(&mut queued.task.on_start),
            };
            let remaining = queued.task.work;
            // What the landing worker asks for, norms and sums, is too short to have one.
            let tail = if matches!(lane, Lane::HostAdam | Lane::SpillAdam) { 0.5 * remaining.min(self.tick_work) } else { 0.0 };
            state.running = Some(Running { queued, start_ns: self.now_ns, order: self.began, remaining, tail });
            self.began += 1;
            return Some(began);
        }
        None
    }

    /// When the next task ends at the present rates, and on which lane; no lane, if rates change before that.
    pub fn next_end(&self) -> Option<(u64, Option<Lane>)> {
        let (rates, turn) = (self.rates(), self.turn());
        let after = |lane: Lane, work: f64| self.now_ns + (work / rates[lane as usize]).ceil() as u64;
        let ends = LANES.into_iter().filter_map(|lane| {
            let running = self.running(lane)?;
            if rates[lane as usize] == 0.0 {
                debug_assert!(
                    turn.is_some_and(|turn| HOST_LANES.contains(&lane) && lane != turn.now),
                    "{lane:?} stands still without waiting for a turn"
                );
                return None;
            }
            Some((after(lane, running.remaining), Some(lane)))
        });
        let tail = turn.filter(|turn| turn.next.is_some()).and_then(|turn| {
            let running = self.running(turn.now).filter(|running| running.remaining > running.tail)?;
            Some((after(turn.now, running.remaining - running.tail), None))
        });
        ends.chain(tail).min_by_key(|&(at, lane)| (at, lane.map_or(LANES.len(), |lane| lane as usize)))
    }

    /// Lets time pass; nothing may end before `to_ns`.
    pub fn advance(&mut self, to_ns: u64) {
        let rates = self.rates();
        let elapsed = (to_ns - self.now_ns) as f64;
        for (state, rate) in self.lanes.iter_mut().zip(rates) {
            if let Some(running) = &mut state.running {
                running.remaining = (running.remaining - elapsed * rate).max(0.0);
            }
        }
        self.power.pass(self.lanes[Lane::Compute as usize].running.is_some(), elapsed);
        self.now_ns = to_ns;
    }

    /// Ends the running task of a lane, if one ends now.
    pub fn end(&mut self, lane: Option<Lane>) -> Option<Ended<E>> {
        let lane = lane?;
        let state = &mut self.lanes[lane as usize];
        let running = state.running.take()?;
        state.idle_since_ns = self.now_ns;
        let Queued { token, task, .. } = running.queued;
        self.ended_ns[token.0] = Some(self.now_ns);
        self.passes.remove(&token.0);
        Some(Ended { lane, name: task.name, bytes: task.bytes, work: task.work, start_ns: running.start_ns, effects: task.on_end })
    }

    fn running(&self, lane: Lane) -> Option<&Running<E>> {
        self.lanes[lane as usize].running.as_ref()
    }

    /// Who has the kernels' threads, where they finish one task before the next.
    fn turn(&self) -> Option<Turn> {
        if !self.takes_turns {
            return None;
        }
        let asked = |lane: Lane| Some((self.running(lane)?.order, lane));
        let (first, now) = HOST_LANES.into_iter().filter_map(asked).min_by_key(|&(order, _)| order)?;
        let next = HOST_LANES.into_iter().filter_map(asked).filter(|&(order, _)| order > first).min_by_key(|&(order, _)| order);
        Some(Turn { now, next: next.map(|(_, lane)| lane) })
    }

    /// Work per nanosecond of every lane, given who is busy.
    fn rates(&self) -> Rates {
        let turn = self.turn();
        let mut rates = self.rates_while(|lane| turn.is_none_or(|turn| turn.now == lane));
        if let Some(turn) = turn {
            for lane in HOST_LANES.into_iter().filter(|&lane| lane != turn.now) {
                rates[lane as usize] = 0.0;
            }
            let in_tail = self.running(turn.now).is_some_and(|running| running.remaining <= running.tail);
            if let Some(next) = turn.next.filter(|_| in_tail) {
                rates[next as usize] = self.rates_while(|lane| lane == next)[next as usize];
            }
        }
        rates[Lane::Compute as usize] /= self.power.slowdown();
        rates
    }

    /// The same while the kernels' threads work for some of who asked for them.
    fn rates_while(&self, works: impl Fn(Lane) -> bool) -> Rates {
        let busy = |lane: Lane| self.running(lane).is_some() && (!HOST_LANES.contains(&lane) || works(lane));
        let steps = self.running(Lane::HostAdam).filter(|_| works(Lane::HostAdam));
        let pass = steps.and_then(|running| self.passes.get(&running.queued.token.0)).copied();
        self.speeds.rates(busy, pass)
    }
}

/// Who has the kernels' threads, and who begins in its tail.
#[derive(Clone, Copy)]
struct Turn {
    now: Lane,
    next: Option<Lane>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::{HostRow, Measured, preset};

    /// Until nothing is left to do.
    fn run(machine: &mut Machine<()>) {
        loop {
            while machine.begin_one().is_some() {}
            let Some((at, lane)) = machine.next_end() else { break };
            machine.advance(at);
            machine.end(lane);
        }
    }

    /// Nanoseconds of `count` tasks of 10 ms, each of which `pause` other ms come before.
    fn takes(sustained: f64, count: usize, pause: f64) -> f64 {
        let hardware = preset("h100").unwrap();
        let mut machine: Machine<()> = Machine::new(&hardware).sustaining(sustained);
        let task = |ns: f64, waits| Task { name: String::new(), bytes: 0, work: ns, waits, on_start: Vec::new(), on_end: Vec::new() };
        for _ in 0..count {
            let waited = machine.push(Lane::Thread, task(1e6 * pause, Vec::new()));
            machine.push(Lane::Compute, task(1e7, vec![waited]));
            run(&mut machine);
        }
        machine.now_ns() as f64 / count as f64 - 1e6 * pause
    }

    #[test]
    fn compute_without_a_pause_slows_down_and_compute_that_often_waits_does_not() {
        assert!((takes(1.2, 2000, 0.0) / 1e7 - 1.2).abs() < 0.01);
        assert!((takes(1.2, 3, 0.0) / 1e7 - 1.0).abs() < 1e-6, "the first 30 ms");
        assert!((takes(1.2, 200, 10.0) / 1e7 - 1.0).abs() < 1e-6);
        assert!((takes(1.0, 200, 0.0) / 1e7 - 1.0).abs() < 1e-6);
    }

    /// When tasks end, in milliseconds: (lane, when they are asked for, what they take alone), of lanes that work for them in turn.
    fn ends(hardware: &Hardware, tasks: &[(Lane, u64, f64)]) -> Vec<f64> {
        let mut machine: Machine<()> = Machine::new(hardware);
        let alone = |lane: Lane| Machine::<()>::new(hardware).speeds.rates(|other| other == lane, None)[lane as usize];
        let mut tokens = Vec::new();
        for &(lane, asked_ms, ms) in tasks {
            let work = 1e6 * ms * alone(lane);
            let task = Task { name: String::new(), bytes: 0, work, waits: Vec::new(), on_start: Vec::new(), on_end: Vec::new() };
            loop {
                while machine.begin_one().is_some() {}
                let Some((at, lane)) = machine.next_end().filter(|&(at, _)| at <= 1_000_000 * asked_ms) else { break };
                machine.advance(at);
                machine.end(lane);
            }
            machine.advance(1_000_000 * asked_ms);
            tokens.push(machine.push(lane, task));
        }
        run(&mut machine);
        tokens.iter().map(|&token| machine.ended_ns(token).unwrap() as f64 / 1e6).collect()
    }

    #[track_caller]
    fn assert_ends(hardware: &Hardware, tasks: &[(Lane, u64, f64)], wanted: &[f64]) {
        let found = ends(hardware, tasks);
        assert!(found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-3) && found.len() == wanted.len(), "{found:?}, wanted {wanted:?}");
    }

    /// A machine whose kernels have so many threads, and which says of no undo record that it was copied.
    fn with_threads(threads: u32) -> Hardware {
        let row = format!(
            r#"[{{"threads": {threads}, "adam_params_per_s": 1e9, "undoable_params_per_s": 5e8, "accumulate_numel_per_s": 1e9,
            "norm_numel_per_s": 1e9, "copy_bytes_per_s": 1e9}}]"#
        );
        let host: Vec<HostRow> = serde_json::from_str(&row).unwrap();
        Hardware { measured: Some(Measured { host, ..Measured::default() }), ..preset("h100").unwrap() }
    }

    const STEP: Lane = Lane::HostAdam;
    const NORM: Lane = Lane::Landing;

    #[test]
    fn the_kernels_threads_finish_one_task_before_the_next() {
        let hardware = with_threads(1);
        assert_ends(&hardware, &[(STEP, 0, 10.0), (STEP, 0, 10.0), (NORM, 1, 3.0)], &[10.0, 23.0, 13.0]);
        assert_ends(&hardware, &[(NORM, 0, 3.0), (STEP, 1, 10.0), (NORM, 1, 1.0)], &[3.0, 13.0, 14.0]);
        // An engine that copied undo records in pieces: others had their turns between them.
        let mut copied = with_threads(1);
        copied.measured.as_mut().unwrap().host[0].undoable_params_per_s = None;
        let found = ends(&copied, &[(STEP, 0, 10.0), (NORM, 1, 2.0)]);
        assert!(found[1] < found[0] && found[0] > 11.0, "{found:?}");
    }

    #[test]
    fn what_waits_for_a_step_begins_in_its_tail() {
        for hardware in [preset("h100").unwrap(), with_threads(2)] {
            // For what is left of a norm after the first step's tail of 2 ms the second step waits; one of 1 ms ends within it.
            for (norm_ms, wanted) in [(3.0, [10.0, 21.0, 11.0]), (5.0, [10.0, 23.0, 13.0]), (1.0, [10.0, 20.0, 9.0])] {
                assert_ends(&hardware, &[(STEP, 0, 10.0), (STEP, 0, 10.0), (NORM, 1, norm_ms)], &wanted);
            }
            // Two norms, one after the other; and a norm that is asked for in the tail.
            assert_ends(&hardware, &[(STEP, 0, 10.0), (NORM, 1, 0.5), (NORM, 1, 2.5)], &[10.0, 8.5, 11.0]);
            assert_ends(&hardware, &[(STEP, 0, 10.0), (NORM, 9, 3.0)], &[10.0, 12.0]);
            // The one that was asked for first begins first.
            assert_ends(&hardware, &[(STEP, 0, 10.0), (NORM, 1, 1.0), (Lane::SpillAdam, 1, 10.0)], &[10.0, 9.0, 19.0]);
            // Steps of what is spilled have tails too, the landing worker's norms have none.
            assert_ends(&hardware, &[(Lane::SpillAdam, 0, 10.0), (STEP, 1, 10.0)], &[10.0, 18.0]);
            assert_ends(&hardware, &[(NORM, 0, 4.0), (STEP, 1, 10.0)], &[4.0, 14.0]);
            // Of a step that is shorter than a tick, half.
            assert_ends(&hardware, &[(STEP, 0, 2.0), (NORM, 0, 3.0)], &[2.0, 4.0]);
        }
    }

    #[test]
    fn many_short_steps_and_norms_take_no_less_than_either_alone_and_half_of_the_other() {
        let hardware = preset("h100").unwrap();
        let tasks: Vec<(Lane, u64, f64)> = (0..40).map(|at| (if at % 2 == 0 { STEP } else { NORM }, 0, 1.0)).collect();
        let last = ends(&hardware, &tasks).into_iter().fold(0.0, f64::max);
        assert!((30.0 - 1e-3..40.0).contains(&last), "{last} ms");
    }

    #[test]
    fn a_tail_stays_one_when_its_step_is_slowed_down() {
        let hardware = preset("h100").unwrap();
        // The copy begins as the tail does. What is left of the step takes longer than a tail then, and the norm is slowed down by the copy too.
        let found = ends(&hardware, &[(STEP, 0, 10.0), (NORM, 1, 2.0), (Lane::HostToDevice, 8, 5.0)]);
        assert!(found[0] > 10.4, "the copy slows the step down: {found:?}");
        assert!((10.05..10.2).contains(&found[1]), "the norm goes on, slowed down: {found:?}");
    }

    #[test]
    fn copies_are_as_fast_as_beside_a_pass_only_while_it_has_the_threads() {
        let mut sharing = super::super::sharing::tests::rows();
        for row in sharing.iter_mut().filter(|row| row.adam_params_per_s.is_some() && row.h2d_bytes_per_s.is_none()) {
            // Beside whole steps, and norms, 36e9.
            row.moments_d2h_bytes_per_s = row.d2h_bytes_per_s.map(|_| 18e9);
        }
        let mut hardware = with_threads(16);
        hardware.measured.as_mut().unwrap().sharing = sharing;
        let mut machine: Machine<()> = Machine::new(&hardware);
        let task = |work: f64| Task { name: String::new(), bytes: 0, work, waits: Vec::new(), on_start: Vec::new(), on_end: Vec::new() };
        let norm = machine.push(NORM, task(1e8));
        machine.push(Lane::DeviceToHost, task(1e12));
        while machine.begin_one().is_some() {}
        let pass = machine.push(STEP, task(1e12));
        machine.is_pass(pass, HostPass::Moments);
        while machine.begin_one().is_some() {}
        let copies = |machine: &Machine<()>| machine.rates()[Lane::DeviceToHost as usize];
        assert!((copies(&machine) - 36.0).abs() < 1e-9, "beside the norm: {}", copies(&machine));
        let (at, lane) = machine.next_end().unwrap();
        machine.advance(at);
        machine.end(lane);
        assert!(machine.ended_ns(norm).is_some());
        assert!((copies(&machine) - 18.0).abs() < 1e-9, "beside the pass: {}", copies(&machine));
    }
}
