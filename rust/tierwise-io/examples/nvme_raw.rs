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
    use std::error::Error;
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::time::Instant;
    use tierwise_io::backend::BackendKind;
    use tierwise_io::pages::Pages;
    use tierwise_io::raw::Raw;
    use tierwise_io::spill_file::{Naming, SpillFile};
    use tierwise_io::store::{Store, StoreConfig};
    use tierwise_io::{Direction, Key, Priority};

    type Outcome<T> = Result<T, Box<dyn Error>>;

    /// What is measured: what the rounds go through, payload by payload and block by block.
    const ROWS: [(&str, &[Direction]); 3] =
        [("read", &[Direction::Read]), ("write", &[Direction::Write]), ("both", &[Direction::Read, Direction::Write])];
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
        let pages = Arc::new(pages);
        let capacity_bytes = (bytes + BUFFERS * PAYLOAD_BYTES) as u64;
        let config = StoreConfig { backend: args.backend, capacity_bytes, ..StoreConfig::new(&args.directory, 0) };
        let block_bytes = config.block_bytes;
        let store = Store::open(config)?;
        let setup = store.setup().clone();
        let raw_file = SpillFile::create(&args.directory, bytes as u64, Naming::Anonymous)?;
        let raw = Raw::new(raw_file, block_bytes, setup.queue_depth, Arc::clone(&pages), setup.backend == "io_uring")?;
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
        let mut generations = vec![0; payloads];
        store_round(&store, &pages, &mut generations, &[Direction::Write])?;
        raw.run(&[Direction::Write], None)?;
        let mut table: [[Vec<f64>; 2]; 3] = Default::default();
        for round in 0..args.rounds {
            for (row, (_, kinds)) in ROWS.iter().enumerate() {
                // Who goes first alternates: disks slow down as they warm up.
                for who in [round % 2, 1 - round % 2] {
                    let started = Instant::now();
                    if who == 0 {
                        store_round(&store, &pages, &mut generations, kinds)?;
                    } else {
                        raw.run(kinds, None)?;
                    }
                    table[row][who].push(bytes as f64 / started.elapsed().as_secs_f64() / 1e6);
                }
            }
        }
        println!("{:<7} {:>24} {:>24} {:>7}", "", "store MB/s (range)", "raw loop MB/s (range)", "ratio");
        for ((name, _), speeds) in ROWS.iter().zip(table) {
            let [ours, raw] = speeds.map(|mut speeds| {
                speeds.sort_by(f64::total_cmp);
                (speeds[speeds.len() / 2], format!("({:.0}..{:.0})", speeds[0], speeds[speeds.len() - 1]))
            });
            let show = |(median, range): &(f64, String)| format!("{median:.0} {range}");
            println!("{:<7} {:>24} {:>24} {:>7.3}", name, show(&ours), show(&raw), ours.0 / raw.0);
        }
        Ok(())
    }

    fn store_round(store: &Store, pages: &Pages, generations: &mut [u64], kinds: &[Direction]) -> Outcome<()> {
        let mut tickets = std::collections::VecDeque::new();
        for (payload, generation) in generations.iter_mut().enumerate() {
            let direction = kinds[payload % kinds.len()];
            *generation += u64::from(direction == Direction::Write);
            if tickets.len() == BUFFERS {
                let ticket: Option<tierwise_io::ticket::Ticket> = tickets.pop_front();
                ticket.map_or(Ok(()), |ticket| ticket.wait())?;
            }
            // SAFETY: the buffer's last operation has ended, and `pages` outlives the store.
            let mut buffer = unsafe { pages.buffer(payload % BUFFERS * PAYLOAD_BYTES, PAYLOAD_BYTES) };
            let key = Key { chunk: payload as u32, payload: 0 };
            tickets.push_back(match direction {
                Direction::Write => store.write(key, *generation, &buffer, Priority::Soon)?,
                Direction::Read => store.read(key, *generation, &mut buffer, Priority::Soon)?,
            });
        }
        for ticket in tickets {
            ticket.wait()?;
        }
        Ok(())
    }
}
