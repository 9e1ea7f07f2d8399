//! The record of decisions: what the scheduler was told and what it asked for, in order. The runtime and the simulator write the same.

use super::{Action, Event, Progress, ScheduleError};
use serde::{Deserialize, Serialize};

/// An event that took effect, and the actions that it led to.
///
/// An event that blocked is left out, because how often it is repeated says only how often somebody looked; what it asked for all the same
/// is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    /// What happened.
    pub event: Event,
    /// What had to be done, in this order.
    pub actions: Vec<Action>,
}

/// Turns since recording began; nothing while it is off.
#[derive(Debug, Clone, Default)]
pub(super) struct Record(Option<Vec<Turn>>);

impl Record {
    pub fn enable(&mut self, enabled: bool) {
        self.0 = enabled.then(Vec::new);
    }

    pub fn take(&mut self) -> Vec<Turn> {
        self.0.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub fn add(&mut self, event: &Event, actions: &[Action], progress: &Result<Progress, ScheduleError>) {
        if let Some(turns) = &mut self.0
            && (matches!(progress, Ok(Progress::Done)) || !actions.is_empty())
        {
            turns.push(Turn { event: event.clone(), actions: actions.to_vec() });
        }
    }
}
