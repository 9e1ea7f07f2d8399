//! The residency table: exhaustively, against a table written by hand, and for what it can never do.

use tierwise_core::residency::{Residency, Transition};
use tierwise_core::{ChunkId, Tier};

const TIERS: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Nvme];

/// States that can be reached: two copies are never at the same tier.
fn states() -> Vec<Residency> {
    let mut states = vec![Residency::Absent];
    for a in TIERS {
        states.extend([Residency::At(a), Residency::Writing(a), Residency::Tentative { home: a, cache: None }]);
        for b in TIERS.into_iter().filter(|b| *b != a) {
            states.push(Residency::Cached { home: a, cache: b });
            states.push(Residency::Moving { from: a, to: b });
            states.push(Residency::Tentative { home: a, cache: Some(b) });
        }
    }
    states
}

fn transitions() -> Vec<Transition> {
    use Transition as T;
    let mut all = vec![T::DropCache, T::Land, T::BeginWrite, T::FinishWrite, T::Speculate, T::Accept, T::Undo, T::Consume];
    for tier in TIERS {
        all.extend([T::Create(tier), T::Cache(tier), T::Move(tier)]);
    }
    all
}

/// The expected table as text: state, transition, state after. `a` and `b` are different tiers.
const TABLE: &str = "
    absent         create(a)    at(a)
    at(a)          cache(b)     cached(a,b)
    at(a)          move(b)      moving(a,b)
    at(a)          begin_write  writing(a)
    at(a)          speculate    tentative(a)
    at(a)          consume      absent
    cached(a,b)    drop_cache   at(a)
    cached(a,b)    speculate    tentative(a,b)
    moving(a,b)    land         at(b)
    writing(a)     finish_write at(a)
    tentative(a)   accept       at(a)
    tentative(a)   undo         at(a)
    tentative(a,b) accept       at(a)
    tentative(a,b) undo         cached(a,b)
    tentative(a,b) drop_cache   tentative(a)
";

fn state_name(state: Residency) -> String {
    match state {
        Residency::Absent => "absent".to_owned(),
        Residency::At(a) => format!("at({a})"),
        Residency::Cached { home, cache } => format!("cached({home},{cache})"),
        Residency::Moving { from, to } => format!("moving({from},{to})"),
        Residency::Writing(a) => format!("writing({a})"),
        Residency::Tentative { home, cache: None } => format!("tentative({home})"),
        Residency::Tentative { home, cache: Some(cache) } => format!("tentative({home},{cache})"),
    }
}

fn transition_name(transition: Transition) -> String {
    match transition {
        Transition::Create(t) => format!("create({t})"),
        Transition::Cache(t) => format!("cache({t})"),
        Transition::DropCache => "drop_cache".to_owned(),
        Transition::Move(t) => format!("move({t})"),
        Transition::Land => "land".to_owned(),
        Transition::BeginWrite => "begin_write".to_owned(),
        Transition::FinishWrite => "finish_write".to_owned(),
        Transition::Speculate => "speculate".to_owned(),
        Transition::Accept => "accept".to_owned(),
        Transition::Undo => "undo".to_owned(),
        Transition::Consume => "consume".to_owned(),
    }
}

fn expected() -> Vec<(String, String, String)> {
    let mut rows = Vec::new();
    for line in TABLE.lines().filter(|line| !line.trim().is_empty()) {
        for a in TIERS {
            for b in TIERS.into_iter().filter(|b| *b != a) {
                // Tier names contain neither `(a` nor `,b` nor `(b`.
                let line = line.replace("(a", &format!("({a}")).replace(",b", &format!(",{b}")).replace("(b", &format!("({b}"));
                let mut words = line.split_whitespace().map(str::to_owned);
                rows.push((words.next().unwrap(), words.next().unwrap(), words.next().unwrap()));
            }
        }
    }
    rows.sort();
    rows.dedup();
    rows
}

#[test]
fn the_table_is_the_expected_one() {
    let mut actual: Vec<_> = states()
        .into_iter()
        .flat_map(|state| transitions().into_iter().map(move |t| (state, t, state.apply(t))))
        .filter_map(|(state, t, after)| Some((state_name(state), transition_name(t), state_name(after?))))
        .collect();
    actual.sort();
    assert_eq!(actual, expected());
}

#[test]
fn authority_is_never_lost_and_dirty_bytes_never_dropped() {
    for state in states() {
        for transition in transitions() {
            let Some(after) = state.apply(transition) else { continue };
            if transition == Transition::Consume {
                continue;
            }
            let what = format!("{state:?} {transition:?} {after:?}");
            let tier = after.authority().unwrap_or_else(|| panic!("no authority: {what}"));
            // What is authoritative afterwards was there before, unless it has just been created or has landed.
            match transition {
                Transition::Create(created) => assert_eq!(tier, created, "{what}"),
                Transition::Land => assert!(state.tiers().any(|t| t == tier), "{what}"),
                _ => assert_eq!(Some(tier), state.authority(), "{what}"),
            }
            assert!(after.tiers().any(|t| t == tier), "{what}");
            // A tier loses its bytes only if they are a copy: the authoritative ones stay.
            for lost in state.tiers().filter(|t| after.tiers().all(|a| a != *t)) {
                assert!(state.authority() != Some(lost) || matches!(state, Residency::Moving { .. }), "{what}");
            }
        }
    }
}

#[test]
fn reachable_states_never_have_two_copies_at_one_tier() {
    let mut reached = vec![Residency::Absent];
    let mut next = 0;
    while next < reached.len() {
        for transition in transitions() {
            if let Some(after) = reached[next].apply(transition)
                && !reached.contains(&after)
            {
                reached.push(after);
            }
        }
        next += 1;
    }
    assert_eq!(reached.len(), states().len());
    for state in reached {
        let tiers: Vec<Tier> = state.tiers().collect();
        assert!(tiers.len() < 2 || tiers[0] != tiers[1], "{state:?}");
        // What the compute stream may read is there.
        for tier in TIERS {
            assert!(!state.readable_at(tier) || tiers.contains(&tier), "{state:?}");
        }
        if let Residency::Tentative { home, .. } | Residency::Writing(home) = state {
            assert!(!state.readable_at(home), "{state:?} is not decided");
        }
    }
}

#[test]
fn an_illegal_transition_names_chunk_state_and_event_and_changes_nothing() {
    let mut state = Residency::Writing(Tier::Host);
    let error = state.advance(ChunkId(7), "param", Transition::Cache(Tier::Device)).unwrap_err().to_string();
    for part in ["chunk 7", "`param`", "Cache(Device)", "Writing(Host)"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(state, Residency::Writing(Tier::Host));
}
