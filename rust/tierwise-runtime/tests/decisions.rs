//! What the simulator predicts is what happens: the runtime, on the emulated device driven by a virtual clock, hands the scheduler the same
//! events in the same order as the simulator, and gets the same actions.

mod virtual_device;

use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tierwise_core::layout::{Layout, ParamLayout, ParamSpec, Precision};
use tierwise_core::plan::{ActivationPlan, ChunkPlan, ClipMode, NvmePlan, OptimizerClass, ParamHome, Plan};
use tierwise_core::planner::{NvmeRequest, Offload, Placement, PlanError, PlanRequest, Recompute, Speeds, minimum_device_bytes, plan};
use tierwise_core::scheduler::{Action, Event, Turn};
use tierwise_core::streaming::pieces as visits;
use tierwise_core::trace::{Op, Phase, Trace, Unit};
use tierwise_core::{ChunkId, Tier};
use tierwise_io::backend::Backend;
use tierwise_io::backend::memory::Memory;
use tierwise_io::queue::Limits;
use tierwise_io::store::Store;
use tierwise_kernels::AdamHyper;
use tierwise_runtime::device::ComputeStream;
use tierwise_runtime::engine::{Engine, EngineConfig, Hyper};
use tierwise_runtime::spill::access::Access;
use tierwise_sim::costs::{Costs, Launch};
use tierwise_sim::executor::calls::{Call, calls};
use tierwise_sim::executor::offload::{Need, Offload as Offloaded, PARTS, part_of};
use tierwise_sim::executor::{Setup, WARM_UP_STEPS, decisions};
use tierwise_sim::hardware::{Disk, Hardware, preset};
use virtual_device::VirtualDevice;

const STREAM: ComputeStream = ComputeStream(0);
/// No budget of these tests is what limits them.
const PLENTY: u64 = 1 << 40;

#[derive(Debug, Clone)]
struct Case {
    layout: Layout,
    trace: Trace,
    plan: Plan,
    costs: Costs,
    hardware: Hardware,
    clips: bool,
}

impl Case {
    fn backward(&self) -> Vec<Option<(tierwise_core::OpId, tierwise_core::OpId)>> {
        let mut found: Vec<Option<(tierwise_core::OpId, tierwise_core::OpId)>> = vec![None; self.layout.chunks.len()];
        for op in self.trace.ids().filter(|op| self.trace.ops[op.index()].phase == Phase::Backward) {
            for chunk in self.trace.chunks(op).iter().filter(|c| self.plan.chunks[c.index()].class != OptimizerClass::Frozen) {
                found[chunk.index()].get_or_insert((op, op)).1 = op;
            }
        }
        found
    }

    fn simulated(&self) -> Vec<Turn> {
        decisions(&Setup {
            layout: &self.layout,
            trace: &self.trace,
            plan: &self.plan,
            costs: &self.costs,
            hardware: &self.hardware,
            sharding: None,
            transient_bytes: None,
            forward_reserve_bytes: 0,
            device_budget: PLENTY,
            host_budget: PLENTY,
            nvme_budget: u64::MAX,
            clips: self.clips,
        })
        .unwrap()
    }

    /// The same steps by the engine, or so many calls of them, after which it is dropped in the middle. Gradients are such that every
    /// parameter's sum of squares is the simulator's: 4 or 0.
    fn executed(&self, most: usize) -> Vec<Turn> {
        let device = VirtualDevice::new(&self.hardware);
        let mut memory = Vec::new();
        let mut take = |bytes: u64| {
            memory.push(vec![0_u64; bytes.div_ceil(8).max(1) as usize]);
            memory.last().map_or(0, |m| m.as_ptr() as u64)
        };
        let config = EngineConfig {
            device_budget: PLENTY,
            host_budget: PLENTY,
            nvme_budget: PLENTY,
            max_norm: Some(1.0),
            threads: Some(1),
            ..EngineConfig::default()
        };
        let disk = |nvme: &NvmePlan, _| {
            let (bytes, block_bytes) = (nvme.file_bytes as usize, nvme.block_bytes as usize);
            let limits = Limits { queue_depth: 32, block_bytes, alignment: 4096, blocks: (bytes / block_bytes) as u32 };
            let memory = move || Ok(Box::new(Memory::new(bytes, 32)) as Box<dyn Backend>);
            Ok(Store::with_backend(limits, Duration::from_secs(60), memory).unwrap())
        };
        let (layout, trace, plan) = (self.layout.clone(), self.trace.clone(), self.plan.clone());
        let engine = Engine::with_store(layout, trace, plan, Arc::clone(&device) as _, &config, disk).unwrap();
        for chunk in self.layout.ids() {
            let placed = self.plan.chunks[chunk.index()];
            let resident = placed.home.is_resident().then(|| take(self.layout.param_bytes(chunk)));
            let states = (placed.class == OptimizerClass::Device).then(|| take(self.layout.state_bytes(chunk)));
            let accumulator = self.plan.sums_on_device(chunk).then(|| take(self.layout.grad_acc_bytes(chunk)));
            engine.bind(chunk, resident, states, accumulator).unwrap();
        }
        if self.plan.stream_slab_bytes > 0 {
            engine.bind_slab(take(self.plan.stream_slab_bytes)).unwrap();
        }
        if self.plan.device.staging > 0 {
            engine.bind_staging(take(self.plan.device.staging)).unwrap();
        }
        let params: usize = self.layout.chunks.iter().map(|c| c.params.len()).sum();
        let group = AdamHyper { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };
        engine.set_hyper(Hyper { groups: vec![group], group_of_param: vec![Some(0); params] }).unwrap();
        let gradients = |first: u16| -> Vec<Vec<Vec<u16>>> {
            let of = |numel: u64| std::iter::once(first).chain(std::iter::repeat_n(0, numel as usize - 1)).collect();
            self.layout.chunks.iter().map(|c| c.params.iter().map(|p| of(p.numel)).collect()).collect()
        };
        let (two, zero) = (gradients(if self.clips { 0x4000 } else { 0 }), gradients(0));
        for chunk in self.layout.ids().filter(|c| self.plan.chunks[c.index()].class == OptimizerClass::Frozen) {
            if self.plan.chunks[chunk.index()].home == ParamHome::Fetched {
                let (numel, values) = (self.layout.chunks[chunk.index()].numel, take(self.layout.param_bytes(chunk)));
                engine.spilled(chunk, "param", (0, numel), Access::Write(values), &mut || true).unwrap();
            }
        }
        engine.record_decisions(true).unwrap();
        engine.start().unwrap();
        let mut patience = || true;
        let step = calls(&self.trace, &self.plan, &self.backward());
        let mut away = Away::new(&engine, self);
        let first_micro_batch = (step.len() - 1) / self.plan.accumulation as usize;
        for number in 0..=WARM_UP_STEPS as usize {
            for (at, call) in step.iter().enumerate().take(most.saturating_sub(number * step.len())) {
                match *call {
                    Call::Begin => away.begin(),
                    Call::Enter(op) => {
                        let Op { unit, phase } = self.trace.ops[op.index()];
                        engine.enter(unit, phase, STREAM, &mut patience).unwrap();
                        if away.policy.is_none() {
                            self.compute(&device, unit, phase, |whole| whole);
                        }
                    }
                    Call::AskBack(op) => away.ask_back(self.trace.ops[op.index()].unit),
                    Call::Work(op, part) => {
                        let Op { unit, phase } = self.trace.ops[op.index()];
                        let storage = away.before_work(unit, phase, part);
                        self.compute(&device, unit, phase, |whole| if storage.is_some() { part_of(whole, part) } else { whole });
                        if let Some(storage) = storage.filter(|_| phase == Phase::Backward) {
                            away.used(unit, storage);
                        }
                    }
                    Call::Leave(op) => {
                        let Op { unit, phase } = self.trace.ops[op.index()];
                        away.leave(unit, phase);
                        engine.leave(unit, phase, STREAM).unwrap();
                    }
                    Call::BackwardBegin => engine.backward_begin(1.0, &mut patience).unwrap(),
                    Call::Hand(chunk) => {
                        let of = if at < first_micro_batch { &two } else { &zero };
                        let grads: Vec<_> = of[chunk.index()].iter().enumerate().map(|(i, g)| (i, g.as_ptr() as u64)).collect();
                        engine.grads(chunk, &grads, STREAM, &mut patience).unwrap();
                    }
                    Call::BackwardEnd => engine.backward_end(STREAM).unwrap(),
                    Call::Step => device.spend(self.costs.commit_ns),
                    Call::Commit => engine.commit(1.0, STREAM, &mut patience).unwrap(),
                }
            }
        }
        if most == usize::MAX {
            device.drain();
        }
        let turns = engine.decisions().unwrap();
        drop(engine);
        turns
    }

    /// Enqueues so much of a unit's work and spends what that takes.
    fn compute(&self, device: &VirtualDevice, unit: u32, phase: Phase, share: impl Fn(u64) -> u64) {
        let index = unit as usize;
        let recomputed = self.plan.activations[index] == ActivationPlan::Recompute;
        let again = if recomputed { self.costs.recompute_ns[index] } else { 0 };
        device.compute(share(match phase {
            Phase::Forward => self.costs.forward_ns[index],
            Phase::Backward => self.costs.backward_ns[index] + again,
        }));
        device.spend(share(self.costs.launch[index].ns(phase, recomputed)));
    }

    /// Compares turn by turn, and gives them.
    fn check(&self) -> Vec<Turn> {
        let (simulated, executed) = (self.simulated(), self.executed(usize::MAX));
        for (at, (predicted, happened)) in simulated.iter().zip(&executed).enumerate() {
            let before: Vec<_> = simulated[at.saturating_sub(3)..at].iter().map(|turn| &turn.event).collect();
            assert_eq!(predicted, happened, "turn {at} of {}, after {before:?}", simulated.len());
        }
        assert_eq!(
            simulated.len(),
            executed.len(),
            "the longer one goes on with {:?}",
            simulated.get(executed.len()).or(executed.get(simulated.len()))
        );
        simulated
    }
}

/// What the hooks do with offloaded activations, on the engine.
struct Away<'a> {
    engine: &'a Engine,
    policy: Option<Offloaded<u64>>,
    /// By unit and part: a storage on the device.
    storages: Vec<Vec<Vec<u8>>>,
    /// The copies that bring storages back.
    back: BTreeMap<(u32, u64), u64>,
    /// What the host holds; and what it holds of finished backwards until its copy has left the device.
    tickets: BTreeMap<(u32, u64), u64>,
    dying: Vec<u64>,
}

impl<'a> Away<'a> {
    fn new(engine: &'a Engine, case: &Case) -> Self {
        let policy = Offloaded::new(&case.trace, &case.plan);
        let bytes = |unit: u32, part: u64| policy.as_ref().map_or(0, |p| p.bytes(unit, part)) as usize;
        let storages = |unit: u32| (0..PARTS).map(|part| vec![0; bytes(unit, part)]).collect();
        let storages = (0..case.trace.units.len() as u32).map(storages).collect();
        Away { engine, policy, storages, back: BTreeMap::new(), tickets: BTreeMap::new(), dying: Vec::new() }
    }

    fn settle(&mut self) {
        let engine = self.engine;
        let has_left = |ticket: &u64| engine.activation_has_left(*ticket, false, STREAM, &mut || true).unwrap();
        if let Some(policy) = &mut self.policy {
            policy.settle(has_left);
        }
        let (gone, dying) = std::mem::take(&mut self.dying).into_iter().partition(has_left);
        self.dying = dying;
        let gone: Vec<u64> = gone;
        for ticket in gone {
            engine.free_activation(ticket).unwrap();
        }
    }

    fn begin(&mut self) {
        self.settle();
        if let Some(policy) = &mut self.policy {
            policy.begin();
        }
    }

    fn ask_back(&mut self, unit: u32) {
        self.settle();
        if let Some(policy) = &mut self.policy {
            policy.enter_backward(unit);
        }
        self.fetch_ahead();
    }

    fn fetch_ahead(&mut self) {
        while let Some((unit, part, ticket)) = self.policy.as_mut().and_then(|policy| policy.fetch_ahead(|_| true)) {
            self.fetch(unit, part, ticket);
        }
    }

    fn fetch(&mut self, unit: u32, part: u64, ticket: u64) {
        let address = self.storages[unit as usize][part as usize].as_mut_ptr() as u64;
        self.engine.fetch_activation(ticket, address, STREAM).unwrap();
        self.back.insert((unit, part), ticket);
    }

    /// Before a part of an operation's work: gives the storage that it saves or uses, if its unit offloads.
    fn before_work(&mut self, unit: u32, phase: Phase, part: u64) -> Option<u64> {
        if !self.policy.as_ref().is_some_and(|policy| policy.has(unit)) {
            return None;
        }
        let storage = if phase == Phase::Forward { part } else { PARTS - 1 - part };
        self.settle();
        loop {
            let policy = self.policy.as_mut()?;
            let wait = match phase {
                Phase::Forward => policy.room_for(unit, storage).copied(),
                Phase::Backward => match policy.need(unit, storage) {
                    Need::Nothing => None,
                    Need::Wait(ticket) => Some(ticket),
                    Need::Fetch(ticket) => {
                        self.fetch(unit, storage, ticket);
                        None
                    }
                },
            };
            let Some(ticket) = wait else { break };
            self.engine.activation_has_left(ticket, true, STREAM, &mut || true).unwrap();
            self.settle();
        }
        if phase == Phase::Forward {
            self.policy.as_mut()?.save(unit, storage);
        } else {
            let back = self.back.remove(&(unit, storage));
            self.fetch_ahead();
            if let Some(ticket) = back {
                self.engine.await_activation(ticket, STREAM, &mut || true).unwrap();
            }
        }
        Some(storage)
    }

    /// A backward has used a storage.
    fn used(&mut self, unit: u32, storage: u64) {
        if let Some(policy) = &mut self.policy {
            policy.used(unit, storage);
        }
        self.dying.extend(self.tickets.remove(&(unit, storage)));
    }

    fn leave(&mut self, unit: u32, phase: Phase) {
        if self.policy.is_none() {
            return;
        }
        if phase == Phase::Backward {
            self.settle();
            return;
        }
        let sends = self.policy.as_ref().is_some_and(|policy| policy.has(unit));
        for part in 0..if sends { PARTS } else { 0 } {
            self.settle();
            let storage = &self.storages[unit as usize][part as usize];
            let (address, bytes) = (storage.as_ptr() as u64, storage.len() as u64);
            let ticket = self.engine.send_activation(unit, address, bytes, STREAM).unwrap();
            let Some(policy) = &mut self.policy else { return };
            assert_eq!(ticket.is_some(), policy.may_send(unit, part), "room in host memory");
            self.tickets.extend(ticket.map(|ticket| ((unit, part), ticket)));
            policy.leave(unit, part, ticket);
        }
    }
}

/// Units of one chunk each, unless one shares its predecessor's.
fn model(sizes: &[(u64, u64, bool)]) -> (Layout, Trace) {
    let mut chunks = Vec::new();
    let mut units = Vec::new();
    for (number, &(numel, saved_bytes, shares)) in sizes.iter().enumerate() {
        let name = format!("layers.{number}");
        let mut reads = Vec::new();
        if shares && number > 0 {
            reads.push(ChunkId(chunks.len() as u32 - 1));
        }
        if !shares || number == 0 || numel.is_multiple_of(128) {
            let params =
                [("weight", numel), ("bias", 64)].map(|(p, numel)| ParamSpec { name: format!("{name}.{p}"), numel, trainable: true });
            chunks.push((name.clone(), params.to_vec()));
            reads.push(ChunkId(chunks.len() as u32 - 1));
        }
        units.push(Unit {
            name,
            chunks: reads,
            saved_bytes,
            input_bytes: saved_bytes / 4,
            offload_bytes: if number > 0 { saved_bytes / 3 * 2 } else { 0 },
            // Host memory is taken in whole pages, by every storage.
            offload_host_bytes: if number > 0 { (saved_bytes / 3 * 2).next_multiple_of(4096 * PARTS) } else { 0 },
            recomputable: number > 0,
            flops: numel as f64 * 1e3,
            tail_flops: numel as f64 * 2e2,
        });
    }
    let count = units.len() as u32;
    let forward = (0..count).map(|unit| Op { unit, phase: Phase::Forward });
    let ops = forward.chain((0..count).rev().map(|unit| Op { unit, phase: Phase::Backward })).collect();
    (Layout::new(Precision::Bf16, chunks), Trace { units, ops, outer_saved_bytes: 0 })
}

/// Some chunks are not trained.
fn freeze((layout, trace): (Layout, Trace), frozen: impl Fn(usize) -> bool) -> (Layout, Trace) {
    let specs = layout.chunks.iter().enumerate().map(|(at, chunk)| {
        let spec = |p: &ParamLayout| ParamSpec { name: p.name.clone(), numel: p.numel, trainable: !frozen(at) };
        (chunk.name.clone(), chunk.params.iter().map(spec).collect())
    });
    (Layout::new(Precision::Bf16, specs.collect()), trace)
}

/// Speeds at which copies, host steps and computing of such small models take about equally long.
fn slow(scale: [f64; 4]) -> Hardware {
    let h100 = preset("h100").unwrap();
    Hardware {
        h2d_bytes_per_s: 2e9 * scale[0],
        d2h_bytes_per_s: 2e9 * scale[1],
        h2d_duplex_bytes_per_s: 1.5e9 * scale[0],
        d2h_duplex_bytes_per_s: 1.4e9 * scale[1],
        host_memory_bytes_per_s: 9e9 * scale[2],
        host_stream_bytes_per_s: 6e9 * scale[2],
        host_adam_params_per_s: 2e8 * scale[2],
        device_memory_bytes_per_s: 4e10 * scale[3],
        nvme: Some(Disk { read_bytes_per_s: 1.3e9 * scale[0], write_bytes_per_s: 1.9e9 * scale[1] }),
        launch_ns: (700.0 * scale[3]) as u64,
        ..h100
    }
}

fn request(placement: Placement, accumulation: u32, clip_mode: ClipMode, device_budget: u64) -> PlanRequest {
    PlanRequest {
        device_budget,
        host_budget: PLENTY,
        reserve_bytes: 0,
        placement,
        recompute: Recompute::Auto,
        offload: Offload::None,
        accumulation,
        accumulate: None,
        late_moments: None,
        visiting: true,
        clip_mode,
        speeds: Speeds {
            flops: 1e12,
            h2d_bytes: 2e9,
            d2h_bytes: 2e9,
            host_adam_params: 2e8,
            host_params_first: None,
            device_memory_bytes: 4e10,
        },
        nvme: None,
    }
}

fn case(sizes: &[(u64, u64, bool)], wanted: &PlanRequest, hardware: Hardware, clips: bool) -> Case {
    case_of(model(sizes), sizes, wanted, hardware, clips)
}

fn case_of((layout, trace): (Layout, Trace), sizes: &[(u64, u64, bool)], wanted: &PlanRequest, hardware: Hardware, clips: bool) -> Case {
    let plan = plan(&layout, &trace, wanted).unwrap();
    let forward_ns: Vec<u64> = sizes.iter().map(|(numel, saved, _)| numel + saved % 977 + 500).collect();
    let backward_ns: Vec<u64> = forward_ns.iter().map(|ns| 2 * ns + 13).collect();
    let recompute_ns = forward_ns.iter().map(|ns| ns - 150).collect();
    let launch = forward_ns.iter().map(|ns| Launch { forward_ns: [hardware.launch_ns, ns % 450], backward_ns: [ns % 770, 900] }).collect();
    let costs = Costs { forward_ns, backward_ns, recompute_ns, launch, commit_ns: hardware.launch_ns / 3, sustained: 1.0 };
    Case { layout, trace, plan, costs, hardware, clips }
}

const SIZES: [(u64, u64, bool); 6] =
    [(4096, 9000, false), (8192, 20_000, false), (8192, 20_000, false), (8192, 20_000, false), (8192, 20_000, false), (2048, 5000, false)];

fn fixed(offload_optim_frac: f64, offload_param_frac: f64) -> Placement {
    visiting(offload_optim_frac, offload_param_frac, 0.0)
}

fn visiting(offload_optim_frac: f64, offload_param_frac: f64, stream_optim_frac: f64) -> Placement {
    Placement::Static { shard_param_frac: 1.0, offload_optim_frac, offload_param_frac, stream_optim_frac }
}

fn count(turns: &[Turn], wanted: impl Fn(&Action) -> bool) -> usize {
    turns.iter().flat_map(|turn| &turn.actions).filter(|action| wanted(action)).count()
}

#[test]
fn everything_on_the_device() {
    for accumulation in [1, 3] {
        let turns = case(&SIZES, &request(fixed(0.0, 0.0), accumulation, ClipMode::Defer, PLENTY), slow([1.0; 4]), true).check();
        assert_eq!(count(&turns, |a| matches!(a, Action::Step { .. })), 18);
        assert_eq!(count(&turns, |a| matches!(a, Action::Refresh { .. })), 0);
    }
}

#[test]
fn steps_on_the_host() {
    for accumulation in [1, 2, 3] {
        let turns = case(&SIZES, &request(fixed(1.0, 0.0), accumulation, ClipMode::Defer, PLENTY), slow([1.0; 4]), true).check();
        assert_eq!(count(&turns, |a| matches!(a, Action::Refresh { .. })), 18);
    }
    case(&SIZES, &request(fixed(0.5, 0.0), 1, ClipMode::Defer, PLENTY), slow([1.0; 4]), true).check();
}

/// Moments after parameters, with gradients that come before the moments are done: they wait, or land in as many buffers as there are.
#[test]
fn moments_are_late() {
    for accumulation in [1, 2, 3] {
        for param in [0.0, 0.5, 1.0] {
            // The CPU as fast as the device, and so slow that several micro-batches pass meanwhile.
            for cpu in [4.0, 1.0, 0.2, 0.04] {
                for (buffers, accumulate) in [(2, Tier::Host), (3, Tier::Host), (6, Tier::Host), (2, Tier::Device)] {
                    let wanted = PlanRequest {
                        late_moments: Some(true),
                        accumulate: Some(accumulate),
                        ..request(fixed(1.0, param), accumulation, ClipMode::Defer, PLENTY)
                    };
                    let mut case = case(&SIZES, &wanted, slow([1.0, 1.0, cpu, 1.0]), true);
                    assert_eq!(
                        case.plan.chunks.iter().any(|c| c.accumulate == Tier::Device),
                        accumulation > 1 && accumulate == Tier::Device
                    );
                    let largest = case.plan.host.staging / u64::from(case.plan.landing_buffers);
                    (case.plan.landing_buffers, case.plan.host.staging) = (buffers, u64::from(buffers) * largest);
                    let turns = case.check();
                    assert_eq!(count(&turns, |a| matches!(a, Action::Moments { .. })), 18);
                }
            }
        }
    }
}

#[test]
fn states_visit_the_device() {
    for (accumulation, clip_mode) in [(1, ClipMode::Defer), (3, ClipMode::Defer), (1, ClipMode::Speculate), (2, ClipMode::Auto)] {
        for (param, stream) in [(0.0, 1.0), (0.0, 0.5), (0.4, 0.5)] {
            for staging in [3 * 64 * 10, 3 * 4096 * 10, 3 * (8192 + 64) * 10] {
                // Links slow enough that states of one step would be overtaken by those of the next.
                for scale in [[1.0; 4], [0.2, 0.2, 4.0, 1.0], [4.0, 0.3, 1.0, 0.5]] {
                    let placement = visiting(1.0, param, stream);
                    let mut case = case(&SIZES, &request(placement, accumulation, clip_mode, PLENTY), slow(scale), false);
                    let streamed = |c: &ChunkId| case.plan.chunks[c.index()].class == OptimizerClass::Streamed;
                    assert!(case.plan.device.staging > 0 && case.layout.ids().any(|c| streamed(&c)));
                    case.plan.device.staging = staging;
                    let most = case.layout.ids().map(|c| visits(&case.layout, c, staging, |_| true).len()).max();
                    assert_eq!(most > Some(1), staging < 3 * 8192 * 10);
                    let turns = case.check();
                    let on_device = count(&turns, |a| matches!(a, Action::Step { tier: Tier::Device, .. }));
                    assert_eq!(on_device, 3 * case.layout.ids().filter(streamed).count());
                }
            }
        }
    }
}

#[test]
fn gradients_are_summed_on_either_side() {
    for tier in [Tier::Device, Tier::Host] {
        for (optim, param) in [(1.0, 0.0), (0.5, 0.0), (1.0, 1.0)] {
            let wanted = PlanRequest { accumulate: Some(tier), ..request(fixed(optim, param), 3, ClipMode::Defer, PLENTY) };
            let case = case(&SIZES, &wanted, slow([1.0; 4]), true);
            assert!(case.plan.chunks.iter().any(|c| c.class == OptimizerClass::Host && c.accumulate == tier));
            case.check();
        }
    }
}

#[test]
fn parameters_are_streamed() {
    let (layout, trace) = model(&SIZES);
    let wanted = request(Placement::Auto, 1, ClipMode::Defer, PLENTY);
    let least = minimum_device_bytes(&layout, &trace, &wanted);
    for accumulation in [1, 2] {
        for budget in [least, least + least / 8, least + least / 3] {
            let wanted = request(
                Placement::Auto,
                accumulation,
                ClipMode::Defer,
                budget.max(minimum_device_bytes(&layout, &trace, &request(Placement::Auto, accumulation, ClipMode::Defer, PLENTY))),
            );
            let turns = case(&SIZES, &wanted, slow([1.0; 4]), true).check();
            assert!(count(&turns, |a| matches!(a, Action::Fetch { .. })) > 12);
        }
    }
}

#[test]
fn speculation_that_is_accepted_and_undone() {
    for (clips, accumulation) in [(false, 1), (true, 1), (false, 2), (true, 2)] {
        for clip_mode in [ClipMode::Speculate, ClipMode::Auto] {
            let turns = case(&SIZES, &request(fixed(1.0, 0.5), accumulation, clip_mode, PLENTY), slow([1.0, 1.0, 4.0, 1.0]), clips).check();
            assert!(count(&turns, |a| matches!(a, Action::Accept { .. })) > 0 || clips);
            assert!(clips || count(&turns, |a| matches!(a, Action::Speculate { .. })) > 6);
        }
    }
}

#[test]
fn activations_are_offloaded() {
    // Links from far too slow to fast enough: forward waits for the window, backward for what comes back, or neither.
    for link in [0.02, 0.3, 1.0, 20.0] {
        for (optim, param, accumulation, clip_mode) in [
            (0.0, 0.0, 1, ClipMode::Defer),
            (1.0, 0.0, 1, ClipMode::Defer),
            (1.0, 0.5, 3, ClipMode::Defer),
            (1.0, 0.5, 1, ClipMode::Speculate),
        ] {
            let wanted = PlanRequest {
                offload: Offload::Full,
                recompute: Recompute::None,
                ..request(fixed(optim, param), accumulation, clip_mode, PLENTY)
            };
            let case = case(&SIZES, &wanted, slow([link, link, 1.0, 1.0]), false);
            assert_eq!(case.plan.activations.iter().filter(|a| **a == ActivationPlan::Offload).count(), 5);
            case.check();
        }
    }
    // Making outputs again takes longer than the link does.
    let many = [(20_480, 49_000, false); 12];
    let budgets = (1..60).map(|step| 100_000 + 20_000 * step);
    let mut mixed = budgets.filter_map(|budget| {
        let mut wanted = PlanRequest { offload: Offload::Auto, ..request(fixed(1.0, 0.5), 2, ClipMode::Defer, budget) };
        wanted.speeds.flops = 1e11;
        let (layout, trace) = model(&many);
        plan(&layout, &trace, &wanted).is_ok().then(|| case(&many, &wanted, slow([1.0; 4]), true))
    });
    let mixed = mixed.find(|case| {
        let has = |kind| case.plan.activations.contains(&kind);
        has(ActivationPlan::Offload) && has(ActivationPlan::Keep)
    });
    let mixed = mixed.expect("a budget with room for some activations");
    mixed.check();
}

/// A host budget between the least that a request with a disk needs (0) and what it needs without one (1).
fn tightened((layout, trace): &(Layout, Trace), wanted: &PlanRequest, share: f64) -> PlanRequest {
    let with = |host_budget| plan(layout, trace, &PlanRequest { host_budget, ..wanted.clone() });
    let least = match with(0) {
        Err(PlanError::Host { needed, .. }) => needed,
        Ok(_) => 0,
        Err(other) => panic!("{other}"),
    };
    let all = with(PLENTY).unwrap().host.total();
    PlanRequest { host_budget: least + (share * all.saturating_sub(least) as f64) as u64, ..wanted.clone() }
}

fn spilling(placement: Placement, accumulation: u32) -> PlanRequest {
    let nvme = NvmeRequest { budget: PLENTY, read_bytes: 1.3e9, write_bytes: 1.9e9 };
    PlanRequest { nvme: Some(nvme), ..request(placement, accumulation, ClipMode::Defer, PLENTY) }
}

/// More than one piece each, of which the last is smaller.
const LARGE: [(u64, u64, bool); 5] =
    [(12_288, 9000, false), (20_480, 20_000, false), (20_480, 20_000, false), (20_480, 20_000, false), (9216, 5000, false)];

/// Disks and links from far too slow to fast enough, much slower in one direction, and with a slow CPU.
const DISKS: [[f64; 4]; 5] = [[1.0; 4], [0.2, 0.3, 1.0, 1.0], [3.0, 5.0, 0.5, 1.0], [20.0, 20.0, 2.0, 1.0], [10.0, 0.1, 1.0, 1.0]];

/// Compares on every disk, with host memory tightened to each share; every plan has to have what the test is about.
fn on_every_disk(
    model: &(Layout, Trace),
    sizes: &[(u64, u64, bool)],
    wanted: &PlanRequest,
    shares: [f64; 3],
    has: impl Fn(&Plan) -> bool,
) -> Vec<Vec<Turn>> {
    let cases = shares.into_iter().flat_map(|share| DISKS.map(|scale| (share, scale)));
    let check = |(share, scale)| {
        let case = case_of(model.clone(), sizes, &tightened(model, wanted, share), slow(scale), true);
        assert!(has(&case.plan), "{share}: {:?}", case.plan.chunks);
        case.check()
    };
    cases.map(check).collect()
}

#[test]
fn states_are_on_the_disk() {
    for optim in [1.0, 0.6] {
        let has =
            |plan: &Plan| plan.chunks.iter().any(|c| c.class == OptimizerClass::Nvme) && !plan.chunks.iter().any(ChunkPlan::spills_grads);
        for turns in on_every_disk(&model(&LARGE), &LARGE, &spilling(fixed(optim, 0.0), 1), [0.6, 0.8, 0.95], has) {
            assert!(count(&turns, |a| matches!(a, Action::Step { tier: Tier::Nvme, .. })) >= 3);
        }
    }
}

#[test]
fn gradients_and_their_sums_are_on_the_disk() {
    let many = [LARGE[1]; 9];
    for accumulation in [1, 2, 3] {
        let wanted = PlanRequest { accumulate: Some(Tier::Host), ..spilling(fixed(1.0, 0.0), accumulation) };
        on_every_disk(&model(&many), &many, &wanted, [0.0, 0.04, 0.08], |plan| plan.chunks.iter().any(ChunkPlan::spills_grads));
    }
}

#[test]
fn parameters_are_on_the_disk() {
    let many = [LARGE[1]; 9];
    let has = |plan: &Plan| plan.chunks.iter().any(|c| c.home == ParamHome::Fetched);
    for accumulation in [1, 2] {
        on_every_disk(&model(&many), &many, &spilling(fixed(1.0, 1.0), accumulation), [0.0, 0.06, 0.12], has);
    }
}

#[test]
fn what_is_frozen_is_on_the_disk() {
    let many = [(36_864, 20_000, false); 18];
    let model = freeze(model(&many), |chunk| !matches!(chunk, 1 | 5));
    let fetched = |c: &&ChunkPlan| c.home == ParamHome::Fetched && c.class == OptimizerClass::Frozen;
    for accumulation in [1, 2] {
        let has = |plan: &Plan| plan.chunks.iter().filter(fetched).count() >= 3;
        on_every_disk(&model, &many, &spilling(fixed(1.0, 1.0), accumulation), [0.0, 0.2, 0.4], has);
    }
}

/// A test that fails in the middle of a step says so, and does not hang.
#[test]
fn an_engine_is_dropped_in_the_middle_of_a_step() {
    let many = [LARGE[1]; 9];
    let wanted = PlanRequest { accumulate: Some(Tier::Host), ..spilling(fixed(1.0, 0.0), 2) };
    let case = case(&many, &tightened(&model(&many), &wanted, 0.0), slow([1.0; 4]), true);
    for most in [1, 21, 40, 60, 90, 130] {
        case.executed(most);
    }
}

#[test]
fn a_machine_that_takes_other_times_decides_otherwise() {
    // Else the comparison would say nothing about time.
    let wanted = request(fixed(1.0, 0.5), 1, ClipMode::Defer, PLENTY);
    let order = |hardware| case(&SIZES, &wanted, hardware, true).check().into_iter().map(|turn| turn.event).collect::<Vec<Event>>();
    assert!(order(slow([1.0; 4])) != order(slow([40.0, 40.0, 40.0, 1.0])), "as if time did not matter");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn random_models_plans_and_machines(
        sizes in prop::collection::vec((1_u64..80, 100_u64..40_000, prop::bool::weighted(0.2)), 2..7),
        optim in 0.0..=1.0_f64,
        param in 0.0..=1.0_f64,
        stream in 0.0..=1.0_f64,
        piece_numel in prop::option::of(1_u64..100),
        room in prop::option::of(0.0..1.5_f64),
        accumulation in 1_u32..4,
        mode in 0_usize..3,
        recompute in 0_usize..3,
        offload in 0_usize..3,
        accumulate in prop::option::of(prop::sample::select(vec![Tier::Device, Tier::Host])),
        scale in prop::array::uniform4(0.1..8.0_f64),
        clips: bool,
    ) {
        let sizes: Vec<(u64, u64, bool)> = sizes.into_iter().map(|(n, saved, shares)| (64 * n, saved, shares)).collect();
        let clip_mode = [ClipMode::Defer, ClipMode::Speculate, ClipMode::Auto][mode];
        let placement = if room.is_some() { Placement::Auto } else { visiting(optim.max(param), param, stream) };
        let mut wanted = PlanRequest { accumulate, ..request(placement, accumulation, clip_mode, PLENTY) };
        wanted.recompute = [Recompute::None, Recompute::Full, Recompute::Auto][recompute].clone();
        wanted.offload = [Offload::None, Offload::Full, Offload::Auto][offload];
        if let Some(room) = room {
            let (layout, trace) = model(&sizes);
            let least = minimum_device_bytes(&layout, &trace, &wanted);
            wanted.device_budget = least + (room * least as f64) as u64;
        }
        let (layout, trace) = model(&sizes);
        if plan(&layout, &trace, &wanted).is_err() {
            // More states would visit than belong to resident parameters.
            wanted.placement = fixed(optim.max(param), param);
        }
        let mut case = case(&sizes, &wanted, slow(scale), clips);
        if let Some(numel) = piece_numel.filter(|_| case.plan.device.staging > 0) {
            case.plan.device.staging = 3 * 64 * numel * 10;
        }
        case.check();
    }

    #[test]
    fn random_models_that_spill(
        sizes in prop::collection::vec((1_u64..400, 100_u64..40_000, prop::bool::weighted(0.2)), 3..14),
        frozen in prop::collection::vec(prop::bool::weighted(0.2), 14),
        optim in 0.5..=1.0_f64,
        param in 0.0..=1.0_f64,
        share in prop_oneof![Just(0.0), 0.0..1.0_f64],
        accumulation in 1_u32..4,
        mode in 0_usize..3,
        late_moments in prop::option::of(prop::bool::ANY),
        accumulate in prop::option::of(prop::sample::select(vec![Tier::Device, Tier::Host])),
        buffers in prop::option::of(2_u32..6),
        scale in prop::array::uniform4(0.05..8.0_f64),
        clips: bool,
    ) {
        let sizes: Vec<(u64, u64, bool)> = sizes.into_iter().map(|(n, saved, shares)| (64 * n, saved, shares)).collect();
        let clip_mode = [ClipMode::Defer, ClipMode::Speculate, ClipMode::Auto][mode];
        let wanted = PlanRequest { clip_mode, late_moments, accumulate, ..spilling(fixed(optim.max(param), param), accumulation) };
        let model = freeze(model(&sizes), |chunk| frozen[chunk]);
        prop_assume!(plan(&model.0, &model.1, &wanted).is_ok());
        let wanted = tightened(&model, &wanted, share);
        let mut case = case_of(model, &sizes, &wanted, slow(scale), clips);
        if let (Some(nvme), Some(buffers)) = (&mut case.plan.nvme, buffers) {
            nvme.buffers = buffers.min(nvme.buffers);
            nvme.grad_buffers = buffers.min(nvme.grad_buffers);
            nvme.fetch_buffers = buffers.min(nvme.fetch_buffers);
        }
        case.check();
    }
}
