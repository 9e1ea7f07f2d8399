//! Memory traffic of the Adam step beside plain fp32 adds, the common measure of a machine's usable bandwidth: `c = a + b`, whose
//! write costs a hidden read, and `a += b`, which like Adam has no hidden traffic. Both count 12 bytes per element.
//!
//! `cargo run --release --example adam_speed [millions of parameters] [threads ...]`

use std::time::Instant;

use tierwise_kernels::adam::{Pass, adam_pass};
use tierwise_kernels::pool::GRAIN_NUMEL;
use tierwise_kernels::{AdamConstants, AdamHyper, AdamSegment, Addition, Format, GradDtype, GradSpan, Pool, accumulate, dispatch};

const ADAM_BYTES: usize = 26; // read and write bf16 + i16 + two f32, read bf16
const PASS_BYTES: usize = 18; // read and write one half of that, read the other, or nothing of the parameters
const STATE_BYTES: usize = 2 + 2 + 4 + 4 + 2;
const REPEATS: usize = 9;

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<usize>().expect("arguments are whole numbers"));
    let numel = arguments.next().unwrap_or(200) * 1_000_000;
    let mut threads: Vec<usize> = arguments.collect();
    if threads.is_empty() {
        threads = vec![1, Pool::new(None).threads()];
        threads.dedup();
    }
    let bytes = (numel * STATE_BYTES).next_multiple_of(64) + 5 * 64;
    let memory = map(bytes);
    println!("{numel} parameters, {:.1} GB, {:?}; best and median of {REPEATS}", bytes as f64 / 1e9, dispatch::level());
    println!(
        "| threads | c = a + b GB/s | a += b GB/s | Adam GB/s | Adam 1e9 parameters/s | Adam / (c = a + b) | Adam / (a += b) | parameters first, GB/s | moments later, GB/s |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for threads in threads {
        let pool = Pool::new(Some(threads));
        fill(&pool, memory, bytes);
        let (mut adds, mut adds_in_place, mut adams, mut params, mut moments) = (vec![], vec![], vec![], vec![], vec![]);
        // Interleaved, so that a neighbour's load hits all alike.
        for step in 0..=REPEATS {
            let add = add(&pool, memory, bytes);
            let add_in_place = add_in_place(&pool, memory, bytes);
            fill(&pool, memory, bytes);
            let adam = |pass, bytes| adam(&pool, memory, numel, step as u64 + 1, pass, bytes);
            let whole = adam(Pass::Whole, ADAM_BYTES);
            let two = [adam(Pass::Params, PASS_BYTES), adam(Pass::Moments, PASS_BYTES)];
            if step > 0 {
                adds.push(add);
                adds_in_place.push(add_in_place);
                adams.push(whole);
                params.push(two[0]);
                moments.push(two[1]);
            }
        }
        let ([add, add_median], [in_place, in_place_median], [adam, adam_median]) = (summary(adds), summary(adds_in_place), summary(adams));
        let ([params, params_median], [moments, moments_median]) = (summary(params), summary(moments));
        println!(
            "| {threads} | {add:.1} ({add_median:.1}) | {in_place:.1} ({in_place_median:.1}) | {adam:.1} ({adam_median:.1}) | {:.2} | {:.2} ({:.2}) | {:.2} ({:.2}) | {params:.1} ({params_median:.1}) | {moments:.1} ({moments_median:.1}) |",
            adam / ADAM_BYTES as f64,
            adam / add,
            adam_median / add_median,
            adam / in_place,
            adam_median / in_place_median
        );
    }
}

/// Best and median.
fn summary(mut rates: Vec<f64>) -> [f64; 2] {
    rates.sort_by(f64::total_cmp);
    [rates[rates.len() - 1], rates[rates.len() / 2]]
}

/// Anonymous memory in huge pages where the system gives them; lives as long as the process.
fn map(bytes: usize) -> *mut u8 {
    const HUGE: usize = 2 << 20;
    // SAFETY: a new private mapping; nobody else knows its address.
    unsafe {
        let ptr = libc::mmap(
            std::ptr::null_mut(),
            bytes + HUGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert!(ptr != libc::MAP_FAILED, "cannot map {bytes} bytes: {}", std::io::Error::last_os_error());
        let ptr = ptr.add(ptr.align_offset(HUGE));
        libc::madvise(ptr, bytes, libc::MADV_HUGEPAGE);
        ptr.cast()
    }
}

/// Small normal numbers in every format.
fn fill(pool: &Pool, memory: *mut u8, bytes: usize) {
    let words = bytes / 4;
    let address = memory as usize;
    pool.for_each_grain(words.div_ceil(GRAIN_NUMEL), |grain| {
        let start = grain * GRAIN_NUMEL;
        // SAFETY: the mapping lives as long as the process; each grain is written by one thread.
        let grain = unsafe { std::slice::from_raw_parts_mut((address as *mut u32).add(start), GRAIN_NUMEL.min(words - start)) };
        for (i, word) in grain.iter_mut().enumerate() {
            *word = 0x3c00_3c00 + (i as u32 & 0x7f) * 0x0001_0001;
        }
    });
}

fn rate(bytes: usize, work: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    work();
    bytes as f64 / begin.elapsed().as_secs_f64() / 1e9
}

fn adam(pool: &Pool, memory: *mut u8, numel: usize, step: u64, pass: Pass, bytes: usize) -> f64 {
    let hyper = AdamHyper { lr: 1e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };
    let mut at = 0;
    let mut array = |element: usize| {
        // SAFETY: the arrays and their padding are what the mapping was made for.
        let ptr = unsafe { memory.add(at) };
        at = (at + numel * element).next_multiple_of(64);
        ptr
    };
    let segment = AdamSegment {
        format: Format::SplitBf16,
        grad_dtype: GradDtype::Bf16,
        numel,
        param: array(2),
        master: array(2),
        exp_avg: array(4).cast(),
        exp_avg_sq: array(4).cast(),
        grad: array(2),
        constants: AdamConstants::new(&hyper, step, 1.0),
    };
    // SAFETY: five arrays of the mapping, which lives as long as the process, side by side.
    rate(numel * bytes, || unsafe { adam_pass(pool, pass, &[segment]) })
}

fn add(pool: &Pool, memory: *mut u8, bytes: usize) -> f64 {
    let numel = bytes / 12;
    let address = memory as usize;
    rate(numel * 12, || {
        pool.for_each_grain(numel.div_ceil(GRAIN_NUMEL), |grain| {
            let start = grain * GRAIN_NUMEL;
            let count = GRAIN_NUMEL.min(numel - start);
            // SAFETY: three arrays of the mapping, which lives as long as the process; each grain is written by one thread.
            unsafe {
                let base = address as *mut f32;
                let a = std::slice::from_raw_parts(base.add(start), count);
                let b = std::slice::from_raw_parts(base.add(numel + start), count);
                let c = std::slice::from_raw_parts_mut(base.add(2 * numel + start), count);
                for ((c, a), b) in c.iter_mut().zip(a).zip(b) {
                    *c = a + b;
                }
            }
        });
    })
}

fn add_in_place(pool: &Pool, memory: *mut u8, bytes: usize) -> f64 {
    let numel = bytes / 8;
    // SAFETY: the two halves of the mapping, which lives as long as the process.
    let src = GradSpan { ptr: unsafe { memory.add(numel * 4) }, dtype: GradDtype::Fp32, numel };
    let addition = Addition { dst: memory, sums: GradDtype::Fp32, src, overwrite: false };
    // SAFETY: as above.
    rate(numel * 12, || unsafe { accumulate::add(pool, &[addition]) })
}
