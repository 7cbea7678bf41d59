// Metal Shading Language 3.1: types, qualifiers and what the device computes by itself.

#include <metal_stdlib>
using namespace metal;

#define FN static inline
#define TABLE constant
#define DEVICE device
#define SHARED threadgroup
#define THREAD thread

typedef uchar u8;
typedef ushort u16;
typedef uint u32;
typedef ulong u64;
typedef int i32;
typedef long i64;
typedef float f32;
typedef half f16;
typedef bfloat bf16;

FN f32 f16_of_bits(u16 bits) { return f32(as_type<half>(bits)); }
FN f32 f32_of_bits(u32 bits) { return as_type<float>(bits); }
#define INF f32_of_bits(0x7f800000u)

// Barriers between commands wait for those before; memory comes when it is read.
FN void after_predecessor() {}
struct Predecessor {
    void operator()() const {}
};
typedef Predecessor Waited;

FN void barrier() { threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device); }
// Whether this thread is the first one to put `mark` in the place of 0.
FN bool claim(device u32* at, u32 mark) {
    device atomic_uint* const word = (device atomic_uint*)at;
    for (u32 before = 0; before == 0;) {
        // May fail for no reason.
        if (atomic_compare_exchange_weak_explicit(word, &before, mark, memory_order_relaxed, memory_order_relaxed)) return true;
    }
    return false;
}
FN f32 shuffle_xor(f32 x, u32 mask) { return simd_shuffle_xor(x, ushort(mask)); }
// Shuffles move 32 bits at most.
FN i64 shuffle_xor(i64 x, u32 mask) {
    const u32 low = simd_shuffle_xor(u32(x), ushort(mask));
    const u32 high = simd_shuffle_xor(u32(u64(x) >> 32), ushort(mask));
    return i64(u64(high) << 32 | low);
}

namespace math {
FN f32 abs(f32 x) { return metal::fabs(x); }
FN f32 sqrt(f32 x) { return metal::precise::sqrt(x); }
FN f32 rsqrt(f32 x) { return metal::precise::rsqrt(x); }
FN f32 exp(f32 x) { return metal::precise::exp(x); }
FN f32 log(f32 x) { return metal::precise::log(x); }
FN f32 sin(f32 x) { return metal::precise::sin(x); }
FN f32 cos(f32 x) { return metal::precise::cos(x); }
FN f32 tanh(f32 x) { return metal::precise::tanh(x); }
FN f32 pow(f32 x, f32 y) { return metal::precise::pow(x, y); }
FN f32 floor(f32 x) { return metal::floor(x); }
FN f32 ceil(f32 x) { return metal::ceil(x); }
FN f32 round(f32 x) { return metal::rint(x); }

// Metal has no log1p, expm1 and erf. The first two by Kahan: the rounding of 1 + x, and of exp(x),
// is undone by the quotient.
FN f32 log1p(f32 x) {
    const f32 u = 1.0f + x;
    return u == 1.0f || x == INF ? x : log(u) * (x / (u - 1.0f));
}
FN f32 expm1(f32 x) {
    const f32 u = exp(x);
    if (u == 1.0f) return x;
    return u == 0.0f || u == INF ? u - 1.0f : (u - 1.0f) * (x / log(u));
}

// Within 4 ulp: the polynomials of the CPU's erf.
FN f32 erf(f32 x) {
    const f32 a = abs(x), s = x * x, t = a > 4.0f ? 4.0f : a;
    f32 p = -9.673591e-6f;
    p = p * s + 1.1268254e-4f;
    p = p * s - 8.4843966e-4f;
    p = p * s + 5.2210534e-3f;
    p = p * s - 2.6865438e-2f;
    p = p * s + 1.1283783e-1f;
    p = p * s - 3.7612638e-1f;
    p = p * s + 1.1283792f;
    f32 q = 1.615045e-6f;
    q = q * t - 4.561102e-5f;
    q = q * t + 5.9295054e-4f;
    q = q * t - 4.741118e-3f;
    q = q * t + 2.6367415e-2f;
    q = q * t - 1.099833e-1f;
    q = q * t - 6.3193133e-1f;
    q = q * t - 1.1301703f;
    q = q * t + 3.041768e-4f;
    return a >= 1.0f ? copysign(1.0f - exp(q), x) : x * p;
}

// Box and Muller's normal number of u in (0, 1] and v in [0, 1).
FN f32 normal(f32 u, f32 v) { return sqrt(-2.0f * log(u)) * metal::precise::cospi(2.0f * v); }
}
