//! What a directory's file system is.

use crate::error::{Error, Result, last_errno};
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What `statfs` says about a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filesystem {
    /// Its name, or its magic number where it is not a known one.
    pub name: String,
    /// Files live in memory.
    pub in_memory: bool,
    /// Files live on another machine.
    pub network: bool,
    /// Bytes that an unprivileged user may still take.
    pub available_bytes: u64,
}

/// Magic numbers of `statfs(2)` and `linux/magic.h`: (number, name, in memory, network).
const KNOWN: [(i64, &str, bool, bool); 14] = [
    (0x0102_1994, "tmpfs", true, false),
    (0x8584_58f6, "ramfs", true, false),
    (0x9584_58f6, "hugetlbfs", true, false),
    (0xef53, "ext4", false, false),
    (0x5846_5342, "xfs", false, false),
    (0x9123_683e, "btrfs", false, false),
    (0xf2f5_2010, "f2fs", false, false),
    (0x2fc1_2fc1, "zfs", false, false),
    (0x794c_7630, "overlayfs", false, false),
    (0x6969, "nfs", false, true),
    (0xff53_4d42, "cifs", false, true),
    (0x0102_1997, "9p", false, true),
    (0x0bd0_0bd0, "lustre", false, true),
    (0x6573_5546, "fuse", false, true),
];

impl Filesystem {
    /// Looks at an existing directory.
    pub fn of(directory: &Path) -> Result<Filesystem> {
        let failed = |errno| Error::Create {
            directory: directory.to_owned(),
            bytes: 0,
            call: "statfs",
            errno,
            remedy: "choose an existing directory on an NVMe disk".to_owned(),
        };
        let path = CString::new(directory.as_os_str().as_bytes()).map_err(|_| failed(libc::EINVAL))?;
        // SAFETY: all-zero bytes are a valid value of this plain structure.
        let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the path ends with a zero byte and both pointers live through the call.
        if unsafe { libc::statfs(path.as_ptr(), &raw mut stat) } != 0 {
            return Err(failed(last_errno()));
        }
        let magic = stat.f_type as i64 & 0xffff_ffff;
        let available_bytes = (stat.f_bavail as u64).saturating_mul(stat.f_bsize as u64);
        Ok(match KNOWN.iter().find(|(known, ..)| *known == magic) {
            Some(&(_, name, in_memory, network)) => Filesystem { name: name.to_owned(), in_memory, network, available_bytes },
            None => Filesystem { name: format!("file system {magic:#x}"), in_memory: false, network: false, available_bytes },
        })
    }
}
