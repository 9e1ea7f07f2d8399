//! Recording of the timeline: spans between two events, resolved when somebody asks.

use crate::device::EventRef;
use tierwise_core::timeline::{Sample, Span, Timeline};

/// A span whose events may still be ahead.
struct Pending {
    track: &'static str,
    name: String,
    bytes: u64,
    start: EventRef,
    end: EventRef,
}

/// What is being recorded. Costs nothing while off.
#[derive(Default)]
pub struct Recorder {
    enabled: bool,
    pending: Vec<Pending>,
    done: Timeline,
    /// Pairs of events around waits of the compute stream, and the nanoseconds already resolved.
    waits: Vec<(EventRef, EventRef)>,
    waited_ns: u64,
}

impl Recorder {
    /// Whether spans are recorded.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Starts afresh, or stops.
    pub fn enable(&mut self, enabled: bool) {
        if enabled {
            self.pending.clear();
            self.done = Timeline::default();
        }
        self.enabled = enabled;
    }

    /// A span between two device events.
    pub fn between(&mut self, track: &'static str, name: String, bytes: u64, start: Option<EventRef>, end: &EventRef) {
        if let (true, Some(start)) = (self.enabled, start) {
            self.pending.push(Pending { track, name, bytes, start, end: end.clone() });
        }
    }

    /// A span whose times are known.
    pub fn span(&mut self, track: &str, name: String, bytes: u64, start_ns: u64, end_ns: u64) {
        if self.enabled {
            let duration_ns = end_ns.saturating_sub(start_ns);
            self.done.spans.push(Span { track: track.to_owned(), name, start_ns, duration_ns, bytes });
        }
    }

    /// The value of a counter from now on.
    pub fn sample(&mut self, counter: &str, at_ns: u64, value: u64) {
        if self.enabled {
            self.done.samples.push(Sample { counter: counter.to_owned(), at_ns, value });
        }
    }

    /// A wait of the compute stream.
    pub fn wait(&mut self, name: &str, start: EventRef, end: EventRef) {
        if self.enabled {
            self.pending.push(Pending { track: "compute wait", name: name.to_owned(), bytes: 0, start: start.clone(), end: end.clone() });
        }
        self.waits.push((start, end));
        if self.waits.len() > 4096 {
            self.waited_ns();
        }
    }

    /// Nanoseconds that the compute stream has waited so far, as far as its events are done.
    pub fn waited_ns(&mut self) -> u64 {
        let waited = &mut self.waited_ns;
        self.waits.retain(|(start, end)| match (start.time_ns(), end.time_ns()) {
            (Some(start), Some(end)) => {
                *waited += end.saturating_sub(start);
                false
            }
            _ => true,
        });
        self.waited_ns
    }

    /// Everything recorded whose events are done.
    pub fn timeline(&mut self) -> Timeline {
        let done = &mut self.done;
        self.pending.retain(|p| match (p.start.time_ns(), p.end.time_ns()) {
            (Some(start), Some(end)) => {
                done.spans.push(Span {
                    track: p.track.to_owned(),
                    name: p.name.clone(),
                    start_ns: start,
                    duration_ns: end.saturating_sub(start),
                    bytes: p.bytes,
                });
                false
            }
            _ => true,
        });
        done.spans.sort_by(|a, b| (a.start_ns, &a.track).cmp(&(b.start_ns, &b.track)));
        done.clone()
    }
}
