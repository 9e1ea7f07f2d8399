//! Scratch directories, payload contents and stores for the tests.

#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tierwise_io::Key;
use tierwise_io::backend::BackendKind;
use tierwise_io::backend::faulty::{Fault, Faulty, FaultyDisk, Random};
use tierwise_io::backend::{Backend, Op};
use tierwise_io::pages::Pages;
use tierwise_io::queue::Limits;
use tierwise_io::store::{Store, StoreConfig};

/// Alignment of every test store.
pub const ALIGNMENT: usize = 4096;
/// Small blocks, so that small payloads have several.
pub const BLOCK_BYTES: usize = 4 * ALIGNMENT;

/// A directory on a disk that is removed at the end.
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// Below `TIERWISE_TEST_DISK`, else below the build folder: it must not be a tmpfs.
    pub fn new(name: &str) -> Scratch {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let base = std::env::var_os("TIERWISE_TEST_DISK").map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
        let path = base.join(format!("{name}-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A file system of its own in a loop-mounted image; unmounted at the end.
pub struct Mount(Scratch);

impl Mount {
    /// `None`, with the reason printed, where this user may not mount.
    pub fn new(name: &str, mkfs: &str, options: &str, bytes: u64) -> Option<Mount> {
        let scratch = Scratch::new(name);
        let (image, target) = (scratch.path().join("image"), scratch.path().join("mount"));
        std::fs::create_dir(&target).unwrap();
        std::fs::File::create(&image).unwrap().set_len(bytes).unwrap();
        let run = |program: &str, args: &[&Path]| match Command::new(program).args(args).output() {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
            Err(error) => Err(format!("{program}: {error}")),
        };
        let mounted = run(mkfs, &[Path::new("-q"), Path::new("-F"), &image])
            .and_then(|()| run("mount", &[Path::new("-o"), Path::new(options), &image, &target]));
        if let Err(reason) = mounted {
            println!("SKIPPED: {reason}; runs as root with loop devices and {mkfs}");
            return None;
        }
        Some(Mount(scratch))
    }

    pub fn path(&self) -> std::path::PathBuf {
        self.0.path().join("mount")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // The kernel may still be closing a ring.
        for _ in 0..100 {
            if Command::new("umount").arg(self.path()).output().is_ok_and(|output| output.status.success()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        eprintln!("{} stays mounted", self.path().display());
    }
}

pub fn key(chunk: u32) -> Key {
    Key { chunk, payload: chunk % 3 }
}

/// What a generation of a payload holds: different bytes for every identity.
pub fn content(key: Key, generation: u64, len: usize) -> Vec<u8> {
    let mut random = Random::new(u64::from(key.chunk) << 40 | u64::from(key.payload) << 32 | generation);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&random.next_u64().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Aligned memory that starts with a generation's content.
pub fn filled(key: Key, generation: u64, len: usize) -> Pages {
    let mut pages = Pages::new(len, ALIGNMENT).unwrap();
    pages.as_mut_slice()[..len].copy_from_slice(&content(key, generation, len));
    pages
}

/// Aligned memory that holds nothing right.
pub fn poisoned(len: usize) -> Pages {
    let mut pages = Pages::new(len, ALIGNMENT).unwrap();
    pages.as_mut_slice().fill(0xee);
    pages
}

pub fn config(scratch: &Scratch, kind: BackendKind, blocks: u64) -> StoreConfig {
    StoreConfig { block_bytes: BLOCK_BYTES, backend: Some(kind), ..StoreConfig::new(scratch.path(), blocks * BLOCK_BYTES as u64) }
}

/// A store over a faulty disk. `plan` sees the transfers in the order in which they start.
pub fn faulty_store(
    blocks: u32,
    depth: usize,
    stall: Duration,
    plan: impl FnMut(&Op, &mut Random) -> Option<Fault> + Send + 'static,
) -> Store {
    let limits = Limits { queue_depth: depth, block_bytes: BLOCK_BYTES, alignment: ALIGNMENT, blocks };
    Store::with_backend(limits, stall, move || {
        let disk = FaultyDisk::new(blocks as usize * BLOCK_BYTES, ALIGNMENT, 1, Box::new(plan));
        Ok(Box::new(Faulty::new(disk, depth)) as Box<dyn Backend>)
    })
    .unwrap()
}

/// Writes a generation and waits.
pub fn put(store: &Store, key: Key, generation: u64, len: usize) -> tierwise_io::error::Result<()> {
    let pages = filled(key, generation, len);
    // SAFETY: the pages live, untouched, until the wait below has ended.
    let buffer = unsafe { pages.buffer(0, len) };
    let ticket = store.write(key, generation, &buffer, tierwise_io::Priority::Background)?;
    let outcome = ticket.wait();
    assert!(pages.as_slice()[..len] == content(key, generation, len), "the only other copy of {key} has to stay as it was");
    outcome
}

/// Reads a generation and waits; a success with other bytes than were written is a failure of the test.
pub fn get(store: &Store, key: Key, generation: u64, len: usize) -> tierwise_io::error::Result<()> {
    let pages = poisoned(len);
    // SAFETY: the pages live, untouched, until the wait below has ended.
    let mut buffer = unsafe { pages.buffer(0, len) };
    let ticket = store.read(key, generation, &mut buffer, tierwise_io::Priority::Demand)?;
    ticket.wait()?;
    assert!(pages.as_slice()[..len] == content(key, generation, len), "{key}, generation {generation}: wrong bytes were returned as right");
    Ok(())
}
