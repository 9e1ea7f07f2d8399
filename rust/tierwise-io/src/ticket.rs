//! What a caller holds while its bytes move.

use crate::driver::Shared;
use crate::error::{Error, Result};
use crate::queue::RequestId;
use crate::{Direction, Key, Priority};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Where the driver leaves the outcome.
#[derive(Default)]
pub(crate) struct Slot {
    outcome: Mutex<Option<Result<()>>>,
    resolved: Condvar,
}

impl Slot {
    pub(crate) fn resolve(&self, outcome: Result<()>) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.resolved.notify_all();
    }

    pub(crate) fn wait(&self, timeout: Duration) -> Option<Result<()>> {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        let (outcome, _) =
            self.resolved.wait_timeout_while(outcome, timeout, |outcome| outcome.is_none()).unwrap_or_else(PoisonError::into_inner);
        outcome.clone()
    }
}

/// One read or write. Dropping it ends nothing: the buffer is the operation's until it has ended.
#[derive(Clone)]
#[must_use = "an operation that nobody waits for may fail unseen"]
pub struct Ticket {
    pub(crate) slot: Arc<Slot>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) request: RequestId,
    pub(crate) direction: Direction,
    pub(crate) key: Key,
    pub(crate) generation: u64,
}

impl Ticket {
    /// Waits for the end. A disk that completes nothing at all for the store's `stall_timeout` is reported as [`Error::Stalled`]: the
    /// operation still owns its buffer then, and can be waited for again.
    pub fn wait(&self) -> Result<()> {
        let started = Instant::now();
        let limit = self.shared.stall_timeout;
        let mut patience = limit;
        loop {
            self.shared.check_process()?;
            if let Some(outcome) = self.slot.wait(patience) {
                return outcome;
            }
            let quiet = self.shared.quiet_for().min(started.elapsed());
            if quiet >= limit {
                let Ticket { direction, key, generation, .. } = *self;
                return Err(Error::Stalled { direction, key, generation, waited: started.elapsed() });
            }
            patience = limit.saturating_sub(quiet);
        }
    }

    /// Waits for the end at most this long.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Result<()>> {
        if let Err(error) = self.shared.check_process() {
            return Some(Err(error));
        }
        self.slot.wait(timeout)
    }

    /// The outcome, if it has ended.
    pub fn outcome(&self) -> Option<Result<()>> {
        self.wait_timeout(Duration::ZERO)
    }

    /// Ends the operation as cancelled as soon as the disk has let go of its buffer; [`Ticket::wait`] tells when. One that has ended
    /// stays as it ended. A cancelled write leaves the last complete generation as it was.
    pub fn cancel(&self) -> Result<()> {
        self.shared.check_process()?;
        self.shared.change(|queue| queue.cancel(self.request));
        Ok(())
    }

    /// Changes who is served first.
    pub fn set_priority(&self, priority: Priority) -> Result<()> {
        self.shared.check_process()?;
        self.shared.change(|queue| queue.set_priority(self.request, priority));
        Ok(())
    }
}
