// ---- products of few tiles ----
//
// A block makes 16 x 16 results. Each of its lanes has 4 x 4 of them, and a sixteenth of what is summed over: so a result of a few
// tiles keeps a device busy, whose time would else be that of one long sum.
namespace small {

enum : i32 { TILE = 16, PATCH = 4, LANES = TILE / PATCH * (TILE / PATCH) };

// How four by four elements of a factor are read: one by one, or four at a time along one of both.
enum : i64 { APART, ALONG_K, ACROSS_K };

// Elements (outer + i, k + j) of a factor; zeros beyond its extents.
template <i64 READS, i64 OUTER_STEP, i64 K_STEP, typename I, typename A, typename T>
FN void load_patch(DEVICE const T* from, I outer, I k, I outers, I depth, THREAD A (&to)[PATCH][PATCH]) {
    for (i32 i = 0; i < PATCH; ++i) {
        for (i32 j = 0; j < PATCH; ++j) to[i][j] = A(0);
    }
    from += outer * I(OUTER_STEP) + k * I(K_STEP);
    for (i32 i = 0; i < PATCH; ++i) {
        if (READS == ALONG_K) {
            if (outer + i < outers && k < depth) load(to[i], from + i * I(OUTER_STEP));
        } else if (READS == ACROSS_K) {
            A part[PATCH] = {A(0), A(0), A(0), A(0)};
            if (k + i < depth && outer < outers) load(part, from + i * I(K_STEP));
            for (i32 j = 0; j < PATCH; ++j) to[j][i] = part[j];
        } else {
            for (i32 j = 0; j < PATCH; ++j) {
                if (outer + i < outers && k + j < depth) to[i][j] = A(from[i * I(OUTER_STEP) + j * I(K_STEP)]);
            }
        }
    }
}

template <typename K, typename T>
FN void product(DEVICE const T* a, DEVICE const T* b, DEVICE const T* bias, DEVICE T* out, Thread t, SHARED u64* shared) {
    typedef typename K::I I;
    typedef typename K::A A;
    const i32 PARTS = i32(K::BLOCK) / LANES, GROUPS = K::BLOCK / 32, ACROSS = (i32(K::COLS) + TILE - 1) / TILE;
    SHARED A* const sums = (SHARED A*)shared; // [GROUPS][TILE][TILE]
    const i32 lane = t.tid % 32, own = lane % LANES, part = t.tid / LANES;
    const i32 row = own / (TILE / PATCH) * PATCH, col = own % (TILE / PATCH) * PATCH;
    for (i32 tile = t.block; tile < K::TILES; tile += t.blocks) {
        const I first_row = tile / ACROSS * TILE, first_col = tile % ACROSS * TILE;
        A sum[PATCH][PATCH];
        for (i32 i = 0; i < PATCH; ++i) {
            for (i32 j = 0; j < PATCH; ++j) sum[i][j] = A(0);
        }
#pragma unroll 4
        for (I k = part * PATCH; k < K::INNER; k += PARTS * PATCH) {
            A left[PATCH][PATCH], right[PATCH][PATCH];
            load_patch<K::A_READS, K::A_ROW, K::A_COL>(a + K::A_START, first_row + row, k, I(K::ROWS), I(K::INNER), left);
            load_patch<K::B_READS, K::B_COL, K::B_ROW>(b + K::B_START, first_col + col, k, I(K::COLS), I(K::INNER), right);
            for (i32 p = 0; p < PATCH; ++p) {
                for (i32 i = 0; i < PATCH; ++i) {
                    for (i32 j = 0; j < PATCH; ++j) sum[i][j] += left[i][p] * right[j][p];
                }
            }
        }
        for (i32 i = 0; i < PATCH; ++i) {
            for (i32 j = 0; j < PATCH; ++j) {
                const A both = sum[i][j] + shuffle_xor(sum[i][j], LANES);
                if (lane < LANES) sums[t.tid / 32 * TILE * TILE + (row + i) * TILE + col + j] = both;
            }
        }
        barrier();
        for (i32 i = t.tid; i < TILE * TILE; i += K::BLOCK) {
            const I to_row = first_row + i / TILE, to_col = first_col + i % TILE;
            if (to_row < K::ROWS && to_col < K::COLS) {
                put_product<K>(out + (K::OUT_START + to_row * I(K::OUT_ROW)), bias, to_col, fold<Sum, GROUPS>(sums + i, TILE * TILE));
            }
        }
        barrier();
    }
}

template <typename K, typename T>
FN void product(DEVICE const T* a, DEVICE const T* b, DEVICE T* out, Thread t, SHARED u64* shared) {
    product<K>(a, b, (DEVICE const T*)nullptr, out, t, shared);
}

}
