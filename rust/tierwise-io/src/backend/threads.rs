//! A pool of threads that call `pread` and `pwrite`, for systems that refuse `io_uring`.
//!
//! There are more threads than transfers: while some take checksums, the disk has others' transfers.

use super::{Backend, Completion, Op, Wake};
use crate::Direction;
use crate::error::{Error, Result, last_errno};
use crate::spill_file::SpillFile;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// The pool.
pub struct Threads {
    jobs: Option<Sender<Op>>,
    events: Receiver<Event>,
    wake: Arc<WakeSender>,
    workers: Vec<JoinHandle<()>>,
}

enum Event {
    Ended(Completion),
    Wake,
}

/// How many transfers the disk may still get.
struct Permits {
    free: Mutex<usize>,
    given_back: Condvar,
}

impl Permits {
    fn with<T>(&self, run: impl FnOnce() -> T) -> T {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        *self.given_back.wait_while(free, |free| *free == 0).unwrap_or_else(PoisonError::into_inner) -= 1;
        let result = run();
        *self.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.given_back.notify_one();
        result
    }
}

struct WakeSender(Mutex<Sender<Event>>);

impl Wake for WakeSender {
    fn wake(&self) {
        // Without a receiver there is no wait to end.
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).send(Event::Wake);
    }
}

impl Threads {
    /// Starts threads for `depth` transfers.
    pub fn open(file: &Arc<SpillFile>, depth: usize) -> Result<Threads> {
        let depth = depth.max(1);
        let threads = depth + depth.div_ceil(2);
        let permits = Arc::new(Permits { free: Mutex::new(depth), given_back: Condvar::new() });
        let (jobs, queue) = channel::<Op>();
        let (events_in, events) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let mut pool = Threads { jobs: Some(jobs), events, wake: Arc::new(WakeSender(Mutex::new(events_in.clone()))), workers: Vec::new() };
        for index in 0..threads {
            let (queue, events, file, permits) = (Arc::clone(&queue), events_in.clone(), Arc::clone(file), Arc::clone(&permits));
            let run = move || {
                loop {
                    let op = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(op) = op else { break };
                    if events.send(Event::Ended(transfer(&file, &op, &permits))).is_err() {
                        break;
                    }
                }
            };
            let thread = std::thread::Builder::new().name(format!("tierwise-io-{index}")).spawn(run).map_err(|error| Error::Backend {
                backend: "threads",
                reason: format!("cannot start thread {} of {threads}: {error}", index + 1),
                errno: error.raw_os_error(),
            })?;
            pool.workers.push(thread);
        }
        Ok(pool)
    }
}

fn transfer(file: &SpillFile, op: &Op, permits: &Permits) -> Completion {
    let before = op.checksum_before();
    let fd = file.raw_fd();
    let offset = op.offset as libc::off_t;
    let result = permits.with(|| {
        let moved = match op.direction {
            // SAFETY: the buffer's owner keeps the range alive and leaves it alone until the request ends, which it does only with this
            // completion; the descriptor is kept by the thread's `SpillFile`.
            Direction::Read => unsafe { libc::pread(fd, std::ptr::with_exposed_provenance_mut(op.address), op.len, offset) },
            Direction::Write => {
                let part = libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(op.address), iov_len: op.len };
                // SAFETY: as above.
                unsafe { libc::pwritev2(fd, &raw const part, 1, offset, file.write_flags()) }
            }
        };
        usize::try_from(moved).map_err(|_| last_errno())
    });
    let checksum = before.or_else(|| result.ok().and_then(|moved| op.checksum_after(moved)));
    Completion { id: op.id, result, checksum }
}

impl Backend for Threads {
    fn max_in_flight(&self) -> usize {
        self.workers.len()
    }

    fn submit(&mut self, op: Op) -> Result<()> {
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(op).is_ok());
        if sent { Ok(()) } else { Err(Error::Stopped("the I/O threads ended".to_owned())) }
    }

    fn reap(&mut self, timeout: Option<Duration>, ended: &mut Vec<Completion>) -> Result<()> {
        let event = match timeout {
            None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(timeout) => self.events.recv_timeout(timeout),
        };
        match event {
            Ok(Event::Ended(completion)) => ended.push(completion),
            Ok(Event::Wake) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(Error::Stopped("the I/O threads ended".to_owned())),
        }
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.wake) as Arc<dyn Wake>
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.workers.drain(..) {
            // A thread that panicked has nothing in flight any more.
            let _ = thread.join();
        }
    }
}
