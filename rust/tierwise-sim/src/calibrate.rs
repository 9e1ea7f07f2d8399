//! Measures what a machine's host does without torch: our Adam, sums and copies by threads, and a disk. The device and its links need torch:
//! `tierwise calibrate` measures those too.

use crate::hardware::{Disk, HARDWARE_VERSION, Hardware, HostRow, Measured};
use std::path::Path;
use std::time::Duration;
use tierwise_io::doctor::{ProbeLimits, probe};
use tierwise_kernels::Pool;
use tierwise_kernels::measure::{HostBench, HostKernel};

/// Bytes of host memory traffic of one bf16 parameter's Adam step.
const ADAM_BYTES: f64 = crate::costs::ADAM_BYTES_PER_PARAM;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options<'a> {
    /// Name of the machine in reports.
    pub name: &'a str,
    /// Machine whose figures stand for what is not measured.
    pub base: Hardware,
    /// Parameters on which the host's kernels are measured, 14 bytes each.
    pub host_numel: usize,
    /// Time of the host's kernels, about.
    pub time: Duration,
    /// Directory to measure as the NVMe tier.
    pub disk: Option<&'a Path>,
}

/// Measures the host; gives a hardware file's contents.
pub fn calibrate(options: &Options, log: &mut dyn FnMut(&str)) -> Result<Hardware, String> {
    let most = Pool::try_new(None)?;
    let mut bench = HostBench::new(&most, options.host_numel)?;
    let counts = thread_counts(most.threads());
    let share = options.time.div_f64(7.0 * counts.len() as f64);
    let mut host = Vec::new();
    for threads in counts {
        let pool = Pool::try_new(Some(threads))?;
        let row = HostRow {
            threads: threads as u32,
            adam_params_per_s: bench.rate(&pool, HostKernel::Adam, share),
            params_first_per_s: Some(bench.rate(&pool, HostKernel::ParamsFirst, share)),
            moments_per_s: Some(bench.rate(&pool, HostKernel::Moments, share)),
            undoable_params_per_s: Some(bench.rate(&pool, HostKernel::Undoable, share)),
            accumulate_numel_per_s: bench.rate(&pool, HostKernel::Accumulate, share),
            norm_numel_per_s: bench.rate(&pool, HostKernel::Norm, share),
            copy_bytes_per_s: bench.rate(&pool, HostKernel::Copy, share),
        };
        let (adam, copy) = (row.adam_params_per_s / 1e9, row.copy_bytes_per_s / 1e9);
        log(&format!("{threads} threads: Adam {adam:.2}e9 parameters/s, copy {copy:.1} GB/s"));
        host.push(row);
    }
    let disk = match options.disk {
        None => None,
        Some(directory) => {
            let found = probe(directory, ProbeLimits::default()).map_err(|error| error.to_string())?;
            log(&format!("disk: {:.0} MB/s written, {:.0} MB/s read", found.write_mb_per_s, found.read_mb_per_s));
            Some(Disk { write_bytes_per_s: 1e6 * found.write_mb_per_s, read_bytes_per_s: 1e6 * found.read_mb_per_s })
        }
    };
    let Some(all) = host.last().copied() else { return Err("no number of threads was measured".to_owned()) };
    let base = &options.base;
    log(&format!("not measured: the device, its links and what runs beside what; these are the figures of `{}`", base.name));
    log("`tierwise calibrate` measures them too; it needs torch");
    let mut sources = std::collections::BTreeMap::new();
    sources.insert(
        "host_adam_params_per_s, host_params_first_per_s, host_stream_bytes_per_s, measured".to_owned(),
        "tierwise-sim calibrate, on this machine".to_owned(),
    );
    sources.insert(
        "everything else".to_owned(),
        format!("as {}: {}", base.name, base.sources.values().cloned().collect::<Vec<_>>().join("; ")),
    );
    Ok(Hardware {
        schema_version: HARDWARE_VERSION,
        name: options.name.to_owned(),
        sources,
        host_memory_bytes_per_s: (ADAM_BYTES * all.adam_params_per_s).max(2.0 * all.copy_bytes_per_s),
        host_stream_bytes_per_s: 2.0 * all.norm_numel_per_s,
        host_adam_params_per_s: all.adam_params_per_s,
        host_params_first_per_s: all.params_first_per_s,
        nvme: disk.or(base.nvme),
        measured: Some(Measured { host, disk, ..Measured::default() }),
        ..base.clone()
    })
}

/// Powers of two up to `most`, and `most`.
fn thread_counts(most: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = std::iter::successors(Some(1), |count| Some(count * 2)).take_while(|count| *count < most).collect();
    counts.push(most);
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_counts_end_with_all() {
        assert_eq!(thread_counts(1), [1]);
        assert_eq!(thread_counts(2), [1, 2]);
        assert_eq!(thread_counts(6), [1, 2, 4, 6]);
        assert_eq!(thread_counts(16), [1, 2, 4, 8, 16]);
    }
}
