// CUDA kernels of Tierwise, bit-equal to the CPU kernels of this crate: fp32, rounded to nearest after each operation.
//
// Every operation is an intrinsic with an explicit rounding, so that neither NVRTC nor the driver's compiler contracts any.
// Names, arguments and launch geometry: ../cuda.rs. Rebuild kernels.ptx with ../../build_ptx.py after every change.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Same layout as AdamConstants in ../lib.rs.
struct AdamConstants {
    float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, bias_correction2_sqrt, eps, step_size, decay, l2;
};

enum : u32 {
    BLOCK_NUMEL = 65536,
    LANES = 2048,
    THREADS = 256,
    // Consecutive elements of one thread. 4 fp32 are one access and leave no gap between the threads of a warp.
    VECTOR = 4,
    NORM_VECTOR = LANES / THREADS,
};

// Element types: `T` is how it is stored.
struct Bf16 {
    typedef u16 T;
    static __device__ __forceinline__ float widen(u16 x) { return __uint_as_float((u32)x << 16); }
    static __device__ __forceinline__ u16 round(float x) {
        const u32 bits = __float_as_uint(x);
        return x != x ? (u16)0x7fc0 : (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
};
struct Fp16 {
    typedef u16 T;
    static __device__ __forceinline__ float widen(u16 x) {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
        return y;
    }
    static __device__ __forceinline__ u16 round(float x) {
        u16 y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
};
struct Fp32 {
    typedef float T;
    static __device__ __forceinline__ float widen(float x) { return x; }
    static __device__ __forceinline__ float round(float x) { return x; }
};

template <u32 BYTES>
struct Word {
    typedef uint4 Type;
};
template <>
struct Word<8> {
    typedef uint2 Type;
};

// N elements, moved in accesses of 16 bytes (8 where they are no more) if the array is aligned.
template <typename T, u32 N>
union Vector {
    typedef typename Word<N * sizeof(T)>::Type W;
    T x[N];
    W words[N * sizeof(T) / sizeof(W)];
};

__device__ __forceinline__ bool aligned(const void* p) { return ((u64)p & 15) == 0; }

template <typename T, u32 N>
__device__ __forceinline__ void load(Vector<T, N>& to, const T* from, bool vector) {
    typedef typename Vector<T, N>::W W;
    if (vector) {
#pragma unroll
        for (u32 k = 0; k < sizeof(to) / sizeof(W); ++k) to.words[k] = ((const W*)from)[k];
    } else {
#pragma unroll
        for (u32 k = 0; k < N; ++k) to.x[k] = from[k];
    }
}

template <typename T, u32 N>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& from, bool vector) {
    typedef typename Vector<T, N>::W W;
    if (vector) {
#pragma unroll
        for (u32 k = 0; k < sizeof(from) / sizeof(W); ++k) ((W*)to)[k] = from.words[k];
    } else {
#pragma unroll
        for (u32 k = 0; k < N; ++k) to[k] = from.x[k];
    }
}

// Storage formats of a weight.
struct SplitBf16 {
    typedef u16 Param;
    typedef u16 Master;  // a signed low half
    enum { READS_PARAM = 1, HAS_MASTER = 1 };
    static __device__ __forceinline__ float load(u16 param, u16 master) {
        return __uint_as_float(((u32)param << 16) + (u32)(int)(short)master);
    }
    static __device__ __forceinline__ void store(float w, u16& param, u16& master) {
        // A NaN payload could round to an infinity or carry into the sign; one quiet NaN cannot.
        const u32 bits = w != w ? 0x7fc00000u : __float_as_uint(w);
        param = (u16)((bits + 0x8000u) >> 16);
        master = (u16)bits;
    }
};
struct Fp16Master {
    typedef u16 Param;
    typedef float Master;
    enum { READS_PARAM = 0, HAS_MASTER = 1 };
    static __device__ __forceinline__ float load(u16, float master) { return master; }
    static __device__ __forceinline__ void store(float w, u16& param, float& master) {
        param = Fp16::round(w);
        master = w;
    }
};
struct Fp32Only {
    typedef float Param;
    typedef float Master;  // the array is absent
    enum { READS_PARAM = 1, HAS_MASTER = 0 };
    static __device__ __forceinline__ float load(float param, float) { return param; }
    static __device__ __forceinline__ void store(float w, float& param, float&) { param = w; }
};

__device__ __forceinline__ float flush(float x) { return fabsf(x) < __uint_as_float(0x00800000u) ? 0.0f : x; }

template <typename S, typename G>
__device__ __forceinline__ void adam_element(typename S::Param& param, typename S::Master& master, float& exp_avg, float& exp_avg_sq,
                                             typename G::T grad, const AdamConstants& c) {
    float w = S::load(param, master);
    float g = __fmul_rn(G::widen(grad), c.grad_scale);
    if (c.l2 != 0.0f) g = __fadd_rn(g, __fmul_rn(c.l2, w));
    const float m = flush(__fadd_rn(__fmul_rn(c.beta1, exp_avg), __fmul_rn(c.one_minus_beta1, g)));
    const float v = flush(__fadd_rn(__fmul_rn(c.beta2, exp_avg_sq), __fmul_rn(__fmul_rn(c.one_minus_beta2, g), g)));
    const float denom = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), c.bias_correction2_sqrt), c.eps);
    w = __fmul_rn(w, c.decay);
    w = __fsub_rn(w, __fmul_rn(c.step_size, __fdiv_rn(m, denom)));
    exp_avg = m;
    exp_avg_sq = v;
    S::store(w, param, master);
}

template <typename S, typename G>
__device__ __forceinline__ void adam(typename S::Param* __restrict__ param, typename S::Master* __restrict__ master,
                                     float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq,
                                     const typename G::T* __restrict__ grad, u64 numel, const AdamConstants& c) {
    const bool v_param = aligned(param), v_master = aligned(master), v_avg = aligned(exp_avg), v_sq = aligned(exp_avg_sq),
               v_grad = aligned(grad);
    const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 stride = (u64)gridDim.x * blockDim.x;
    const u64 vectors = numel / VECTOR;
    for (u64 vector = thread; vector < vectors; vector += stride) {
        const u64 at = vector * VECTOR;
        Vector<typename S::Param, VECTOR> p;
        Vector<typename S::Master, VECTOR> w;
        Vector<float, VECTOR> m, v;
        Vector<typename G::T, VECTOR> g;
        if (S::READS_PARAM) load(p, param + at, v_param);
        if (S::HAS_MASTER) load(w, master + at, v_master);
        load(m, (const float*)exp_avg + at, v_avg);
        load(v, (const float*)exp_avg_sq + at, v_sq);
        load(g, grad + at, v_grad);
#pragma unroll
        for (u32 k = 0; k < VECTOR; ++k) adam_element<S, G>(p.x[k], w.x[k], m.x[k], v.x[k], g.x[k], c);
        store(param + at, p, v_param);
        if (S::HAS_MASTER) store(master + at, w, v_master);
        store(exp_avg + at, m, v_avg);
        store(exp_avg_sq + at, v, v_sq);
    }
    const u64 i = vectors * VECTOR + thread;
    if (i < numel) {
        typename S::Param p = param[i];
        typename S::Master w = S::HAS_MASTER ? master[i] : typename S::Master(0);
        float m = exp_avg[i], v = exp_avg_sq[i];
        adam_element<S, G>(p, w, m, v, grad[i], c);
        param[i] = p;
        if (S::HAS_MASTER) master[i] = w;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
    }
}

// One norm block per CUDA block; the tree is described in ../norm.rs.
template <typename G>
__device__ __forceinline__ void sum_squares(const typename G::T* __restrict__ grad, u64 numel, float* __restrict__ block_out) {
    __shared__ float lanes[LANES];
    const u64 start = (u64)blockIdx.x * BLOCK_NUMEL;
    if (start >= numel) return;
    const u32 count = numel - start < BLOCK_NUMEL ? (u32)(numel - start) : BLOCK_NUMEL;
    const typename G::T* block = grad + start;
    const bool vector = aligned(block);
    const u32 first = threadIdx.x * NORM_VECTOR;
    float sum[NORM_VECTOR];
#pragma unroll
    for (u32 k = 0; k < NORM_VECTOR; ++k) sum[k] = 0.0f;
    u32 at = first;
#pragma unroll 4
    for (; at + NORM_VECTOR <= count; at += LANES) {
        Vector<typename G::T, NORM_VECTOR> x;
        load(x, block + at, vector);
#pragma unroll
        for (u32 k = 0; k < NORM_VECTOR; ++k) {
            const float y = G::widen(x.x[k]);
            sum[k] = __fadd_rn(sum[k], __fmul_rn(y, y));
        }
    }
#pragma unroll
    for (u32 k = 0; k < NORM_VECTOR; ++k) {
        if (at + k < count) {
            const float y = G::widen(block[at + k]);
            sum[k] = __fadd_rn(sum[k], __fmul_rn(y, y));
        }
        lanes[first + k] = sum[k];
    }
    for (u32 half = LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        for (u32 j = threadIdx.x; j < half; j += THREADS) lanes[j] = __fadd_rn(lanes[j], lanes[j + half]);
    }
    if (threadIdx.x == 0) block_out[blockIdx.x] = lanes[0];
}

template <typename G, typename Sum>
__device__ __forceinline__ void accumulate(typename Sum::T* __restrict__ dst, const typename G::T* __restrict__ src, u64 numel,
                                           bool overwrite) {
    const bool v_dst = aligned(dst), v_src = aligned(src);
    const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 stride = (u64)gridDim.x * blockDim.x;
    const u64 vectors = numel / VECTOR;
    for (u64 vector = thread; vector < vectors; vector += stride) {
        const u64 at = vector * VECTOR;
        Vector<typename G::T, VECTOR> x;
        Vector<typename Sum::T, VECTOR> y;
        load(x, src + at, v_src);
        if (!overwrite) load(y, (const typename Sum::T*)dst + at, v_dst);
#pragma unroll
        for (u32 k = 0; k < VECTOR; ++k)
            y.x[k] = Sum::round(overwrite ? G::widen(x.x[k]) : __fadd_rn(Sum::widen(y.x[k]), G::widen(x.x[k])));
        store(dst + at, y, v_dst);
    }
    const u64 i = vectors * VECTOR + thread;
    if (i < numel) dst[i] = Sum::round(overwrite ? G::widen(src[i]) : __fadd_rn(Sum::widen(dst[i]), G::widen(src[i])));
}

#define ADAM(name, S, G)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) tw_adam_##name(S::Param* param, S::Master* master, float* exp_avg,               \
                                                                     float* exp_avg_sq, const G::T* grad, u64 numel, AdamConstants c) { \
        adam<S, G>(param, master, exp_avg, exp_avg_sq, grad, numel, c);                                                                \
    }
ADAM(split_bf16, SplitBf16, Bf16)
ADAM(split_fp16, SplitBf16, Fp16)
ADAM(split_fp32, SplitBf16, Fp32)
ADAM(fp16_bf16, Fp16Master, Bf16)
ADAM(fp16_fp16, Fp16Master, Fp16)
ADAM(fp16_fp32, Fp16Master, Fp32)
ADAM(fp32_bf16, Fp32Only, Bf16)
ADAM(fp32_fp16, Fp32Only, Fp16)
ADAM(fp32_fp32, Fp32Only, Fp32)

#define GRADIENT(name, G)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) tw_sum_squares_##name(const G::T* grad, u64 numel, float* block_out) {   \
        sum_squares<G>(grad, numel, block_out);                                                                                \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) tw_accumulate_##name(float* dst, const G::T* src, u64 numel, u32 overwrite) { \
        accumulate<G, Fp32>(dst, src, numel, overwrite != 0);                                                                  \
    }
GRADIENT(bf16, Bf16)
GRADIENT(fp16, Fp16)
GRADIENT(fp32, Fp32)

#define ADD(name, G)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256) tw_add_##name(G::T* dst, const G::T* src, u64 numel, u32 overwrite) {    \
        accumulate<G, G>(dst, src, numel, overwrite != 0);                                                                     \
    }
ADD(bf16, Bf16)
ADD(fp16, Fp16)

extern "C" __global__ void tw_sum_blocks(const float* __restrict__ block_sums, const u32* __restrict__ span_first_block, u32 span_count,
                                         double* out) {
    const u32 span = blockIdx.x * blockDim.x + threadIdx.x;
    if (span >= span_count) return;
    const u32 end = span_first_block[span + 1];
    double sum = 0.0;
#pragma unroll 8
    for (u32 block = span_first_block[span]; block < end; ++block) sum = __dadd_rn(sum, (double)block_sums[block]);
    out[span] = sum;
}
