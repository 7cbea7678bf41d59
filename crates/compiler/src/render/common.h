// What both dialects share.

// ---- memory ----

// Moved as one: an access of up to 16 bytes.
template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };

template <int N, typename R, typename T> FN void load(THREAD R (&to)[N], DEVICE const T* from) {
    DEVICE const Pack<T, N>& all = *(DEVICE const Pack<T, N>*)from;
    const Pack<T, N> pack = all;
    for (i32 j = 0; j < N; ++j) to[j] = R(pack.at[j]);
}

template <int N, typename R, typename T> FN void store(DEVICE T* to, THREAD R (&from)[N]) {
    Pack<T, N> pack;
    for (i32 j = 0; j < N; ++j) pack.at[j] = T(from[j]);
    DEVICE Pack<T, N>& all = *(DEVICE Pack<T, N>*)to;
    all = pack;
}

// ---- scalar functions ----

namespace math {
template <typename T> FN T sign(T x) { return x > T(0) ? T(1) : x < T(0) ? T(-1) : x; }
template <typename T> FN T recip(T x) { return T(1) / x; }
template <typename T> FN T sqr(T x) { return x * x; }
template <typename T> FN T relu(T x) { return x < T(0) ? T(0) : x; }
template <typename T> FN T sigmoid(T x) { return T(1) / (T(1) + exp(-x)); }
template <typename T> FN T silu(T x) { return x / (T(1) + exp(-x)); }
template <typename T> FN T gelu(T x) { return T(0.5) * x * (T(1) + erf(x * T(0.7071067811865476))); }
template <typename T> FN T gelu_tanh(T x) {
    return T(0.5) * x * (T(1) + tanh(T(0.7978845608028654) * (x + T(0.044715) * x * x * x)));
}
// NaN if either is: every comparison with NaN fails.
template <typename T> FN T maximum(T a, T b) { return a > b || a != a ? a : b; }
template <typename T> FN T minimum(T a, T b) { return a < b || a != a ? a : b; }
}

// Integers wrap.
namespace integer {
FN i64 neg(i64 x) { return i64(u64(0) - u64(x)); }
FN i64 abs(i64 x) { return x < 0 ? neg(x) : x; }
FN i64 add(i64 a, i64 b) { return i64(u64(a) + u64(b)); }
FN i64 sub(i64 a, i64 b) { return i64(u64(a) - u64(b)); }
FN i64 mul(i64 a, i64 b) { return i64(u64(a) * u64(b)); }
FN i64 sqr(i64 x) { return mul(x, x); }
FN i64 div(i64 a, i64 b) { return b == 0 ? 0 : b == -1 ? neg(a) : a / b; }
FN i64 pow(i64 base, i64 exponent) {
    if (exponent < 0) return base == 1 ? 1 : base == -1 ? 1 - 2 * (exponent & 1) : 0;
    i64 power = 1;
    for (; exponent > 0; exponent >>= 1) {
        if (exponent & 1) power = mul(power, base);
        base = mul(base, base);
    }
    return power;
}
}

// Floats to integers: cut off, held within the range, NaN to 0.
template <typename T> FN i64 to_u8(T x) { return x > T(0) ? x < T(255) ? i64(x) : 255 : 0; }
template <typename T> FN i64 to_u32(T x) {
    return x > T(0) ? x < T(4294967295.0) ? i64(x) : 4294967295 : 0;
}
template <typename T> FN i64 to_i64(T x) {
    const i64 lowest = i64(u64(1) << 63);
    return x >= T(9223372036854775808.0) ? -(lowest + 1) : x > T(-9223372036854775808.0) ? i64(x) : x == x ? lowest : 0;
}

// ---- reductions ----

struct Sum {
    template <typename T> FN T of(T a, T x) { return a + x; }
    FN i64 of(i64 a, i64 x) { return integer::add(a, x); }
};
// A NaN on either side stays.
struct Max {
    template <typename T> FN T of(T a, T x) { return x > a || x != x ? x : a; }
};
struct Min {
    template <typename T> FN T of(T a, T x) { return x < a || x != x ? x : a; }
};

// Over the 32 lanes of a SIMD group, each of which gets the same bits.
template <typename Op, typename T> FN T simd_reduce(T x) {
    for (u32 mask = 16; mask > 0; mask >>= 1) x = Op::of(x, shuffle_xor(x, mask));
    return x;
}

// Over N values that lie a stride apart.
template <typename Op, i32 N, typename T> FN T fold(SHARED const T* from, i32 stride) {
    T x = from[0];
    for (i32 i = 1; i < N; ++i) x = Op::of(x, from[i * stride]);
    return x;
}

// Over a block of N SIMD groups.
template <typename Op, i32 N, typename T> FN T block_reduce(T x, SHARED u64* shared, u32 tid) {
    SHARED T* const part = (SHARED T*)shared;
    x = simd_reduce<Op>(x);
    if (tid % 32 == 0) part[tid / 32] = x;
    barrier();
    x = fold<Op, N>(part, 1);
    barrier();
    return x;
}

// Over the N threads of a column of a block that is WIDTH threads wide.
template <typename Op, i32 WIDTH, i32 N, typename T>
FN T column_reduce(T x, SHARED u64* shared, u32 tid) {
    SHARED T* const part = (SHARED T*)shared;
    part[tid] = x;
    barrier();
    x = fold<Op, N>(part + tid % WIDTH, WIDTH);
    barrier();
    return x;
}

// ---- random numbers ----

struct Words { u32 a, b, c, d; };

// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw 2011): block `at` of the stream.
FN Words philox(i64 seed, u32 stream, i64 at) {
    Words x = {u32(at), u32(u64(at) >> 32), stream, 0};
    u32 key0 = u32(seed), key1 = u32(u64(seed) >> 32);
    for (i32 round = 0; round < 10; ++round) {
        const u64 p = u64(0xD2511F53u) * x.a, q = u64(0xCD9E8D57u) * x.c;
        x = {u32(q >> 32) ^ x.b ^ key0, u32(q), u32(p >> 32) ^ x.d ^ key1, u32(p)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return x;
}

// A multiple of 2^-24 in [0, 1).
FN f32 unit(u32 word) { return f32(word >> 8) * (1.0f / 16777216.0f); }
FN f32 random_uniform(i64 seed, u32 stream, i64 at) { return unit(philox(seed, stream, at).a); }
FN auto random_normal(i64 seed, u32 stream, i64 at) -> decltype(math::normal(1.0f, 0.0f)) {
    const Words x = philox(seed, stream, at);
    return math::normal(1.0f - unit(x.a), unit(x.b));
}
