//! Processes that share a directory, are killed, are limited, are refused `io_uring`, or fork.
//!
//! The ignored tests are the other processes; the tests that need them run them.

#![cfg(target_os = "linux")]

mod common;

use common::{BLOCK_BYTES, Mount, Scratch, config, get, key, put};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tierwise_io::backend::BackendKind;
use tierwise_io::error::Error;
use tierwise_io::spill_file::{NAME_PREFIX, Naming, SpillFile, remove_stale};
use tierwise_io::store::{Store, StoreConfig};

const DIRECTORY: &str = "TIERWISE_TEST_CHILD_DIRECTORY";
const READY: &str = "the child is ready";
const MIB: u64 = 1 << 20;

fn command(test: &str, directory: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "--nocapture", test]).env(DIRECTORY, directory);
    command
}

/// A child that does not outlive its test.
struct Running(Child);

impl Running {
    fn kill(&mut self) {
        self.0.kill().unwrap();
        assert!(!self.0.wait().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a child and waits until it says that it is ready.
fn start(test: &str, directory: &Path) -> Running {
    let mut child = Running(command(test, directory).stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains(READY)), "{test} ended before it was ready");
    child
}

/// Runs a child to its end; its own assertions are its test.
fn run(test: &str, directory: &Path) {
    let output = command(test, directory).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{test}: {:?}\n{text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{test} did not run: {text}");
}

fn directory() -> PathBuf {
    std::env::var_os(DIRECTORY).expect("run by another test").into()
}

fn child_config(blocks: u64) -> StoreConfig {
    StoreConfig { block_bytes: BLOCK_BYTES, ..StoreConfig::new(directory(), blocks * BLOCK_BYTES as u64) }
}

#[test]
#[ignore = "a child of other tests"]
fn child_that_writes_until_it_is_killed() {
    let store = Store::open(child_config(40 * MIB / BLOCK_BYTES as u64)).unwrap();
    put(&store, key(0), 1, 10 * BLOCK_BYTES).unwrap();
    println!("{READY}");
    for generation in 2.. {
        put(&store, key(0), generation, 100 * BLOCK_BYTES).unwrap();
    }
}

#[test]
fn kill_9_leaves_no_file_and_no_space_taken() {
    let scratch = Scratch::new("kill");
    let mount = Mount::new("kill", "mkfs.ext4", "loop", 64 * MIB);
    let path = mount.as_ref().map_or_else(|| scratch.path().to_owned(), Mount::path);
    let before: Vec<_> = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let mut child = start("child_that_writes_until_it_is_killed", &path);
    if mount.is_some() {
        let Err(error) = SpillFile::create(&path, 40 * MIB, Naming::Anonymous) else { panic!("twice 40 MiB on a disk of 64") };
        assert_eq!(error.errno(), Some(libc::ENOSPC));
    }
    // In the middle of its writes.
    std::thread::sleep(Duration::from_millis(100));
    child.kill();
    let after: Vec<_> = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(before, after);
    // The kernel closes the dead process's ring in the background.
    let started = Instant::now();
    let store = loop {
        match Store::open(StoreConfig { block_bytes: BLOCK_BYTES, ..StoreConfig::new(&path, 40 * MIB) }) {
            Ok(store) => break store,
            Err(error) => assert!(error.errno() == Some(libc::ENOSPC) && started.elapsed() < Duration::from_secs(20), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    put(&store, key(0), 1, 100 * BLOCK_BYTES).unwrap();
    get(&store, key(0), 1, 100 * BLOCK_BYTES).unwrap();
}

#[test]
#[ignore = "a child of other tests"]
fn child_that_is_killed_before_its_file_loses_its_name() {
    let file = std::fs::File::create(directory().join(format!("{NAME_PREFIX}child"))).unwrap();
    // SAFETY: an owned descriptor and no pointers.
    assert_eq!(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) }, 0);
    println!("{READY}");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_killed_processes_named_file_is_removed_and_not_before() {
    let scratch = Scratch::new("window");
    let mut child = start("child_that_is_killed_before_its_file_loses_its_name", scratch.path());
    assert!(remove_stale(scratch.path()).is_empty());
    child.kill();
    let store = Store::open(config(&scratch, BackendKind::Threads, 4)).unwrap();
    assert_eq!(store.setup().stale_removed, [scratch.path().join(format!("{NAME_PREFIX}child"))]);
}

#[test]
#[ignore = "a child of other tests"]
fn child_that_spills_beside_others() {
    for round in 0..5 {
        let naming = if round % 2 == 0 { Naming::Unlinked } else { Naming::Anonymous };
        let store = Store::open(StoreConfig { naming, ..child_config(64) }).unwrap();
        for generation in 1..=10 {
            for chunk in 0..4 {
                put(&store, key(chunk), generation, 3 * BLOCK_BYTES + 5).unwrap();
            }
            for chunk in 0..4 {
                get(&store, key(chunk), generation, 3 * BLOCK_BYTES + 5).unwrap();
            }
        }
    }
}

#[test]
fn processes_share_a_directory() {
    let scratch = Scratch::new("shared");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| run("child_that_spills_beside_others", scratch.path()));
        }
    });
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}

fn limit_file_size(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the structure lives through the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) }, 0);
}

#[test]
#[ignore = "a child of other tests"]
fn child_with_a_file_size_limit() {
    let blocks = 64;
    for kind in [BackendKind::Threads, BackendKind::IoUring] {
        limit_file_size(8 * BLOCK_BYTES as u64);
        let Err(error) = Store::open(StoreConfig { backend: Some(kind), ..child_config(blocks) }) else { panic!("beyond the limit") };
        assert!(error.errno() == Some(libc::EFBIG) && error.to_string().contains("ulimit -f"), "{error}");
        limit_file_size(libc::RLIM_INFINITY);
        let store = match Store::open(StoreConfig { backend: Some(kind), ..child_config(blocks) }) {
            Err(Error::Backend { reason, .. }) if kind == BackendKind::IoUring => {
                println!("SKIPPED over io_uring: {reason}; runs where the system allows io_uring");
                continue;
            }
            opened => opened.unwrap(),
        };
        put(&store, key(0), 1, 10 * BLOCK_BYTES).unwrap();
        // In the middle: the system would kill a process that did not look out (SIGXFSZ).
        limit_file_size(8 * BLOCK_BYTES as u64);
        let error = put(&store, key(0), 2, 10 * BLOCK_BYTES).unwrap_err();
        assert!(
            matches!(error, Error::Transfer { errno: libc::EFBIG, .. }) && error.to_string().contains("ulimit -f"),
            "{kind:?}: {error}"
        );
        get(&store, key(0), 1, 10 * BLOCK_BYTES).unwrap();
        limit_file_size(libc::RLIM_INFINITY);
        put(&store, key(0), 2, 10 * BLOCK_BYTES).unwrap();
        get(&store, key(0), 2, 10 * BLOCK_BYTES).unwrap();
    }
}

#[test]
fn the_file_size_limit_is_an_error_and_kills_nobody() {
    run("child_with_a_file_size_limit", Scratch::new("limit").path());
}

/// This process's system call `number` fails with `errno` from now on, as a container's profile makes it.
fn refuse(number: libc::c_long, errno: i32) {
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        // The number is the first word of `seccomp_data`.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its filter live through the call; threads started later inherit the filter.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

fn without_io_uring(number: libc::c_long, errno: i32, expected: &str) {
    refuse(number, errno);
    let store = Store::open(child_config(16)).unwrap();
    let setup = store.setup();
    assert_eq!(setup.backend, "threads");
    assert!(setup.backend_note.as_ref().is_some_and(|note| note.contains(expected)), "{setup:?}");
    put(&store, key(0), 1, 3 * BLOCK_BYTES).unwrap();
    get(&store, key(0), 1, 3 * BLOCK_BYTES).unwrap();
    let Err(error) = Store::open(StoreConfig { backend: Some(BackendKind::IoUring), ..child_config(16) }) else { panic!("not refused") };
    assert!(matches!(&error, Error::Backend { backend: "io_uring", reason, .. } if reason.contains(expected)), "{error}");
}

#[test]
#[ignore = "a child of other tests"]
fn child_whose_profile_forbids_io_uring() {
    without_io_uring(libc::SYS_io_uring_setup, libc::EPERM, "seccomp");
}

#[test]
#[ignore = "a child of other tests"]
fn child_whose_kernel_has_no_io_uring() {
    without_io_uring(libc::SYS_io_uring_setup, libc::ENOSYS, "built without it");
}

#[test]
#[ignore = "a child of other tests"]
fn child_that_may_make_a_ring_but_not_use_it() {
    without_io_uring(libc::SYS_io_uring_enter, libc::EPERM, "io_uring_enter");
}

#[test]
fn threads_are_used_where_io_uring_is_refused() {
    let scratch = Scratch::new("refused");
    run("child_whose_profile_forbids_io_uring", scratch.path());
    run("child_whose_kernel_has_no_io_uring", scratch.path());
    run("child_that_may_make_a_ring_but_not_use_it", scratch.path());
}

#[test]
#[ignore = "a child of other tests"]
fn child_with_a_forced_backend() {
    let store = Store::open(StoreConfig { backend: Some(BackendKind::Threads), ..child_config(16) }).unwrap();
    assert_eq!(store.setup().backend, "memory");
    put(&store, key(0), 1, 3 * BLOCK_BYTES).unwrap();
    get(&store, key(0), 1, 3 * BLOCK_BYTES).unwrap();
}

#[test]
#[ignore = "a child of other tests"]
fn child_with_an_unknown_backend() {
    let Err(error) = Store::open(child_config(16)) else { panic!("opened") };
    assert!(
        error.to_string().contains("TIERWISE_IO_BACKEND='aio'") && error.to_string().contains("io_uring, threads or memory"),
        "{error}"
    );
}

#[test]
fn the_environment_forces_a_backend() {
    let scratch = Scratch::new("forced");
    for (value, test) in [("memory", "child_with_a_forced_backend"), ("aio", "child_with_an_unknown_backend")] {
        let output = command(test, scratch.path()).env("TIERWISE_IO_BACKEND", value).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_forked_child_is_refused_and_its_drop_does_nothing() {
    let scratch = Scratch::new("fork");
    let store = Store::open(config(&scratch, BackendKind::Threads, 16)).unwrap();
    put(&store, key(0), 1, 3 * BLOCK_BYTES).unwrap();
    // SAFETY: the child only calls the store and ends without running anybody else's code.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = matches!(put(&store, key(0), 2, BLOCK_BYTES), Err(Error::Forked { .. }))
            && matches!(store.flush(), Err(Error::Forked { .. }))
            && matches!(store.metrics(), Err(Error::Forked { .. }));
        drop(store);
        // SAFETY: ends the child.
        unsafe { libc::_exit(if refused { 7 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: waits for the child made above; the status lives through the call.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "status {status:#x}");
    get(&store, key(0), 1, 3 * BLOCK_BYTES).unwrap();
    put(&store, key(0), 2, 3 * BLOCK_BYTES).unwrap();
}
