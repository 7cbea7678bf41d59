// Products of 16-bit factors with a thin side, as LoRA's, on tensor cores (see mma.h): what they take is the time to read the wide factor,
// which is read once.

namespace thin {
// A row's 8 elements, as four pairs.
struct alignas(16) Eight { u32 pair[4]; };

template <typename T> FN Eight eight(const T* at, bool inside) {
    Eight all = {{0, 0, 0, 0}};
    if (inside) all = *(const Eight*)at;
    return all;
}

// ---- many rows times a few columns: [M, K] times [K, N] ----
//
// A block has ROW_GROUPS times 16 rows, and PARTS of the sums' terms. The order of the terms is free: of 32 neighbours in a row, lane l has the
// 8 from 8 (l % 4) on, the first four of which are of one step of the tensor core, and the others of the next. Of the few columns, DEPTH terms
// lie in shared memory, column after column.

constexpr i32 DEPTH = 128, PITCH = DEPTH + 32;

template <typename K, typename T> FN void copy_few(T* to, const T* w, typename K::I start, i32 tid) {
    constexpr i32 THREADS = 32 * K::ROW_GROUPS, N = K::COLS, PIECES = N / 8;
    if (K::TERMS_SIDE_BY_SIDE) {
        for (i32 at = tid; at < N * DEPTH / 8; at += THREADS) {
            const i32 y = at / (DEPTH / 8), x = at % (DEPTH / 8) * 8;
            *(Eight*)(to + y * PITCH + x) = eight(w + (y * K::W_STEP + start + x), start + x < K::INNER);
        }
        return;
    }
    // Two terms of eight columns.
    for (i32 at = tid; at < PIECES * DEPTH / 2; at += THREADS) {
        const i32 y = at / PIECES * 2, x = at % PIECES * 8;
        const T* const from = w + ((start + y) * K::W_STEP + x);
        const Eight a = eight(from, start + y < K::INNER), b = eight(from + K::W_STEP, start + y + 1 < K::INNER);
        for (i32 j = 0; j < 4; ++j) {
            *(u32*)(to + (x + 2 * j) * PITCH + y) = (a.pair[j] & 0xffff) | b.pair[j] << 16;
            *(u32*)(to + (x + 2 * j + 1) * PITCH + y) = a.pair[j] >> 16 | (b.pair[j] & 0xffff0000);
        }
    }
}

template <typename K, typename T, typename OUT>
FN void rows_by_few(const T* x, const T* w, OUT* out, Thread t, u64* shared) {
    typedef typename K::I I;
    constexpr i32 N = K::COLS, TILES = N / 8, STEPS = DEPTH / 32, PARTS = K::PARTS, GROUPS = K::ROW_GROUPS;
    const i32 lane = t.tid % 32, group = t.tid / 32 % K::ROW_GROUPS, part = t.tid / 32 / K::ROW_GROUPS;
    T* const few = (T*)shared + part * (N * PITCH);
    f32* const joined = (f32*)shared;
    after_predecessor();
    for (I block = t.block; block < K::BLOCKS; block += t.blocks) {
        const I row = (block * GROUPS + group) * 16 + lane / 4;
        f32 sum[TILES][4];
#pragma unroll
        for (i32 i = 0; i < TILES * 4; ++i) sum[i / 4][i % 4] = 0.0f;
        for (I base = 0; base < K::INNER; base += PARTS * DEPTH) {
            const I start = base + part * DEPTH;
            Eight a[STEPS][2];
#pragma unroll
            for (i32 i = 0; i < 2 * STEPS; ++i) {
                const I y = row + i % 2 * 8, k = start + i / 2 * 32 + lane % 4 * 8;
                a[i / 2][i % 2] = eight(x + (y * K::X_STEP + k), y < K::ROWS && k < K::INNER);
            }
            copy_few<K>(few, w, start, t.tid % (32 * K::ROW_GROUPS));
            barrier();
#pragma unroll
            for (i32 s = 0; s < STEPS; ++s) {
#pragma unroll
                for (i32 n = 0; n < TILES; ++n) {
                    const Eight b = *(const Eight*)(few + (8 * n + lane / 4) * PITCH + 32 * s + lane % 4 * 8);
#pragma unroll
                    for (i32 j = 0; j < 4; j += 2) {
                        const u32 left[4] = {a[s][0].pair[j], a[s][1].pair[j], a[s][0].pair[j + 1], a[s][1].pair[j + 1]};
                        multiply_add(sum[n], left, b.pair[j], b.pair[j + 1], T());
                    }
                }
            }
            barrier();
        }
        if (PARTS > 1) {
            f32* const own = joined + (part * GROUPS + group) * (TILES * 128) + lane;
            for (i32 i = 0; i < TILES * 4; ++i) own[i * 32] = sum[i / 4][i % 4];
            barrier();
            for (i32 p = 1; p < PARTS && part == 0; ++p) {
                for (i32 i = 0; i < TILES * 4; ++i) sum[i / 4][i % 4] += own[(p * GROUPS * TILES * 4 + i) * 32];
            }
            barrier();
        }
        for (i32 i = 0; i < TILES * 2 && part == 0; ++i) {
            const I y = row + i % 2 * 8;
            if (y >= K::ROWS) continue;
            OUT* const to = out + (y * K::OUT_STEP + i / 2 * 8 + lane % 4 * 2);
            f32 pair[2] = {0.0f, 0.0f};
            if (K::ACCUMULATE) load(pair, to);
            for (i32 j = 0; j < 2; ++j) pair[j] += K::alpha() * sum[i / 2][i % 2 * 2 + j];
            store(to, pair);
        }
    }
}

// ---- a few columns of sums over many rows: [M, W] transposed times [M, N] ----
//
// A block has 64 columns of the wide factor, 16 for each of its SIMD groups, and a share of the rows, of which 64 lie in shared memory while
// the next ones are on their way. A second kernel adds the shares' sums, in order.

constexpr i32 WIDE = 64, ROWS = 64, WIDE_BYTES = 2 * WIDE;

template <typename K, typename T>
FN void copy_rows(u32 to, const T* x, const T* few, typename K::I first, typename K::I end, typename K::I column, i32 tid) {
    typedef typename K::I I;
    constexpr i32 N = K::COLS, FEW_BYTES = 2 * N + 16, PIECES = N / 8;
    for (i32 at = tid; at < ROWS * 8; at += 128) {
        const i32 y = at / 8, piece = at % 8;
        const bool inside = first + y < end && column + piece * 8 < K::WIDE_COLS;
        const I from = inside ? (first + y) * K::X_STEP + column + piece * 8 : 0;
        copy_async(to + y * WIDE_BYTES + ((piece ^ (y & 7)) << 4), x + from, inside);
    }
    for (i32 at = tid; at < ROWS * PIECES; at += 128) {
        const i32 y = at / PIECES, piece = at % PIECES;
        const bool inside = first + y < end;
        const I from = inside ? (first + y) * K::W_STEP + piece * 8 : 0;
        copy_async(to + ROWS * WIDE_BYTES + y * FEW_BYTES + piece * 16, few + from, inside);
    }
}

template <typename K, typename T>
FN void columns_by_few(const T* x, const T* few, f32* shares, Thread t, u64* shared) {
    typedef typename K::I I;
    constexpr i32 N = K::COLS, TILES = N / 8, FEW_BYTES = 2 * N + 16, STAGE = ROWS * (WIDE_BYTES + FEW_BYTES);
    const i32 lane = t.tid % 32, simd = t.tid / 32;
    // The rows of the matrices that this lane names.
    const i32 turned = lane % 8 + lane / 16 * 8, piece = simd * 2 + lane / 8 % 2;
    after_predecessor();
    for (I block = t.block; block < K::BLOCKS; block += t.blocks) {
        const I column = block % K::ACROSS * WIDE, share = block / K::ACROSS;
        const I start = share * K::SHARE, end = start + K::SHARE < K::INNER ? start + K::SHARE : K::INNER;
        f32 sum[TILES][4];
#pragma unroll
        for (i32 i = 0; i < TILES * 4; ++i) sum[i / 4][i % 4] = 0.0f;
        u32 now = shared_place(shared), next = now + STAGE;
        copy_rows<K>(now, x, few, start, end, column, t.tid);
        await_copies();
        barrier();
        for (I first = start; first < end; first += ROWS) {
            if (first + ROWS < end) copy_rows<K>(next, x, few, first + ROWS, end, column, t.tid);
#pragma unroll
            for (i32 k = 0; k < ROWS; k += 16) {
                u32 left[4];
                load_transposed(left, now + (k + turned) * WIDE_BYTES + ((piece ^ (turned & 7)) << 4));
#pragma unroll
                for (i32 n = 0; n < TILES; n += 2) {
                    u32 right[4];
                    load_transposed(right, now + ROWS * WIDE_BYTES + (k + lane % 16) * FEW_BYTES + (n + lane / 16) * 16);
                    multiply_add(sum[n], left, right[0], right[1], T());
                    multiply_add(sum[n + 1], left, right[2], right[3], T());
                }
            }
            await_copies();
            barrier();
            const u32 done = now;
            now = next;
            next = done;
        }
        for (i32 i = 0; i < TILES * 2; ++i) {
            const I wide = column + simd * 16 + i % 2 * 8 + lane / 4;
            f32 pair[2] = {sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]};
            if (wide < K::WIDE_COLS) store(shares + ((share * K::WIDE_COLS + wide) * N + i / 2 * 8 + lane % 4 * 2), pair);
        }
    }
}

template <typename K, typename OUT> FN void add_shares(const f32* shares, OUT* out, Thread t) {
    typedef typename K::I I;
    EACH(i, K::ELEMENTS) {
        f32 sum = 0.0f;
        for (I share = 0; share < K::SHARES; ++share) sum += shares[share * K::ELEMENTS + i];
        put_product<K>(out + (i / K::COLS * K::OUT_WIDE_STEP + i % K::COLS * K::OUT_STEP), sum);
    }
}
}
