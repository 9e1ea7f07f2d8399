//! What the queue promises about order, depth and time.

#![cfg(target_os = "linux")]

mod common;

use common::{ALIGNMENT, BLOCK_BYTES, key};
use tierwise_io::backend::{Completion, Op, OpId};
use tierwise_io::error::Error;
use tierwise_io::pages::Pages;
use tierwise_io::queue::{Limits, Queue, RequestId};
use tierwise_io::{Direction, Priority};

const LIMITS: Limits = Limits { queue_depth: 3, block_bytes: BLOCK_BYTES, alignment: ALIGNMENT, blocks: 64 };

fn write(queue: &mut Queue, pages: &Pages, chunk: u32, priority: Priority) -> RequestId {
    // SAFETY: no transfer is carried out in this file.
    queue.write(key(chunk), 1, unsafe { pages.buffer(0, pages.bytes()) }, priority).unwrap()
}

fn done(queue: &mut Queue, now_ns: u64, op: Op) {
    queue.complete(now_ns, &Completion { id: op.id, result: Ok(op.len), checksum: Some(1) }).unwrap();
}

/// Completes everything one by one and returns the requests in the order in which they end.
fn order(queue: &mut Queue) -> Vec<RequestId> {
    let mut order = Vec::new();
    while queue.pending() > 0 {
        let op = queue.poll(0).expect("something is left");
        done(queue, 0, op);
        order.extend(queue.take_finished().into_iter().map(|finished| finished.request));
    }
    order
}

#[test]
fn priorities_decide_and_equal_ones_keep_their_order() {
    let pages = Pages::new(2 * BLOCK_BYTES, ALIGNMENT).unwrap();
    let mut queue = Queue::new(LIMITS).unwrap();
    let priorities = [
        Priority::Background,
        Priority::Prefetch,
        Priority::Demand,
        Priority::Soon,
        Priority::Prefetch,
        Priority::Demand,
        Priority::Background,
    ];
    let ids: Vec<RequestId> = priorities.iter().enumerate().map(|(chunk, &p)| write(&mut queue, &pages, chunk as u32, p)).collect();
    queue.set_priority(ids[6], Priority::Demand);
    queue.set_priority(ids[2], Priority::Background);
    assert_eq!(order(&mut queue), [5, 6, 3, 1, 4, 0, 2].map(|i| ids[i]));
}

#[test]
fn a_reader_lends_its_priority_to_the_write_it_waits_for() {
    let pages = Pages::new(BLOCK_BYTES, ALIGNMENT).unwrap();
    let mut queue = Queue::new(LIMITS).unwrap();
    let other = write(&mut queue, &pages, 0, Priority::Soon);
    let slow = write(&mut queue, &pages, 1, Priority::Background);
    // SAFETY: no transfer is carried out in this file.
    let read = queue.read(key(1), 1, unsafe { pages.buffer(0, BLOCK_BYTES) }, Priority::Demand).unwrap();
    assert_eq!(order(&mut queue), [slow, read, other]);
}

#[test]
fn no_more_than_the_depth_is_in_flight() {
    let pages = Pages::new(10 * BLOCK_BYTES, ALIGNMENT).unwrap();
    let mut queue = Queue::new(LIMITS).unwrap();
    write(&mut queue, &pages, 0, Priority::Soon);
    let mut ops: Vec<Op> = std::iter::from_fn(|| queue.poll(0)).collect();
    assert_eq!((ops.len(), queue.in_flight()), (3, 3));
    for _ in 0..7 {
        let op = ops.remove(0);
        done(&mut queue, 0, op);
        ops.extend(std::iter::from_fn(|| queue.poll(0)));
        assert_eq!((ops.len(), queue.in_flight()), (3, 3));
    }
    for op in ops {
        done(&mut queue, 0, op);
    }
    assert!(queue.poll(0).is_none() && queue.pending() == 0);
}

#[test]
fn a_pause_after_eagain_is_as_long_as_the_wakeup_says_and_others_go_on() {
    let pages = Pages::new(BLOCK_BYTES, ALIGNMENT).unwrap();
    let mut queue = Queue::new(LIMITS).unwrap();
    write(&mut queue, &pages, 0, Priority::Demand);
    let op = queue.poll(1000).unwrap();
    queue.complete(1000, &Completion { id: op.id, result: Err(libc::EAGAIN), checksum: Some(1) }).unwrap();
    let due = queue.next_wakeup_ns().unwrap();
    assert!(due > 1000);
    assert!(queue.poll(due - 1).is_none());
    write(&mut queue, &pages, 1, Priority::Background);
    assert!(queue.poll(due - 1).is_some());
    let again = queue.poll(due).unwrap();
    assert_eq!((again.offset, again.len, again.direction), (op.offset, op.len, Direction::Write));
    assert_ne!(again.id, op.id);
}

#[test]
fn a_completion_that_nobody_waits_for_is_an_error() {
    let pages = Pages::new(BLOCK_BYTES, ALIGNMENT).unwrap();
    let mut queue = Queue::new(LIMITS).unwrap();
    write(&mut queue, &pages, 0, Priority::Soon);
    let op = queue.poll(0).unwrap();
    let unknown = Completion { id: OpId(op.id.0 + 1), result: Ok(op.len), checksum: None };
    assert!(matches!(queue.complete(0, &unknown), Err(Error::Stopped(text)) if text.contains("not in flight")));
    done(&mut queue, 0, op);
    // Twice is once too often.
    assert!(queue.complete(0, &Completion { id: op.id, result: Ok(op.len), checksum: None }).is_err());
}

#[test]
fn in_flight_time_is_counted_once() {
    let pages = Pages::new(2 * BLOCK_BYTES, ALIGNMENT).unwrap();
    let mut queue = Queue::new(LIMITS).unwrap();
    write(&mut queue, &pages, 0, Priority::Soon);
    let (first, second) = (queue.poll(100).unwrap(), queue.poll(150).unwrap());
    done(&mut queue, 300, first);
    done(&mut queue, 400, second);
    assert_eq!(queue.metrics().write.in_flight_ns, 300);
    assert_eq!(queue.metrics().write.transfer_ns, 200 + 250);
    assert_eq!(queue.metrics().write.bytes, 2 * BLOCK_BYTES as u64);
}

#[test]
fn impossible_limits_are_refused() {
    for limits in [
        Limits { queue_depth: 0, ..LIMITS },
        Limits { blocks: 0, ..LIMITS },
        Limits { block_bytes: 0, ..LIMITS },
        Limits { alignment: 0, ..LIMITS },
        Limits { block_bytes: ALIGNMENT + 1, ..LIMITS },
    ] {
        assert!(matches!(Queue::new(limits), Err(Error::Usage(_))), "{limits:?}");
    }
}
