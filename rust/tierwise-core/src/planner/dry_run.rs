//! A dry run of the scheduler over a steady-state micro-batch: the fetches that a plan leads to.

use crate::layout::Layout;
use crate::plan::{ClipMode, OptimizerClass, Plan, PlannedFetch};
use crate::scheduler::{Action, Event, Progress, ScheduleError, Scheduler};
use crate::trace::{Phase, Trace};
use crate::{ChunkId, OpId};

/// The slab's content repeats after this many micro-batches.
const WARM_UP: usize = 2;

/// Fetches of one micro-batch in the order in which they are issued.
pub(super) fn fetches(layout: &Layout, trace: &Trace, plan: &Plan) -> Result<Vec<PlannedFetch>, ScheduleError> {
    if plan.stream_slab_bytes == 0 {
        return Ok(Vec::new());
    }
    // Between two micro-batches of a step nothing is rewritten; a plan without accumulation rewrites after each. Moments move nothing.
    let accumulation = if plan.accumulation > 1 { u32::MAX } else { 1 };
    let steady = Plan { accumulation, clip_mode: ClipMode::Defer, late_moments: false, ..plan.clone() };
    let mut run = DryRun {
        scheduler: Scheduler::new(layout.clone(), trace.clone(), steady, None),
        layout,
        trace,
        handed: last_backwards(layout, trace, plan),
        fetches: Vec::new(),
    };
    for _ in 0..WARM_UP {
        run.micro_batch()?;
    }
    run.fetches.clear();
    run.micro_batch()?;
    Ok(run.fetches)
}

/// Per operation: chunks whose gradients it completes.
fn last_backwards(layout: &Layout, trace: &Trace, plan: &Plan) -> Vec<Vec<ChunkId>> {
    let mut last = vec![None; layout.chunks.len()];
    for (at, op) in trace.ops.iter().enumerate().filter(|(_, op)| op.phase == Phase::Backward) {
        for chunk in &trace.units[op.unit as usize].chunks {
            last[chunk.index()] = Some(at);
        }
    }
    let mut handed = vec![Vec::new(); trace.ops.len()];
    for chunk in layout.ids().filter(|c| plan.chunks[c.index()].class != OptimizerClass::Frozen) {
        if let Some(at) = last[chunk.index()] {
            handed[at].push(chunk);
        }
    }
    handed
}

struct DryRun<'a> {
    scheduler: Scheduler,
    layout: &'a Layout,
    trace: &'a Trace,
    handed: Vec<Vec<ChunkId>>,
    fetches: Vec<PlannedFetch>,
}

impl DryRun<'_> {
    fn micro_batch(&mut self) -> Result<(), ScheduleError> {
        let ops = self.trace.ops.len();
        let mut in_backward = false;
        for at in 0..ops {
            let (unit, phase) = (self.trace.ops[at].unit, self.trace.ops[at].phase);
            if phase == Phase::Backward && !in_backward {
                in_backward = true;
                self.step(&Event::BackwardBegin { grad_scale: 1.0 }, at)?;
            }
            self.step(&Event::Enter { unit, phase }, at)?;
            self.step(&Event::Leave { unit, phase }, at)?;
            for chunk in self.handed[at].clone() {
                self.step(&Event::GradsHanded { chunk }, at)?;
                if self.scheduler.is_last_backward() {
                    let sums = self.layout.chunks[chunk.index()].params.iter().filter(|p| p.trainable).map(|p| (p.index, 0.0)).collect();
                    self.step(&Event::GradLanded { chunk, sums }, at)?;
                }
            }
        }
        if in_backward {
            self.step(&Event::BackwardEnd, ops - 1)?;
            if self.scheduler.plan().accumulation == 1 {
                self.step(&Event::Commit { grad_scale: 1.0, hyper_changed: false }, ops - 1)?;
            }
        }
        Ok(())
    }

    /// Applies an event at an operation; host steps finish at once.
    fn step(&mut self, event: &Event, at: usize) -> Result<(), ScheduleError> {
        let mut actions = Vec::new();
        let progress = self.scheduler.step(event, &mut actions)?;
        debug_assert_eq!(progress, Progress::Done, "nothing is pending in a dry run");
        let mut steps = Vec::new();
        for action in actions {
            match action {
                Action::Fetch { chunk, offset, demand, .. } => {
                    let needed_at = if demand { at } else { self.next_use(chunk, at) };
                    self.fetches.push(PlannedFetch {
                        chunk,
                        slot_offset: offset,
                        issued_at: OpId(at as u32),
                        needed_at: OpId(needed_at as u32),
                    });
                }
                Action::Step { chunk, tier: crate::Tier::Host | crate::Tier::Nvme, .. } => steps.push(chunk),
                _ => {}
            }
        }
        for chunk in steps {
            self.step(&Event::StepDone { chunk }, at)?;
        }
        Ok(())
    }

    /// The next operation after `at`, cyclically, that reads a chunk.
    fn next_use(&self, chunk: ChunkId, at: usize) -> usize {
        let ops = self.trace.ops.len();
        (1..=ops).map(|ahead| (at + ahead) % ops).find(|&op| self.trace.chunks(OpId(op as u32)).contains(&chunk)).unwrap_or(at)
    }
}
