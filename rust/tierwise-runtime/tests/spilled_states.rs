//! Spilled states through the engine, over disks that are kind, slow, or fail: the bits of a run in memory, or an error that says which
//! bytes of what failed and why. Never a wrong weight, a panic or a hang.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use tierwise_core::layout::{Layout, ParamSpec, Precision, Sums};
use tierwise_core::plan::{
    ActivationPlan, ChunkPlan, ClipMode, DeviceBytes, HostBytes, NvmePlan, OptimizerClass, ParamHome, Plan, host_region_bytes,
};
use tierwise_core::staging::Pieces;
use tierwise_core::trace::{Op, Phase, Trace, Unit};
use tierwise_core::{ChunkId, OpId, Tier};
use tierwise_io::Direction;
use tierwise_io::backend::faulty::{Fault, Faulty, FaultyDisk};
use tierwise_io::error::Error as DiskError;
use tierwise_io::queue::Limits;
use tierwise_io::store::Store;
use tierwise_kernels::AdamHyper;
use tierwise_runtime::device::ComputeStream;
use tierwise_runtime::emulated::{EmulatedConfig, EmulatedDevice};
use tierwise_runtime::engine::{Engine, EngineConfig, Hyper};
use tierwise_runtime::error::{Error, Result};
use tierwise_runtime::spill::access::Access;

const STREAM: ComputeStream = ComputeStream(0);
const CHUNKS: u32 = 3;
const NUMEL: u64 = 10_000;
const PIECE: u64 = 4096;
const BUFFER: u64 = 64 << 10;
/// Bytes of a chunk's place in the slab, the gaps between its parameters included.
const SLOT: u64 = (2 * (NUMEL + 128)).next_multiple_of(256);
/// Extents of the buffers' size.
const BLOCK: u64 = 64 << 10;

fn trace() -> Trace {
    let unit = |i: u32| Unit {
        name: format!("layers.{i}"),
        chunks: vec![ChunkId(i)],
        saved_bytes: 0,
        input_bytes: 0,
        offload_bytes: 0,
        offload_host_bytes: 0,
        recomputable: true,
        flops: 1.0,
        tail_flops: 0.0,
    };
    let op = |unit, phase| Op { unit, phase };
    let ops = (0..CHUNKS).map(|u| op(u, Phase::Forward)).chain((0..CHUNKS).rev().map(|u| op(u, Phase::Backward)));
    Trace { units: (0..CHUNKS).map(unit).collect(), ops: ops.collect(), outer_saved_bytes: 0 }
}

/// Two parameters per chunk, so that pieces and parameters do not end together.
fn layout() -> Layout {
    let spec = |i: u32, name: &str, numel| ParamSpec { name: format!("layers.{i}.{name}"), numel, trainable: true };
    let chunks = (0..CHUNKS).map(|i| (format!("layers.{i}"), vec![spec(i, "weight", NUMEL - 77), spec(i, "bias", 77)]));
    Layout::new(Precision::Bf16, chunks.collect())
}

fn plan(placement: ChunkPlan, buffers: u32) -> Plan {
    accumulating(placement, buffers, 1)
}

fn accumulating(placement: ChunkPlan, buffers: u32, accumulation: u32) -> Plan {
    let spills_grads = placement.spills_grads();
    let states = u64::from(CHUNKS * 3 + buffers) * if placement.home == ParamHome::Fetched { 2 } else { 1 };
    // A chunk's gradient has three pieces; two chunks land at once, or all buffers are rewritten.
    let grads = if spills_grads { u64::from(CHUNKS * 3 + 6.max(buffers)) } else { 0 };
    let landing = 2 * host_region_bytes(2 * layout().chunks[0].state_numel);
    let nvme = NvmePlan {
        piece_numel: PIECE,
        buffer_bytes: BUFFER,
        buffers,
        block_bytes: BLOCK,
        file_bytes: (states + grads) * BLOCK,
        fetch_buffers: if placement.home == ParamHome::Fetched { buffers.div_ceil(2) } else { 0 },
        fetch_buffer_bytes: BUFFER,
        grad_buffers: if spills_grads { buffers } else { 0 },
        grad_buffer_bytes: 4 * PIECE,
        ..NvmePlan::default()
    };
    Plan {
        version: 1,
        chunks: vec![placement; CHUNKS as usize],
        activations: vec![ActivationPlan::Keep; CHUNKS as usize],
        offload_window_bytes: 0,
        stream_slab_bytes: if placement.home.is_streamed() { SLOT * u64::from(buffers.clamp(1, 2)) } else { 0 },
        grad_in_flight_bytes: 1 << 20,
        grad_ahead_bytes: 0,
        accumulation,
        clip_mode: ClipMode::Defer,
        undo_bytes: 0,
        late_moments: false,
        landing_buffers: 2,
        device: DeviceBytes::default(),
        device_peak_op: OpId(0),
        host: HostBytes { staging: if spills_grads || accumulation > 1 { landing } else { 0 }, ..HostBytes::default() },
        nvme: (placement.class == OptimizerClass::Nvme).then_some(nvme),
        fetches: Vec::new(),
        predicted_step_s: 0.0,
        bound_by: String::new(),
    }
}

/// Which transfer gets which fault: by direction, the first of this number or a later one that the fault changes, counted from the moment
/// it is armed. Dealt faults leave the list.
#[derive(Clone, Default)]
struct Script {
    armed: Arc<AtomicBool>,
    faults: Arc<Mutex<Vec<(Direction, u64, Fault)>>>,
    /// Nanoseconds that every transfer takes longer.
    late_ns: u64,
    gate: Gate,
}

/// While it is closed no read begins.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn set_closed(&self, closed: bool) {
        *self.0.0.lock().unwrap() = closed;
        self.0.1.notify_all();
    }

    /// Not for ever: a test that has failed lets its disk go.
    fn pass(&self) {
        let (closed, changed) = &*self.0;
        drop(changed.wait_timeout_while(closed.lock().unwrap(), Duration::from_secs(20), |closed| *closed).unwrap());
    }
}

impl Script {
    fn store(&self, plan: &NvmePlan) -> Store {
        let Script { armed, faults, late_ns, gate } = self.clone();
        let blocks = (plan.file_bytes / plan.block_bytes) as u32;
        let bytes = plan.file_bytes as usize;
        let limits = Limits { queue_depth: 8, block_bytes: plan.block_bytes as usize, alignment: 4096, blocks };
        let mut seen = [0_u64; 2];
        let decide = move |op: &tierwise_io::backend::Op, _: &mut _| {
            let late = (late_ns > 0).then_some(Fault::Late(late_ns));
            if op.direction == Direction::Read {
                gate.pass();
            }
            if !armed.load(Ordering::Acquire) {
                return late;
            }
            let number = seen[op.direction as usize];
            seen[op.direction as usize] += 1;
            let changed = |fault: Fault| !matches!(fault, Fault::Short(moved) | Fault::Torn(moved) if moved >= op.len);
            let mut faults = faults.lock().unwrap();
            let found = faults.iter().position(|&(d, n, fault)| d == op.direction && n <= number && changed(fault));
            found.map(|at| faults.remove(at).2).or(late)
        };
        let open = move || Ok(Box::new(Faulty::new(FaultyDisk::new(bytes, 4096, 7, Box::new(decide)), 8)) as Box<_>);
        Store::with_backend(limits, Duration::from_secs(30), open).unwrap()
    }
}

/// An engine with memory for its parameters and gradients.
struct Rig {
    engine: Engine,
    params: Vec<Vec<u16>>,
    gradients: Vec<Vec<u16>>,
    slab: Vec<u16>,
    home: ParamHome,
    accumulation: usize,
    /// The step with a gradient that is not finite.
    infinite: Option<usize>,
    /// Sums over the parameters that every operation found.
    seen: Vec<u64>,
}

fn patience() -> impl FnMut() -> bool {
    let started = std::time::Instant::now();
    move || started.elapsed() < Duration::from_secs(20)
}

impl Rig {
    fn new(placement: ChunkPlan, buffers: u32, script: &Script) -> Rig {
        Rig::with(plan(placement, buffers), script)
    }

    fn with(plan: Plan, script: &Script) -> Rig {
        Rig::summing(plan, Sums::Fp32, script)
    }

    fn summing(plan: Plan, sums: Sums, script: &Script) -> Rig {
        Rig::clipping(plan, sums, script, 1.0)
    }

    fn clipping(plan: Plan, sums: Sums, script: &Script, max_norm: f64) -> Rig {
        let accumulation = plan.accumulation as usize;
        let (layout, homes) = (layout().with_sums(sums), plan.chunks.iter().map(|placed| placed.home).collect::<Vec<_>>());
        let device = EmulatedDevice::new(EmulatedConfig { threads: 1, ..EmulatedConfig::default() });
        let config = EngineConfig {
            device_budget: 1 << 30,
            host_budget: 1 << 30,
            max_norm: Some(max_norm),
            threads: Some(1),
            nvme_budget: 1 << 30,
            ..EngineConfig::default()
        };
        let script = script.clone();
        let engine = Engine::with_store(layout.clone(), trace(), plan, device, &config, move |nvme, _| Ok(script.store(nvme))).unwrap();
        let numel = layout.chunks[0].numel as usize;
        let value = |chunk: usize, i: usize| 0x3f00 + ((chunk * 31 + i * 7) % 251) as u16;
        let params: Vec<Vec<u16>> = (0..CHUNKS as usize).map(|c| (0..numel).map(|i| value(c, i)).collect()).collect();
        let slab = vec![0; SLOT as usize];
        let gradients = vec![vec![0; numel]; CHUNKS as usize];
        let rig = Rig { engine, gradients, params, slab, home: homes[0], accumulation, infinite: None, seen: Vec::new() };
        if rig.home.is_streamed() {
            rig.engine.bind_slab(rig.slab.as_ptr() as u64).unwrap();
        }
        for (chunk, values) in layout.ids().zip(&rig.params) {
            if !rig.home.is_streamed() {
                rig.engine.bind(chunk, Some(values.as_ptr() as u64), None, None).unwrap();
            }
            if homes[chunk.index()].is_spilled() {
                rig.engine.spilled(chunk, "param", (0, numel as u64), Access::Write(values.as_ptr() as u64), &mut patience()).unwrap();
            } else {
                let (host, _) = rig.engine.host_slab();
                let offset = rig.engine.host_offset(chunk, "param").unwrap().unwrap();
                // SAFETY: the slab has room for the payload at its offset; nothing else runs yet.
                unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), (host + offset) as *mut u16, numel) };
            }
        }
        let group = AdamHyper { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };
        rig.engine.set_hyper(Hyper { groups: vec![group], group_of_param: vec![Some(0); 2 * CHUNKS as usize] }).unwrap();
        rig.engine.start().unwrap();
        rig
    }

    /// Enters a unit and reads what its operation would.
    fn enter(&mut self, unit: u32, phase: Phase) -> Result<()> {
        let slots = self.engine.enter(unit, phase, STREAM, &mut patience())?;
        let mut address = self.params[unit as usize].as_ptr();
        if self.home.is_streamed() {
            let &[(chunk, slot)] = slots.as_slice() else { panic!("{slots:?}") };
            assert_eq!(chunk, ChunkId(unit));
            address = self.slab.as_ptr().wrapping_add(slot as usize / 2);
        }
        // Volatile, because the device writes there.
        // SAFETY: both lie in memory of the rig, and the engine has said that this chunk may be read.
        let values = (0..NUMEL as usize).map(|i| unsafe { address.add(i).read_volatile() });
        self.seen.push(values.fold(0, |sum: u64, value| sum.wrapping_mul(31).wrapping_add(u64::from(value))));
        Ok(())
    }

    fn step(&mut self, number: usize) -> Result<()> {
        for micro_batch in 0..self.accumulation {
            self.passes(number, micro_batch)?;
        }
        self.engine.commit(1.0, STREAM, &mut patience())
    }

    /// Forward and backward of a micro-batch.
    fn passes(&mut self, number: usize, micro_batch: usize) -> Result<()> {
        for unit in 0..CHUNKS {
            self.enter(unit, Phase::Forward)?;
            self.engine.leave(unit, Phase::Forward, STREAM)?;
        }
        self.engine.backward_begin(1.0, &mut patience())?;
        for unit in (0..CHUNKS).rev() {
            self.enter(unit, Phase::Backward)?;
            let layout = layout();
            let gradient = &mut self.gradients[unit as usize];
            for (i, value) in gradient.iter_mut().enumerate() {
                *value = 0x3c00 + ((number * 13 + micro_batch * 7 + i * 5) % 509) as u16;
            }
            if self.infinite == Some(number) && unit == 1 && micro_batch == 0 {
                gradient[5000] = 0x7f80;
            }
            let address = gradient.as_ptr() as u64;
            let grads: Vec<(usize, u64)> =
                layout.chunks[unit as usize].params.iter().enumerate().map(|(i, p)| (i, address + 2 * p.offset)).collect();
            // Not every parameter has a gradient in every pass.
            let grads = match (number + micro_batch) % 5 {
                1 => &grads[..1],
                3 => &grads[1..],
                _ => &grads,
            };
            // What came in an earlier micro-batch only is final all the same.
            let stale = unit == 1 && number % 2 == 1 && micro_batch > 0 && micro_batch + 1 == self.accumulation;
            if !stale {
                let ticket = self.engine.grads(ChunkId(unit), grads, STREAM, &mut patience())?;
                // The copy is over before the memory changes again.
                let started = std::time::Instant::now();
                while !self.engine.collect()?.contains(&ticket) {
                    assert!(started.elapsed() < Duration::from_secs(20), "the gradient is never collected");
                    std::thread::yield_now();
                }
            }
            self.engine.leave(unit, Phase::Backward, STREAM)?;
        }
        self.engine.backward_end(STREAM)
    }

    fn run(&mut self, steps: std::ops::Range<usize>) -> Result<()> {
        for number in steps {
            self.step(number)?;
        }
        self.engine.flush(&mut patience())
    }

    /// Parameters and states of every chunk.
    fn state(&self) -> Vec<u8> {
        let numel = layout().chunks[0].state_numel;
        let mut all = Vec::new();
        for chunk in layout().ids() {
            let mut params = self.params[chunk.index()].clone();
            if self.home.is_streamed() {
                let access = Access::Read(params.as_mut_ptr() as u64);
                self.engine.spilled(chunk, "param", (0, params.len() as u64), access, &mut patience()).unwrap();
            }
            all.extend(params.iter().flat_map(|v| v.to_le_bytes()));
            for (payload, bytes) in [("master", 2), ("exp_avg", 4), ("exp_avg_sq", 4)] {
                let mut values = vec![0_u8; (numel * bytes) as usize];
                let address = values.as_mut_ptr() as u64;
                match self.engine.host_offset(chunk, payload).unwrap() {
                    Some(offset) => {
                        let (host, _) = self.engine.host_slab();
                        // SAFETY: the payload is that long, and the engine was flushed.
                        unsafe { std::ptr::copy_nonoverlapping((host + offset) as *const u8, values.as_mut_ptr(), values.len()) };
                    }
                    None => self.engine.spilled(chunk, payload, (0, numel), Access::Read(address), &mut patience()).unwrap(),
                }
                all.extend(values);
            }
        }
        all.extend(self.seen.iter().flat_map(|sum| sum.to_le_bytes()));
        all
    }
}

fn in_memory(steps: usize) -> Vec<u8> {
    let mut rig = Rig::new(ChunkPlan::new(OptimizerClass::Host, ParamHome::Resident), 2, &Script::default());
    rig.run(0..steps).unwrap();
    rig.state()
}

/// As the placements, with gradients on the disk too.
fn with_gradients() -> [ChunkPlan; 3] {
    PLACEMENTS.map(|placement| placement.accumulating(Tier::Nvme))
}

const PLACEMENTS: [ChunkPlan; 3] = [
    ChunkPlan::new(OptimizerClass::Nvme, ParamHome::Resident),
    ChunkPlan::new(OptimizerClass::Nvme, ParamHome::Spilled),
    ChunkPlan::new(OptimizerClass::Nvme, ParamHome::Fetched),
];

#[test]
fn any_number_of_buffers_gives_the_bits_of_memory() {
    let expected = in_memory(5);
    for placement in PLACEMENTS {
        for buffers in [1, 2, 3, 5, 12] {
            let mut rig = Rig::new(placement, buffers, &Script::default());
            rig.run(0..5).unwrap();
            assert!(rig.state() == expected, "{placement:?} with {buffers} buffers");
        }
    }
}

#[test]
fn a_slow_disk_changes_nothing() {
    let expected = in_memory(3);
    for placement in PLACEMENTS.into_iter().chain(with_gradients()) {
        let mut rig = Rig::new(placement, 2, &Script { late_ns: 3_000_000, ..Script::default() });
        rig.run(0..3).unwrap();
        assert!(rig.state() == expected, "{placement:?}");
    }
}

#[test]
fn faults_that_can_be_repaired_are_and_counted() {
    let expected = in_memory(4);
    let repairable = [Fault::Errno(libc::EINTR), Fault::Errno(libc::EAGAIN), Fault::Short(8192), Fault::FlippedBit(77)];
    for placement in PLACEMENTS.into_iter().chain(with_gradients()) {
        for fault in repairable {
            let script = Script::default();
            // A bit that is wrong on the disk stays wrong; one that was wrong on the way is read again.
            let directions =
                if matches!(fault, Fault::FlippedBit(_)) { vec![Direction::Read] } else { vec![Direction::Read, Direction::Write] };
            *script.faults.lock().unwrap() = directions.iter().flat_map(|&d| [(d, 2, fault), (d, 7, fault)]).collect();
            let mut rig = Rig::new(placement, 2, &script);
            rig.run(0..2).unwrap();
            script.armed.store(true, Ordering::Release);
            rig.run(2..4).unwrap();
            assert!(rig.state() == expected, "{placement:?} {fault:?}");
            assert!(script.faults.lock().unwrap().is_empty(), "{placement:?} {fault:?} was not dealt");
            let stats = rig.engine.stats().unwrap();
            assert!(stats["nvme_retries"].as_u64().unwrap() >= 2 * directions.len() as u64, "{placement:?} {fault:?} {stats}");
        }
    }
}

#[test]
fn a_fault_that_cannot_be_repaired_stops_the_engine_and_says_what_it_was() {
    let full = "No space left on device (os error 28); free space on the disk";
    let cases: [(Direction, Fault, &str, i32); 7] = [
        (Direction::Write, Fault::Errno(libc::EIO), "Input/output error", libc::EIO),
        (Direction::Write, Fault::Errno(libc::ENOSPC), full, libc::ENOSPC),
        (Direction::Read, Fault::Errno(libc::EIO), "os error 5); the disk is defective or gone (see dmesg)", libc::EIO),
        (Direction::Write, Fault::FlippedBit(12345), "has checksum", libc::EIO),
        (Direction::Write, Fault::Lost, "has checksum", libc::EIO),
        (Direction::Write, Fault::Torn(4096), "has checksum", libc::EIO),
        (Direction::Write, Fault::TooLong, "the system moved", libc::EIO),
    ];
    for placement in PLACEMENTS {
        // Where parameters are fetched, the first is a transfer of parameters, the second one of states.
        for ((direction, fault, wanted, errno), number) in cases.into_iter().flat_map(|case| [(case, 2), (case, 5)]) {
            let script = Script::default();
            script.faults.lock().unwrap().push((direction, number, fault));
            let mut rig = Rig::new(placement, 2, &script);
            rig.run(0..2).unwrap();
            script.armed.store(true, Ordering::Release);
            let error = rig.run(2..8).expect_err(&format!("{fault:?}"));
            let message = error.to_string();
            assert!(matches!(&error, Error::StoppedByDisk { source, .. } if source.errno() == Some(errno)), "{error:?}");
            assert!(message.contains(wanted), "{fault:?}: {message}");
            // Fetched parameters are read alone.
            let payloads = if placement.home == ParamHome::Fetched { "of `layers." } else { "master, exp_avg, exp_avg_sq of `layers." };
            for part in [payloads, "elements ", "generation "] {
                assert!(message.contains(part), "{fault:?}: {message}");
            }
            // It stays stopped, and going away does not hang.
            assert_eq!(rig.engine.flush(&mut patience()).expect_err("stopped").to_string(), message);
            let mut value = [0_u8; 4];
            let access = Access::Read(value.as_mut_ptr() as u64);
            assert!(rig.engine.spilled(ChunkId(0), "exp_avg", (0, 1), access, &mut patience()).is_err());
        }
    }
}

#[test]
fn a_fetch_that_finds_its_write_failed_leaves_the_word_to_the_write() {
    // Of a piece the parameters are written first, then the states.
    for number in [2, 4, 6, 8] {
        let script = Script::default();
        // Whoever waits for writes is still waiting for the first piece's states, and the next step wants the parameters by then.
        let late = Fault::Late(100_000_000);
        script.faults.lock().unwrap().extend([(Direction::Write, 1, late), (Direction::Write, number, Fault::Errno(libc::ENOSPC))]);
        let mut rig = Rig::new(ChunkPlan::new(OptimizerClass::Nvme, ParamHome::Fetched), 12, &script);
        rig.run(0..2).unwrap();
        script.armed.store(true, Ordering::Release);
        let error = rig.run(2..5).expect_err("a disk that is full");
        // A read that was asked for before its write had failed waits inside the store, and ends with the same reason.
        assert!(matches!(&error, Error::StoppedByDisk { source, .. } if source.errno() == Some(libc::ENOSPC)), "{number}: {error:?}");
    }
}

#[test]
fn a_parameter_that_cannot_be_read_is_never_used() {
    let mut reference = Rig::new(ChunkPlan::new(OptimizerClass::Host, ParamHome::Resident), 2, &Script::default());
    reference.run(0..3).unwrap();
    let fetched = ChunkPlan::new(OptimizerClass::Nvme, ParamHome::Fetched);
    let mut fetches = 0;
    for (fault, wanted) in [(Fault::Errno(libc::EIO), "Input/output error"), (Fault::FlippedBit(4097), "has checksum")] {
        for number in 0..24 {
            let script = Script::default();
            // A wrong block is read once more, so everything from there on is wrong.
            let wrong = number..number + if matches!(fault, Fault::Errno(_)) { 1 } else { 100 };
            script.faults.lock().unwrap().extend(wrong.map(|number| (Direction::Read, number, fault)));
            let mut rig = Rig::new(fetched, 2, &script);
            script.armed.store(true, Ordering::Release);
            let error = rig.run(0..3).expect_err("a disk that fails");
            let message = error.to_string();
            assert!(message.contains(wanted), "{message}");
            fetches += usize::from(message.contains("spilled param of `layers."));
            assert!(reference.seen.starts_with(&rig.seen), "read {number}: {fault:?}: an operation saw other parameters");
        }
    }
    assert!(fetches > 10, "{fetches} of the failing reads were of parameters alone");
}

#[test]
fn what_comes_in_for_a_slot_that_was_given_away_is_dropped() {
    let mut mixed = plan(ChunkPlan::new(OptimizerClass::Nvme, ParamHome::Fetched), 1);
    mixed.nvme.as_mut().unwrap().fetch_buffers = 4;
    for chunk in [0, 2] {
        mixed.chunks[chunk] = ChunkPlan::new(OptimizerClass::Host, ParamHome::Streamed);
    }
    let script = Script::default();
    let mut rig = Rig::with(mixed, &script);
    script.gate.set_closed(true);
    let value = |rig: &Rig, chunk: usize| rig.params[chunk].clone();
    let slot = |rig: &Rig| -> Vec<u16> {
        let numel = rig.params[0].len();
        // SAFETY: the slab is the rig's memory; volatile, because the device writes there.
        (0..numel).map(|i| unsafe { rig.slab.as_ptr().add(i).read_volatile() }).collect()
    };
    rig.enter(0, Phase::Forward).unwrap();
    rig.engine.leave(0, Phase::Forward, STREAM).unwrap();
    // The only slot was given to chunk 1, whose blocks the disk is asked for; compute goes another way before they come in.
    assert!(rig.engine.stats().unwrap()["nvme_fetched_bytes"].as_u64().unwrap() > 0, "nothing was asked of the disk");
    rig.enter(2, Phase::Forward).unwrap();
    assert!(slot(&rig) == value(&rig, 2));
    script.gate.set_closed(false);
    // All that was asked for has come in by then, and what was copied is there.
    rig.engine.flush(&mut patience()).unwrap();
    assert!(slot(&rig) == value(&rig, 2), "another chunk's block was copied into a slot in use");
    rig.engine.leave(2, Phase::Forward, STREAM).unwrap();
    rig.enter(1, Phase::Forward).unwrap();
    assert!(slot(&rig) == value(&rig, 1));
    rig.engine.leave(1, Phase::Forward, STREAM).unwrap();
    rig.engine.flush(&mut patience()).unwrap();
}

const SUMS: [Sums; 2] = [Sums::Fp32, Sums::Gradient];

/// Steps in memory only, with gradients that are not finite in one of them; the engine's counters too.
fn summed_in_memory(accumulation: u32, sums: Sums, steps: usize) -> (Rig, serde_json::Value) {
    let plan = accumulating(ChunkPlan::new(OptimizerClass::Host, ParamHome::Resident), 2, accumulation);
    let mut rig = Rig::summing(plan, sums, &Script::default());
    rig.infinite = Some(2);
    rig.run(0..steps).unwrap();
    let stats = rig.engine.stats().unwrap();
    (rig, stats)
}

#[test]
fn gradients_on_the_disk_give_the_bits_of_memory() {
    for accumulation in [1, 2, 4] {
        for sums in if accumulation == 1 { &SUMS[..1] } else { &SUMS } {
            let (expected, counted) = summed_in_memory(accumulation, *sums, 5);
            assert!(counted["clipped"].as_u64() >= Some(3) && counted["skipped"] == 1, "{counted}");
            for (placement, buffers) in with_gradients().into_iter().flat_map(|placement| [1, 2, 3, 12].map(|buffers| (placement, buffers)))
            {
                let case = format!("{placement:?}, {buffers} buffers, accumulation {accumulation}, {sums:?}");
                let mut rig = Rig::summing(accumulating(placement, buffers, accumulation), *sums, &Script::default());
                rig.infinite = Some(2);
                rig.run(0..5).unwrap();
                assert!(rig.engine.host_offset(ChunkId(0), "grad").unwrap().is_none(), "{case}");
                assert!(rig.state() == expected.state(), "{case}");
                let stats = rig.engine.stats().unwrap();
                assert_eq!((&stats["clipped"], &stats["skipped"]), (&counted["clipped"], &counted["skipped"]), "{case}");
                assert_eq!(rig.engine.decision(true, &mut patience()).unwrap(), expected.engine.decision(true, &mut patience()).unwrap());
                assert!(stats["nvme_grad_bytes"].as_u64().unwrap() > 0, "{case}");
            }
        }
    }
}

#[test]
fn gradients_that_are_dropped_leave_nothing_behind() {
    for accumulation in [1, 2] {
        let run = |placement, buffers, alone: bool, script: &Script| {
            let mut plan = accumulating(placement, buffers, accumulation);
            if alone {
                plan.chunks[0] = ChunkPlan::new(OptimizerClass::Host, ParamHome::Resident);
                plan.chunks[2] = plan.chunks[0];
            }
            let mut rig = Rig::with(plan, script);
            rig.run(0..2).unwrap();
            for dropped in 2..5 {
                // After all micro-batches of a step, and after the first one.
                for micro_batch in 0..if dropped == 3 { 1 } else { rig.accumulation } {
                    rig.passes(dropped, micro_batch).unwrap();
                }
                rig.engine.drop_grads(&mut patience()).unwrap();
            }
            rig.run(5..7).unwrap();
            rig.state()
        };
        let expected = run(ChunkPlan::new(OptimizerClass::Host, ParamHome::Resident), 2, false, &Script::default());
        // Dropped gradients are still being written when the next ones come.
        let script = Script { late_ns: 2_000_000, ..Script::default() };
        for placement in with_gradients() {
            // Where one chunk alone lands, or all have a buffer, nothing else waits for its writes.
            for (buffers, alone) in [(2, false), (12, false), (12, true)] {
                if !(alone && placement.home.is_streamed()) {
                    let case = format!("{placement:?}, {buffers} buffers, accumulation {accumulation}, alone {alone}");
                    assert!(run(placement, buffers, alone, &script) == expected, "{case}");
                }
            }
        }
    }
}

#[test]
fn a_gradient_that_cannot_be_read_or_written_stops_the_engine_and_is_never_used() {
    let faults = [
        (Direction::Write, Fault::Errno(libc::EIO), "Input/output error", libc::EIO),
        (Direction::Write, Fault::Errno(libc::ENOSPC), "No space left on device", libc::ENOSPC),
        (Direction::Write, Fault::FlippedBit(321), "has checksum", libc::EIO),
        (Direction::Read, Fault::Errno(libc::EIO), "Input/output error", libc::EIO),
        (Direction::Read, Fault::FlippedBit(77), "has checksum", libc::EIO),
    ];
    for accumulation in [1, 2] {
        let plan = accumulating(ChunkPlan::new(OptimizerClass::Host, ParamHome::Resident), 2, accumulation);
        let mut reference = Rig::with(plan, &Script::default());
        reference.run(0..4).unwrap();
        for (direction, fault, wanted, errno) in faults {
            let mut of_gradients = 0;
            for number in 0..16 {
                let script = Script::default();
                // A wrong block is read once more, so everything from there on is wrong.
                let again = if matches!((direction, fault), (Direction::Read, Fault::FlippedBit(_))) { 100 } else { 1 };
                script.faults.lock().unwrap().extend((number..number + again).map(|number| (direction, number, fault)));
                let placement = PLACEMENTS[number as usize % 2].accumulating(Tier::Nvme);
                let mut rig = Rig::with(accumulating(placement, 2, accumulation), &script);
                script.armed.store(true, Ordering::Release);
                let error = rig.run(0..4).expect_err(&format!("{direction:?} {fault:?} {number}"));
                let message = error.to_string();
                assert!(matches!(&error, Error::StoppedByDisk { source, .. } if source.errno() == Some(errno)), "{error:?}");
                for part in [wanted, "of `layers.", "elements ", "generation "] {
                    assert!(message.contains(part), "{fault:?}: {message}");
                }
                of_gradients += usize::from(message.contains("spilled gradient of `layers."));
                assert!(reference.seen.starts_with(&rig.seen), "{direction:?} {number}: {fault:?}: an operation saw other parameters");
                assert_eq!(rig.engine.flush(&mut patience()).expect_err("stopped").to_string(), message);
            }
            assert!(of_gradients >= 3, "{of_gradients} of the {direction:?} {fault:?} were of gradients");
        }
    }
}

#[test]
fn a_plan_without_buffers_for_spilled_gradients_is_refused() {
    let mut wrong = accumulating(with_gradients()[0], 2, 2);
    wrong.nvme.as_mut().unwrap().grad_buffer_bytes = 2 * PIECE;
    let device = EmulatedDevice::new(EmulatedConfig::default());
    let config = EngineConfig { device_budget: 1 << 30, host_budget: 1 << 30, nvme_budget: 1 << 30, ..EngineConfig::default() };
    let open = |nvme: &NvmePlan, _| Ok(Script::default().store(nvme));
    let error = Engine::with_store(layout(), trace(), wrong, device, &config, open).err().unwrap();
    assert!(error.to_string().contains("has 2 buffers of 8192 bytes for pieces of 16384"), "{error}");
}

#[test]
fn what_is_undone_has_the_bits_of_before_also_without_some_gradients() {
    let deferred = plan(ChunkPlan::new(OptimizerClass::Host, ParamHome::Resident), 2);
    let undo = layout().ids().map(|chunk| layout().undo_bytes(chunk)).sum();
    let mut speculating = Plan { clip_mode: ClipMode::Speculate, undo_bytes: undo, ..deferred.clone() };
    speculating.host.undo = host_region_bytes(undo);
    let run = |plan: Plan| {
        let speculates = plan.clip_mode == ClipMode::Speculate;
        let mut rig = Rig::clipping(plan, Sums::Fp32, &Script::default(), 1e6);
        rig.infinite = Some(5);
        let mut speculated = 0;
        for step in 0..12 {
            rig.passes(step, 0).unwrap();
            // The last chunk's gradient comes first; of the second one it is not finite once, and then nothing more is speculated.
            speculated += if step == 5 { 1 } else { u64::from(CHUNKS) };
            let mut wait = patience();
            while speculates && rig.engine.stats().unwrap()["speculated"].as_u64() < Some(speculated) && wait() {
                std::thread::yield_now();
            }
            // Whatever was stepped with the scale that backward was told has to go where the commit tells another.
            let scale = if step % 2 == 1 { 0.5 } else { 1.0 };
            rig.engine.commit(scale, STREAM, &mut patience()).unwrap();
        }
        rig.engine.flush(&mut patience()).unwrap();
        (rig.engine.stats().unwrap(), rig)
    };
    let ((counted, expected), (stats, rig)) = (run(deferred), run(speculating));
    assert!(rig.state() == expected.state());
    assert_eq!((stats["speculated"].as_u64(), stats["undone"].as_u64()), (Some(34), Some(16)));
    assert_eq!((&counted["clipped"], &counted["skipped"]), (&stats["clipped"], &stats["skipped"]));
    assert_eq!((stats["clipped"].as_u64(), stats["skipped"].as_u64()), (Some(0), Some(1)));
}

#[test]
fn an_engine_is_dropped_in_the_middle_of_everything() {
    for placement in PLACEMENTS.into_iter().chain(with_gradients()) {
        let mut rig = Rig::new(placement, 3, &Script { late_ns: 5_000_000, ..Script::default() });
        for number in 0..2 {
            rig.step(number).unwrap();
        }
        // Steps, reads and writes are on their way.
        drop(rig);
    }
}

#[test]
fn states_are_read_and_written_by_name_in_any_part() {
    let rig = Rig::new(PLACEMENTS[0], 2, &Script::default());
    let chunk = ChunkId(1);
    let values: Vec<f32> = (0..NUMEL).map(|i| i as f32).collect();
    let mut wait = patience();
    let mut access = |payload, range, access| rig.engine.spilled(chunk, payload, range, access, &mut wait);
    // Over the borders of pieces, which are at 4096 and 8192.
    access("exp_avg", (100, 9000), Access::Write(values[100..].as_ptr() as u64)).unwrap();
    let mut back = vec![1.0_f32; NUMEL as usize];
    access("exp_avg", (0, NUMEL), Access::Read(back.as_mut_ptr() as u64)).unwrap();
    assert!(back.iter().enumerate().all(|(i, v)| v.to_bits() == if (100..9100).contains(&i) { i as f32 } else { 0.0 }.to_bits()));
    access("exp_avg_sq", (4000, 200), Access::Read(back.as_mut_ptr() as u64)).unwrap();
    assert!(back[..200].iter().all(|v| v.to_bits() == 0), "the other payload of the same pieces was not touched");
    access("exp_avg", (0, 0), Access::Read(0)).unwrap();
    for (payload, range) in [("param", (0, 1)), ("grad", (0, 1)), ("exp_avg", (2 * NUMEL, 1)), ("exp_avg", (u64::MAX, 2))] {
        let message = access(payload, range, Access::Read(0)).expect_err(payload).to_string();
        assert!(message.contains(&format!("spilled `{payload}`")), "{message}");
    }
}

#[test]
fn a_disk_that_cannot_be_opened_is_an_error_of_the_engine() {
    let device = EmulatedDevice::new(EmulatedConfig::default());
    let config = EngineConfig { device_budget: 1 << 30, host_budget: 1 << 30, ..EngineConfig::default() };
    let refused = |config: &EngineConfig| Engine::new(layout(), trace(), plan(PLACEMENTS[0], 2), device.clone(), config).err().unwrap();
    assert!(matches!(refused(&config), Error::Budget(error) if error.to_string().contains("nvme budget exceeded: the spill file needs")));
    let config = EngineConfig { nvme_budget: 1 << 30, ..config };
    assert!(refused(&config).to_string().contains("no nvme_path was given"));
    let config = EngineConfig { nvme_path: Some("/no/such/directory".into()), ..config };
    match refused(&config) {
        Error::Storage { what, path, source } => {
            assert!(matches!(*source, DiskError::Create { errno: libc::ENOENT, .. }), "{source:?}");
            assert_eq!(what, "nvme_path `/no/such/directory`");
            assert_eq!(path.unwrap(), std::path::Path::new("/no/such/directory"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn pieces_cover_every_element_once() {
    let (layout, plan) = (layout(), plan(PLACEMENTS[1], 2));
    let pieces = Pieces::new(&layout, &trace(), &plan);
    assert_eq!(pieces.len(), 9);
    for chunk in layout.ids() {
        let mut next = 0;
        for piece in pieces.of_chunk(chunk).map(|id| pieces.get(id)) {
            assert_eq!((piece.first, piece.bytes), (next, piece.numel * 12));
            next += piece.numel;
        }
        assert_eq!(next, layout.chunks[chunk.index()].state_numel);
    }
}
