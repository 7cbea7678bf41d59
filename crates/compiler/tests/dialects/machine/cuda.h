// What NVRTC knows without a header, for a C++ compiler.

#pragma once

#include "machine.h"
#include "tensor_cores.h"

#include <cmath>

#define __global__
#define __device__
#define __shared__
#define __align__(bytes)
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index { unsigned x; };
#define threadIdx (Index{machine::ids().tid})
#define blockIdx (Index{machine::ids().block})
#define gridDim (Index{machine::ids().blocks})

TOGETHER inline void __syncthreads() { machine::barrier(); }
template <typename T> TOGETHER T __shfl_xor_sync(unsigned, T x, unsigned mask) { return machine::shuffle_xor(x, mask); }

inline unsigned atomicCAS(unsigned* at, unsigned expected, unsigned desired) {
    return machine::compare_exchange(at, expected, desired);
}

inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, sizeof x); return x; }
inline double __longlong_as_double(long long bits) { double x; std::memcpy(&x, &bits, sizeof x); return x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

// The conversions that are instructions: to nearest even, NaN to NaN.
inline float f16_to_f32(unsigned short bits) { _Float16 x; std::memcpy(&x, &bits, sizeof x); return float(x); }
inline unsigned short f32_to_f16(float x) {
    const _Float16 rounded = _Float16(x);
    unsigned short bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return bits;
}
inline unsigned short f32_to_bf16(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// What `mma.h` says in PTX.
using machine::await_copies;
using machine::copy_async;
using machine::copy_word_async;
using machine::shared_place;
inline void load_matrices(unsigned (&to)[4], unsigned row) { machine::load_matrices(to, row, false); }
inline void load_transposed(unsigned (&to)[4], unsigned row) { machine::load_matrices(to, row, true); }
template <typename T> machine::Half kind_of() { return T(1.0f).bits == 0x3c00 ? machine::Half::F16 : machine::Half::BF16; }
template <typename T> void multiply_add(float (&to)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, T) {
    machine::multiply_add(to, a, b0, b1, kind_of<T>());
}
template <typename T> unsigned pair_of(float a, float b, T) { return unsigned(T(a).bits) | unsigned(T(b).bits) << 16; }
inline float power_of_2(float x) { return exp2f(x); }
TOGETHER inline void simd_barrier() { machine::shuffle_xor(0u, 0); }

// What `wgmma.h` says in PTX: here, products have ended when they are asked for.
inline void publish() {}
inline void begin_products() {}
inline void end_products() {}
template <int LEFT> void await_products() {}
template <typename T, int N> void settled(T (&)[N][4]) {}
inline unsigned long long factor_at(unsigned place) {
    return (unsigned long long)(place >> 4 & 0x3fff) | 64ull << 32 | 1ull << 62;
}
template <typename T> void multiply_together(float (&to)[8][4], unsigned long long a, unsigned long long b, bool add, T) {
    for (unsigned n = 0; n < 8; ++n) {
        if (!add) for (float& x : to[n]) x = 0.0f;
        machine::multiply_tile(to[n], machine::Factor(a, false), machine::Factor(b, false), n, kind_of<T>());
    }
}
template <typename T>
TOGETHER void multiply_turned(float (&to)[8][4], const unsigned (&a)[4], unsigned long long b, T) {
    for (unsigned n = 0; n < 8; ++n) machine::multiply_tile(to[n], a, machine::Factor(b, true), n, kind_of<T>());
}
