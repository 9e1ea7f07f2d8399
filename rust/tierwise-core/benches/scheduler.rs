//! Cost of the scheduler per event and of planning, at the scale of LLaMA-2-70B.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{GIB, RESIDENT_HOST, STREAMED, bare_plan, h100, llama_70b};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;
use tierwise_core::layout::Layout;
use tierwise_core::plan::{ChunkPlan, Plan};
use tierwise_core::planner::{PlanRequest, minimum_device_bytes, plan};
use tierwise_core::scheduler::{Action, Event, Progress, Scheduler};
use tierwise_core::trace::{Phase, Trace};
use tierwise_core::{ChunkId, Tier};

/// One optimizer step as events, host steps excepted: those answer actions.
fn events(layout: &Layout, trace: &Trace) -> Vec<Event> {
    let mut events = Vec::new();
    for op in &trace.ops {
        if op.phase == Phase::Backward && !events.contains(&Event::BackwardBegin { grad_scale: 1.0 }) {
            events.push(Event::BackwardBegin { grad_scale: 1.0 });
        }
        events.push(Event::Enter { unit: op.unit, phase: op.phase });
        events.push(Event::Leave { unit: op.unit, phase: op.phase });
        if op.phase == Phase::Backward {
            let chunk = ChunkId(op.unit);
            let sums = layout.chunks[chunk.index()].params.iter().map(|p| (p.index, 1.0)).collect();
            events.extend([Event::GradsHanded { chunk }, Event::GradLanded { chunk, sums }]);
        }
    }
    events.extend([Event::BackwardEnd, Event::Commit { grad_scale: 1.0, hyper_changed: false }]);
    events
}

/// Runs one step; host steps finish as soon as they are asked for. Gives the number of events.
fn run(scheduler: &mut Scheduler, events: &[Event], actions: &mut Vec<Action>) -> u64 {
    let mut count = 0;
    for event in events {
        actions.clear();
        assert_eq!(scheduler.step(event, actions), Ok(Progress::Done));
        count += 1;
    }
    let stepping: Vec<ChunkId> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Step { chunk, tier: Tier::Host, .. } => Some(*chunk),
            _ => None,
        })
        .collect();
    for chunk in stepping {
        actions.clear();
        assert_eq!(scheduler.step(&Event::StepDone { chunk }, actions), Ok(Progress::Done));
        count += 1;
    }
    count
}

fn per_event(criterion: &mut Criterion) {
    let (layout, trace) = llama_70b(4096);
    let events = events(&layout, &trace);
    let slots = 4 * layout.param_bytes(ChunkId(1)).next_multiple_of(256);
    let mut group = criterion.benchmark_group("scheduler step of LLaMA-2-70B, per event");
    group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    let placed = |placement: ChunkPlan, slab: u64| -> Plan { bare_plan(vec![placement; layout.chunks.len()], trace.units.len(), slab, 1) };
    for (name, plan) in [("all streamed, 4 slots", placed(STREAMED, slots)), ("all resident, host-stepped", placed(RESIDENT_HOST, 0))] {
        let mut warm = Scheduler::new(layout.clone(), trace.clone(), plan, Some(1.0));
        let mut actions = Vec::new();
        let count = run(&mut warm, &events, &mut actions);
        group.throughput(Throughput::Elements(count));
        group.bench_function(name, |bencher| {
            bencher.iter_batched_ref(|| warm.clone(), |scheduler| run(scheduler, &events, &mut actions), BatchSize::LargeInput);
        });
        // The dearest event: it decides over every chunk at once.
        let (commit, before) = events.split_last().unwrap();
        for event in before {
            assert_eq!(warm.step(event, &mut actions), Ok(Progress::Done));
        }
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("{name}: commit"), |bencher| {
            bencher.iter_batched_ref(
                || (warm.clone(), Vec::with_capacity(256)),
                |(scheduler, actions)| scheduler.step(commit, actions),
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

fn planning(criterion: &mut Criterion) {
    let (layout, trace) = llama_70b(4096);
    let mut group = criterion.benchmark_group("planning LLaMA-2-70B");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for gib in [24, 80] {
        let request = h100(gib * GIB, 1200 * GIB);
        group.bench_function(format!("{gib} GiB"), |bencher| bencher.iter(|| plan(&layout, &trace, &request).unwrap()));
    }
    let request: PlanRequest = h100(80 * GIB, 1200 * GIB);
    group.bench_function("smallest device budget", |bencher| bencher.iter(|| minimum_device_bytes(&layout, &trace, &request)));
    group.finish();
}

criterion_group!(benches, per_event, planning);
criterion_main!(benches);
