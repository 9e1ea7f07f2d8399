//! The spill file: nameless, private, allocated in full before it is used, opened for direct I/O where the file system can.

use crate::error::{Error, Result, last_errno, os};
use crate::filesystem::Filesystem;
use crate::pages::Pages;
use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Alignment that every store uses at least; the host slabs' regions have it too.
pub const MIN_ALIGNMENT: usize = 4096;
/// Alignments that are tried where the file system does not say one.
const ALIGNMENTS: [usize; 3] = [MIN_ALIGNMENT, 16 << 10, 64 << 10];
/// Every named spill file starts with this, and a file with this name and no lock is nobody's.
pub const NAME_PREFIX: &str = "tierwise-spill-";

/// How a spill file is kept out of the directory listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// `O_TMPFILE`, else [`Naming::Unlinked`].
    Anonymous,
    /// Created with a name that is removed at once.
    Unlinked,
}

/// An open spill file. Its space is given back when the last descriptor closes, however the process ends.
#[derive(Debug)]
pub struct SpillFile {
    fd: OwnedFd,
    bytes: u64,
    alignment: usize,
    direct: bool,
    direct_note: Option<String>,
    naming: Naming,
    filesystem: Filesystem,
    stale_removed: Vec<PathBuf>,
}

impl SpillFile {
    /// Removes dead processes' files from `directory`, then makes a file of `bytes` there and allocates all of it.
    pub fn create(directory: &Path, bytes: u64, naming: Naming) -> Result<SpillFile> {
        let filesystem = Filesystem::of(directory)?;
        if filesystem.in_memory {
            return Err(Error::InMemory { directory: directory.to_owned(), filesystem: filesystem.name });
        }
        let stale_removed = remove_stale(directory);
        check_size_limit(directory, bytes)?;
        let (fd, naming) = match naming {
            Naming::Anonymous => match open_anonymous(directory) {
                Ok(fd) => (fd, Naming::Anonymous),
                // Not every file system can; whatever else is wrong, the second way says it again.
                Err(_) => (open_unlinked(directory, bytes)?, Naming::Unlinked),
            },
            Naming::Unlinked => (open_unlinked(directory, bytes)?, Naming::Unlinked),
        };
        allocate(&fd, directory, bytes, &filesystem)?;
        let mut file =
            SpillFile { fd, bytes, alignment: MIN_ALIGNMENT, direct: false, direct_note: None, naming, filesystem, stale_removed };
        match file.enable_direct() {
            Ok(alignment) => {
                file.direct = true;
                file.alignment = alignment;
            }
            Err(reason) => file.direct_note = Some(reason),
        }
        Ok(file)
    }

    /// Its descriptor; whoever uses it keeps the file.
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What offsets, addresses and lengths have to be multiples of.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Whether transfers bypass the page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// Why transfers do not bypass the page cache.
    pub fn direct_note(&self) -> Option<&str> {
        self.direct_note.as_deref()
    }

    /// How it is kept out of the directory.
    pub fn naming(&self) -> Naming {
        self.naming
    }

    /// Where it lies.
    pub fn filesystem(&self) -> &Filesystem {
        &self.filesystem
    }

    /// Dead processes' files that were removed.
    pub fn stale_removed(&self) -> &[PathBuf] {
        &self.stale_removed
    }

    /// Flags of a write. Through the page cache a disk's error would come after the write was reported as done, and the only good copy
    /// would be gone; `RWF_DSYNC` makes the write wait for the disk.
    pub fn write_flags(&self) -> i32 {
        if self.direct { 0 } else { libc::RWF_DSYNC }
    }

    /// Switches to direct I/O, with the smallest alignment that a real transfer confirms.
    fn enable_direct(&self) -> std::result::Result<usize, String> {
        let fd = self.fd.as_raw_fd();
        let stated = stated_alignment(fd)?;
        // SAFETY: an owned descriptor and no pointers.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        // SAFETY: as above.
        if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_DIRECT) } != 0 {
            return Err(format!("{} refuses O_DIRECT: {}", self.filesystem.name, os(last_errno())));
        }
        let candidates = match stated {
            Some(alignment) => vec![alignment],
            None => ALIGNMENTS.to_vec(),
        };
        let mut reason = format!("the file is smaller than its alignment {}", candidates[0]);
        for alignment in candidates.into_iter().filter(|&alignment| alignment as u64 <= self.bytes) {
            match probe_transfer(fd, alignment) {
                Ok(()) => return Ok(alignment),
                Err(error) => reason = format!("O_DIRECT transfers of {alignment} bytes fail: {error}"),
            }
        }
        // SAFETY: as above.
        if unsafe { libc::fcntl(fd, libc::F_SETFL, flags) } != 0 {
            return Err(format!("{reason}; O_DIRECT cannot be switched off again: {}", os(last_errno())));
        }
        Err(reason)
    }
}

/// What the file system says; `None` where the kernel does not know (before 6.1).
fn stated_alignment(fd: RawFd) -> std::result::Result<Option<usize>, String> {
    // SAFETY: all-zero bytes are a valid value of this plain structure.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path that ends with a zero byte, an owned descriptor, and a structure that lives through the call.
    let failed = unsafe { libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stat) } != 0;
    if failed || stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(None);
    }
    match stat.stx_dio_mem_align.max(stat.stx_dio_offset_align) as usize {
        0 => Err("the file system states that it does no direct I/O (STATX_DIOALIGN)".to_owned()),
        alignment => Ok(Some(alignment.next_power_of_two().max(MIN_ALIGNMENT))),
    }
}

fn probe_transfer(fd: RawFd, alignment: usize) -> std::result::Result<(), String> {
    let mut pages = Pages::new(alignment, alignment).map_err(|error| error.to_string())?;
    pages.as_mut_slice().fill(0xa5);
    // SAFETY: an owned descriptor and memory of `alignment` bytes that lives through the call.
    let written = unsafe { libc::pwrite(fd, pages.as_ptr().cast(), alignment, 0) };
    if written != alignment as isize {
        return Err(if written < 0 { os(last_errno()).to_string() } else { format!("{written} bytes were written") });
    }
    pages.as_mut_slice().fill(0);
    // SAFETY: as above.
    let read = unsafe { libc::pread(fd, pages.as_ptr().cast(), alignment, 0) };
    if read != alignment as isize {
        return Err(if read < 0 { os(last_errno()).to_string() } else { format!("{read} bytes were read") });
    }
    if pages.as_slice().iter().any(|&byte| byte != 0xa5) {
        return Err("other bytes were read than were written".to_owned());
    }
    Ok(())
}

fn create_error(directory: &Path, bytes: u64, call: &'static str, errno: i32, available_bytes: Option<u64>) -> Error {
    let remedy = match (errno, available_bytes) {
        (libc::ENOSPC | libc::EDQUOT, Some(available)) => {
            format!("{available} bytes are available there; lower the NVMe budget, free space or choose another disk")
        }
        (libc::EFBIG, _) => "raise the file size limit (ulimit -f) or lower the NVMe budget".to_owned(),
        (libc::EACCES | libc::EPERM | libc::EROFS, _) => "choose a directory that this user may write to".to_owned(),
        (libc::EMFILE | libc::ENFILE, _) => "raise the limit of open files (ulimit -n)".to_owned(),
        _ => "choose a directory on a local NVMe disk".to_owned(),
    };
    Error::Create { directory: directory.to_owned(), bytes, call, errno, remedy }
}

/// Beyond `RLIMIT_FSIZE` the system does not only fail: it kills the process with SIGXFSZ. So the limit is looked at first.
fn check_size_limit(directory: &Path, bytes: u64) -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure lives through the call.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) } == 0;
    if known && bytes > limit.rlim_cur {
        return Err(create_error(directory, bytes, "RLIMIT_FSIZE", libc::EFBIG, None));
    }
    Ok(())
}

fn open(path: &Path, flags: libc::c_int) -> std::result::Result<OwnedFd, i32> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| libc::EINVAL)?;
    loop {
        // SAFETY: the path ends with a zero byte and lives through the call.
        let fd = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC, 0o600 as libc::c_uint) };
        if fd >= 0 {
            // SAFETY: the call above returned a new descriptor that nobody else owns.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        let errno = last_errno();
        if errno != libc::EINTR {
            return Err(errno);
        }
    }
}

fn open_anonymous(directory: &Path) -> std::result::Result<OwnedFd, i32> {
    // O_EXCL: the file can never be given a name.
    open(directory, libc::O_TMPFILE | libc::O_EXCL | libc::O_RDWR)
}

/// Between the creation and the removal of the name the process may be killed: then the file has a name and no lock, and the next
/// process removes it.
fn open_unlinked(directory: &Path, bytes: u64) -> Result<OwnedFd> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let name = format!("{NAME_PREFIX}{}-{nanos}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
    let path = directory.join(name);
    let fd = open(&path, libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_RDWR)
        .map_err(|errno| create_error(directory, bytes, "open", errno, None))?;
    // Failing means that another process just took the file for a dead one's and removes the name, which is what comes next anyway.
    lock(&fd);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(create_error(directory, bytes, "unlink", error.raw_os_error().unwrap_or(libc::EIO), None))
        }
        _ => Ok(fd),
    }
}

fn lock(fd: &OwnedFd) -> bool {
    // SAFETY: an owned descriptor and no pointers.
    unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// Removes spill files that no living process has locked, whatever container or host it lives in; returns them.
pub fn remove_stale(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let named = entries.flatten().filter(|entry| entry.file_name().as_bytes().starts_with(NAME_PREFIX.as_bytes()));
    named
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .map(|entry| entry.path())
        // What cannot be opened or removed belongs to another user.
        .filter(|path| {
            open(path, libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK).is_ok_and(|fd| lock(&fd) && std::fs::remove_file(path).is_ok())
        })
        .collect()
}

fn allocate(fd: &OwnedFd, directory: &Path, bytes: u64, filesystem: &Filesystem) -> Result<()> {
    let failed = |call, errno| create_error(directory, bytes, call, errno, Some(filesystem.available_bytes));
    let length = libc::off_t::try_from(bytes).map_err(|_| failed("fallocate", libc::EFBIG))?;
    loop {
        // SAFETY: an owned descriptor and no pointers.
        if unsafe { libc::fallocate(fd.as_raw_fd(), 0, 0, length) } == 0 {
            return Ok(());
        }
        match last_errno() {
            libc::EINTR => {}
            libc::EOPNOTSUPP | libc::ENOSYS => return fill_with_zeros(fd, bytes).map_err(|errno| failed("write", errno)),
            errno => return Err(failed("fallocate", errno)),
        }
    }
}

/// What a file system without `fallocate` can promise: blocks that were written once.
fn fill_with_zeros(fd: &OwnedFd, bytes: u64) -> std::result::Result<(), i32> {
    let zeros = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < bytes {
        let len = zeros.len().min((bytes - at) as usize);
        // SAFETY: an owned descriptor and memory of at least `len` bytes that lives through the call.
        match unsafe { libc::pwrite(fd.as_raw_fd(), zeros.as_ptr().cast(), len, at as libc::off_t) } {
            written if written > 0 => at += written as u64,
            0 => return Err(libc::ENOSPC),
            _ => match last_errno() {
                libc::EINTR => {}
                errno => return Err(errno),
            },
        }
    }
    // Only the disk knows whether there was room.
    // SAFETY: an owned descriptor and no pointers.
    if unsafe { libc::fdatasync(fd.as_raw_fd()) } != 0 {
        return Err(last_errno());
    }
    Ok(())
}
