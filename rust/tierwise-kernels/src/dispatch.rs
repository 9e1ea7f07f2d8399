//! Run-time choice of the instruction set. Every level gives the same bits.

use std::sync::OnceLock;

/// Name of the environment variable that lowers the level.
pub const SIMD_ENV: &str = "TIERWISE_SIMD";

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// What the build target guarantees.
    Baseline,
    /// AVX2
    Avx2,
    /// AVX-512 F, BW, DQ and VL
    Avx512,
}

impl Level {
    /// The levels that this machine can run, lowest first.
    pub fn supported() -> impl Iterator<Item = Self> {
        [Self::Baseline, Self::Avx2, Self::Avx512].into_iter().filter(|&level| level <= detected())
    }
}

/// The level that kernels use: the highest this machine has, or less where `TIERWISE_SIMD` is `baseline`, `avx2` or `avx512`.
///
/// # Panics
/// If `TIERWISE_SIMD` is set to something else.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let env = std::env::var_os(SIMD_ENV).map(|value| value.to_string_lossy().into_owned());
        lowered(detected(), env.as_deref()).unwrap_or_else(|error| panic!("{error}"))
    })
}

fn lowered(detected: Level, env: Option<&str>) -> Result<Level, String> {
    let limit = match env {
        None => return Ok(detected),
        Some("baseline") => Level::Baseline,
        Some("avx2") => Level::Avx2,
        Some("avx512") => Level::Avx512,
        Some(value) => return Err(format!("{SIMD_ENV}='{value}' is not one of 'baseline', 'avx2', 'avx512'")),
    };
    Ok(detected.min(limit))
}

#[cfg(target_arch = "x86_64")]
fn detected() -> Level {
    if !is_x86_feature_detected!("avx2") {
        Level::Baseline
    } else if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
    {
        Level::Avx512
    } else {
        Level::Avx2
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detected() -> Level {
    Level::Baseline
}

/// A level that this machine was seen to support: what makes the jump into a `#[target_feature]` function sound.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Supported(Level);

impl Supported {
    /// # Panics
    /// If this machine lacks the level.
    pub(crate) fn new(level: Level) -> Self {
        assert!(level <= detected(), "this machine has no {level:?}; its highest level is {:?}", detected());
        Self(level)
    }

    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "one level only"))]
    pub(crate) fn level(self) -> Level {
        self.0
    }
}

/// Compiles one body for every level. The function gets a leading argument of type [`Supported`].
///
/// Slices are arguments of the `#[target_feature]` functions themselves, so that the compiler knows that they do not overlap. No
/// wrapper enables `fma`: nothing can be contracted.
macro_rules! at_every_level {
    ($(#[$meta:meta])* fn $name:ident $(<$($generic:ident : $bound:path),*>)? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        fn $name $(<$($generic: $bound),*>)? (supported: $crate::dispatch::Supported, $($arg: $ty),*) $(-> $ret)? {
            // Must be compiled with the features of each caller below.
            #[inline(always)]
            fn body $(<$($generic: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512 $(<$($generic: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                body $(::<$($generic),*>)? ($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2 $(<$($generic: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                body $(::<$($generic),*>)? ($($arg),*)
            }

            // Not inlined into the dispatch, where the slices would lose what is known of them as arguments.
            #[inline(never)]
            fn baseline $(<$($generic: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                body $(::<$($generic),*>)? ($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            match supported.level() {
                // SAFETY: `Supported` was made after this machine was seen to have the features.
                $crate::dispatch::Level::Avx512 => return unsafe { avx512 $(::<$($generic),*>)? ($($arg),*) },
                // SAFETY: as above.
                $crate::dispatch::Level::Avx2 => return unsafe { avx2 $(::<$($generic),*>)? ($($arg),*) },
                $crate::dispatch::Level::Baseline => {}
            }
            let _ = supported;
            baseline $(::<$($generic),*>)? ($($arg),*)
        }
    };
}
pub(crate) use at_every_level;

/// Asks for the cache line at `ptr` in a state that can be written. Any address is allowed, also an invalid one.
#[inline(always)]
#[expect(clippy::inline_always, reason = "one instruction")]
pub(crate) fn prefetch_write<T>(ptr: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHW never faults and changes no memory or flag; CPUs older than it decode it as a no-operation.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) ptr, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

/// Asks for the cache line at `ptr`. Any address is allowed, also an invalid one.
#[inline(always)]
#[expect(clippy::inline_always, reason = "one instruction")]
pub(crate) fn prefetch_read<T>(ptr: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that never faults; SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(ptr.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_lowers_and_never_raises() {
        assert_eq!(lowered(Level::Avx512, None), Ok(Level::Avx512));
        assert_eq!(lowered(Level::Avx512, Some("avx2")), Ok(Level::Avx2));
        assert_eq!(lowered(Level::Avx2, Some("avx512")), Ok(Level::Avx2));
        assert_eq!(lowered(Level::Avx512, Some("baseline")), Ok(Level::Baseline));
        assert!(lowered(Level::Avx2, Some("sse9")).unwrap_err().contains("'sse9'"));
    }
}
