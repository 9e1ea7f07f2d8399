//! The fault matrix: each row is a test, through a store and its driver thread. A fault is repaired, or it is a clear error and the last
//! good copy can still be read; never wrong bytes, a panic or a hang.

#![cfg(target_os = "linux")]

mod common;

use common::{ALIGNMENT, BLOCK_BYTES, content, faulty_store, filled, get, key, poisoned, put};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tierwise_io::backend::faulty::Fault;
use tierwise_io::error::Error;
use tierwise_io::queue::MAX_FRUITLESS_TRANSFERS;
use tierwise_io::store::Store;
use tierwise_io::{Direction, Priority};

const BLOCKS: u32 = 32;
const STALL: Duration = Duration::from_secs(30);
/// Three blocks, the last one not full.
const LEN: usize = 2 * BLOCK_BYTES + ALIGNMENT + 100;

/// Faults of the next transfers of one direction, by their order.
#[derive(Clone, Default)]
struct Script(Arc<Mutex<BTreeMap<(Direction, u64), Fault>>>);

impl Script {
    /// One transfer at a time, so that "the second transfer" is the second block.
    fn store(&self) -> Store {
        let (script, mut seen) = (Arc::clone(&self.0), BTreeMap::new());
        faulty_store(BLOCKS, 1, STALL, move |op, _| {
            let mut script = script.lock().unwrap();
            let count: &mut u64 = seen.entry(op.direction).or_insert(0);
            // The order starts anew with each script.
            if script.remove(&(op.direction, u64::MAX)).is_some() {
                *count = 0;
            }
            let fault = script.get(&(op.direction, *count)).copied();
            *count += 1;
            fault
        })
    }

    /// The `nth` transfer of `direction` from now on fails like this.
    fn set(&self, direction: Direction, faults: impl IntoIterator<Item = (u64, Fault)>) {
        let mut script = self.0.lock().unwrap();
        script.clear();
        script.insert((direction, u64::MAX), Fault::Lost);
        script.extend(faults.into_iter().map(|(nth, fault)| ((direction, nth), fault)));
    }

    fn clear(&self) {
        self.0.lock().unwrap().clear();
    }
}

/// Generation 1 is on the disk, generation 2 meets `fault` at each of its blocks: it fails like this, and generation 1 is still there.
fn write_fails(fault: Fault, expected: impl Fn(&Error) -> bool) {
    let script = Script::default();
    let store = script.store();
    put(&store, key(0), 1, LEN).unwrap();
    let free = store.free_bytes().unwrap();
    for nth in 0..3 {
        script.set(Direction::Write, [(nth, fault)]);
        let error = put(&store, key(0), 2, LEN).unwrap_err();
        assert!(expected(&error), "{error}");
        script.clear();
        assert_eq!(store.stored(key(0)).unwrap(), Some(1));
        get(&store, key(0), 1, LEN).unwrap();
        assert_eq!(store.free_bytes().unwrap(), free, "the failed copy's blocks are free again");
    }
    put(&store, key(0), 2, LEN).unwrap();
    get(&store, key(0), 2, LEN).unwrap();
}

/// A read meets `fault` at each block and fails like this; the next read of the same copy is right.
fn read_fails(faults_of: impl Fn(u64) -> Vec<(u64, Fault)>, expected: impl Fn(&Error) -> bool) {
    let script = Script::default();
    let store = script.store();
    put(&store, key(0), 1, LEN).unwrap();
    for nth in 0..3 {
        script.set(Direction::Read, faults_of(nth));
        let error = get(&store, key(0), 1, LEN).unwrap_err();
        assert!(expected(&error), "{error}");
        script.clear();
        get(&store, key(0), 1, LEN).unwrap();
    }
}

/// What a write put on the disk silently wrong is an error when it is read, and other payloads are as they were.
fn silent_fault_of_a_write(fault: Fault) {
    for nth in 0..3 {
        let script = Script::default();
        let store = script.store();
        put(&store, key(1), 1, LEN).unwrap();
        put(&store, key(0), 1, LEN).unwrap();
        script.set(Direction::Write, [(nth, fault)]);
        put(&store, key(0), 2, LEN).unwrap();
        script.clear();
        let error = get(&store, key(0), 2, LEN).unwrap_err();
        let Error::Corrupt { key: of, generation: 2, block, expected, found, .. } = error else { panic!("{error}") };
        assert_eq!((of, u64::from(block)), (key(0), nth));
        assert_ne!(expected, found);
        get(&store, key(1), 1, LEN).unwrap();
        assert_eq!(store.metrics().unwrap().rereads, 1);
    }
}

fn transfer_error(direction: Direction, errno: i32) -> impl Fn(&Error) -> bool {
    move |error| {
        matches!(error, Error::Transfer { direction: d, errno: e, generation, .. } if *d == direction && *e == errno && *generation > 0)
            && error.errno() == Some(errno)
    }
}

/// The same transient fault `times` times in a row, in both directions; the data is right afterwards.
fn transient(errno: i32) {
    let script = Script::default();
    let store = script.store();
    let faults = || (0..5).map(|nth| (nth, Fault::Errno(errno)));
    script.set(Direction::Write, faults());
    put(&store, key(0), 1, LEN).unwrap();
    script.set(Direction::Read, faults());
    get(&store, key(0), 1, LEN).unwrap();
    assert_eq!(store.metrics().unwrap().retries, 10);
    // For ever is too long: it ends with the error, not with a hang.
    script.set(Direction::Write, (0..100).map(|nth| (nth, Fault::Errno(errno))));
    let error = put(&store, key(0), 2, LEN).unwrap_err();
    assert!(matches!(error, Error::Transfer { attempts, .. } if attempts == MAX_FRUITLESS_TRANSFERS), "{error}");
    script.clear();
    get(&store, key(0), 1, LEN).unwrap();
}

#[test]
fn eintr_is_retried() {
    transient(libc::EINTR);
}

#[test]
fn eagain_is_retried_with_pauses() {
    let started = Instant::now();
    transient(libc::EAGAIN);
    assert!(started.elapsed() > Duration::from_millis(100), "20 pauses that double from 0.1 to 100 ms");
}

#[test]
fn short_transfers_continue_at_every_boundary() {
    let lengths =
        (0..=BLOCK_BYTES).step_by(512).flat_map(|len| [len.wrapping_sub(1), len, len + 1]).filter(|len| (1..BLOCK_BYTES).contains(len));
    let script = Script::default();
    let store = script.store();
    for (round, short) in lengths.enumerate() {
        let generation = round as u64 + 1;
        script.set(Direction::Write, [(round as u64 % 3, Fault::Short(short))]);
        put(&store, key(0), generation, LEN).unwrap();
        script.set(Direction::Read, [(round as u64 % 3, Fault::Short(short))]);
        get(&store, key(0), generation, LEN).unwrap();
    }
    assert!(store.metrics().unwrap().short_transfers > 100);
}

#[test]
fn transfers_that_are_short_again_and_again_continue() {
    let script = Script::default();
    let store = script.store();
    // The first block alone takes four transfers of one alignment each.
    script.set(Direction::Write, (0..8).map(|nth| (nth, Fault::Short(ALIGNMENT + 10))));
    put(&store, key(0), 1, LEN).unwrap();
    script.set(Direction::Read, (0..8).map(|nth| (nth, Fault::Short(ALIGNMENT + 10))));
    get(&store, key(0), 1, LEN).unwrap();
}

#[test]
fn a_write_that_moves_nothing_is_an_error_in_the_end() {
    let script = Script::default();
    let store = script.store();
    script.set(Direction::Write, (0..100).map(|nth| (nth, Fault::Short(0))));
    let error = put(&store, key(0), 1, LEN).unwrap_err();
    assert!(matches!(error, Error::Impossible { moved: 0, .. }), "{error}");
}

#[test]
fn the_end_of_the_file_inside_it_is_an_error() {
    read_fails(|nth| vec![(nth, Fault::Short(0))], |error| matches!(error, Error::Impossible { moved: 0, direction: Direction::Read, .. }));
}

#[test]
fn more_bytes_than_asked_for_is_an_error() {
    write_fails(Fault::TooLong, |error| matches!(error, Error::Impossible { asked, moved, .. } if *moved == asked + 1));
    read_fails(|nth| vec![(nth, Fault::TooLong)], |error| matches!(error, Error::Impossible { .. }));
}

#[test]
fn eio_is_an_error_and_the_last_copy_stays() {
    write_fails(Fault::Errno(libc::EIO), transfer_error(Direction::Write, libc::EIO));
    read_fails(|nth| vec![(nth, Fault::Errno(libc::EIO))], transfer_error(Direction::Read, libc::EIO));
}

#[test]
fn a_disk_that_fills_up_in_the_middle_is_an_error_and_the_last_copy_stays() {
    write_fails(Fault::Errno(libc::ENOSPC), transfer_error(Direction::Write, libc::ENOSPC));
    write_fails(Fault::Errno(libc::EDQUOT), transfer_error(Direction::Write, libc::EDQUOT));
}

#[test]
fn a_torn_block_is_noticed() {
    for moved in [0, 1, 512, ALIGNMENT, ALIGNMENT + 99] {
        silent_fault_of_a_write(Fault::Torn(moved));
    }
}

#[test]
fn a_bit_flipped_on_the_disk_is_noticed() {
    for bit in [0, 7, 8 * ALIGNMENT - 1, 4243] {
        silent_fault_of_a_write(Fault::FlippedBit(bit));
    }
}

#[test]
fn a_bit_flipped_on_the_way_is_repaired_by_reading_again() {
    let script = Script::default();
    let store = script.store();
    put(&store, key(0), 1, LEN).unwrap();
    for nth in 0..3 {
        script.set(Direction::Read, [(nth, Fault::FlippedBit(4321))]);
        get(&store, key(0), 1, LEN).unwrap();
        assert_eq!(store.metrics().unwrap().rereads, nth + 1);
    }
    read_fails(
        |nth| {
            vec![
                (nth, Fault::FlippedBit(1)),
                (nth + 1, Fault::FlippedBit(1)),
                (nth + 2, Fault::FlippedBit(1)),
                (nth + 3, Fault::FlippedBit(1)),
            ]
        },
        |error| matches!(error, Error::Corrupt { .. }),
    );
}

#[test]
fn a_stale_generation_is_noticed() {
    // Generation 3 goes to the blocks where generation 1 was; the disk loses the write and returns generation 1.
    for nth in 0..3 {
        let script = Script::default();
        let store = script.store();
        put(&store, key(0), 1, LEN).unwrap();
        put(&store, key(0), 2, LEN).unwrap();
        script.set(Direction::Write, [(nth, Fault::Lost)]);
        put(&store, key(0), 3, LEN).unwrap();
        script.clear();
        let error = get(&store, key(0), 3, LEN).unwrap_err();
        assert!(matches!(error, Error::Corrupt { generation: 3, block, .. } if u64::from(block) == nth), "{error}");
    }
}

#[test]
fn equal_bytes_of_another_generation_are_noticed() {
    // The checksum is of what a block is, so a stale block fails even if only its identity is wrong.
    let script = Script::default();
    let store = script.store();
    put(&store, key(0), 1, BLOCK_BYTES).unwrap();
    put(&store, key(1), 1, BLOCK_BYTES).unwrap();
    script.set(Direction::Read, (0..2).map(|nth| (nth, Fault::Misdirected(BLOCK_BYTES as u64))));
    let error = get(&store, key(0), 1, BLOCK_BYTES).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}

#[test]
fn a_misdirected_read_is_noticed() {
    let elsewhere = Fault::Misdirected(20 * BLOCK_BYTES as u64);
    read_fails(|nth| (nth..nth + 4).map(|nth| (nth, elsewhere)).collect(), |error| matches!(error, Error::Corrupt { .. }));
    // Once is repaired.
    let script = Script::default();
    let store = script.store();
    put(&store, key(0), 1, LEN).unwrap();
    script.set(Direction::Read, [(1, elsewhere)]);
    get(&store, key(0), 1, LEN).unwrap();
}

#[test]
fn a_misdirected_write_is_noticed() {
    silent_fault_of_a_write(Fault::Misdirected(20 * BLOCK_BYTES as u64));
}

#[test]
fn a_misdirected_write_over_another_payload_is_noticed_there() {
    let script = Script::default();
    let store = script.store();
    put(&store, key(1), 1, BLOCK_BYTES).unwrap();
    script.set(Direction::Write, [(0, Fault::Misdirected(0))]);
    put(&store, key(0), 1, BLOCK_BYTES).unwrap();
    for victim in [0, 1] {
        let error = get(&store, key(victim), 1, BLOCK_BYTES).unwrap_err();
        assert!(matches!(error, Error::Corrupt { key: of, .. } if of == key(victim)), "{error}");
    }
}

/// A store whose disk keeps every read for `LATE` once `late` is set.
const LATE: Duration = Duration::from_millis(300);

fn late_store(late: &Arc<AtomicBool>, stall: Duration) -> Store {
    let late = Arc::clone(late);
    faulty_store(BLOCKS, 4, stall, move |_, _| late.load(Ordering::SeqCst).then_some(Fault::Late(LATE.as_nanos() as u64)))
}

#[test]
fn a_late_completion_is_waited_for_or_reported_and_never_lost() {
    let late = Arc::new(AtomicBool::new(false));
    let store = late_store(&late, Duration::from_millis(50));
    put(&store, key(0), 1, LEN).unwrap();
    late.store(true, Ordering::SeqCst);
    let pages = poisoned(LEN);
    // SAFETY: the pages live, untouched, until the last wait has ended.
    let mut buffer = unsafe { pages.buffer(0, LEN) };
    let read = store.read(key(0), 1, &mut buffer, Priority::Demand).unwrap();
    let error = read.wait().unwrap_err();
    assert!(matches!(error, Error::Stalled { waited, .. } if waited >= Duration::from_millis(50) && waited < LATE), "{error}");
    assert!(read.wait_timeout(Duration::from_secs(20)).expect("the disk answers in the end").is_ok());
    assert!(pages.as_slice()[..LEN] == content(key(0), 1, LEN));
}

#[test]
fn a_completion_after_a_cancel_ends_the_ticket_only_when_the_buffer_is_free() {
    let late = Arc::new(AtomicBool::new(false));
    let store = late_store(&late, STALL);
    put(&store, key(0), 1, LEN).unwrap();
    late.store(true, Ordering::SeqCst);
    let pages = poisoned(LEN);
    // SAFETY: the pages live, untouched, until the wait has ended.
    let mut buffer = unsafe { pages.buffer(0, LEN) };
    let started = Instant::now();
    let read = store.read(key(0), 1, &mut buffer, Priority::Prefetch).unwrap();
    // Until the driver has handed it to the disk.
    std::thread::sleep(Duration::from_millis(50));
    read.cancel().unwrap();
    assert!(read.outcome().is_none(), "the disk still owns the buffer");
    let error = read.wait().unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    assert!(started.elapsed() >= LATE);
    // From here on nothing may arrive in it any more.
    let snapshot = pages.as_slice().to_vec();
    std::thread::sleep(LATE);
    assert!(pages.as_slice() == snapshot);
    late.store(false, Ordering::SeqCst);
    get(&store, key(0), 1, LEN).unwrap();
}

#[test]
fn a_cancelled_write_leaves_the_last_copy() {
    let late = Arc::new(AtomicBool::new(false));
    let store = late_store(&late, STALL);
    put(&store, key(0), 1, LEN).unwrap();
    late.store(true, Ordering::SeqCst);
    let source = filled(key(0), 2, LEN);
    let target = poisoned(LEN);
    // SAFETY: both live, untouched, until the waits have ended.
    let (out, mut back) = unsafe { (source.buffer(0, LEN), target.buffer(0, LEN)) };
    let write = store.write(key(0), 2, &out, Priority::Background).unwrap();
    let reader = store.read(key(0), 2, &mut back, Priority::Prefetch).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    write.cancel().unwrap();
    assert!(matches!(write.wait(), Err(Error::Cancelled { .. })));
    let error = reader.wait().unwrap_err();
    assert!(matches!(error, Error::NotStored { asked: 2, stored: Some(1), .. }), "{error}");
    late.store(false, Ordering::SeqCst);
    get(&store, key(0), 1, LEN).unwrap();
}

#[test]
fn a_broken_backend_ends_every_ticket() {
    // The plan runs on the driver thread: its panic is the driver's.
    let armed = Arc::new(AtomicBool::new(false));
    let plan = Arc::clone(&armed);
    let store = faulty_store(BLOCKS, 4, STALL, move |_, _| {
        assert!(!plan.load(Ordering::SeqCst), "a defect in the driver");
        None
    });
    put(&store, key(0), 1, LEN).unwrap();
    armed.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let error = get(&store, key(0), 1, LEN).unwrap_err();
        assert!(matches!(&error, Error::Stopped(text) if text.contains("a defect in the driver")), "{error}");
    }
}
