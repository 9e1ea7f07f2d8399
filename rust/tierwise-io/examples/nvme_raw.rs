//! The store against a raw `O_DIRECT` loop without checksums, tables or tickets, at the same depth, on the same disk, in the same run.
//!
//!     cargo run --release -p tierwise-io --example nvme_raw -- DIRECTORY [--gib 4] [--rounds 5] [--backend io_uring|threads]
//!
//! Rounds alternate between the two; the ratio is of the medians, the spread is the lowest and the highest round.

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("Linux only");
}

#[cfg(target_os = "linux")]
fn main() {
    if let Err(error) = linux::run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use io_uring::{IoUring, opcode, types};
    use std::error::Error;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Instant;
    use tierwise_io::backend::BackendKind;
    use tierwise_io::pages::Pages;
    use tierwise_io::spill_file::{Naming, SpillFile};
    use tierwise_io::store::{Store, StoreConfig};
    use tierwise_io::{Direction, Key, Priority};

    type Outcome<T> = Result<T, Box<dyn Error>>;

    /// Payloads of the store's rounds; as many buffers are in flight as fit the host slab.
    const PAYLOAD_BYTES: usize = 64 << 20;
    const BUFFERS: usize = 8;

    struct Args {
        directory: PathBuf,
        gib: f64,
        rounds: usize,
        backend: Option<BackendKind>,
    }

    fn args() -> Outcome<Args> {
        let mut args = std::env::args().skip(1);
        let directory = args.next().ok_or("usage: nvme_raw DIRECTORY [--gib 4] [--rounds 5] [--backend io_uring|threads]")?.into();
        let mut parsed = Args { directory, gib: 4.0, rounds: 5, backend: None };
        while let Some(flag) = args.next() {
            let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
            match flag.as_str() {
                "--gib" => parsed.gib = value.parse()?,
                "--rounds" => parsed.rounds = value.parse()?,
                "--backend" if value == "io_uring" => parsed.backend = Some(BackendKind::IoUring),
                "--backend" if value == "threads" => parsed.backend = Some(BackendKind::Threads),
                _ => return Err(format!("unknown option {flag} {value}").into()),
            }
        }
        Ok(parsed)
    }

    pub fn run() -> Outcome<()> {
        let args = args()?;
        let payloads = ((args.gib * f64::from(1 << 30)) as usize / PAYLOAD_BYTES).max(2);
        let bytes = payloads * PAYLOAD_BYTES;
        let mut pages = Pages::new(BUFFERS * PAYLOAD_BYTES, 2 << 20)?;
        for (i, byte) in pages.as_mut_slice().iter_mut().enumerate() {
            *byte = (i >> 3) as u8 ^ (i >> 13) as u8;
        }
        let capacity_bytes = (bytes + BUFFERS * PAYLOAD_BYTES) as u64;
        let config = StoreConfig { backend: args.backend, capacity_bytes, ..StoreConfig::new(&args.directory, 0) };
        let block_bytes = config.block_bytes;
        let store = Store::open(config)?;
        let setup = store.setup().clone();
        let raw_file = SpillFile::create(&args.directory, bytes as u64, Naming::Anonymous)?;
        let raw = Raw { file: &raw_file, pages: &pages, bytes, block_bytes, depth: setup.queue_depth, ring: setup.backend == "io_uring" };
        println!(
            "{} on {}, {} MiB blocks, depth {}, direct I/O: {}, {:.1} GiB per round, {} rounds",
            setup.backend,
            setup.filesystem.as_deref().unwrap_or("?"),
            block_bytes >> 20,
            setup.queue_depth,
            setup.direct_io,
            bytes as f64 / f64::from(1 << 30),
            args.rounds
        );
        // Unmeasured: the first write of a block also changes the file system's books.
        let mut generation = 1;
        store_round(&store, &pages, payloads, Direction::Write, generation)?;
        raw.round(Direction::Write)?;
        let mut table: [[Vec<f64>; 2]; 2] = Default::default();
        for round in 0..args.rounds {
            generation += 1;
            for direction in [Direction::Write, Direction::Read] {
                // Who goes first alternates: disks slow down as they warm up.
                for who in [round % 2, 1 - round % 2] {
                    let started = Instant::now();
                    if who == 0 {
                        store_round(&store, &pages, payloads, direction, generation)?;
                    } else {
                        raw.round(direction)?;
                    }
                    table[direction as usize][who].push(bytes as f64 / started.elapsed().as_secs_f64() / 1e6);
                }
            }
        }
        println!("{:<7} {:>24} {:>24} {:>7}", "", "store MB/s (range)", "raw loop MB/s (range)", "ratio");
        for direction in [Direction::Read, Direction::Write] {
            let [ours, raw] = table[direction as usize].clone().map(|mut speeds| {
                speeds.sort_by(f64::total_cmp);
                (speeds[speeds.len() / 2], format!("({:.0}..{:.0})", speeds[0], speeds[speeds.len() - 1]))
            });
            let show = |(median, range): &(f64, String)| format!("{median:.0} {range}");
            println!("{:<7} {:>24} {:>24} {:>7.3}", direction.to_string(), show(&ours), show(&raw), ours.0 / raw.0);
        }
        Ok(())
    }

    fn store_round(store: &Store, pages: &Pages, payloads: usize, direction: Direction, generation: u64) -> Outcome<()> {
        let mut tickets = std::collections::VecDeque::new();
        for payload in 0..payloads {
            if tickets.len() == BUFFERS {
                let ticket: Option<tierwise_io::ticket::Ticket> = tickets.pop_front();
                ticket.map_or(Ok(()), |ticket| ticket.wait())?;
            }
            // SAFETY: the buffer's last operation has ended, and `pages` outlives the store.
            let mut buffer = unsafe { pages.buffer(payload % BUFFERS * PAYLOAD_BYTES, PAYLOAD_BYTES) };
            let key = Key { chunk: payload as u32, payload: 0 };
            tickets.push_back(match direction {
                Direction::Write => store.write(key, generation, &buffer, Priority::Soon)?,
                Direction::Read => store.read(key, generation, &mut buffer, Priority::Soon)?,
            });
        }
        for ticket in tickets {
            ticket.wait()?;
        }
        Ok(())
    }

    /// The peer: the same blocks in the same order, nothing else.
    struct Raw<'a> {
        file: &'a SpillFile,
        pages: &'a Pages,
        bytes: usize,
        block_bytes: usize,
        depth: usize,
        ring: bool,
    }

    impl Raw<'_> {
        fn round(&self, direction: Direction) -> Outcome<()> {
            if self.ring { self.ring_round(direction) } else { self.thread_round(direction) }
        }

        /// Transfers in flight never share a buffer: there are more buffers than the depth.
        fn address(&self, block: usize) -> *mut u8 {
            self.pages.as_ptr().wrapping_add(block * self.block_bytes % self.pages.bytes())
        }

        fn ring_round(&self, direction: Direction) -> Outcome<()> {
            let mut ring: IoUring =
                IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(self.depth.next_power_of_two() as u32)?;
            ring.submitter().register_files(&[self.file.raw_fd()])?;
            let blocks = self.bytes / self.block_bytes;
            let (mut started, mut ended, mut failed) = (0, 0, 0);
            while ended < blocks {
                while started < blocks && started - ended < self.depth {
                    let (file, address, len) = (types::Fixed(0), self.address(started), self.block_bytes as u32);
                    let offset = (started * self.block_bytes) as u64;
                    let entry = match direction {
                        Direction::Read => opcode::Read::new(file, address, len).offset(offset).build(),
                        Direction::Write => opcode::Write::new(file, address, len).offset(offset).build(),
                    };
                    // SAFETY: the pages outlive the round, which waits for every transfer.
                    unsafe { ring.submission().push(&entry)? };
                    started += 1;
                }
                ring.submit_and_wait(1)?;
                for entry in ring.completion() {
                    failed += usize::from(entry.result() != self.block_bytes as i32);
                    ended += 1;
                }
            }
            check(failed)
        }

        fn thread_round(&self, direction: Direction) -> Outcome<()> {
            let blocks = self.bytes / self.block_bytes;
            let fd = self.file.raw_fd();
            let (start, span, block_bytes) = (self.pages.as_ptr().expose_provenance(), self.pages.bytes(), self.block_bytes);
            let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
            std::thread::scope(|scope| {
                for _ in 0..self.depth {
                    scope.spawn(|| {
                        loop {
                            let block = next.fetch_add(1, Ordering::Relaxed);
                            if block >= blocks {
                                break;
                            }
                            let address: *mut u8 = std::ptr::with_exposed_provenance_mut(start + block * block_bytes % span);
                            let offset = (block * block_bytes) as libc::off_t;
                            // SAFETY: the pages outlive the scope.
                            let moved = unsafe {
                                match direction {
                                    Direction::Read => libc::pread(fd, address.cast(), block_bytes, offset),
                                    Direction::Write => libc::pwrite(fd, address.cast(), block_bytes, offset),
                                }
                            };
                            if moved != block_bytes as isize {
                                failed.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    });
                }
            });
            check(failed.into_inner())
        }
    }

    fn check(failed: usize) -> Outcome<()> {
        if failed == 0 { Ok(()) } else { Err(format!("{failed} transfers of the raw loop failed").into()) }
    }
}
