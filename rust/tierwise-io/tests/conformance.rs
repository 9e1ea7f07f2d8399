//! What every backend has to do, run over all of them.

#![cfg(target_os = "linux")]

mod common;

use common::{ALIGNMENT, BLOCK_BYTES, Scratch, config, content, faulty_store, filled, get, key, poisoned, put};
use std::time::Duration;
use tierwise_io::Priority;
use tierwise_io::backend::BackendKind;
use tierwise_io::backend::faulty::Fault;
use tierwise_io::error::Error;
use tierwise_io::pages::Pages;
use tierwise_io::spill_file::Naming;
use tierwise_io::store::{Slab, Store, StoreConfig};

const BLOCKS: u32 = 64;

/// Runs `test` over every backend that this system has. Only `io_uring` may be missing, and only because the system refuses it.
fn each_backend(name: &str, test: impl Fn(&str, &Store)) {
    let scratch = Scratch::new(name);
    match Store::open(config(&scratch, BackendKind::IoUring, BLOCKS.into())) {
        Ok(store) => {
            assert_eq!(store.setup().backend, "io_uring");
            test("io_uring", &store);
        }
        Err(Error::Backend { backend, reason, .. }) => {
            println!("SKIPPED over io_uring: {backend}: {reason}; runs where the system allows io_uring");
        }
        Err(error) => panic!("{error}"),
    }
    let store = Store::open(config(&scratch, BackendKind::Threads, BLOCKS.into())).unwrap();
    assert_eq!(store.setup().backend, "threads");
    test("threads", &store);
    let unlinked = StoreConfig { naming: Naming::Unlinked, ..config(&scratch, BackendKind::Threads, BLOCKS.into()) };
    test("threads, unlinked file", &Store::open(unlinked).unwrap());
    let store = Store::open(config(&scratch, BackendKind::Memory, BLOCKS.into())).unwrap();
    assert_eq!(store.setup().backend, "memory");
    test("memory", &store);
    // Faults that a retry repairs must not be visible at all.
    let store = faulty_store(BLOCKS, 8, Duration::from_secs(60), |op, random| match random.below(8) {
        0 => Some(Fault::Errno(libc::EINTR)),
        1 => Some(Fault::Errno(libc::EAGAIN)),
        2 | 3 => Some(Fault::Short(1 + random.below(op.len as u64) as usize)),
        4 => Some(Fault::Late(random.below(2_000_000))),
        _ => None,
    });
    test("faulty", &store);
    assert!(store.metrics().unwrap().failed == 0);
}

#[test]
fn every_length_comes_back_and_nothing_around_it_changes() {
    each_backend("lengths", |name, store| {
        let lengths =
            [1, 4095, 4096, 4097, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES + ALIGNMENT, 5 * BLOCK_BYTES + 17];
        for (chunk, len) in lengths.into_iter().enumerate() {
            let key = key(chunk as u32);
            put(store, key, 1, len).unwrap_or_else(|error| panic!("{name}: {error}"));
            let padded = len.next_multiple_of(ALIGNMENT);
            let pages = poisoned(padded + 2 * ALIGNMENT);
            // SAFETY: the pages live, untouched, until the wait has ended.
            let mut buffer = unsafe { pages.buffer(ALIGNMENT, len) };
            store.read(key, 1, &mut buffer, Priority::Demand).unwrap().wait().unwrap_or_else(|error| panic!("{name}: {error}"));
            let bytes = pages.as_slice();
            assert!(bytes[ALIGNMENT..ALIGNMENT + len] == content(key, 1, len), "{name}: {len} bytes");
            assert!(bytes[..ALIGNMENT].iter().chain(&bytes[ALIGNMENT + padded..]).all(|&byte| byte == 0xee), "{name}: {len} bytes");
        }
    });
}

#[test]
fn generations_replace_each_other_and_take_no_more_room() {
    each_backend("generations", |name, store| {
        let (key, len) = (key(7), 3 * BLOCK_BYTES + 100);
        let empty = store.free_bytes().unwrap();
        for generation in 1..=30 {
            put(store, key, generation, len).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(store.stored(key).unwrap(), Some(generation));
            get(store, key, generation, len).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(store.free_bytes().unwrap(), empty - 4 * BLOCK_BYTES as u64, "{name}");
        }
        for stale in [0, 1, 29, 31] {
            let error = get(store, key, stale, len).unwrap_err();
            assert!(matches!(error, Error::NotStored { asked, stored: Some(30), .. } if asked == stale), "{name}: {error}");
        }
        assert!(matches!(put(store, key, 30, len), Err(Error::Usage(_))), "{name}");
        store.forget(key).unwrap();
        assert_eq!(store.free_bytes().unwrap(), empty, "{name}");
        assert!(matches!(get(store, key, 30, len), Err(Error::NotStored { stored: None, .. })), "{name}");
    });
}

#[test]
fn a_read_of_what_is_being_written_waits_for_it() {
    each_backend("read-after-write", |name, store| {
        let (key, len) = (key(1), 6 * BLOCK_BYTES);
        for generation in 1..=20 {
            let source = filled(key, generation, len);
            let target = poisoned(len);
            // SAFETY: both live, untouched, until the waits have ended.
            let (out, mut back) = unsafe { (source.buffer(0, len), target.buffer(0, len)) };
            let write = store.write(key, generation, &out, Priority::Background).unwrap();
            let read = store.read(key, generation, &mut back, Priority::Demand).unwrap();
            read.wait().unwrap_or_else(|error| panic!("{name}: {error}"));
            write.wait().unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(target.as_slice() == content(key, generation, len), "{name}, generation {generation}");
        }
    });
}

#[test]
fn the_last_generation_is_readable_while_the_next_is_written() {
    each_backend("last-generation", |name, store| {
        let (key, len) = (key(2), 4 * BLOCK_BYTES);
        put(store, key, 1, len).unwrap();
        for generation in 2..=20 {
            let source = filled(key, generation, len);
            let target = poisoned(len);
            // SAFETY: both live, untouched, until the waits have ended.
            let (out, mut back) = unsafe { (source.buffer(0, len), target.buffer(0, len)) };
            let write = store.write(key, generation, &out, Priority::Background).unwrap();
            match store.read(key, generation - 1, &mut back, Priority::Demand) {
                Ok(read) => {
                    read.wait().unwrap_or_else(|error| panic!("{name}: {error}"));
                    assert!(target.as_slice() == content(key, generation - 1, len), "{name}, generation {generation}");
                }
                // The write was faster.
                Err(Error::NotStored { stored: Some(stored), .. }) => assert_eq!(stored, generation, "{name}"),
                Err(error) => panic!("{name}: {error}"),
            }
            write.wait().unwrap();
        }
    });
}

#[test]
fn a_full_file_is_an_error_before_anything_is_overwritten() {
    each_backend("full", |name, store| {
        let half = BLOCKS as usize / 2 * BLOCK_BYTES;
        put(store, key(0), 1, half).unwrap();
        put(store, key(1), 1, half - BLOCK_BYTES).unwrap();
        let error = put(store, key(0), 2, half).unwrap_err();
        let Error::Full { needed, free, capacity, .. } = error else { panic!("{name}: {error}") };
        assert_eq!((needed, free, capacity), (half as u64, BLOCK_BYTES as u64, u64::from(BLOCKS) * BLOCK_BYTES as u64), "{name}");
        get(store, key(0), 1, half).unwrap();
        get(store, key(1), 1, half - BLOCK_BYTES).unwrap();
        store.forget(key(1)).unwrap();
        put(store, key(0), 2, half).unwrap();
        get(store, key(0), 2, half).unwrap();
    });
}

#[test]
fn cancelled_operations_end_and_leave_the_last_copy() {
    each_backend("cancel", |name, store| {
        let len = 4 * BLOCK_BYTES;
        for chunk in 0..4 {
            put(store, key(chunk), 1, len).unwrap();
        }
        for round in 0..10 {
            let pages: Vec<Pages> = (0..4).map(|_| poisoned(len)).collect();
            let reads: Vec<_> = pages
                .iter()
                .enumerate()
                .map(|(chunk, pages)| {
                    // SAFETY: the pages live, untouched, until the waits have ended.
                    let mut buffer = unsafe { pages.buffer(0, len) };
                    store.read(key(chunk as u32), 1, &mut buffer, Priority::Prefetch).unwrap()
                })
                .collect();
            let source = filled(key(9), round + 1, len);
            // SAFETY: as above.
            let buffer = unsafe { source.buffer(0, len) };
            let write = store.write(key(9), round + 1, &buffer, Priority::Background).unwrap();
            write.cancel().unwrap();
            for read in &reads {
                read.cancel().unwrap();
            }
            for (chunk, read) in reads.iter().enumerate() {
                match read.wait() {
                    Ok(()) => assert!(pages[chunk].as_slice() == content(key(chunk as u32), 1, len), "{name}"),
                    Err(error) => assert!(matches!(error, Error::Cancelled { .. }), "{name}: {error}"),
                }
            }
            let before = store.stored(key(9)).unwrap();
            match write.wait() {
                Ok(()) => get(store, key(9), round + 1, len).unwrap(),
                Err(error) => {
                    assert!(matches!(error, Error::Cancelled { .. }), "{name}: {error}");
                    assert!(before < Some(round + 1), "{name}");
                    if let Some(last) = store.stored(key(9)).unwrap() {
                        get(store, key(9), last, len).unwrap();
                    }
                }
            }
        }
        for chunk in 0..4 {
            get(store, key(chunk), 1, len).unwrap();
        }
    });
}

#[test]
fn misuse_is_refused_with_the_values() {
    each_backend("misuse", |name, store| {
        let pages = filled(key(0), 1, 2 * BLOCK_BYTES);
        // SAFETY: refused before anything moves.
        let (unaligned, empty) = unsafe { (tierwise_io::buffer::Buffer::new(pages.as_ptr().add(8), 100), pages.buffer(0, 0)) };
        for buffer in [unaligned, empty] {
            let error = store.write(key(0), 1, &buffer, Priority::Demand).err().unwrap();
            assert!(matches!(&error, Error::Usage(text) if text.contains("multiple of 4096")), "{name}: {error}");
        }
        put(store, key(0), 1, BLOCK_BYTES).unwrap();
        let error = get(store, key(0), 1, BLOCK_BYTES - 1).unwrap_err();
        assert!(matches!(&error, Error::Usage(text) if text.contains("16384") && text.contains("16383")), "{name}: {error}");
    });
}

#[test]
fn threads_share_a_store() {
    each_backend("threads", |name, store| {
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    for generation in 1..=15 {
                        for chunk in [thread * 2, thread * 2 + 1] {
                            let len = (1 + (chunk as usize + generation as usize) % 3) * BLOCK_BYTES - 5;
                            put(store, key(chunk), generation, len).unwrap_or_else(|error| panic!("{name}: {error}"));
                            get(store, key(chunk), generation, len).unwrap_or_else(|error| panic!("{name}: {error}"));
                        }
                    }
                });
            }
        });
    });
}

#[test]
fn dropping_a_store_ends_every_ticket() {
    for kind in [BackendKind::IoUring, BackendKind::Threads, BackendKind::Memory] {
        let scratch = Scratch::new("drop");
        let store = match Store::open(config(&scratch, kind, 64)) {
            Err(Error::Backend { reason, .. }) if kind == BackendKind::IoUring => {
                println!("SKIPPED over io_uring: {reason}; runs where the system allows io_uring");
                continue;
            }
            opened => opened.unwrap(),
        };
        let pages: Vec<Pages> = (0..8).map(|chunk| filled(key(chunk), 1, 8 * BLOCK_BYTES)).collect();
        let tickets: Vec<_> = (0..8)
            .map(|chunk| {
                // SAFETY: the pages outlive the store, whose drop waits for the disk.
                let buffer = unsafe { pages[chunk as usize].buffer(0, 8 * BLOCK_BYTES) };
                store.write(key(chunk), 1, &buffer, Priority::Background).unwrap()
            })
            .collect();
        drop(store);
        for ticket in tickets {
            let outcome = ticket.outcome().unwrap_or_else(|| panic!("{kind:?}: a ticket did not end"));
            assert!(matches!(outcome, Ok(()) | Err(Error::Cancelled { .. })), "{kind:?}: {outcome:?}");
        }
    }
}

#[test]
fn metrics_count_what_moved() {
    each_backend("metrics", |name, store| {
        put(store, key(0), 1, 3 * BLOCK_BYTES).unwrap();
        get(store, key(0), 1, 3 * BLOCK_BYTES).unwrap();
        store.flush().unwrap();
        let metrics = store.metrics().unwrap();
        let moved = 3 * BLOCK_BYTES as u64;
        if name == "faulty" {
            // Part of a short transfer moves twice.
            assert!(metrics.write.bytes >= moved && metrics.read.bytes >= moved, "{metrics:?}");
        } else {
            assert_eq!((metrics.write.bytes, metrics.read.bytes), (moved, moved), "{name}");
        }
        assert_eq!((metrics.write.requests, metrics.read.requests), (1, 1), "{name}");
        assert!(metrics.write.in_flight_ns > 0 && metrics.read.in_flight_ns > 0, "{name}");
        assert_eq!(metrics.used_bytes, moved, "{name}");
        for direction in [metrics.write, metrics.read] {
            assert!(metrics.busy_ns >= direction.in_flight_ns && direction.transfer_ns >= direction.in_flight_ns, "{name}: {metrics:?}");
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert_eq!(store.metrics().unwrap().busy_ns, metrics.busy_ns, "{name}: nothing is busy where nothing was asked for");
    });
}

#[test]
fn registered_memory_moves_the_same_bytes() {
    let scratch = Scratch::new("registered");
    let slab = Pages::new(16 * BLOCK_BYTES, ALIGNMENT).unwrap();
    // SAFETY: the slab outlives the store.
    let slabs = vec![unsafe { Slab::new(slab.as_ptr(), slab.bytes()) }];
    let store = match Store::open(StoreConfig { slabs, ..config(&scratch, BackendKind::IoUring, 64) }) {
        Err(Error::Backend { reason, .. }) => {
            println!("SKIPPED: {reason}; runs where the system allows io_uring");
            return;
        }
        opened => opened.unwrap(),
    };
    let setup = store.setup();
    assert!(setup.registered_bytes == slab.bytes() as u64 || setup.registered_note.is_some(), "{setup:?}");
    let len = 5 * BLOCK_BYTES + 77;
    // SAFETY: no operation is in flight, and none uses these bytes until the copy is done.
    unsafe { std::ptr::copy_nonoverlapping(content(key(3), 1, len).as_ptr(), slab.as_ptr(), len) };
    // SAFETY: the slab lives, and these ranges of it are left alone until the waits have ended.
    let (out, mut back) = unsafe { (slab.buffer(0, len), slab.buffer(8 * BLOCK_BYTES, len)) };
    store.write(key(3), 1, &out, Priority::Demand).unwrap().wait().unwrap();
    store.read(key(3), 1, &mut back, Priority::Demand).unwrap().wait().unwrap();
    assert!(slab.as_slice()[8 * BLOCK_BYTES..8 * BLOCK_BYTES + len] == content(key(3), 1, len));
    // Memory outside the slab still works.
    put(&store, key(4), 1, len).unwrap();
    get(&store, key(4), 1, len).unwrap();
    drop(store);
}
