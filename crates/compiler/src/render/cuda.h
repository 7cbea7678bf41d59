// CUDA C for NVRTC: types, qualifiers and what the device computes by itself. No header is needed.

#define FN static __device__ __forceinline__
#define TABLE static __device__ const
#define DEVICE
#define SHARED
#define THREAD

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;
typedef float f32;
typedef double f64;

#ifdef __CUDACC__
// The conversions of 16-bit floats are instructions.
FN f32 f16_to_f32(u16 bits) { f32 x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits)); return x; }
FN u16 f32_to_f16(f32 x) { u16 bits; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); return bits; }
FN u16 f32_to_bf16(f32 x) { u16 bits; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); return bits; }
#endif

struct f16 {
    u16 bits;
    f16() = default;
    __device__ explicit f16(f32 x) : bits(f32_to_f16(x)) {}
    __device__ operator f32() const { return f16_to_f32(bits); }
};

struct bf16 {
    u16 bits;
    bf16() = default;
    __device__ explicit bf16(f32 x) : bits(f32_to_bf16(x)) {}
    __device__ operator f32() const { return __uint_as_float(u32(bits) << 16); }
};

FN f32 f16_of_bits(u16 bits) { return f16_to_f32(bits); }
FN f32 f32_of_bits(u32 bits) { return __uint_as_float(bits); }
#define INF f32_of_bits(0x7f800000u)
FN f64 f64_of_bits(u64 bits) { return __longlong_as_double(i64(bits)); }

// Programmatic dependent launch ("CUDA C++ Programming Guide"): the blocks of a kernel may take their places while those
// of the one before it end, and go on when it has ended and its writes are seen. Says that the next one may, too.
FN void after_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

struct Predecessor {
    __device__ __forceinline__ void operator()() const { after_predecessor(); }
};

struct Waited {
    __device__ __forceinline__ void operator()() const {}
};

// An operand of any type, for a kernel that calls others.
struct Any {
    void* at;
    template <typename T> __device__ operator T*() const { return (T*)at; }
};

FN void barrier() { __syncthreads(); }
// Whether this thread is the first one to put `mark` in the place of 0.
FN bool claim(u32* at, u32 mark) { return atomicCAS(at, 0u, mark) == 0u; }
template <typename T> FN T shuffle_xor(T x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

namespace math {
#define BOTH(name, single, twice) \
    FN f32 name(f32 x) { return single(x); } \
    FN f64 name(f64 x) { return twice(x); }
BOTH(abs, fabsf, ::fabs)
BOTH(sqrt, sqrtf, ::sqrt)
BOTH(rsqrt, rsqrtf, ::rsqrt)
BOTH(exp, expf, ::exp)
BOTH(log, logf, ::log)
BOTH(log1p, log1pf, ::log1p)
BOTH(expm1, expm1f, ::expm1)
BOTH(sin, sinf, ::sin)
BOTH(cos, cosf, ::cos)
BOTH(tanh, tanhf, ::tanh)
BOTH(erf, erff, ::erf)
BOTH(floor, floorf, ::floor)
BOTH(ceil, ceilf, ::ceil)
BOTH(round, rintf, ::rint)
#undef BOTH
FN f32 pow(f32 x, f32 y) { return powf(x, y); }
FN f64 pow(f64 x, f64 y) { return ::pow(x, y); }

// Box and Muller's normal number of u in (0, 1] and v in [0, 1): in f64, as on the CPU.
FN f64 normal(f32 u, f32 v) { return ::sqrt(-2.0 * ::log(f64(u))) * ::cos(6.283185307179586 * v); }
}
