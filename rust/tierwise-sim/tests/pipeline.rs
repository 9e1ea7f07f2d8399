//! Pipeline schedules against their formulas.

use tierwise_sim::pipeline::{Schedule, StageCost};

const COST: StageCost = StageCost { forward_ns: 120, backward_ns: 240, weights_ns: 120 };

fn makespan(schedule: Schedule, stages: usize, micro_batches: u64) -> u64 {
    schedule.makespan_ns(&vec![COST; stages], micro_batches, 0).unwrap()
}

#[test]
fn bubbles_are_the_published_ones() {
    for stages in [1_u64, 2, 4, 8] {
        for micro_batches in [stages, 2 * stages, 4 * stages] {
            let work = 360 * micro_batches;
            // GPipe and 1F1B: (p - 1) (f + b).
            for schedule in [Schedule::Gpipe, Schedule::OneFOneB] {
                assert_eq!(makespan(schedule, stages as usize, micro_batches), work + (stages - 1) * 360, "{schedule:?}");
            }
            // Interleaved: that over the number of chunks.
            for chunks in [2, 3, 4] {
                let bubble = (stages - 1) * 360 / chunks;
                assert_eq!(makespan(Schedule::Interleaved(chunks), stages as usize, micro_batches), work + bubble, "x{chunks}");
            }
            // ZB-H1: (p - 1) (f + b - w), where b and w are the halves of a backward and f = b = w.
            if micro_batches >= 2 * stages {
                assert_eq!(makespan(Schedule::ZeroBubble, stages as usize, micro_batches), work + (stages - 1) * 120);
            }
        }
    }
}

#[test]
fn a_slow_stage_bounds_the_step_and_sending_costs_once_per_hop() {
    let mut costs = vec![COST; 4];
    costs[2].forward_ns = 300;
    let slow = Schedule::OneFOneB.makespan_ns(&costs, 64, 0).unwrap();
    assert!((540 * 64..540 * 64 + 3 * 540).contains(&slow), "{slow}");
    let sent = Schedule::Gpipe.makespan_ns(&[COST; 4], 8, 10).unwrap();
    assert_eq!(sent, makespan(Schedule::Gpipe, 4, 8) + 2 * 3 * 10);
}

#[test]
fn memory_is_the_published_one() {
    assert_eq!(Schedule::Gpipe.in_flight(0, 4, 32), 32);
    assert_eq!((0..4).map(|s| Schedule::OneFOneB.in_flight(s, 4, 32)).collect::<Vec<_>>(), [4, 3, 2, 1]);
    // Interleaving holds a factor of 1 + (p - 1) / (p v) more than 1F1B.
    assert_eq!(Schedule::Interleaved(2).in_flight(0, 4, 32), 6);
    assert_eq!(Schedule::OneFOneB.in_flight(0, 4, 2), 2);
}

#[test]
fn interleaving_needs_whole_groups() {
    assert!(Schedule::Interleaved(2).makespan_ns(&[COST; 4], 6, 0).unwrap_err().contains("multiple of 4"));
}
