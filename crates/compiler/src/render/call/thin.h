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
// lie in shared memory, in the order in which they are read from there; while they are worked on, the next ones are on their way.

constexpr i32 DEPTH = 128, STEPS = DEPTH / 32, PITCH = 2 * DEPTH + 64;

// Where a row of 8 K columns begins: the rows 0, 1, 8, 9, 16, 17, 24 and 25 in different banks.
template <typename K> FN u32 term_row(i32 y) { return y * (2 * K::COLS + 16) + (y >> 3) * 32; }

template <typename K, typename T> FN void copy_few(u32 to, const T* w, typename K::I start, i32 tid) {
    constexpr i32 THREADS = 32 * K::ROW_GROUPS, N = K::COLS, PIECES = K::TERMS_SIDE_BY_SIDE ? DEPTH / 8 : N / 8;
    for (i32 at = tid; at < N * DEPTH / 8; at += THREADS) {
        const i32 y = at / PIECES, x = at % PIECES;
        const bool inside = start + (K::TERMS_SIDE_BY_SIDE ? 8 * x : y) < K::INNER;
        const T* const from = K::TERMS_SIDE_BY_SIDE ? w + (y * K::W_STEP + start + 8 * x) : w + ((start + y) * K::W_STEP + 8 * x);
        copy_async(to + (K::TERMS_SIDE_BY_SIDE ? y * PITCH : term_row<K>(y)) + 16 * x, inside ? from : w, inside);
    }
}

// Of 32 terms of 8 columns, what this lane multiplies: a pair for each half of two steps.
template <typename K> FN void few_pairs(u32 (&pair)[4], const u64* shared, u32 at, i32 step, i32 tile, i32 lane) {
    if (K::TERMS_SIDE_BY_SIDE) {
        const Eight all = *(const Eight*)((const u8*)shared + at + (8 * tile + lane / 4) * PITCH + 64 * step + lane % 4 * 16);
        for (i32 j = 0; j < 4; ++j) pair[j] = all.pair[j];
    } else {
        const i32 row = 32 * step + lane % 8 / 2 * 8 + lane % 2 + lane / 8 * 2;
        load_transposed(pair, shared_place(shared) + at + term_row<K>(row) + 16 * tile);
    }
}

template <typename K, typename T> FN void load_rows(Eight (&a)[STEPS][2], const T* x, typename K::I row, typename K::I start, i32 lane) {
#pragma unroll
    for (i32 i = 0; i < 2 * STEPS; ++i) {
        const typename K::I y = row + i % 2 * 8, k = start + i / 2 * 32 + lane % 4 * 8;
        a[i / 2][i % 2] = eight(x + (y * K::X_STEP + k), y < K::ROWS && k < K::INNER);
    }
}

template <typename K, typename T, typename OUT>
FN void rows_by_few(const T* x, const T* w, OUT* out, Thread t, u64* shared) {
    typedef typename K::I I;
    constexpr i32 N = K::COLS, TILES = N / 8, PARTS = K::PARTS, GROUPS = K::ROW_GROUPS, FEW = K::FEW_BYTES;
    const i32 lane = t.tid % 32, group = t.tid / 32 % GROUPS, part = t.tid / 32 / GROUPS, tid = t.tid % (32 * GROUPS);
    f32* const joined = (f32*)shared;
    const u32 place = shared_place(shared);
    after_predecessor();
    for (I block = t.block; block < K::BLOCKS; block += t.blocks) {
        const I row = (block * GROUPS + group) * 16 + lane / 4;
        f32 sum[TILES][4];
#pragma unroll
        for (i32 i = 0; i < TILES * 4; ++i) sum[i / 4][i % 4] = 0.0f;
        Eight a[STEPS][2], next[STEPS][2];
        u32 now = part * FEW;
        copy_few<K>(place + now, w, part * DEPTH, tid);
        load_rows<K>(a, x, row, part * DEPTH, lane);
        await_copies();
        barrier();
        for (I start = part * DEPTH, base = 0; base < K::INNER; base += PARTS * DEPTH) {
            start += PARTS * DEPTH;
            const u32 after = now < PARTS * FEW ? now + PARTS * FEW : now - PARTS * FEW;
            if (base + PARTS * DEPTH < K::INNER) {
                copy_few<K>(place + after, w, start, tid);
                load_rows<K>(next, x, row, start, lane);
            }
#pragma unroll
            for (i32 s = 0; s < STEPS; ++s) {
#pragma unroll
                for (i32 n = 0; n < TILES; ++n) {
                    u32 b[4];
                    few_pairs<K>(b, shared, now, s, n, lane);
#pragma unroll
                    for (i32 j = 0; j < 4; j += 2) {
                        const u32 left[4] = {a[s][0].pair[j], a[s][1].pair[j], a[s][0].pair[j + 1], a[s][1].pair[j + 1]};
                        multiply_add(sum[n], left, b[j], b[j + 1], T());
                    }
                }
            }
            await_copies();
            barrier();
            now = after;
#pragma unroll
            for (i32 i = 0; i < 2 * STEPS; ++i) a[i / 2][i % 2] = next[i / 2][i % 2];
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
// A block has 64 columns of the wide factor, 16 for each of its SIMD groups, and a share of the rows, of which 128 lie in shared memory: many
// blocks on a multiprocessor wait for each other's copies. A second kernel adds the shares' sums, in an order of its own that is always the same.

constexpr i32 WIDE = 64, ROWS = 128, WIDE_BYTES = 2 * WIDE;

template <typename K, typename T>
FN void copy_rows(u32 to, const T* x, const T* few, typename K::I first, typename K::I end, typename K::I column, i32 tid) {
    typedef typename K::I I;
    constexpr i32 N = K::COLS, FEW_BYTES = 2 * N + 16, PIECES = N / 8;
#pragma unroll
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
    constexpr i32 N = K::COLS, TILES = N / 8, FEW_BYTES = 2 * N + 16;
    const i32 lane = t.tid % 32, simd = t.tid / 32;
    // The rows of the matrices that this lane names.
    const i32 turned = lane % 8 + lane / 16 * 8, piece = simd * 2 + lane / 8 % 2;
    const u32 place = shared_place(shared);
    after_predecessor();
    for (I block = t.block; block < K::BLOCKS; block += t.blocks) {
        const I column = block % K::ACROSS * WIDE, share = block / K::ACROSS;
        const I start = share * K::SHARE, end = start + K::SHARE < K::INNER ? start + K::SHARE : K::INNER;
        f32 sum[TILES][4];
#pragma unroll
        for (i32 i = 0; i < TILES * 4; ++i) sum[i / 4][i % 4] = 0.0f;
        for (I first = start; first < end; first += ROWS) {
            copy_rows<K>(place, x, few, first, end, column, t.tid);
            await_copies();
            barrier();
#pragma unroll
            for (i32 k = 0; k < ROWS; k += 16) {
                u32 left[4];
                load_transposed(left, place + (k + turned) * WIDE_BYTES + ((piece ^ (turned & 7)) << 4));
#pragma unroll
                for (i32 n = 0; n < TILES; n += 2) {
                    u32 right[4];
                    load_transposed(right, place + ROWS * WIDE_BYTES + (k + lane % 16) * FEW_BYTES + (n + lane / 16) * 16);
                    multiply_add(sum[n], left, right[0], right[1], T());
                    multiply_add(sum[n + 1], left, right[2], right[3], T());
                }
            }
            barrier();
        }
        for (i32 i = 0; i < TILES * 2; ++i) {
            const I wide = column + simd * 16 + i % 2 * 8 + lane / 4;
            f32 pair[2] = {sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]};
            if (wide < K::WIDE_COLS) store(shares + ((share * K::WIDE_COLS + wide) * N + i / 2 * 8 + lane % 4 * 2), pair);
        }
    }
}

// Eight elements for a SIMD group, and four parts of their shares.
template <typename K, typename OUT> FN void add_shares(const f32* shares, OUT* out, Thread t) {
    typedef typename K::I I;
    const I lane = t.tid % 32;
    for (I first = (I(t.block) * K::BLOCK + t.tid) / 32 * 8; first < K::ELEMENTS; first += I(t.blocks) * (K::BLOCK / 4)) {
        const I i = first + lane % 8;
        f32 sum = 0.0f;
#pragma unroll 8
        for (I share = lane / 8; share < K::SHARES; share += 4) sum += shares[share * K::ELEMENTS + i];
        sum += shuffle_xor(sum, 8);
        sum += shuffle_xor(sum, 16);
        if (lane < 8) put_product<K>(out + (i / K::COLS * K::OUT_WIDE_STEP + i % K::COLS * K::OUT_STEP), sum);
    }
}
}
