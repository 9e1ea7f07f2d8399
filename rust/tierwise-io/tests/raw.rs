//! The raw loop that measurements compare the store with.

#![cfg(target_os = "linux")]

mod common;

use common::Scratch;
use std::sync::Arc;
use std::time::Duration;
use tierwise_io::Direction;
use tierwise_io::error::Error;
use tierwise_io::pages::Pages;
use tierwise_io::raw::Raw;
use tierwise_io::spill_file::{Naming, SpillFile};

const BLOCK: usize = 1 << 16;
const BLOCKS: u64 = 24;

fn raw(scratch: &Scratch, ring: bool, depth: usize, buffers: usize) -> tierwise_io::error::Result<Raw> {
    let file = SpillFile::create(scratch.path(), BLOCKS * BLOCK as u64, Naming::Anonymous)?;
    Raw::new(file, BLOCK, depth, Arc::new(Pages::new(buffers * BLOCK, 4096)?), ring)
}

#[test]
fn it_moves_every_block_once_or_as_many_as_there_is_time_for() {
    let scratch = Scratch::new("raw");
    for ring in [true, false] {
        for (depth, buffers) in [(1, 1), (4, 4), (4, 11)] {
            let raw = raw(&scratch, ring, depth, buffers).unwrap();
            let once = match raw.run(&[Direction::Write], None) {
                Err(Error::Backend { reason, .. }) if ring => {
                    println!("SKIPPED over io_uring: {reason}; runs where the system allows it");
                    continue;
                }
                once => once.unwrap(),
            };
            assert_eq!(once.bytes, [0, BLOCKS * BLOCK as u64]);
            let both = raw.run(&[Direction::Read, Direction::Write], None).unwrap();
            assert_eq!(both.bytes, [BLOCKS / 2 * BLOCK as u64; 2]);
            let timed = raw.run(&[Direction::Read], Some(Duration::from_millis(5))).unwrap();
            assert!(timed.seconds > 0.0 && timed.bytes[0] > 0 && timed.bytes[0].is_multiple_of(BLOCK as u64), "{timed:?}");
            assert_eq!(timed.bytes[1], 0);
            let late = raw.run(&[Direction::Read, Direction::Write], Some(Duration::ZERO)).unwrap();
            assert_eq!(late.bytes, [BLOCK as u64; 2], "one block of each kind, however little time there is");
        }
    }
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[test]
fn sizes_that_cannot_work_are_refused() {
    let scratch = Scratch::new("raw-sizes");
    for (depth, buffers) in [(0, 1), (4, 3)] {
        assert!(matches!(raw(&scratch, false, depth, buffers), Err(Error::Usage(_))), "{depth} {buffers}");
    }
    assert!(matches!(raw(&scratch, false, 1, 1).unwrap().run(&[], None), Err(Error::Usage(_))));
}
