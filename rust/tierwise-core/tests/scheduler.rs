//! The scheduler: eviction against the optimum, and a state machine that carries out every action on simulated values.

mod common;

use common::{STREAMED, bare_plan, models, uniform};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use tierwise_core::layout::{Layout, ParamSpec, Precision};
use tierwise_core::plan::{ChunkPlan, ClipMode, OptimizerClass, ParamHome, Plan};
use tierwise_core::scheduler::{Action, Decision, Event, Progress, ScheduleError, Scheduler};
use tierwise_core::trace::{Op, Phase, Trace, Unit};
use tierwise_core::{ChunkId, OpId, Tier};

// ---- eviction -------------------------------------------------------------------------------------------------------------------

/// Fewest fetches that serve `accesses` with `slots` slots, by keeping every reachable content of the slab. With `ahead`, the next
/// chunk must be there too while one is used, because otherwise compute would wait for it.
fn optimum(accesses: &[u32], slots: usize, ahead: bool) -> u64 {
    let mut states: BTreeMap<BTreeSet<u32>, u64> = std::iter::once((BTreeSet::new(), 0)).collect();
    for (at, &access) in accesses.iter().enumerate() {
        let mut needed: BTreeSet<u32> = std::iter::once(access).collect();
        if ahead {
            needed.extend(accesses.get(at + 1));
        }
        let mut next: BTreeMap<BTreeSet<u32>, u64> = BTreeMap::new();
        for (content, &cost) in &states {
            let missing = needed.difference(content).count();
            let with: BTreeSet<u32> = content.union(&needed).copied().collect();
            for kept in subsets(&with, with.len().saturating_sub(slots), &needed) {
                let best = next.entry(kept).or_insert(u64::MAX);
                *best = (cost + missing as u64).min(*best);
            }
        }
        states = next;
    }
    states.into_values().min().unwrap()
}

/// `all` without `excess` of its elements, in every way that keeps `needed`.
fn subsets(all: &BTreeSet<u32>, excess: usize, needed: &BTreeSet<u32>) -> Vec<BTreeSet<u32>> {
    let mut result = vec![all.clone()];
    for _ in 0..excess {
        result = result
            .iter()
            .flat_map(|set| {
                set.difference(needed).map(|victim| {
                    let mut rest = set.clone();
                    rest.remove(victim);
                    rest
                })
            })
            .collect();
    }
    result
}

const BYTES: u64 = 256;
const NUMEL: u64 = 128;

/// Fetches of the scheduler in the later ones of `cycles` runs over a trace, and those that compute waited for.
fn steady_fetches(trace: &Trace, layout: &Layout, plan: &Plan, warm_up: usize, cycles: usize) -> (u64, u64) {
    let mut scheduler = Scheduler::new(layout.clone(), trace.clone(), plan.clone(), None);
    let mut actions = Vec::new();
    let mut before = scheduler.counters();
    for cycle in 0..cycles {
        if cycle == warm_up {
            before = scheduler.counters();
        }
        for op in &trace.ops {
            for event in [Event::Enter { unit: op.unit, phase: op.phase }, Event::Leave { unit: op.unit, phase: op.phase }] {
                assert_eq!(scheduler.step(&event, &mut actions), Ok(Progress::Done));
            }
        }
    }
    let after = scheduler.counters();
    (after.fetches - before.fetches, after.demand_fetches - before.demand_fetches)
}

/// Fewest fetches in the later cycles, once it does not matter any more how the slab was filled first.
fn steady_optimum(trace: &Trace, slots: usize, ahead: bool, warm_up: usize, cycles: usize) -> u64 {
    let accesses = |cycles: usize| -> Vec<u32> { (0..cycles).flat_map(|_| trace.ops.iter().map(|op| op.unit)).collect() };
    optimum(&accesses(cycles), slots, ahead) - optimum(&accesses(warm_up), slots, ahead)
}

#[test]
fn a_training_step_fetches_no_more_than_the_optimum() {
    for chunks in 1..=6 {
        for slots in 1..=chunks {
            let (layout, trace, plan) = uniform(chunks, NUMEL, |_| STREAMED, u64::from(slots) * BYTES, u32::MAX);
            let (fetches, demand) = steady_fetches(&trace, &layout, &plan, 4, 12);
            assert_eq!(fetches, steady_optimum(&trace, slots as usize, false, 4, 12), "{chunks} chunks, {slots} slots");
            // With a second slot every copy starts before it is needed.
            assert!(slots == 1 || demand == 0, "{chunks} chunks, {slots} slots: compute waited {demand} times");
        }
    }
}

/// Whatever the host is about to rewrite is not fetched for the step after; between micro-batches it stays.
#[test]
fn nothing_is_fetched_to_be_rewritten() {
    for (chunks, accumulation) in (1..=6).flat_map(|chunks| [(chunks, 1), (chunks, 2), (chunks, 3)]) {
        for slots in 1..=chunks {
            let (layout, trace, plan) = uniform(chunks, NUMEL, |_| STREAMED, u64::from(slots) * BYTES, accumulation);
            let mut scheduler = Scheduler::new(layout, trace.clone(), plan, None);
            let steps = 3;
            for _ in 0..steps {
                let mut events = Vec::new();
                for micro in 0..accumulation {
                    for op in &trace.ops {
                        let (unit, phase) = (op.unit, op.phase);
                        if phase == Phase::Backward && unit + 1 == chunks {
                            events.push(Event::BackwardBegin { grad_scale: 1.0 });
                        }
                        events.extend([Event::Enter { unit, phase }, Event::Leave { unit, phase }]);
                        if phase == Phase::Backward {
                            let chunk = ChunkId(unit);
                            events.push(Event::GradsHanded { chunk });
                            if micro + 1 == accumulation {
                                events.push(Event::GradLanded { chunk, sums: vec![(unit, 1.0)] });
                            }
                        }
                    }
                    events.push(Event::BackwardEnd);
                }
                events.push(Event::Commit { grad_scale: 1.0, hyper_changed: false });
                events.extend((0..chunks).map(|chunk| Event::StepDone { chunk: ChunkId(chunk) }));
                for event in events {
                    assert_eq!(scheduler.step(&event, &mut Vec::new()), Ok(Progress::Done));
                }
            }
            let accesses: Vec<u32> = (0..accumulation).flat_map(|_| trace.ops.iter().map(|op| op.unit)).collect();
            // After the last step the slab is filled again for the next one.
            let fetches = scheduler.counters().fetches - u64::from(slots.min(chunks));
            let best = steps * optimum(&accesses, slots as usize, false);
            assert_eq!(fetches, best, "{chunks} chunks, {slots} slots, {accumulation} micro-batches");
        }
    }
}

/// The copy of a chunk that the host rewrites is worth nothing after its last use, one that stays valid is worth keeping.
#[test]
fn what_will_be_rewritten_leaves_first() {
    let frozen = ChunkPlan::new(OptimizerClass::Frozen, ParamHome::Streamed);
    for (accumulation, present) in [(1, ChunkId(1)), (2, ChunkId(0))] {
        let (layout, trace, plan) = uniform(2, NUMEL, |chunk| if chunk == 0 { STREAMED } else { frozen }, BYTES, accumulation);
        let mut scheduler = Scheduler::new(layout, trace.clone(), plan, None);
        for op in &trace.ops {
            for event in [Event::Enter { unit: op.unit, phase: op.phase }, Event::Leave { unit: op.unit, phase: op.phase }] {
                assert_eq!(scheduler.step(&event, &mut Vec::new()), Ok(Progress::Done));
            }
        }
        assert!(scheduler.slot(present).is_some(), "accumulation {accumulation}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// Shared chunks come up again: any forward, then its mirror image.
    #[test]
    fn any_training_step_fetches_no_more_than_the_optimum(order in prop::collection::vec(0_u32..5, 1..8), slots in 1_u64..5) {
        let (layout, mut trace, plan) = uniform(5, NUMEL, |_| STREAMED, slots * BYTES, u32::MAX);
        let op = |phase| move |&unit: &u32| Op { unit, phase };
        trace.ops = order.iter().map(op(Phase::Forward)).chain(order.iter().rev().map(op(Phase::Backward))).collect();
        let (fetches, _) = steady_fetches(&trace, &layout, &plan, 5, 15);
        let best = steady_optimum(&trace, slots as usize, slots > 1, 5, 15);
        if order.iter().collect::<BTreeSet<_>>().len() == order.len() {
            prop_assert_eq!(fetches, best);
        } else {
            // Copies start as early as they can, before a chunk that is in use now becomes the better one to leave; but whoever was fetched
            // stays until it is used.
            let uses = 10 * trace.ops.len() as u64;
            prop_assert!((best..=uses).contains(&fetches), "{} fetches for {} uses, {} would do", fetches, uses, best);
        }
    }
}

#[test]
fn recomputation_does_not_disturb_the_schedule() {
    let (layout, trace, plan) = uniform(6, NUMEL, |_| STREAMED, 2 * BYTES, u32::MAX);
    let run = |recompute: bool| {
        let mut scheduler = Scheduler::new(layout.clone(), trace.clone(), plan.clone(), None);
        let mut actions = Vec::new();
        for _ in 0..3 {
            let mut in_backward = false;
            for op in &trace.ops {
                let mut events = Vec::new();
                if op.phase == Phase::Backward {
                    if !std::mem::replace(&mut in_backward, true) {
                        events.push(Event::BackwardBegin { grad_scale: 1.0 });
                    }
                    if recompute {
                        let (unit, phase) = (op.unit, Phase::Forward);
                        events.extend([Event::Enter { unit, phase }, Event::Leave { unit, phase }]);
                    }
                }
                events.extend([Event::Enter { unit: op.unit, phase: op.phase }, Event::Leave { unit: op.unit, phase: op.phase }]);
                for event in events {
                    assert_eq!(scheduler.step(&event, &mut actions), Ok(Progress::Done));
                }
            }
            scheduler.step(&Event::BackwardEnd, &mut actions).unwrap();
        }
        let counters = scheduler.counters();
        (counters.fetches, counters.demand_fetches, counters.off_trace)
    };
    assert_eq!(run(true), run(false));
    assert_eq!(run(true).2, 0);
}

/// What a recomputation saved views of stays: it enters the unit's backward ahead of its turn. Whoever has no room then is told by whom.
#[test]
fn what_was_entered_ahead_stays_until_its_backward_leaves() {
    let (layout, trace, plan) = uniform(3, NUMEL, |_| STREAMED, 2 * BYTES, 1);
    let mut scheduler = Scheduler::new(layout, trace, plan, None);
    let mut step = |event: Event| scheduler.step(&event, &mut Vec::new()).map(|progress| assert_eq!(progress, Progress::Done));
    let backward = Phase::Backward;
    step(Event::BackwardBegin { grad_scale: 1.0 }).unwrap();
    step(Event::Enter { unit: 0, phase: backward }).unwrap();
    step(Event::Enter { unit: 1, phase: backward }).unwrap();
    let error = step(Event::Enter { unit: 2, phase: backward }).unwrap_err();
    for part in ["`layers.2`", "512 of the slab's 512 bytes", "`layers.0`", "`layers.1`"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    step(Event::Leave { unit: 1, phase: backward }).unwrap();
    step(Event::Leave { unit: 0, phase: backward }).unwrap();
    step(Event::Enter { unit: 1, phase: backward }).unwrap();
    step(Event::Enter { unit: 2, phase: backward }).unwrap();
}

/// A chunk that two recomputed units read stays until both are over.
#[test]
fn each_unit_lets_go_of_its_own_chunks() {
    let (layout, mut trace, plan) = uniform(2, NUMEL, |_| STREAMED, 2 * BYTES, 1);
    trace.units[1].chunks = vec![ChunkId(0), ChunkId(1)];
    let mut scheduler = Scheduler::new(layout, trace, plan, None);
    let phase = Phase::Backward;
    let mut run = |events: &[Event]| {
        for event in events {
            assert_eq!(scheduler.step(event, &mut Vec::new()), Ok(Progress::Done));
        }
        [ChunkId(0), ChunkId(1)].map(|chunk| scheduler.in_use(chunk))
    };
    run(&[Event::BackwardBegin { grad_scale: 1.0 }]);
    assert_eq!(run(&[Event::Enter { unit: 0, phase }, Event::Enter { unit: 1, phase }]), [true, true]);
    assert_eq!(run(&[Event::Leave { unit: 1, phase }]), [true, false]);
    assert_eq!(run(&[Event::Leave { unit: 0, phase }]), [false, false]);
}

/// Ctrl-C between an enter and what remembers it: the next forward starts with nothing in use, and readers are waited for all the same.
#[test]
fn a_forward_begins_with_nothing_entered() {
    let (layout, trace, plan) = uniform(3, NUMEL, |_| STREAMED, BYTES, 1);
    let mut scheduler = Scheduler::new(layout, trace, plan, None);
    let enter = Event::Enter { unit: 0, phase: Phase::Forward };
    assert_eq!(scheduler.step(&enter, &mut Vec::new()), Ok(Progress::Done));
    let mut actions = Vec::new();
    assert_eq!(scheduler.step(&Event::ForwardBegin, &mut actions), Ok(Progress::Done));
    assert_eq!(actions.first(), Some(&Action::Release { chunk: ChunkId(0), offset: 0 }));
    assert!(!scheduler.in_use(ChunkId(0)));
    assert_eq!(scheduler.step(&Event::Enter { unit: 1, phase: Phase::Forward }, &mut Vec::new()), Ok(Progress::Done));
}

// ---- the state machine ----------------------------------------------------------------------------------------------------------

/// What a payload holds, as a fingerprint of everything that was ever done to it.
type Value = u64;

/// Bytes that nobody may read: half written, or another chunk's by now.
const POISON: Value = u64::MAX;

fn mix(parts: &[u64]) -> Value {
    parts.iter().fold(0x9e37_79b9_7f4a_7c15, |hash, part| {
        let mixed = (hash ^ part).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ (mixed >> 29)
    })
}

/// One optimizer step: depends on the old value, the gradient, the scale and the hyperparameters.
fn stepped(value: Value, grad: Value, scale: f32, hyper: u64) -> Value {
    assert_ne!(value, POISON, "stepped bytes that are not there");
    mix(&[value, grad, u64::from(scale.to_bits()), hyper])
}

/// Host work in the order in which it was asked for.
#[derive(Debug, Clone, Copy)]
enum Job {
    Step { grad: Value, scale: f32, hyper: u64 },
    Speculate { grad: Value, scale: f32, hyper: u64 },
    Undo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pin {
    slot: Option<u64>,
    generation: u64,
}

/// Executor, compute and a synchronous reference in one.
struct World {
    scheduler: Scheduler,
    /// Random choices; all zero once they are used up.
    choices: VecDeque<u16>,
    host: Vec<Value>,
    device: Vec<Value>,
    slots: Vec<Option<(u64, u64)>>,
    /// What a synchronous optimizer on one device would hold.
    reference: Vec<Value>,
    steps: Vec<u64>,
    undo: Vec<Option<(u64, u64, Value)>>,
    jobs: Vec<VecDeque<Job>>,
    /// Chunks that owe their moments.
    owing: BTreeSet<ChunkId>,
    grads: Vec<Option<Value>>,
    /// Chunks whose final gradient is on its way.
    landing: BTreeSet<ChunkId>,
    /// Chunks with gradients of the step that is not decided yet.
    handed: BTreeSet<ChunkId>,
    pins: Vec<Vec<Pin>>,
    hyper: u64,
    speculation_hyper: u64,
    commit: Option<(f64, u64)>,
    sums: Vec<Option<f64>>,
    generations: Vec<u64>,
    decisions: u64,
    serial: u64,
}

impl World {
    fn new(layout: Layout, trace: Trace, plan: Plan, max_norm: Option<f64>, choices: Vec<u16>) -> Self {
        let chunks = layout.chunks.len();
        let params = layout.chunks.iter().map(|c| c.params.len()).sum();
        let initial: Vec<Value> = (0..chunks as u64).map(|c| mix(&[c])).collect();
        let off = |keep: fn(&ChunkPlan) -> bool| -> Vec<Value> {
            plan.chunks.iter().zip(&initial).map(|(p, v)| if keep(p) { *v } else { POISON }).collect()
        };
        World {
            // What is spilled counts as the host's here: the step that rewrites it sends it on.
            host: off(|p| p.class.on_cpu() || p.home == ParamHome::Streamed),
            device: off(|p| p.home.is_resident()),
            scheduler: Scheduler::new(layout, trace, plan, max_norm),
            choices: choices.into(),
            slots: vec![None; chunks],
            reference: initial,
            steps: vec![0; chunks],
            undo: vec![None; chunks],
            jobs: vec![VecDeque::new(); chunks],
            owing: BTreeSet::new(),
            grads: vec![None; chunks],
            landing: BTreeSet::new(),
            handed: BTreeSet::new(),
            pins: vec![Vec::new(); chunks],
            hyper: 0,
            speculation_hyper: 0,
            commit: None,
            sums: vec![None; params],
            generations: vec![0; chunks],
            decisions: 0,
            serial: 0,
        }
    }

    /// A choice of `0..below`.
    fn choose(&mut self, below: usize) -> usize {
        self.choices.pop_front().unwrap_or(0) as usize % below
    }

    fn fresh(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    fn plan(&self, chunk: ChunkId) -> ChunkPlan {
        self.scheduler.plan().chunks[chunk.index()]
    }

    /// Hands over something that cannot be now: an error that says so, and nothing has changed.
    fn something_illegal(&mut self) {
        let snapshot = self.scheduler.snapshot();
        let chunk = ChunkId(self.choose(self.reference.len()) as u32);
        let state = &snapshot[chunk.index()];
        let (work, grad) = (&state["work"], state["grad"].as_str().unwrap());
        let unit = self.choose(self.scheduler.trace().units.len()) as u32;
        let phase = [Phase::Forward, Phase::Backward][self.choose(2)];
        let pins = ["forward_pins", "backward_pins"][phase as usize];
        let entered = self.scheduler.trace().units[unit as usize].chunks.iter().all(|c| snapshot[c.index()][pins] != 0);
        let nobody = ChunkId(self.reference.len() as u32);
        let param = self.scheduler.layout().chunks[chunk.index()].params[0].index;
        let foreign = if param == 0 { u32::MAX } else { param - 1 };
        let no_step = self.plan(chunk).class == OptimizerClass::Frozen;
        let idle = work == "idle" && !self.scheduler.is_undecided();
        let landed = |index| Event::GradLanded { chunk, sums: vec![(index, 1.0)] };
        // Whether it is illegal now, and what it is.
        let events = [
            (work != "stepping", Event::StepDone { chunk }),
            (work.get("speculating").is_none(), Event::SpeculateDone { chunk }),
            (work.get("undoing").is_none(), Event::UndoDone { chunk }),
            (state["owes_moments"] == false || work == "stepping", Event::MomentsDone { chunk }),
            (grad != "in_flight" || state["owes_moments"] == true, landed(param)),
            (grad == "in_flight" && state["owes_moments"] == false, landed(foreign)),
            (no_step || (idle && grad != "none" && grad != "partial"), Event::GradsHanded { chunk }),
            (!entered, Event::Leave { unit, phase }),
            (true, Event::Leave { unit: u32::MAX, phase }),
            (true, Event::Enter { unit: u32::MAX, phase }),
            (true, Event::Touch { chunk: nobody }),
            (true, Event::StepDone { chunk: nobody }),
        ];
        let (illegal, event) = &events[self.choose(events.len())];
        if !illegal {
            return;
        }
        let before = format!("{:?}", self.scheduler);
        let mut actions = Vec::new();
        let error = self.scheduler.step(event, &mut actions).expect_err(&format!("{event:?} while {state}")).to_string();
        assert_eq!(actions, [], "{event:?}");
        assert_eq!(format!("{:?}", self.scheduler), before, "{event:?} changed something");
        let names = match event {
            Event::Leave { unit, .. } if (*unit as usize) < self.scheduler.trace().units.len() => {
                format!("`{}`", self.scheduler.trace().units[*unit as usize].name)
            }
            Event::Leave { .. } | Event::Enter { .. } => u32::MAX.to_string(),
            Event::Touch { .. } => nobody.0.to_string(),
            Event::StepDone { chunk } if *chunk == nobody => nobody.0.to_string(),
            _ => format!("`{}`", self.scheduler.layout().chunks[chunk.index()].name),
        };
        assert!(error.contains(&names), "{error}");
    }

    /// Hands over an event; other work finishes in between, and as long as it blocks.
    fn event(&mut self, event: &Event) -> Result<(), ScheduleError> {
        if self.choose(24) == 23 {
            self.something_illegal();
        }
        while self.choose(3) == 1 {
            if !self.finish_something()? {
                break;
            }
        }
        while self.apply(event)? != Progress::Done {
            assert!(self.finish_something()?, "{event:?} waits for nothing: {}", self.scheduler.snapshot());
        }
        Ok(())
    }

    fn apply(&mut self, event: &Event) -> Result<Progress, ScheduleError> {
        let mut actions = Vec::new();
        let progress = self.scheduler.step(event, &mut actions)?;
        if let Event::UndoDone { chunk } = *event
            && matches!(self.jobs[chunk.index()].front(), Some(Job::Step { .. }))
        {
            // It gave up its slot for its own step, not for another chunk.
            self.slots[chunk.index()] = None;
        }
        self.carry_out(&actions);
        self.check();
        Ok(progress)
    }

    /// Finishes one piece of running work, if there is any.
    fn finish_something(&mut self) -> Result<bool, ScheduleError> {
        let working: Vec<ChunkId> = self.scheduler.layout().ids().filter(|c| !self.jobs[c.index()].is_empty()).collect();
        // What lands in a buffer is added to its sum after the moments that read that.
        let landing: Vec<ChunkId> = self.landing.difference(&self.owing).copied().collect();
        // Moments are behind the step in the same queue.
        let owing: Vec<ChunkId> = self.owing.iter().copied().filter(|c| self.jobs[c.index()].is_empty()).collect();
        if working.len() + landing.len() + owing.len() == 0 {
            return Ok(false);
        }
        let chosen = self.choose(working.len() + landing.len() + owing.len());
        if let Some(&chunk) = working.get(chosen) {
            let job = self.jobs[chunk.index()].pop_front().unwrap();
            let value = &mut self.host[chunk.index()];
            let event = match job {
                Job::Step { grad, scale, hyper } => {
                    *value = stepped(*value, grad, scale, hyper);
                    Event::StepDone { chunk }
                }
                Job::Speculate { grad, scale, hyper } => {
                    *value = stepped(*value, grad, scale, hyper);
                    Event::SpeculateDone { chunk }
                }
                Job::Undo => {
                    *value = self.undo[chunk.index()].take().expect("an undo record").2;
                    Event::UndoDone { chunk }
                }
            };
            assert_eq!(self.apply(&event)?, Progress::Done);
        } else if let Some(&chunk) = owing.get(chosen - working.len()) {
            self.owing.remove(&chunk);
            assert_eq!(self.apply(&Event::MomentsDone { chunk })?, Progress::Done);
        } else {
            let chunk = landing[chosen - working.len() - owing.len()];
            self.landing.remove(&chunk);
            self.land(chunk)?;
        }
        Ok(true)
    }

    fn land(&mut self, chunk: ChunkId) -> Result<(), ScheduleError> {
        let size = [1.0, 0.0, 1e-3, 4.0][self.choose(4)];
        let poisoned = self.choose(40) == 39;
        let params = &self.scheduler.layout().chunks[chunk.index()].params;
        let sums: Vec<(u32, f64)> =
            params.iter().filter(|p| p.trainable).map(|p| (p.index, if poisoned { f64::NAN } else { size })).collect();
        for &(index, sum) in &sums {
            self.sums[index as usize] = Some(sum);
        }
        assert_eq!(self.apply(&Event::GradLanded { chunk, sums })?, Progress::Done);
        Ok(())
    }

    fn carry_out(&mut self, actions: &[Action]) {
        let mut decided = None;
        for action in actions {
            match action {
                Action::Fetch { chunk, offset, evicted, .. } => {
                    assert!(self.plan(*chunk).home.is_streamed());
                    let end = offset + self.scheduler.layout().param_bytes(*chunk).next_multiple_of(256);
                    assert!(end <= self.scheduler.plan().stream_slab_bytes, "a slot ends behind the slab");
                    self.slots[chunk.index()] = None;
                    for other in evicted {
                        assert!(self.pins[other.index()].is_empty(), "{other:?} is in use and left for {chunk:?}");
                        self.slots[other.index()] = None;
                        self.device[other.index()] = POISON;
                    }
                    for (start, stop) in self.slots.iter().flatten() {
                        assert!(*start >= end || stop <= offset, "{chunk:?} was written over a chunk that did not leave");
                    }
                    self.slots[chunk.index()] = Some((*offset, end));
                    assert!(self.jobs[chunk.index()].is_empty(), "{chunk:?} is fetched while it is rewritten");
                    self.device[chunk.index()] = self.host[chunk.index()];
                    assert_ne!(self.device[chunk.index()], POISON);
                }
                Action::Refresh { chunk } => {
                    assert!(self.plan(*chunk).class.on_cpu() && self.plan(*chunk).home.is_resident());
                    assert!(self.jobs[chunk.index()].is_empty(), "{chunk:?} is refreshed while it is rewritten");
                    self.device[chunk.index()] = self.host[chunk.index()];
                }
                Action::Release { chunk, offset } => {
                    assert!(self.pins[chunk.index()].is_empty(), "{chunk:?} was released in use");
                    // Named before a fetch of the same batch takes the slot: whoever reuses it has to find its readers.
                    let slot = self.slots[chunk.index()].expect("a released chunk has the slot that it was read from");
                    assert_eq!(slot.0, *offset);
                }
                Action::Moments { chunk } => {
                    assert!(self.scheduler.plan().late_moments && self.plan(*chunk).class == OptimizerClass::Host);
                    assert!(matches!(self.jobs[chunk.index()].back(), Some(Job::Step { .. })), "moments without a step");
                    assert!(self.owing.insert(*chunk), "{chunk:?} owes its moments twice");
                }
                Action::Step { chunk, tier, grad_scale } => {
                    let moments = |action: &Action| matches!(action, Action::Moments { .. });
                    assert!(!actions.iter().take_while(|&other| !std::ptr::eq(other, action)).any(moments), "a step behind moments");
                    let decision: &Decision = decided.expect("a step outside of a decision");
                    assert!(!decision.skipped);
                    let grad = self.grads[chunk.index()].take().expect("a gradient to step with");
                    let hyper = self.commit_hyper();
                    self.steps[chunk.index()] += 1;
                    if *tier == Tier::Device {
                        assert!(self.plan(*chunk).class.steps_on_device());
                        self.device[chunk.index()] = stepped(self.device[chunk.index()], grad, *grad_scale, hyper);
                    } else {
                        let spilled = self.plan(*chunk).class == OptimizerClass::Nvme;
                        assert!(self.plan(*chunk).class.on_cpu());
                        assert_eq!(*tier, if spilled { Tier::Nvme } else { Tier::Host });
                        if self.jobs[chunk.index()].is_empty() {
                            self.slots[chunk.index()] = None;
                        }
                        self.jobs[chunk.index()].push_back(Job::Step { grad, scale: *grad_scale, hyper });
                    }
                }
                Action::Speculate { chunk, grad_scale, undo_offset } => {
                    assert_eq!(self.plan(*chunk).class, OptimizerClass::Host, "spilled chunks wait for the decision");
                    let bytes = self.scheduler.layout().undo_bytes(*chunk);
                    assert!(undo_offset + bytes <= self.scheduler.plan().undo_bytes, "an undo record outside of its room");
                    for (offset, other, _) in self.undo.iter().flatten() {
                        assert!(offset + other <= *undo_offset || *offset >= undo_offset + bytes, "undo records overlap");
                    }
                    assert!(self.jobs[chunk.index()].is_empty() && self.commit.is_none());
                    let grad = self.grads[chunk.index()].expect("a gradient to speculate with");
                    self.undo[chunk.index()] = Some((*undo_offset, bytes, self.host[chunk.index()]));
                    let job = Job::Speculate { grad, scale: *grad_scale, hyper: self.speculation_hyper };
                    self.jobs[chunk.index()].push_back(job);
                }
                Action::Undo { chunk } => self.jobs[chunk.index()].push_back(Job::Undo),
                Action::Accept { chunk } => {
                    self.undo[chunk.index()] = None;
                    self.grads[chunk.index()] = None;
                    self.steps[chunk.index()] += 1;
                    self.slots[chunk.index()] = None;
                }
                Action::Decided(decision) => {
                    self.decide(decision);
                    decided = Some(decision);
                }
                Action::Forget { chunk } => self.grads[chunk.index()] = None,
            }
        }
        if decided.is_some() {
            self.commit = None;
        }
    }

    fn commit_hyper(&self) -> u64 {
        self.commit.expect("a committed step").1
    }

    /// The synchronous reference steps at the moment of the decision.
    fn decide(&mut self, decision: &Decision) {
        let (grad_scale, hyper) = self.commit.expect("nothing is decided before it is committed");
        assert!(self.landing.is_empty(), "decided before every gradient was there");
        self.decisions += 1;
        assert_eq!(decision.step, self.decisions);
        let norm = self.sums.iter().flatten().sum::<f64>().sqrt() * grad_scale;
        assert_eq!(decision.norm.to_bits(), norm.to_bits());
        assert_eq!(decision.skipped, !norm.is_finite());
        let coefficient = match self.scheduler.max_norm() {
            Some(limit) if norm.is_finite() => (limit / (norm + 1e-6)).min(1.0),
            _ => 1.0,
        };
        assert_eq!(decision.coefficient.to_bits(), coefficient.to_bits());
        self.sums.fill(None);
        for chunk in std::mem::take(&mut self.handed) {
            if !decision.skipped {
                let grad = self.grads[chunk.index()].expect("a gradient");
                let value = &mut self.reference[chunk.index()];
                *value = stepped(*value, grad, (coefficient * grad_scale) as f32, hyper);
                self.generations[chunk.index()] += 1;
            }
        }
    }

    /// What must hold after every event.
    fn check(&mut self) {
        let mut ranges = Vec::new();
        for chunk in self.scheduler.layout().ids() {
            let residency = self.scheduler.residency(chunk);
            let placement = self.plan(chunk);
            let slot = self.scheduler.slot(chunk);
            let home = match placement.home {
                ParamHome::Spilled | ParamHome::Fetched => Tier::Nvme,
                ParamHome::Streamed => Tier::Host,
                ParamHome::Resident if placement.class.on_cpu() => Tier::Host,
                ParamHome::Resident => Tier::Device,
            };
            assert_eq!(residency.authority(), Some(home), "{chunk:?} {residency:?}");
            let in_slab = placement.home.is_streamed() && residency.tiers().any(|t| t == Tier::Device);
            assert_eq!(slot.is_some(), in_slab, "{chunk:?} {residency:?} {slot:?}");
            match (slot, self.slots[chunk.index()]) {
                (Some(slot), Some((start, end))) => {
                    assert_eq!(slot, start, "{chunk:?} moved without a fetch");
                    ranges.push((start, end));
                }
                (Some(_), None) => panic!("{chunk:?} has a slot that was never filled"),
                (None, _) => self.slots[chunk.index()] = None,
            }
            let now = Pin { slot, generation: self.scheduler.generation(chunk) };
            for pin in &self.pins[chunk.index()] {
                assert_eq!(*pin, now, "{chunk:?} is in use and changed");
                assert!(self.scheduler.in_use(chunk));
                assert!(residency.readable_at(Tier::Device), "{chunk:?} is in use and gone: {residency:?}");
            }
            assert_eq!(self.scheduler.owes_moments(chunk), self.owing.contains(&chunk), "{chunk:?}");
            assert!(self.scheduler.generation(chunk) <= self.generations[chunk.index()], "{chunk:?} was rewritten before the decision");
        }
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0), "slots overlap: {ranges:?}");
        assert_eq!(self.scheduler.slab_used(), ranges.iter().map(|(start, end)| end - start).sum::<u64>());
        assert!(self.scheduler.slab_used() <= self.scheduler.plan().stream_slab_bytes);
    }

    /// Compute reads what a synchronous optimizer would have left there.
    fn read(&self, chunk: ChunkId) {
        let there = self.plan(chunk).home.is_resident() || self.slots[chunk.index()].is_some();
        assert!(there, "{chunk:?} is read without a slot");
        assert_eq!(self.device[chunk.index()], self.reference[chunk.index()], "{chunk:?} is not what it should be");
    }

    fn enter(&mut self, unit: u32, phase: Phase) -> Result<(), ScheduleError> {
        self.event(&Event::Enter { unit, phase })?;
        for chunk in self.scheduler.trace().units[unit as usize].chunks.clone() {
            self.read(chunk);
            let pin = Pin { slot: self.scheduler.slot(chunk), generation: self.scheduler.generation(chunk) };
            self.pins[chunk.index()].push(pin);
        }
        Ok(())
    }

    fn leave(&mut self, unit: u32, phase: Phase) -> Result<(), ScheduleError> {
        for chunk in self.scheduler.trace().units[unit as usize].chunks.clone() {
            self.read(chunk);
            self.pins[chunk.index()].pop();
        }
        self.event(&Event::Leave { unit, phase })
    }

    /// Nobody leaves what was entered; the next forward starts.
    fn interrupted(&mut self) -> Result<(), ScheduleError> {
        for pins in &mut self.pins {
            pins.clear();
        }
        self.event(&Event::ForwardBegin)
    }

    fn touch_something(&mut self) -> Result<(), ScheduleError> {
        let chunk = ChunkId(self.choose(self.reference.len()) as u32);
        self.event(&Event::Touch { chunk })?;
        self.read(chunk);
        Ok(())
    }

    /// Forward and backward of a random subset of the units, sometimes given up in between.
    fn micro_batch(&mut self, last: bool) -> Result<(), ScheduleError> {
        let units = self.scheduler.trace().units.len();
        let skipping = [8, 3][self.choose(2)];
        let skipped: Vec<bool> = (0..units).map(|_| self.choose(skipping) == 2).collect();
        let ops: Vec<Op> = self.scheduler.trace().ops.iter().filter(|op| !skipped[op.unit as usize]).cloned().collect();
        for op in ops.iter().filter(|op| op.phase == Phase::Forward) {
            self.enter(op.unit, op.phase)?;
            if self.choose(24) == 23 {
                self.interrupted()?;
                self.enter(op.unit, op.phase)?;
            }
            self.leave(op.unit, op.phase)?;
            if self.choose(12) == 11 {
                self.touch_something()?;
            }
        }
        // A step of other units than the one before may get here before that one is decided: then it waits.
        let grad_scale = [1.0, 0.5][self.choose(2)];
        self.event(&Event::BackwardBegin { grad_scale })?;
        self.speculation_hyper = self.hyper;
        let backward: Vec<Op> = ops.iter().filter(|op| op.phase == Phase::Backward).cloned().collect();
        for (at, op) in backward.iter().enumerate() {
            if self.choose(4) == 3 {
                self.enter(op.unit, Phase::Forward)?;
                self.leave(op.unit, Phase::Forward)?;
            }
            self.enter(op.unit, op.phase)?;
            self.leave(op.unit, op.phase)?;
            let later: BTreeSet<ChunkId> =
                backward[at + 1..].iter().flat_map(|op| self.scheduler.trace().units[op.unit as usize].chunks.clone()).collect();
            for chunk in self.scheduler.trace().units[op.unit as usize].chunks.clone() {
                // An unused parameter has no gradient.
                if !later.contains(&chunk) && self.plan(chunk).class != OptimizerClass::Frozen && self.choose(10) != 9 {
                    self.event(&Event::GradsHanded { chunk })?;
                    let overwrites = self.scheduler.plan().accumulation == 1 || last && self.scheduler.plan().sums_on_device(chunk);
                    assert!(!(overwrites && self.owing.contains(&chunk)), "{chunk:?}: a gradient over one that is still read");
                    let part = self.fresh();
                    self.grads[chunk.index()] = Some(mix(&[self.grads[chunk.index()].unwrap_or(0), part]));
                    self.handed.insert(chunk);
                    if last {
                        self.landing.insert(chunk);
                    }
                }
            }
        }
        self.event(&Event::BackwardEnd)?;
        for chunk in self.scheduler.stale_partials() {
            while self.owing.contains(&chunk) {
                assert!(self.finish_something()?);
            }
            self.land(chunk)?;
        }
        Ok(())
    }

    fn evaluate_sometimes(&mut self) -> Result<(), ScheduleError> {
        if self.choose(6) == 5 {
            for unit in 0..self.scheduler.trace().units.len() as u32 {
                self.enter(unit, Phase::Forward)?;
                self.leave(unit, Phase::Forward)?;
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), ScheduleError> {
        let accumulation = self.scheduler.plan().accumulation;
        for micro in 0..accumulation {
            self.evaluate_sometimes()?;
            self.micro_batch(micro + 1 == accumulation)?;
        }
        self.evaluate_sometimes()?;
        if self.choose(6) == 5 {
            self.touch_something()?;
        }
        if self.choose(6) == 5 {
            self.event(&Event::DropGrads)?;
            self.handed.clear();
            self.sums.fill(None);
            return Ok(());
        }
        while self.scheduler.is_undecided() {
            assert!(self.finish_something()?);
        }
        let hyper_changed = self.choose(6) == 5;
        self.hyper += u64::from(hyper_changed);
        let grad_scale = [1.0, 0.5][self.choose(2)];
        while self.choose(3) == 1 && self.finish_something()? {}
        self.commit = Some((grad_scale, self.hyper));
        assert_eq!(self.apply(&Event::Commit { grad_scale, hyper_changed })?, Progress::Done);
        // `zero_grad()` after `step()` forgets nothing of it.
        self.event(&Event::DropGrads)
    }

    /// Everything running finishes; then every chunk is what a synchronous optimizer makes of it.
    fn flush(&mut self) -> Result<(), ScheduleError> {
        while self.scheduler.has_in_flight() || self.scheduler.is_undecided() {
            assert!(self.finish_something()?);
        }
        let mut actions = Vec::new();
        self.scheduler.settle(&mut actions)?;
        self.carry_out(&actions);
        self.check();
        while self.finish_something()? {}
        assert!(!self.scheduler.is_busy());
        for chunk in self.scheduler.layout().ids() {
            let at = chunk.index();
            let value = if self.plan(chunk).class.on_cpu() { self.host[at] } else { self.device[at] };
            if self.plan(chunk).class != OptimizerClass::Frozen {
                assert_eq!(value, self.reference[at], "{chunk:?} after the flush");
            }
            assert_eq!(self.scheduler.generation(chunk), self.generations[at]);
            assert_eq!(self.steps[at], self.generations[at], "{chunk:?} is stepped once for every decided step with a gradient");
        }
        assert!(self.undo.iter().all(Option::is_none), "an undo record was left behind");
        Ok(())
    }
}

/// An operation off the trace needs room in one piece where the only decided copy of a speculated chunk lies: the speculation goes.
#[test]
fn a_speculated_chunk_that_had_to_leave_is_undone_not_waited_for() {
    let spec = |name: &str, numel| (name.to_owned(), vec![ParamSpec { name: format!("{name}.weight"), numel, trainable: true }]);
    let layout = Layout::new(Precision::Bf16, vec![spec("wide", 3 * NUMEL), spec("shared", NUMEL), spec("first", NUMEL)]);
    let [wide, shared, first] = [ChunkId(0), ChunkId(1), ChunkId(2)];
    let unit = |chunks: Vec<ChunkId>| Unit {
        name: format!("{chunks:?}"),
        chunks,
        saved_bytes: 0,
        input_bytes: 0,
        offload_bytes: 0,
        offload_host_bytes: 0,
        recomputable: false,
        flops: 1.0,
        tail_flops: 0.0,
    };
    let (evaluation, before, trained) = (0, 1, 2);
    let units = vec![unit(vec![wide, shared]), unit(vec![first]), unit(vec![shared])];
    let op = |unit, phase| Op { unit, phase };
    let ops = vec![op(before, Phase::Forward), op(trained, Phase::Forward), op(trained, Phase::Backward), op(before, Phase::Backward)];
    let trace = Trace { units, ops: ops.clone(), outer_saved_bytes: 0 };
    let mut plan = bare_plan(vec![STREAMED; 3], 3, 4 * BYTES, 1);
    plan.clip_mode = ClipMode::Speculate;
    plan.undo_bytes = layout.undo_bytes(shared);
    let mut world = World::new(layout, trace, plan, None, Vec::new());
    for op in &ops {
        if op.phase == Phase::Backward && op.unit == trained {
            world.event(&Event::BackwardBegin { grad_scale: 1.0 }).unwrap();
        }
        world.enter(op.unit, op.phase).unwrap();
        world.leave(op.unit, op.phase).unwrap();
    }
    world.event(&Event::GradsHanded { chunk: shared }).unwrap();
    world.grads[shared.index()] = Some(1);
    world.handed.insert(shared);
    world.land(shared).unwrap();
    world.event(&Event::BackwardEnd).unwrap();
    while world.finish_something().unwrap() {}
    assert_eq!(world.scheduler.counters().speculated, 1);
    assert_eq!(world.scheduler.slot(shared), Some(BYTES), "in the middle of what is free");
    world.enter(evaluation, Phase::Forward).unwrap();
    world.leave(evaluation, Phase::Forward).unwrap();
    assert_eq!(world.scheduler.counters().undone, 1);
    world.commit = Some((1.0, 0));
    world.event(&Event::Commit { grad_scale: 1.0, hyper_changed: false }).unwrap();
    world.flush().unwrap();
    assert_eq!(world.steps[shared.index()], 1);
}

#[derive(Debug, Clone)]
struct Case {
    layout: Layout,
    trace: Trace,
    plan: Plan,
    max_norm: Option<f64>,
}

fn cases() -> impl Strategy<Value = Case> {
    let clip = prop_oneof![Just(ClipMode::Defer), Just(ClipMode::Speculate), Just(ClipMode::Auto)];
    let norm = prop_oneof![Just(None), Just(Some(1e9)), Just(Some(1.5))];
    (models(), prop::collection::vec(0_u8..8, 8), 1_u32..4, (clip, any::<bool>()), norm, 0_u64..4, 0.0..1.2_f64).prop_map(
        |((layout, trace), kinds, accumulation, (clip_mode, late_moments), max_norm, slots, undo)| {
            let chunks: Vec<ChunkPlan> = layout
                .chunks
                .iter()
                .zip(kinds)
                .map(|(chunk, kind)| {
                    let class = match kind {
                        _ if chunk.state_numel == 0 => OptimizerClass::Frozen,
                        0 => OptimizerClass::Device,
                        1 | 2 => OptimizerClass::Host,
                        6 => OptimizerClass::Streamed,
                        _ => OptimizerClass::Nvme,
                    };
                    let home = match kind {
                        2 | 3 => ParamHome::Streamed,
                        4 if chunk.state_numel > 0 => ParamHome::Spilled,
                        7 if chunk.state_numel > 0 => ParamHome::Fetched,
                        _ => ParamHome::Resident,
                    };
                    let placed = ChunkPlan::new(class, home);
                    // Another half of the host's chunks adds up its gradients on the device.
                    if class == OptimizerClass::Host && chunk.numel % 2 == 0 { placed.accumulating(Tier::Device) } else { placed }
                })
                .collect();
            let streamed = |c: &ChunkId| chunks[c.index()].home.is_streamed();
            let slot = |c: ChunkId| layout.param_bytes(c).next_multiple_of(256);
            let operation = trace
                .ids()
                .map(|op: OpId| trace.chunks(op).iter().copied().filter(streamed).map(slot).sum())
                .chain(layout.ids().filter(streamed).map(slot))
                .max()
                .unwrap_or(0);
            let undo_all: u64 = layout.ids().map(|c| layout.undo_bytes(c)).sum();
            // The smallest slab that any operation fits into, up to two and a half of it.
            let slab = operation + operation * slots / 512 * 256;
            let mut plan = bare_plan(chunks, trace.units.len(), slab, accumulation);
            plan.clip_mode = clip_mode;
            plan.late_moments = late_moments;
            plan.undo_bytes = (undo_all as f64 * undo) as u64;
            Case { layout, trace, plan, max_norm }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, max_shrink_iters: 5000, ..ProptestConfig::with_cases(20000) })]

    #[test]
    fn any_program_reads_and_leaves_what_a_synchronous_optimizer_would(
        case in cases(),
        choices in prop::collection::vec(any::<u16>(), 0..1500),
        steps in 1_usize..6,
    ) {
        let mut world = World::new(case.layout, case.trace, case.plan, case.max_norm, choices);
        for _ in 0..steps {
            world.step().map_err(|e| TestCaseError::fail(e.to_string()))?;
            if world.choose(4) == 3 {
                world.flush().map_err(|e| TestCaseError::fail(e.to_string()))?;
            }
        }
        world.flush().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}
