//! What the device tests share: random optimizer states, a gate for queues, time limits and forked children.
#![allow(dead_code, reason = "each test file uses a part")]

use std::sync::{Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};
use tierwise_kernels::convert::split_master;
use tierwise_kernels::{AdamConstants, AdamSegment, Format, GradDtype, GradSpan};
use tierwise_runtime::device::Event;
use tierwise_runtime::error::Result;

/// Longer than any healthy test, even on a loaded machine.
pub const LIMIT: Duration = Duration::from_secs(30);
pub const DTYPES: [GradDtype; 3] = [GradDtype::Bf16, GradDtype::Fp16, GradDtype::Fp32];
pub const FORMATS: [Format; 3] = [Format::SplitBf16, Format::Fp16Master, Format::Fp32];

/// Runs `test` on another thread and fails if it hangs.
pub fn within_limit(test: impl FnOnce() + Send + 'static) {
    let (done, ended) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        done.send(()).ok();
    });
    if let Err(mpsc::RecvTimeoutError::Timeout) = ended.recv_timeout(LIMIT) {
        panic!("hangs");
    }
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `test` in a forked child and returns its exit code: 0, or 101 if it panicked.
pub fn in_forked_child(test: impl FnOnce()) -> i32 {
    // SAFETY: the child has this thread only; it runs `test`, whose locks are not held by the other threads, and leaves without
    // running anything of the test harness.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork: {}", std::io::Error::last_os_error());
    if child == 0 {
        let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(test)).is_ok();
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(if passed { 0 } else { 101 }) };
    }
    let start = Instant::now();
    let mut status = 0;
    loop {
        // SAFETY: the out pointer is a live local variable and the child is ours.
        match unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } {
            0 if start.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(1)),
            0 => {
                // SAFETY: the child is ours and has not been waited for.
                unsafe { libc::kill(child, libc::SIGKILL) };
                panic!("the forked child hangs");
            }
            _ => break,
        }
    }
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -libc::WTERMSIG(status) }
}

/// An event that the test reaches itself.
#[derive(Default)]
pub struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    pub fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl Event for Gate {
    fn is_done(&self) -> Result<bool> {
        Ok(*self.open.lock().unwrap())
    }

    fn synchronize(&self) -> Result<()> {
        drop(self.opened.wait_while(self.open.lock().unwrap(), |open| !*open).unwrap());
        Ok(())
    }

    fn time_ns(&self) -> Option<u64> {
        None
    }
}

/// splitmix64
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A finite number of any sign, of magnitude 2^-20 to 2^4, sometimes 0.
    fn float(&mut self) -> f32 {
        let bits = self.next();
        if bits.is_multiple_of(64) {
            return 0.0;
        }
        let exponent = 107 + (bits >> 40) % 24;
        f32::from_bits(((bits & 1) << 31 | exponent << 23 | (bits >> 8) & 0x7f_ffff) as u32)
    }

    fn half(&mut self) -> u16 {
        let bits = self.next();
        ((bits & 1) << 15 | ((bits >> 20) % 19) << 10 | (bits >> 40) & 0x3ff) as u16
    }

    fn write(&mut self, dtype: GradDtype, to: &mut [u8]) {
        for element in to.chunks_exact_mut(dtype.bytes()) {
            match dtype {
                GradDtype::Bf16 => element.copy_from_slice(&((self.float().to_bits() >> 16) as u16).to_ne_bytes()),
                GradDtype::Fp16 => element.copy_from_slice(&self.half().to_ne_bytes()),
                GradDtype::Fp32 => element.copy_from_slice(&self.float().to_ne_bytes()),
            }
        }
    }
}

/// Bytes at a 16-byte aligned address, with arrays in them by offset, so that one image serves every device.
#[derive(Clone, PartialEq)]
pub struct Arena {
    words: Vec<u128>,
    used: usize,
}

impl Arena {
    pub fn new() -> Arena {
        Arena { words: Vec::new(), used: 0 }
    }

    /// Room for an array that starts `skew` bytes after a multiple of 16; returns its offset.
    fn push(&mut self, bytes: usize, skew: usize) -> usize {
        let offset = self.used.next_multiple_of(16) + skew;
        self.used = offset + bytes;
        self.words.resize(self.used.div_ceil(16), 0);
        offset
    }

    pub fn bytes(&self) -> usize {
        size_of_val(&*self.words)
    }

    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.words.as_mut_ptr().cast()
    }

    pub fn as_slice(&mut self) -> &mut [u8] {
        let bytes = self.bytes();
        // SAFETY: the words are initialised, and borrowed for as long as the slice is.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), bytes) }
    }

    fn fill(&mut self, rng: &mut Rng, dtype: GradDtype, offset: usize, numel: usize) {
        rng.write(dtype, &mut self.as_slice()[offset..offset + numel * dtype.bytes()]);
    }
}

/// One segment, by offsets.
pub struct Segment {
    format: Format,
    grad_dtype: GradDtype,
    numel: usize,
    /// param, master, first moment, second moment, gradient
    offsets: [usize; 5],
    constants: AdamConstants,
}

impl Segment {
    pub fn at(&self, base: *mut u8) -> AdamSegment {
        let [param, master, exp_avg, exp_avg_sq, grad] = self.offsets.map(|offset| base.wrapping_add(offset));
        AdamSegment {
            format: self.format,
            grad_dtype: self.grad_dtype,
            numel: self.numel,
            param,
            master: if self.format == Format::Fp32 { std::ptr::null_mut() } else { master },
            exp_avg: exp_avg.cast(),
            exp_avg_sq: exp_avg_sq.cast(),
            grad,
            constants: self.constants,
        }
    }
}

/// Where two images of the same segments differ, for messages.
pub fn differences(segments: &[Segment], expected: &mut Arena, actual: &mut Arena) -> Vec<String> {
    let mut found = Vec::new();
    for segment in segments {
        let master = if segment.format == Format::Fp16Master { 4 } else { 2 };
        let param = if segment.format == Format::Fp32 { 4 } else { 2 };
        let arrays = [("param", param), ("master", master), ("exp_avg", 4), ("exp_avg_sq", 4), ("grad", segment.grad_dtype.bytes())];
        for (offset, (name, bytes)) in segment.offsets.into_iter().zip(arrays) {
            let range = offset..offset + segment.numel * bytes;
            let pairs = expected.as_slice()[range.clone()].chunks_exact(bytes).zip(actual.as_slice()[range].chunks_exact(bytes));
            let mut differing = pairs.enumerate().filter(|(_, (expected, actual))| expected != actual);
            if let Some((i, (expected, actual))) = differing.next() {
                found.push(format!(
                    "{:?} {:?} numel {}: {name}[{i}] is {actual:02x?} and not {expected:02x?}, and {} more",
                    segment.format,
                    segment.grad_dtype,
                    segment.numel,
                    differing.count()
                ));
            }
        }
    }
    found
}

/// Random states of every format and gradient type, of several sizes, aligned and not.
pub fn adam_case(seed: u64, numels: &[usize]) -> (Arena, Vec<Segment>) {
    let (mut rng, mut arena, mut segments) = (Rng(seed), Arena::new(), Vec::new());
    for format in FORMATS {
        for grad_dtype in DTYPES {
            for (i, &numel) in numels.iter().enumerate() {
                let (param, master) = match format {
                    Format::SplitBf16 => (GradDtype::Bf16, GradDtype::Bf16),
                    Format::Fp16Master => (GradDtype::Fp16, GradDtype::Fp32),
                    Format::Fp32 => (GradDtype::Fp32, GradDtype::Fp32),
                };
                let dtypes = [param, master, GradDtype::Fp32, GradDtype::Fp32, grad_dtype];
                let offsets = dtypes.map(|dtype| arena.push(numel * dtype.bytes(), (i % 2) * dtype.bytes()));
                for (offset, dtype) in offsets.into_iter().zip(dtypes) {
                    arena.fill(&mut rng, dtype, offset, numel);
                }
                if format == Format::SplitBf16 {
                    // Not any two halves are a weight: 0 with a negative low half would be a NaN.
                    for i in 0..numel {
                        let (hi, lo) = split_master(rng.float());
                        arena.as_slice()[offsets[0] + 2 * i..][..2].copy_from_slice(&hi.to_ne_bytes());
                        arena.as_slice()[offsets[1] + 2 * i..][..2].copy_from_slice(&lo.to_ne_bytes());
                    }
                }
                // The second moment is not negative: the sign is in the highest byte.
                for element in arena.as_slice()[offsets[3]..offsets[3] + numel * 4].chunks_exact_mut(4) {
                    element[3] &= 0x7f;
                }
                segments.push(Segment { format, grad_dtype, numel, offsets, constants: constants(i) });
            }
        }
    }
    (arena, segments)
}

fn constants(i: usize) -> AdamConstants {
    let decoupled = i.is_multiple_of(3);
    AdamConstants {
        grad_scale: [1.0, 0.37, 1.0 / 1024.0][i % 3],
        beta1: 0.9,
        one_minus_beta1: 0.1,
        beta2: 0.999,
        one_minus_beta2: 0.001,
        bias_correction2_sqrt: 0.0316,
        eps: 1e-8,
        step_size: 1e-3,
        decay: if decoupled { 0.9999 } else { 1.0 },
        l2: if decoupled { 0.0 } else { 0.01 },
    }
}

/// Random gradients of every type; spans by offset.
pub fn grad_case(seed: u64, numels: &[usize]) -> (Arena, Vec<(usize, GradDtype, usize)>) {
    let (mut rng, mut arena, mut spans) = (Rng(seed), Arena::new(), Vec::new());
    for dtype in DTYPES {
        for (i, &numel) in numels.iter().enumerate() {
            let offset = arena.push(numel * dtype.bytes(), (i % 2) * dtype.bytes());
            arena.fill(&mut rng, dtype, offset, numel);
            spans.push((offset, dtype, numel));
        }
    }
    (arena, spans)
}

/// Random gradients of every type and an accumulator for each: (offset of the accumulator, offset, type, numel).
pub fn accumulate_case(
    seed: u64,
    numels: &[usize],
    sums: impl Fn(GradDtype) -> GradDtype,
) -> (Arena, Vec<(usize, usize, GradDtype, usize)>) {
    let (mut arena, spans) = grad_case(seed, numels);
    let mut rng = Rng(seed + 1);
    let pairs = spans.into_iter().enumerate().map(|(i, (offset, dtype, numel))| {
        let dst = arena.push(numel * 4, (i % 2) * 4);
        arena.fill(&mut rng, sums(dtype), dst, numel);
        (dst, offset, dtype, numel)
    });
    let pairs = pairs.collect();
    (arena, pairs)
}

pub fn span_at(base: *mut u8, (offset, dtype, numel): (usize, GradDtype, usize)) -> GradSpan {
    GradSpan { ptr: base.wrapping_add(offset), dtype, numel }
}
