//! The engine's threads: one runs host steps, one adds gradients, the others wait for device events or the disk and pass on what they mean.

use crate::device::{Clock, EventRef, WorkerId};
use crate::engine::Shared;
use crate::error::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// What a job does.
type Run = Box<dyn FnOnce(&Arc<Shared>) -> Result<()> + Send>;

/// Something to do once everything before `after` is done.
pub struct Job {
    /// What to wait for.
    after: Option<EventRef>,
    /// What to do then.
    run: Run,
    /// The worker ends after it.
    last: bool,
}

impl Job {
    /// A job that runs once everything before `after` is done.
    pub fn new(after: Option<EventRef>, run: impl FnOnce(&Arc<Shared>) -> Result<()> + Send + 'static) -> Self {
        Job { after, run: Box::new(run), last: false }
    }

    /// Ends the worker.
    pub fn last() -> Self {
        Job { after: None, run: Box::new(|_| Ok(())), last: true }
    }
}

/// Takes jobs for one worker.
#[derive(Clone)]
pub struct Worker {
    jobs: Sender<Job>,
    id: WorkerId,
    clock: Option<Arc<dyn Clock>>,
}

impl Worker {
    /// Appends a job.
    pub fn send(&self, job: Job) -> Result<()> {
        if let Some(clock) = self.clock.as_ref().filter(|_| !job.last) {
            clock.job_sent(self.id);
        }
        self.jobs.send(job).map_err(|_| Error::Stopped("a worker thread ended".to_owned()))
    }
}

/// A worker whose thread is not running yet.
pub struct Unstarted {
    name: &'static str,
    jobs: Receiver<Job>,
    id: WorkerId,
    clock: Option<Arc<dyn Clock>>,
}

/// A worker that runs its jobs in order.
pub fn worker(id: WorkerId, clock: Option<Arc<dyn Clock>>) -> (Worker, Unstarted) {
    let (sender, jobs) = channel();
    let name = match id {
        WorkerId::Adam => "tierwise-adam",
        WorkerId::Landed => "tierwise-landed",
        WorkerId::Landing => "tierwise-landing",
        WorkerId::Optimizer => "tierwise-optimizer",
        WorkerId::States => "tierwise-states",
        WorkerId::Spill => "tierwise-spill",
        WorkerId::Reads => "tierwise-reads",
        WorkerId::Writes => "tierwise-writes",
        WorkerId::Fetches => "tierwise-fetches",
        WorkerId::Fetched => "tierwise-fetched",
    };
    (Worker { jobs: sender, id, clock: clock.clone() }, Unstarted { name, jobs, id, clock })
}

impl Unstarted {
    /// Starts the thread. A failing or panicking job stops the engine with its error; later jobs are dropped, so that nothing is computed
    /// from what failed.
    pub fn start(self, shared: Arc<Shared>) -> Result<JoinHandle<()>> {
        let run = move || {
            if let Some(clock) = &self.clock {
                clock.worker_started(self.id);
            }
            for job in self.jobs {
                if job.last {
                    break;
                }
                if !shared.stopping() {
                    let outcome = catch_unwind(AssertUnwindSafe(|| {
                        if let Some(event) = &job.after {
                            event.synchronize()?;
                        }
                        (job.run)(&shared)
                    }));
                    match outcome {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => shared.fail(&error),
                        Err(panic) => shared.fail(&Error::Stopped(panic_message(&*panic))),
                    }
                }
                if let Some(clock) = &self.clock {
                    clock.job_done(self.id);
                }
            }
        };
        std::thread::Builder::new()
            .name(self.name.to_owned())
            .spawn(run)
            .map_err(|e| Error::Internal(format!("cannot start a worker thread: {e}")))
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    format!("a worker panicked: {}", text.unwrap_or_else(|| "no message".to_owned()))
}
