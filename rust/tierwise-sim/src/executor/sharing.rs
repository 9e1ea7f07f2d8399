//! How fast the lanes are while others are busy: as measured, where the machine was calibrated, else by a model of its memory.

use super::machine::{HostPass, LANES, Lane};
use crate::costs::ADAM_BYTES_PER_PARAM;
use crate::hardware::{Hardware, Sharing};

/// What compute and the device's optimizer keep of their speed while both work: matrix products hold most of the multiprocessors, and
/// together they do a little more than one after the other. Read from the timelines of three recorded runs (docs/simulator.md).
const COMPUTE_BESIDE_OPTIMIZER: f64 = 0.8;
const OPTIMIZER_BESIDE_COMPUTE: f64 = 0.25;

/// Work per nanosecond of every lane.
pub type Rates = [f64; LANES.len()];

/// The rates of a machine.
pub struct Speeds<'a> {
    hardware: &'a Hardware,
    /// By the set of busy actors: what was measured, if all of it was.
    measured: Option<[Actors; 16]>,
    /// Bytes of device memory traffic per nanosecond of the device's optimizer.
    optimizer: f64,
}

/// Speeds of the actors of a set: bytes per nanosecond, of host memory traffic for Adam; compute's share.
#[derive(Debug, Clone, Copy, Default)]
struct Actors {
    h2d: f64,
    d2h: f64,
    adam: f64,
    compute: f64,
    /// How much more or less than whole steps their passes, and steps with undo records, are slowed down.
    params: f64,
    moments: f64,
    undoable: f64,
    /// How many times as fast as beside whole steps their copies are.
    params_h2d: f64,
    moments_d2h: f64,
    undoable_d2h: f64,
}

const NAMES: [&str; 4] = ["h2d", "d2h", "adam", "compute"];

impl<'a> Speeds<'a> {
    /// Of a machine.
    pub fn new(hardware: &'a Hardware) -> Self {
        let measured = hardware.measured.as_ref();
        // One GPU's share of a node is less than what one GPU alone was measured with.
        let table = measured.filter(|_| hardware.gpus_per_node == 1).and_then(|m| table(&m.sharing, m.workspace_bytes != Some(0)));
        // Its own measurement says how fast the host's Adam is, the one beside others by how much these slow it down.
        let table = table.map(|mut table| {
            let factor = hardware.host_adam_bytes_per_s() / 1e9 / table[4].adam;
            for actors in &mut table {
                actors.adam *= factor;
            }
            table
        });
        let adam = measured.and_then(|m| m.device_adam_params_per_s).map(|rate| rate * ADAM_BYTES_PER_PARAM);
        Speeds { hardware, measured: table, optimizer: adam.unwrap_or(hardware.device_memory_bytes_per_s) / 1e9 }
    }

    /// The rates while these lanes are busy, and the host's Adam does that instead of a whole step.
    pub fn rates(&self, busy: impl Fn(Lane) -> bool, pass: Option<HostPass>) -> Rates {
        // A link is busy whichever of its two streams is.
        let either = |lane: Lane| match lane {
            Lane::HostToDevice => busy(lane) || busy(Lane::StatesIn),
            Lane::DeviceToHost => busy(lane) || busy(Lane::StatesOut),
            other => busy(other),
        };
        let mut rates = match &self.measured {
            Some(table) => self.as_measured(table, &either, pass),
            None => self.by_model(&either),
        };
        for (lane, states) in [(Lane::HostToDevice, Lane::StatesIn), (Lane::DeviceToHost, Lane::StatesOut)] {
            // They take turns.
            let turns = if busy(lane) && busy(states) { 0.5 } else { 1.0 };
            rates[lane as usize] *= turns;
            rates[states as usize] = rates[lane as usize];
        }
        if busy(Lane::Compute) && busy(Lane::Optimizer) {
            rates[Lane::Compute as usize] *= COMPUTE_BESIDE_OPTIMIZER;
            rates[Lane::Optimizer as usize] *= OPTIMIZER_BESIDE_COMPUTE;
        }
        if busy(Lane::Gather) || busy(Lane::Reduce) {
            rates[Lane::Compute as usize] *= 1.0 - self.hardware.collective_compute_tax;
        }
        if busy(Lane::Gather) && busy(Lane::Reduce) {
            // Two collectives at once share the links.
            rates[Lane::Gather as usize] = 0.5;
            rates[Lane::Reduce as usize] = 0.5;
        }
        if let Some(disk) = self.hardware.nvme {
            // A disk does one or the other at any moment.
            let turn = if busy(Lane::DiskRead) && busy(Lane::DiskWrite) { 0.5 } else { 1.0 };
            rates[Lane::DiskRead as usize] = disk.read_bytes_per_s * turn / 1e9;
            rates[Lane::DiskWrite as usize] = disk.write_bytes_per_s * turn / 1e9;
        }
        rates
    }

    fn as_measured(&self, table: &[Actors; 16], busy: &impl Fn(Lane) -> bool, pass: Option<HostPass>) -> Rates {
        let sharers = host_sharers(busy);
        let set = usize::from(busy(Lane::HostToDevice))
            | usize::from(busy(Lane::DeviceToHost)) << 1
            | usize::from(sharers > 0.0) << 2
            | usize::from(busy(Lane::Compute)) << 3;
        let with = |bit: usize| &table[set | bit];
        // All host work that is busy shares the threads; each is slowed down by the device's as Adam is.
        let share = 1.0 / sharers.max(1.0);
        let slowed = with(4).adam / table[4].adam;
        let landing = self.hardware.host_stream_bytes_per_s / 1e9 * slowed;
        let adam = with(4).adam * share;
        let (stepped, h2d, d2h) = match pass {
            None => (1.0, 1.0, 1.0),
            Some(HostPass::Params) => (with(4).params, with(1).params_h2d, 1.0),
            Some(HostPass::Moments) => (with(4).moments, 1.0, with(2).moments_d2h),
            Some(HostPass::Undoable) => (with(4).undoable, 1.0, with(2).undoable_d2h),
        };
        let (stepped, h2d, d2h) = (adam * stepped, with(1).h2d * h2d, with(2).d2h * d2h);
        [with(8).compute, h2d, d2h, self.optimizer, stepped, 1.0, 1.0, landing * share, 0.0, 0.0, 0.0, 0.0, adam, 1.0]
    }

    fn by_model(&self, busy: &impl Fn(Lane) -> bool) -> Rates {
        let h = self.hardware;
        let mut compute = 1.0;
        if busy(Lane::DeviceToHost) {
            compute -= h.d2h_compute_tax;
        }
        let steps = [Lane::HostAdam, Lane::SpillAdam].into_iter().filter(|&lane| busy(lane)).count();
        if steps > 0 {
            compute -= h.host_adam_compute_tax;
        }
        let duplex = busy(Lane::HostToDevice) && busy(Lane::DeviceToHost);
        let (h2d, d2h) = if duplex { (h.h2d_duplex_bytes_per_s, h.d2h_duplex_bytes_per_s) } else { (h.h2d_bytes_per_s, h.d2h_bytes_per_s) };
        // Copies to the host keep their speed under load (posted writes); everybody else shares what host memory has left.
        let taken = if busy(Lane::DeviceToHost) { d2h } else { 0.0 };
        // Where the link is faster than the memory, something is left all the same.
        let left = (h.host_memory_bytes_per_s - taken).max(0.01 * h.host_memory_bytes_per_s);
        let adam = h.host_adam_bytes_per_s();
        let wanted = [(busy(Lane::HostToDevice), h2d), (steps > 0, adam), (busy(Lane::Landing), h.host_stream_bytes_per_s)];
        let total: f64 = wanted.iter().map(|&(is_busy, rate)| if is_busy { rate } else { 0.0 }).sum();
        let share = if total > left { left / total } else { 1.0 };
        let landing = h.host_stream_bytes_per_s * share / 1e9;
        // Both kinds of steps share the threads.
        let adam = adam * share / 1e9 / steps.max(1) as f64;
        [compute, h2d * share / 1e9, d2h / 1e9, self.optimizer, adam, 1.0, 1.0, landing, 0.0, 0.0, 0.0, 0.0, adam, 1.0]
    }
}

/// How many kinds of host work share the kernels' threads: one, where the machine lets them take turns.
fn host_sharers(busy: &impl Fn(Lane) -> bool) -> f64 {
    [Lane::HostAdam, Lane::SpillAdam, Lane::Landing].into_iter().filter(|&lane| busy(lane)).count() as f64
}

/// The actors of a set, in their order.
fn names(set: usize) -> impl Iterator<Item = &'static str> {
    NAMES.into_iter().enumerate().filter(move |(bit, _)| set >> bit & 1 == 1).map(|(_, name)| name)
}

/// The measurements by set of actors, on a device that is `apart` from the CPU or on a CPU; none unless every set was measured.
fn table(rows: &[Sharing], apart: bool) -> Option<[Actors; 16]> {
    let of = |set: usize| rows.iter().find(|row| row.actors.iter().map(String::as_str).eq(names(set)));
    let mut table = [Actors::default(); 16];
    let found = |set: usize, figure: Figure| of(set).and_then(figure);
    // Compute on a device of its own moves nothing in host memory: all that does was measured twice, with compute and without it.
    let host = |set: usize, figure: Figure| {
        if apart { Some(f64::midpoint(found(set & !COMPUTE, figure)?, found(set | COMPUTE, figure)?)) } else { found(set, figure) }
    };
    let share = |set: usize| of(set | COMPUTE).and_then(|row| row.compute_share);
    // The host's Adam moves nothing on a device of its own: compute was measured twice, with Adam and without it.
    let twice = |set: usize| Some(f64::midpoint(share(set & !ADAM)?, share(set | ADAM)?));
    let compute = |set: usize| if apart { Some(twice(set)? / twice(COMPUTE)?) } else { share(set) };
    // Noise may make the busy machine the faster one.
    let busy = |set: usize, figure: Figure| Some(host(set, figure)?.min(host(ADAM, figure)?));
    for (set, actors) in table.iter_mut().enumerate().skip(1) {
        of(set)?;
        let has = |bit: usize| set >> bit & 1 == 1;
        *actors = Actors {
            h2d: if has(0) { host(set, |row| row.h2d_bytes_per_s)? / 1e9 } else { 0.0 },
            d2h: if has(1) { host(set, |row| row.d2h_bytes_per_s)? / 1e9 } else { 0.0 },
            adam: if has(2) { busy(set, |row| row.adam_params_per_s)? * ADAM_BYTES_PER_PARAM / 1e9 } else { 0.0 },
            compute: if has(3) { compute(set)?.min(1.0) } else { 0.0 },
            params: 1.0,
            moments: 1.0,
            undoable: 1.0,
            params_h2d: 1.0,
            moments_d2h: 1.0,
            undoable_d2h: 1.0,
        };
        // Whole steps read and write what the others do, which are slowed down as they are where they were not measured.
        let left = |figure: Figure| Some(busy(set, figure)? / host(ADAM, figure)?);
        let pass = |figure: Figure| Some(left(figure)? / left(|row| row.adam_params_per_s)?);
        let beside = |figure: Figure, whole: Figure| Some(host(set, figure)? / host(set, whole)?);
        actors.params = pass(|row| row.params_first_per_s).unwrap_or(1.0);
        actors.moments = pass(|row| row.moments_per_s).unwrap_or(1.0);
        actors.undoable = pass(|row| row.undoable_params_per_s).unwrap_or(1.0);
        actors.params_h2d = beside(|row| row.params_first_h2d_bytes_per_s, |row| row.h2d_bytes_per_s).unwrap_or(1.0);
        actors.moments_d2h = beside(|row| row.moments_d2h_bytes_per_s, |row| row.d2h_bytes_per_s).unwrap_or(1.0);
        actors.undoable_d2h = beside(|row| row.undoable_d2h_bytes_per_s, |row| row.d2h_bytes_per_s).unwrap_or(1.0);
    }
    Some(table)
}

/// A figure of a row.
type Figure = fn(&Sharing) -> Option<f64>;

/// Sets of one actor.
const ADAM: usize = 4;
const COMPUTE: usize = 8;

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::hardware::{Measured, preset};

    fn near(a: f64, b: f64) {
        assert!((a / b - 1.0).abs() < 1e-12, "{a} {b}");
    }

    /// Copies and the host's Adam lose a tenth of their speed beside each other.
    pub fn rows() -> Vec<Sharing> {
        (1_usize..16)
            .map(|set| {
                let has = |bit: usize| set >> bit & 1 == 1;
                let left = |actors: usize| 1.0 - 0.1 * (actors.count_ones().max(1) - 1) as f64;
                // Compute moves nothing in host memory.
                let slower = left(set & !COMPUTE);
                Sharing {
                    actors: NAMES.into_iter().enumerate().filter(|(bit, _)| has(*bit)).map(|(_, name)| name.to_owned()).collect(),
                    h2d_bytes_per_s: has(0).then_some(50e9 * slower),
                    d2h_bytes_per_s: has(1).then_some(40e9 * slower),
                    adam_params_per_s: has(2).then_some(5e9 * slower),
                    // Adam takes nothing of the device.
                    compute_share: has(3).then_some(left(set & !ADAM)),
                    ..Sharing::default()
                }
            })
            .collect()
    }

    /// Whole steps alone are as fast as in these rows.
    fn of(sharing: Vec<Sharing>) -> Measured {
        Measured { sharing, host_adam_params_per_s: Some(5e9), ..Measured::default() }
    }

    #[test]
    fn compute_and_the_devices_optimizer_slow_each_other_down() {
        let speeds = |measured| Hardware { measured, ..preset("h100").unwrap() };
        for hardware in [speeds(None), speeds(Some(Measured { device_adam_params_per_s: Some(1e11), ..of(rows()) }))] {
            let rates = |lanes: &[Lane]| Speeds::new(&hardware).rates(|lane| lanes.contains(&lane), None);
            let (alone, both) = (rates(&[Lane::Compute]), rates(&[Lane::Compute, Lane::Optimizer]));
            let (optimizer, beside) = (rates(&[Lane::Optimizer])[Lane::Optimizer as usize], both[Lane::Optimizer as usize]);
            let (compute, slowed) = (alone[Lane::Compute as usize], both[Lane::Compute as usize]);
            assert!((slowed / compute - 0.8).abs() < 1e-12, "{slowed} of {compute}");
            assert!((beside / optimizer - 0.25).abs() < 1e-12, "{beside} of {optimizer}");
        }
    }

    #[test]
    fn measured_sets_are_taken_as_they_are() {
        let measured = Measured { device_adam_params_per_s: Some(1e11), ..of(rows()) };
        let hardware = Hardware { measured: Some(measured), ..preset("h100").unwrap() };
        let speeds = Speeds::new(&hardware);
        let rates = speeds.rates(|lane| matches!(lane, Lane::Compute | Lane::HostToDevice | Lane::HostAdam), None);
        near(rates[Lane::Compute as usize], 0.9);
        near(rates[Lane::HostToDevice as usize], 45.0);
        near(rates[Lane::HostAdam as usize], 26.0 * 4.5);
        let rates = speeds.rates(|lane| matches!(lane, Lane::Optimizer | Lane::Landing | Lane::HostAdam), None);
        near(rates[Lane::Optimizer as usize], 2600.0);
        near(rates[Lane::HostAdam as usize], 26.0 * 2.5);
        near(rates[Lane::Landing as usize], 60.0);
    }

    #[test]
    fn the_engines_own_steps_scale_what_was_measured_beside_others() {
        let measured = Measured { sharing: rows(), host_adam_params_per_s: Some(6e9), ..Measured::default() };
        let hardware = Hardware { host_adam_params_per_s: 6e9, measured: Some(measured), ..preset("h100").unwrap() };
        let speeds = Speeds::new(&hardware);
        let rate = |other: Option<Lane>| speeds.rates(|lane| lane == Lane::HostAdam || Some(lane) == other, None)[Lane::HostAdam as usize];
        assert!((rate(None) / (26.0 * 6.0) - 1.0).abs() < 1e-12);
        assert!((rate(Some(Lane::HostToDevice)) / (26.0 * 5.4) - 1.0).abs() < 1e-12);
    }

    /// Work on the lane of the host's Adam is in bytes at the engine's speed, also where no sets were measured or several GPUs share them.
    #[test]
    fn without_measured_sets_the_lane_has_the_engines_speed_too() {
        let measured = Measured { sharing: rows(), host_adam_params_per_s: Some(4e9), ..Measured::default() };
        let hardware = Hardware { host_adam_params_per_s: 5e9, measured: Some(measured), ..preset("dgx-h100").unwrap() };
        for (gpus, rate) in [(1, 4.0), (8, 0.5)] {
            let speeds = hardware.per_gpu(gpus);
            let rates = Speeds::new(&speeds).rates(|lane| lane == Lane::HostAdam, None);
            assert!((rates[Lane::HostAdam as usize] / (26.0 * rate) - 1.0).abs() < 1e-12, "{rates:?}");
        }
    }

    #[test]
    fn passes_of_a_step_are_slowed_down_as_measured() {
        let mut sharing = rows();
        for row in sharing.iter_mut().filter(|row| !row.actors.contains(&"d2h".to_owned())) {
            let beside = row.actors.contains(&"h2d".to_owned());
            row.params_first_per_s = row.adam_params_per_s.map(|_| if beside { 4e9 } else { 8e9 });
        }
        let hardware = Hardware { measured: Some(of(sharing)), ..preset("h100").unwrap() };
        let speeds = Speeds::new(&hardware);
        let rate = |other: Lane, pass| speeds.rates(|lane| lane == Lane::HostAdam || lane == other, pass)[Lane::HostAdam as usize];
        // Whole steps: 5e9 alone, 4.5e9 beside a copy. The pass: half as fast as alone.
        near(rate(Lane::HostToDevice, None), 26.0 * 4.5);
        near(rate(Lane::HostToDevice, Some(HostPass::Params)), 26.0 * 2.5);
        near(rate(Lane::HostAdam, Some(HostPass::Params)), 26.0 * 5.0);
        let unknown =
            [(Lane::DeviceToHost, HostPass::Params), (Lane::HostToDevice, HostPass::Moments), (Lane::DeviceToHost, HostPass::Undoable)];
        for (other, pass) in unknown {
            near(rate(other, Some(pass)), rate(other, None));
        }
    }

    #[test]
    fn steps_that_may_be_undone_and_gradients_slow_each_other_down_as_measured() {
        let mut sharing = rows();
        for row in sharing.iter_mut().filter(|row| !row.actors.contains(&"h2d".to_owned())) {
            let beside = row.actors.contains(&"d2h".to_owned());
            row.undoable_params_per_s = row.adam_params_per_s.map(|_| if beside { 2e9 } else { 4e9 });
            row.undoable_d2h_bytes_per_s = row.adam_params_per_s.and(row.d2h_bytes_per_s).map(|_| 20e9);
        }
        let hardware = Hardware { measured: Some(of(sharing)), ..preset("h100").unwrap() };
        let speeds = Speeds::new(&hardware);
        let rates = |pass| speeds.rates(|lane| matches!(lane, Lane::HostAdam | Lane::DeviceToHost), pass);
        // Whole steps: 5e9 alone, 4.5e9 beside a copy of 36 GB/s. With a record: half as fast as alone.
        let (whole, undoable) = (rates(None), rates(Some(HostPass::Undoable)));
        near(whole[Lane::HostAdam as usize], 26.0 * 4.5);
        near(whole[Lane::DeviceToHost as usize], 36.0);
        near(undoable[Lane::HostAdam as usize], 26.0 * 2.5);
        near(undoable[Lane::DeviceToHost as usize], 20.0);
    }

    #[test]
    fn copies_beside_a_pass_are_as_fast_as_measured_beside_it() {
        let mut sharing = rows();
        for row in &mut sharing {
            // Beside whole steps 45e9 and 36e9.
            let has = |actor: &str| row.actors.iter().any(|name| name == actor);
            let (h2d, d2h) = (has("adam") && has("h2d") && !has("d2h"), has("adam") && has("d2h") && !has("h2d"));
            row.params_first_h2d_bytes_per_s = h2d.then_some(54e9);
            row.moments_d2h_bytes_per_s = d2h.then_some(18e9);
        }
        let hardware = Hardware { measured: Some(of(sharing)), ..preset("h100").unwrap() };
        let speeds = Speeds::new(&hardware);
        let rate = |copy: Lane, pass| speeds.rates(|lane| lane == Lane::HostAdam || lane == copy, pass)[copy as usize];
        near(rate(Lane::HostToDevice, None), 45.0);
        near(rate(Lane::HostToDevice, Some(HostPass::Params)), 54.0);
        near(rate(Lane::HostToDevice, Some(HostPass::Moments)), 45.0);
        near(rate(Lane::DeviceToHost, None), 36.0);
        near(rate(Lane::DeviceToHost, Some(HostPass::Moments)), 18.0);
        near(rate(Lane::DeviceToHost, Some(HostPass::Params)), 36.0);
    }

    #[test]
    fn nobody_on_the_host_is_faster_beside_others_than_alone() {
        let mut sharing = rows();
        for row in &mut sharing {
            let copies = row.actors.iter().filter(|name| name.ends_with("2d") || name.ends_with("2h")).count();
            row.adam_params_per_s = row.adam_params_per_s.map(|_| [5e9, 7e9, 4e9][copies]);
        }
        let hardware = Hardware { measured: Some(of(sharing)), ..preset("h100").unwrap() };
        let rate = |lanes: &[Lane]| Speeds::new(&hardware).rates(|lane| lanes.contains(&lane), None)[Lane::HostAdam as usize];
        near(rate(&[Lane::HostAdam]), 26.0 * 5.0);
        near(rate(&[Lane::HostAdam, Lane::HostToDevice]), 26.0 * 5.0);
        near(rate(&[Lane::HostAdam, Lane::HostToDevice, Lane::DeviceToHost]), 26.0 * 4.0);
    }

    #[test]
    fn compute_on_a_device_of_its_own_takes_nothing_of_host_memory() {
        let mut sharing = rows();
        // Beside compute all of the host was a fifth slower by chance.
        for row in sharing.iter_mut().filter(|row| row.compute_share.is_some()) {
            for rate in [&mut row.h2d_bytes_per_s, &mut row.d2h_bytes_per_s, &mut row.adam_params_per_s] {
                *rate = rate.map(|rate| 0.8 * rate);
            }
        }
        for (workspace_bytes, alone, beside) in [(None, 0.9, 0.9), (Some(1), 0.9, 0.9), (Some(0), 1.0, 0.8)] {
            let hardware = Hardware { measured: Some(Measured { workspace_bytes, ..of(sharing.clone()) }), ..preset("h100").unwrap() };
            let speeds = Speeds::new(&hardware);
            for (compute, left) in [(false, alone), (true, beside)] {
                let busy = |lane| matches!(lane, Lane::HostToDevice | Lane::HostAdam) || (compute && lane == Lane::Compute);
                let rates = speeds.rates(busy, None);
                near(rates[Lane::HostToDevice as usize], 45.0 * left);
                // Whole steps alone count as their own measurement says.
                near(rates[Lane::HostAdam as usize], 26.0 * 4.5 * left / alone);
            }
        }
    }

    #[test]
    fn adam_takes_nothing_of_a_device_of_its_own() {
        let mut sharing = rows();
        // Beside Adam compute was slower by chance, and with copies 0.72 and 0.9 of its speed.
        for row in sharing.iter_mut().filter(|row| row.actors.iter().any(|name| name == "adam")) {
            row.compute_share = row.compute_share.map(|share| 0.8 * share);
        }
        let share = |workspace_bytes, lanes: &[Lane]| {
            let hardware = Hardware { measured: Some(Measured { workspace_bytes, ..of(sharing.clone()) }), ..preset("h100").unwrap() };
            Speeds::new(&hardware).rates(|lane| lanes.contains(&lane), None)[Lane::Compute as usize]
        };
        near(share(None, &[Lane::Compute, Lane::HostAdam]), 1.0);
        near(share(None, &[Lane::Compute, Lane::HostAdam, Lane::HostToDevice]), 0.9);
        near(share(None, &[Lane::Compute, Lane::HostToDevice]), 0.9);
        // A device that needs no workspaces is a CPU.
        near(share(Some(0), &[Lane::Compute, Lane::HostAdam]), 0.8);
        near(share(Some(0), &[Lane::Compute, Lane::HostAdam, Lane::HostToDevice]), 0.72);
        near(share(Some(0), &[Lane::Compute, Lane::HostToDevice]), 0.9);
    }

    #[test]
    fn two_streams_of_a_direction_take_turns_on_its_link() {
        for hardware in [
            preset("h100").unwrap(),
            Hardware { measured: Some(Measured { sharing: rows(), ..Measured::default() }), ..preset("h100").unwrap() },
        ] {
            let speeds = Speeds::new(&hardware);
            let rates = |lanes: &[Lane]| speeds.rates(|lane| lanes.contains(&lane), None);
            let alone = rates(&[Lane::HostToDevice, Lane::DeviceToHost]);
            let states = rates(&[Lane::StatesIn, Lane::StatesOut]);
            let both = rates(&[Lane::HostToDevice, Lane::StatesIn, Lane::DeviceToHost]);
            near(states[Lane::StatesIn as usize], alone[Lane::HostToDevice as usize]);
            near(states[Lane::StatesOut as usize], alone[Lane::DeviceToHost as usize]);
            near(both[Lane::StatesIn as usize] + both[Lane::HostToDevice as usize], alone[Lane::HostToDevice as usize]);
            near(both[Lane::DeviceToHost as usize], alone[Lane::DeviceToHost as usize]);
        }
    }

    #[test]
    fn a_missing_set_falls_back_to_the_model() {
        let mut sharing = rows();
        sharing.remove(5);
        assert!(table(&sharing, true).is_none());
        assert!(table(&rows(), true).is_some());
    }
}
