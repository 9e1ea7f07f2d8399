//! The timeline: spans and byte counters in one format, written by the runtime and by the simulator.

use serde::{Deserialize, Serialize};

/// Something that took time on one track.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Track: `compute`, `h2d`, `d2h`, `optimizer`, `host_adam`, ...
    pub track: String,
    /// What it was, such as `fetch model.layers.3`.
    pub name: String,
    /// Start, in nanoseconds since the timeline's epoch.
    pub start_ns: u64,
    /// Duration in nanoseconds.
    pub duration_ns: u64,
    /// Bytes moved or touched, 0 if that says nothing.
    pub bytes: u64,
}

/// The value of a counter from a moment on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Counter: `device bytes`, `host bytes`, ...
    pub counter: String,
    /// When, in nanoseconds since the timeline's epoch.
    pub at_ns: u64,
    /// Value from then on.
    pub value: u64,
}

/// Spans and samples of one step.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Timeline {
    /// Spans in the order recorded.
    pub spans: Vec<Span>,
    /// Samples in the order recorded.
    pub samples: Vec<Sample>,
}

impl Timeline {
    /// The timeline in the trace-event JSON that Perfetto and `chrome://tracing` open. Timestamps are microseconds.
    pub fn to_perfetto(&self) -> String {
        let mut tracks: Vec<&str> = Vec::new();
        for span in &self.spans {
            if !tracks.contains(&span.track.as_str()) {
                tracks.push(&span.track);
            }
        }
        let mut events: Vec<serde_json::Value> = tracks
            .iter()
            .enumerate()
            .map(|(tid, name)| serde_json::json!({"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "args": {"name": name}}))
            .collect();
        for span in &self.spans {
            let tid = tracks.iter().position(|t| *t == span.track);
            events.push(serde_json::json!({
                "ph": "X", "pid": 1, "tid": tid, "name": span.name, "cat": span.track,
                "ts": span.start_ns as f64 / 1e3, "dur": span.duration_ns as f64 / 1e3, "args": {"bytes": span.bytes},
            }));
        }
        for sample in &self.samples {
            events.push(serde_json::json!({
                "ph": "C", "pid": 1, "name": sample.counter, "ts": sample.at_ns as f64 / 1e3, "args": {"bytes": sample.value},
            }));
        }
        serde_json::json!({"traceEvents": events, "displayTimeUnit": "ms"}).to_string()
    }
}
