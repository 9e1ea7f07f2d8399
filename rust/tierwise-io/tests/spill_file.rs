//! The spill file on real file systems: its mode, its name, its alignment, a full disk, and file systems that can do less.

#![cfg(target_os = "linux")]

mod common;

use common::{BLOCK_BYTES, Mount, Scratch, config, get, key, put};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use tierwise_io::backend::BackendKind;
use tierwise_io::error::Error;
use tierwise_io::spill_file::{NAME_PREFIX, Naming, SpillFile, remove_stale};
use tierwise_io::store::{Store, StoreConfig};

const MIB: u64 = 1 << 20;

fn names(directory: &Path) -> Vec<String> {
    std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn the_file_is_private_nameless_and_allocated_in_full() {
    for naming in [Naming::Anonymous, Naming::Unlinked] {
        let scratch = Scratch::new("private");
        let file = SpillFile::create(scratch.path(), 8 * MIB, naming).unwrap();
        assert!(names(scratch.path()).is_empty(), "{naming:?}");
        let stat = std::fs::metadata(format!("/proc/self/fd/{}", file.raw_fd())).unwrap();
        assert_eq!(stat.permissions().mode() & 0o777, 0o600, "{naming:?}");
        assert_eq!((stat.len(), stat.nlink()), (8 * MIB, 0), "{naming:?}");
        assert!(stat.blocks() * 512 >= 8 * MIB, "{naming:?}: {} blocks are allocated", stat.blocks());
        assert!(file.direct() || file.direct_note().is_some());
        assert!(file.alignment() >= 4096 && file.alignment().is_power_of_two());
    }
}

#[test]
fn only_dead_processes_files_are_removed() {
    let scratch = Scratch::new("stale");
    let dead = scratch.path().join(format!("{NAME_PREFIX}1-2-3"));
    let living = scratch.path().join(format!("{NAME_PREFIX}4-5-6"));
    let other = scratch.path().join("tierwise-checkpoint");
    let link = scratch.path().join(format!("{NAME_PREFIX}link"));
    let folder = scratch.path().join(format!("{NAME_PREFIX}folder"));
    for path in [&dead, &living, &other] {
        std::fs::write(path, "x").unwrap();
    }
    std::os::unix::fs::symlink(&other, &link).unwrap();
    std::fs::create_dir(&folder).unwrap();
    let lock = std::fs::File::open(&living).unwrap();
    // SAFETY: an owned descriptor and no pointers.
    assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0);
    let store = Store::open(config(&scratch, BackendKind::Threads, 4)).unwrap();
    assert_eq!(store.setup().stale_removed, std::slice::from_ref(&dead));
    assert!(!dead.exists());
    assert!(living.exists() && other.exists() && folder.exists() && link.symlink_metadata().is_ok());
    drop(lock);
    assert_eq!(remove_stale(scratch.path()), [living]);
}

#[test]
fn a_removed_directory_or_a_renamed_one_costs_nothing() {
    let scratch = Scratch::new("removed");
    for naming in [Naming::Anonymous, Naming::Unlinked] {
        let directory = scratch.path().join("spill");
        std::fs::create_dir(&directory).unwrap();
        let store = Store::open(StoreConfig { naming, directory: directory.clone(), ..config(&scratch, BackendKind::Threads, 8) }).unwrap();
        put(&store, key(0), 1, 2 * BLOCK_BYTES).unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
        get(&store, key(0), 1, 2 * BLOCK_BYTES).unwrap();
        put(&store, key(0), 2, 2 * BLOCK_BYTES).unwrap();
        get(&store, key(0), 2, 2 * BLOCK_BYTES).unwrap();
    }
}

/// The descriptors of this process that refer to removed files of `directory`.
fn spill_descriptors(directory: &Path) -> Vec<std::path::PathBuf> {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            std::fs::read_link(path).is_ok_and(|target| target.starts_with(directory) && target.to_string_lossy().ends_with("(deleted)"))
        })
        .collect()
}

#[test]
fn a_truncated_file_is_an_error() {
    for kind in [BackendKind::IoUring, BackendKind::Threads] {
        let scratch = Scratch::new("truncated");
        let store = match Store::open(config(&scratch, kind, 8)) {
            Err(Error::Backend { reason, .. }) if kind == BackendKind::IoUring => {
                println!("SKIPPED over io_uring: {reason}; runs where the system allows io_uring");
                continue;
            }
            opened => opened.unwrap(),
        };
        put(&store, key(0), 1, 3 * BLOCK_BYTES).unwrap();
        let descriptors = spill_descriptors(scratch.path());
        assert_eq!(descriptors.len(), 1, "{descriptors:?}");
        std::fs::OpenOptions::new().write(true).open(&descriptors[0]).unwrap().set_len(BLOCK_BYTES as u64).unwrap();
        let error = get(&store, key(0), 1, 3 * BLOCK_BYTES).unwrap_err();
        assert!(matches!(error, Error::Impossible { moved: 0, .. }) && error.to_string().contains("truncated"), "{error}");
    }
}

#[test]
fn tmpfs_is_not_a_disk() {
    let shm = Path::new("/dev/shm");
    let Ok(filesystem) = tierwise_io::filesystem::Filesystem::of(shm) else {
        println!("SKIPPED: there is no /dev/shm; runs where it is mounted");
        return;
    };
    assert_eq!(filesystem.name, "tmpfs");
    let Err(error) = Store::open(StoreConfig::new(shm, 64 * MIB)) else { panic!("tmpfs was taken for a disk") };
    assert!(matches!(&error, Error::InMemory { filesystem, .. } if filesystem == "tmpfs"), "{error}");
    assert!(error.to_string().contains("choose a directory on an NVMe disk"), "{error}");
}

#[test]
fn a_directory_that_does_not_exist_or_must_not_be_written_is_named() {
    let Err(error) = SpillFile::create(Path::new("/nonexistent/spill"), MIB, Naming::Anonymous) else { panic!("made from nothing") };
    assert!(error.errno() == Some(libc::ENOENT) && error.to_string().contains("/nonexistent/spill"), "{error}");
    let Err(error) = SpillFile::create(Path::new("/proc/self"), MIB, Naming::Anonymous) else { panic!("made in /proc") };
    assert!(error.errno().is_some() && error.to_string().contains("/proc/self"), "{error}");
}

#[test]
fn a_full_disk_is_an_error_before_the_first_step() {
    let Some(mount) = Mount::new("full", "mkfs.ext4", "loop", 64 * MIB) else { return };
    for naming in [Naming::Anonymous, Naming::Unlinked] {
        let Err(error) = SpillFile::create(&mount.path(), 200 * MIB, naming) else { panic!("200 MiB on a disk of 64") };
        assert!(error.errno() == Some(libc::ENOSPC), "{error}");
        assert!(error.to_string().contains("bytes are available") && error.to_string().contains("lower the NVMe budget"), "{error}");
    }
    // What failed has given its space back, and a file that fits fills the disk for the next one.
    let store = Store::open(StoreConfig { block_bytes: BLOCK_BYTES, ..StoreConfig::new(mount.path(), 40 * MIB) }).unwrap();
    let Err(error) = SpillFile::create(&mount.path(), 40 * MIB, Naming::Anonymous) else { panic!("twice 40 MiB on a disk of 64") };
    assert_eq!(error.errno(), Some(libc::ENOSPC));
    // Fill the rest: what was allocated stays writable, to its last byte.
    let rest = mount.path().join("rest");
    let zeros = vec![0; 65536];
    let mut filler = std::fs::File::create(&rest).unwrap();
    while std::io::Write::write_all(&mut filler, &zeros).is_ok() {}
    let len = 20 * MIB as usize;
    for generation in 1..=3 {
        put(&store, key(0), generation, len).unwrap();
        get(&store, key(0), generation, len).unwrap();
    }
}

#[test]
fn a_file_system_without_fallocate_is_filled_with_zeros() {
    let Some(mount) = Mount::new("ext2", "mkfs.ext2", "loop", 64 * MIB) else { return };
    let probe = mount.path().join("probe");
    let file = std::fs::File::create(&probe).unwrap();
    // SAFETY: an owned descriptor and no pointers.
    let refused = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, 4096) } != 0;
    assert!(refused && std::io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP), "ext2 is the file system that cannot");
    std::fs::remove_file(&probe).unwrap();
    let Err(error) = SpillFile::create(&mount.path(), 200 * MIB, Naming::Anonymous) else { panic!("200 MiB on a disk of 64") };
    assert_eq!(error.errno(), Some(libc::ENOSPC), "{error}");
    let store = Store::open(StoreConfig { block_bytes: BLOCK_BYTES, ..StoreConfig::new(mount.path(), 20 * MIB) }).unwrap();
    put(&store, key(0), 1, 9 * MIB as usize).unwrap();
    get(&store, key(0), 1, 9 * MIB as usize).unwrap();
}

#[test]
fn without_direct_io_writes_wait_for_the_disk() {
    // With data journaling ext4 does no direct I/O.
    let Some(mount) = Mount::new("journal", "mkfs.ext4", "loop,data=journal", 64 * MIB) else { return };
    let file = SpillFile::create(&mount.path(), 8 * MIB, Naming::Anonymous).unwrap();
    assert!(!file.direct(), "ext4 with data=journal states no direct I/O");
    assert!(file.direct_note().is_some_and(|note| note.contains("direct I/O") || note.contains("O_DIRECT")), "{:?}", file.direct_note());
    assert_eq!(file.write_flags(), libc::RWF_DSYNC);
    drop(file);
    for kind in [BackendKind::IoUring, BackendKind::Threads] {
        let config = StoreConfig { block_bytes: BLOCK_BYTES, backend: Some(kind), ..StoreConfig::new(mount.path(), 8 * MIB) };
        let store = match Store::open(config) {
            Err(Error::Backend { reason, .. }) if kind == BackendKind::IoUring => {
                println!("SKIPPED over io_uring: {reason}; runs where the system allows io_uring");
                continue;
            }
            opened => opened.unwrap(),
        };
        assert!(!store.setup().direct_io && store.setup().direct_io_note.is_some());
        put(&store, key(0), 1, 3 * MIB as usize).unwrap();
        get(&store, key(0), 1, 3 * MIB as usize).unwrap();
    }
}

#[test]
fn file_systems_are_named() {
    let proc = tierwise_io::filesystem::Filesystem::of(Path::new("/proc")).unwrap();
    assert_eq!(proc.name, "file system 0x9fa0");
    assert!(!proc.in_memory && !proc.network);
}
