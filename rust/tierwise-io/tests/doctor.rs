//! The doctor's disk report.

#![cfg(target_os = "linux")]

mod common;

use common::Scratch;
use std::path::Path;
use std::time::Duration;
use tierwise_io::doctor::{DiskReport, ProbeLimits, probe};
use tierwise_io::error::Error;
use tierwise_io::store::StoreConfig;

#[test]
fn a_disk_is_measured_and_left_as_it_was() {
    let scratch = Scratch::new("doctor");
    let report = probe(scratch.path(), ProbeLimits { bytes: 64 << 20, time: Duration::from_secs(3) }).unwrap();
    println!("{report:?}");
    assert!(report.write_mb_per_s > 0.1 && report.read_mb_per_s > 0.1 && report.read_mb_per_s < 1e6);
    assert!(report.measured_bytes > 0 && report.measured_bytes <= 64 << 20);
    assert!(report.setup.backend == "io_uring" || report.advice.iter().any(|line| line.contains("threads")));
    assert!(report.setup.direct_io || report.advice.iter().any(|line| line.contains("page cache")));
    // What the doctor measures is how the engine uses the disk.
    let defaults = StoreConfig::new(scratch.path(), 0);
    assert_eq!(report.setup.queue_depth, if report.setup.backend == "threads" { defaults.threads } else { defaults.queue_depth });
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<DiskReport>(&json).unwrap().setup, report.setup);
}

#[test]
fn tmpfs_and_too_little_room_are_refused() {
    if Path::new("/dev/shm").is_dir() {
        assert!(matches!(probe(Path::new("/dev/shm"), ProbeLimits::default()), Err(Error::InMemory { .. })));
    } else {
        println!("SKIPPED: there is no /dev/shm; runs where it is mounted");
    }
    let scratch = Scratch::new("doctor-small");
    let error = probe(scratch.path(), ProbeLimits { bytes: 1 << 20, time: Duration::from_secs(1) }).unwrap_err();
    assert!(error.to_string().contains("33554432"), "{error}");
}
