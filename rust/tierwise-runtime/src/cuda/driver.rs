//! The CUDA driver as this crate uses it: found at run time, every return code named, one context entered around each call.

use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::ffi::{CStr, c_char};
use std::marker::PhantomData;
use std::sync::OnceLock;

const LIBRARY: &CStr = c"libcuda.so.1";

/// Every function that this crate calls: cudarc panics at the first call of one that the driver lacks.
const SYMBOLS: [&CStr; 35] = [
    c"cuInit",
    c"cuDeviceGet",
    c"cuDeviceGetCount",
    c"cuDeviceGetName",
    c"cuDeviceGetAttribute",
    c"cuDevicePrimaryCtxRetain",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuCtxGetCurrent",
    c"cuCtxPushCurrent_v2",
    c"cuCtxPopCurrent_v2",
    c"cuCtxGetStreamPriorityRange",
    c"cuStreamCreateWithPriority",
    c"cuStreamDestroy_v2",
    c"cuStreamSynchronize",
    c"cuStreamWaitEvent",
    c"cuEventCreate",
    c"cuEventDestroy_v2",
    c"cuEventRecord",
    c"cuEventQuery",
    c"cuEventSynchronize",
    c"cuEventElapsedTime",
    c"cuModuleLoadData",
    c"cuModuleUnload",
    c"cuModuleGetFunction",
    c"cuLaunchKernel",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemcpyDtoHAsync_v2",
    c"cuMemAlloc_v2",
    c"cuMemFree_v2",
    c"cuMemGetInfo_v2",
    c"cuMemHostRegister_v2",
    c"cuMemHostUnregister",
    c"cuMemsetD32Async",
    c"cuGetErrorName",
    c"cuGetErrorString",
];

/// Whether the driver's library is here and complete; the reason why not otherwise. Looked up once.
pub(super) fn find_library() -> std::result::Result<(), String> {
    static FOUND: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    FOUND.get_or_init(open_library).clone()
}

fn open_library() -> std::result::Result<(), String> {
    // SAFETY: the name is a constant; the library's initialisers are the driver's own. The handle is kept for the process's life.
    let handle = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        return Err(format!("{}; install the NVIDIA driver, or use the emulated device", last_dlerror()));
    }
    // SAFETY: the handle was opened above and is never closed.
    let missing = SYMBOLS.iter().find(|symbol| unsafe { libc::dlsym(handle, symbol.as_ptr()) }.is_null());
    match missing {
        Some(symbol) => Err(format!("the NVIDIA driver lacks {}; update it", symbol.to_string_lossy())),
        None => Ok(()),
    }
}

fn last_dlerror() -> String {
    // SAFETY: dlerror returns null or a string that lives until this thread's next call of the dl family; it is copied at once.
    let text = unsafe { text(libc::dlerror()) };
    text.unwrap_or_else(|| format!("{} cannot be opened", LIBRARY.to_string_lossy()))
}

/// # Safety
/// `text` is null or a terminated string that is alive during the call.
unsafe fn text(text: *const c_char) -> Option<String> {
    // SAFETY: promised by the caller.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// The error of a call that did not succeed.
pub(super) fn check(device: &str, call: &'static str, code: sys::CUresult) -> Result<()> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = std::ptr::null();
    let mut description = std::ptr::null();
    // SAFETY: the driver writes null or the address of a constant of its own.
    let message = unsafe {
        sys::cuGetErrorName(code, &raw mut name);
        sys::cuGetErrorString(code, &raw mut description);
        // A stub library knows no text.
        let stub = "the toolkit's stub library was loaded instead of the driver: take its `stubs` folder out of LD_LIBRARY_PATH";
        let unknown = if code == sys::CUresult::CUDA_ERROR_STUB_LIBRARY { stub } else { "no description" };
        format!("{}: {}", text(name).unwrap_or_else(|| format!("{code:?}")), text(description).unwrap_or_else(|| unknown.into()))
    };
    Err(Error::Device { device: device.to_owned(), call, message })
}

/// The primary context of one GPU: the one that torch uses.
pub(super) struct Context {
    name: String,
    multiprocessors: u32,
    device: sys::CUdevice,
    raw: sys::CUcontext,
    owner: u32,
}

// SAFETY: a context handle may be used from any thread that enters it; the driver locks.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn retain(ordinal: usize) -> Result<Context> {
        let label = format!("cuda:{ordinal}");
        let wrong = |call, message| Error::Device { device: label.clone(), call, message };
        find_library().map_err(|message| wrong("dlopen", message))?;
        let check = |call, code| check(&label, call, code);
        let mut count = 0;
        // SAFETY: the library and its symbols were found above; every out pointer is a live local variable.
        unsafe {
            check("cuInit", sys::cuInit(0))?;
            check("cuDeviceGetCount", sys::cuDeviceGetCount(&raw mut count))?;
        }
        let number = i32::try_from(ordinal).ok().filter(|number| *number < count);
        let number = number.ok_or_else(|| wrong("cuDeviceGet", format!("this process sees {count} GPUs (CUDA_VISIBLE_DEVICES)")))?;
        let mut device = 0;
        let mut raw = std::ptr::null_mut();
        let mut name = [0; 256];
        let mut multiprocessors = 0;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        // SAFETY: as above; the driver writes a terminated name of at most the length given.
        let name = unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, number))?;
            check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), 255, device))?;
            check("cuDeviceGetAttribute", sys::cuDeviceGetAttribute(&raw mut multiprocessors, attribute, device))?;
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&raw mut raw, device))?;
            text(name.as_ptr()).unwrap_or(label)
        };
        Ok(Context { name, multiprocessors: multiprocessors.unsigned_abs(), device, raw, owner: std::process::id() })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    pub(super) fn check(&self, call: &'static str, code: sys::CUresult) -> Result<()> {
        check(&self.name, call, code)
    }

    pub(super) fn is_forked(&self) -> bool {
        std::process::id() != self.owner
    }

    /// Makes the context current on this thread until the guard is dropped. The caller's own context (torch on another GPU) comes back.
    pub(super) fn enter(&self) -> Result<Entered> {
        if self.is_forked() {
            return Err(Error::Forked { owner: self.owner, child: std::process::id() });
        }
        let mut current = std::ptr::null_mut();
        // SAFETY: the out pointer is a live local variable; `raw` is retained until this value is dropped.
        unsafe {
            self.check("cuCtxGetCurrent", sys::cuCtxGetCurrent(&raw mut current))?;
            if current == self.raw {
                return Ok(Entered { pop: false, this_thread: PhantomData });
            }
            self.check("cuCtxPushCurrent", sys::cuCtxPushCurrent_v2(self.raw))?;
        }
        Ok(Entered { pop: true, this_thread: PhantomData })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.is_forked() {
            return;
        }
        // SAFETY: retained once by this value, whose users are gone. At process exit the driver may refuse, and nothing is left to do.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// The context is current on this thread.
#[must_use]
pub(super) struct Entered {
    pop: bool,
    /// What is current belongs to one thread.
    this_thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pop {
            let mut popped = std::ptr::null_mut();
            // SAFETY: the out pointer is a live local variable; this thread pushed the context when the guard was made.
            unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
        }
    }
}
