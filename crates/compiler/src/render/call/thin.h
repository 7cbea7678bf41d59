// Products that sum over few, of 16-bit floats on tensor cores: LoRA's second one. They take the time to write the result.
//
// A SIMD group has 64 columns, and every SLICES-th tile of 16 rows. What it needs of b stays in registers. Columns are dealt to
// lanes so that one has 8 neighbours of a row in its sums: 16 bytes.
namespace thin {

// Elements k and k + 1 of a column of b, in one word.
template <typename K, typename T> FN u32 pair_at(const T* b, i32 k, i32 col) {
    if (k >= K::INNER) return 0;
    const T* const from = b + (typename K::I(K::B_START) + typename K::I(k) * K::B_ROW + typename K::I(col) * K::B_COL);
    return from[0].bits | u32(from[K::B_ROW].bits) << 16;
}

// 16 rows of a; zeros beyond it.
template <typename K, typename T> FN void ask_rows(u32 (&to)[K::WIDTH / 16][4], const T* a, i32 first, i32 lane) {
#pragma unroll
    for (i32 i = 0; i < K::WIDTH / 4; ++i) {
        const i32 row = first + i % 2 * 8 + lane / 4, k = i / 2 * 8 + lane % 4 * 2;
        to[i / 4][i % 4] = 0;
        if (row < K::ROWS && k < K::INNER) to[i / 4][i % 4] = *(const u32*)(a + (typename K::I(row) * K::A_ROW + k));
    }
}

template <typename T> FN void add_bias(f32 (&all)[8], const T* bias) {
    f32 more[8];
    load(more, bias);
#pragma unroll
    for (i32 j = 0; j < 8; ++j) all[j] += more[j];
}

template <typename K, typename T> FN void product(const T* a, const T* b, const T* bias, T* out, Thread t) {
    enum : i32 { STRIPS = K::COLS / 64, DEEP = K::WIDTH / 16 };
    const i32 lane = t.tid % 32, group = t.block * (K::BLOCK / 32) + t.tid / 32;
    const i32 strip = group % STRIPS * 64, slice = group / STRIPS;
    if (slice >= K::SLICES) return;
    u32 right[DEEP][8][2];
#pragma unroll
    for (i32 i = 0; i < DEEP * 16; ++i) {
        const i32 k = i / 16 * 16 + i % 2 * 8 + lane % 4 * 2, n = i / 2 % 8;
        right[i / 16][n][i % 2] = pair_at<K>(b, k, strip + n / 4 * 32 + lane / 8 * 8 + n % 4 * 2 + lane / 4 % 2);
    }
    u32 next[DEEP][4];
    ask_rows<K>(next, a, slice * 16, lane);
    for (i32 first = slice * 16; first < K::ROWS; first += K::SLICES * 16) {
        f32 sum[8][4];
#pragma unroll
        for (i32 i = 0; i < 32; ++i) sum[i / 4][i % 4] = 0.0f;
#pragma unroll
        for (i32 i = 0; i < DEEP * 8; ++i) multiply_add(sum[i % 8], next[i / 8], right[i / 8][i % 8][0], right[i / 8][i % 8][1], T());
        ask_rows<K>(next, a, first + K::SLICES * 16, lane);
#pragma unroll
        for (i32 i = 0; i < 4; ++i) {
            const i32 half = i / 2, row = first + half * 8 + lane / 4;
            if (row >= K::ROWS) continue;
            T* const to = out + (typename K::I(row) * K::OUT_ROW + strip + i % 2 * 32 + lane % 4 * 8);
            f32 all[8];
            if (K::ACCUMULATE) load(all, to);
#pragma unroll
            for (i32 j = 0; j < 8; ++j) {
                const f32 x = K::alpha() * sum[i % 2 * 4 + j / 2][half * 2 + j % 2];
                all[j] = K::ACCUMULATE ? all[j] + x : x;
            }
            if (bias) add_bias(all, bias + (strip + i % 2 * 32 + lane % 4 * 8));
            store(to, all);
        }
    }
}

template <typename K, typename T> FN void product(const T* a, const T* b, T* out, Thread t) {
    product<K>(a, b, (const T*)nullptr, out, t);
}

}
