// Products with a thin side, of 16-bit floats on tensor cores: LoRA's. They take the time to read or to write what is not thin.
namespace thin {

// A row of a factor is taken in pieces of so many elements, 128 bytes.
enum : i32 { PIECE = 64 };

// ---- few columns ----
//
// A block has GROUPS x 16 rows. SPLIT SIMD groups share 16 of them: of every SPLIT pieces of a row, each has one, for which it
// asks two steps before it is multiplied. A lane reads 16 bytes of a row at once, so a product of 16 pairs (h, p) takes, of
// every piece, the elements 32 h + 8 (lane % 4) + 4 p + {0, 1, 2, 3}: a sum may be added up in any order that both factors have.

// A lane's part of a piece, of rows lane / 4 and lane / 4 + 8: by row, and h.
struct Part { Pack<u32, 4> at[2][2]; };

template <typename K, typename T> FN void ask(const T* a, i32 row, i32 k, i32 lane, Part& part) {
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
        const i32 y = row + i / 2 * 8 + lane / 4;
        part.at[i / 2][i % 2] = Pack<u32, 4>{0, 0, 0, 0};
        if (y < K::ROWS && k < K::INNER) {
            const T* const from = a + (typename K::I(y) * K::A_ROW + k + i % 2 * 32 + lane % 4 * 8);
            part.at[i / 2][i % 2] = *(const Pack<u32, 4>*)from;
        }
    }
}

// Where row k of a piece of b lies, if its rows do: so that those that are taken together follow each other.
FN i32 order(i32 k) { return (k & 33) | (k & 6) << 2 | (k >> 2 & 6); }

// SPLIT pieces of b, from row `first` on; zeros beyond it.
template <typename K, typename T> FN void copy_pieces(u32 to, const T* b, i32 first, i32 tid) {
    const i32 rows = K::SPLIT * PIECE, runs = K::B_BY_ROWS ? K::WIDTH / 8 : rows / 8;
    for (i32 i = tid; i < rows * K::WIDTH / 8; i += K::BLOCK) {
        const i32 line = i / runs, run = i % runs;
        const i32 k = K::B_BY_ROWS ? line : 8 * run, col = K::B_BY_ROWS ? 8 * run : line;
        const i32 inner = K::B_BY_ROWS ? order(k % PIECE) * K::PITCH + 2 * col : col * K::PITCH + k % PIECE * 2;
        const bool inside = first + k < K::INNER && col < K::COLS;
        const T* const from = b + (inside ? typename K::I(first + k) * K::B_ROW + typename K::I(col) * K::B_COL : 0);
        copy_async(to + k / PIECE * K::PIECE_BYTES + inner, from, inside);
    }
}

// Of 16 columns from `tile * 16` on: pairs of two tiles of 8, two words each.
template <typename K> FN void factor(u32 (&to)[4], const u8* piece, i32 h, i32 p, i32 tile, i32 lane) {
    if (K::B_BY_ROWS) {
        const i32 row = 32 * h + 16 * p + lane % 16;
        load_transposed(to, shared_place(piece + row * K::PITCH + 32 * tile + lane / 16 * 16));
        return;
    }
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
        const u8* const from = piece + (16 * tile + 8 * i + lane / 4) * K::PITCH + 64 * h + lane % 4 * 16 + 8 * p;
        const Pack<u32, 2> words = *(const Pack<u32, 2>*)from;
        to[2 * i] = words.at[0];
        to[2 * i + 1] = words.at[1];
    }
}

template <typename K, typename T> FN void multiply(f32 (&sum)[K::WIDTH / 8][4], const Part& part, const u8* piece, i32 lane, T type) {
#pragma unroll
    for (i32 i = 0; i < 4; ++i) {
        const i32 h = i / 2, p = i % 2;
        const u32 left[4] = {
            part.at[0][h].at[2 * p], part.at[1][h].at[2 * p], part.at[0][h].at[2 * p + 1], part.at[1][h].at[2 * p + 1],
        };
#pragma unroll
        for (i32 tile = 0; tile < K::WIDTH / 16; ++tile) {
            u32 right[4];
            factor<K>(right, piece, h, p, tile, lane);
            multiply_add(sum[2 * tile], left, right[0], right[1], type);
            multiply_add(sum[2 * tile + 1], left, right[2], right[3], type);
        }
    }
}

// The sums of the groups that share rows, added up in their order.
template <typename K, typename T> FN void write(T* out, const f32 (&sum)[K::WIDTH / 8][4], i32 first, i32 tid, f32* parts) {
    const i32 lane = tid % 32, group = tid / 32, rows = K::GROUPS * 16, size = rows * K::WIDTH;
    f32* const own = parts + group % K::SPLIT * size + group / K::SPLIT * 16 * K::WIDTH;
#pragma unroll
    for (i32 i = 0; i < K::WIDTH / 2; ++i) {
        const i32 row = i / 2 % 2 * 8 + lane / 4, col = i / 4 * 8 + lane % 4 * 2 + i % 2;
        own[row * K::WIDTH + col] = sum[i / 4][i % 4];
    }
    barrier();
    for (i32 i = tid; i < rows * K::COLS / 2; i += K::BLOCK) {
        const i32 row = i / (K::COLS / 2), col = i % (K::COLS / 2) * 2;
        if (first + row >= K::ROWS) continue;
        f32 all[2] = {0, 0};
        for (i32 part = 0; part < K::SPLIT; ++part) {
            all[0] += parts[part * size + row * K::WIDTH + col];
            all[1] += parts[part * size + row * K::WIDTH + col + 1];
        }
        T* const to = out + (typename K::I(first + row) * K::OUT_ROW + col);
        for (i32 j = 0; j < 2; ++j) all[j] = K::alpha() * all[j] + (K::ACCUMULATE ? f32(to[j]) : 0.0f);
        store(to, all);
    }
}

template <typename K, typename T> FN void few_columns(const T* a, const T* b, T* out, Thread t, u64* shared) {
    enum : i32 { STEP = K::SPLIT * PIECE, STEPS = (K::INNER + STEP - 1) / STEP, STEP_BYTES = K::SPLIT * K::PIECE_BYTES };
    const i32 lane = t.tid % 32, group = t.tid / 32, own = group % K::SPLIT * PIECE;
    const i32 first = t.block * K::GROUPS * 16, row = first + group / K::SPLIT * 16;
    u8* const pieces = (u8*)shared;
    f32 sum[K::WIDTH / 8][4];
    for (i32 i = 0; i < K::WIDTH / 2; ++i) sum[i / 4][i % 4] = 0.0f;
    Part part[2];
    ask<K>(a, row, own, lane, part[0]);
    ask<K>(a, row, STEP + own, lane, part[1]);
    copy_pieces<K>(shared_place(pieces), b, 0, t.tid);
    for (i32 step = 0; step < STEPS; step += 2) {
#pragma unroll
        for (i32 s = 0; s < 2; ++s) {
            const i32 now = step + s;
            if (now == STEPS) break;
            await_copies();
            barrier();
            if (now + 1 < STEPS) copy_pieces<K>(shared_place(pieces + (1 - s) * STEP_BYTES), b, (now + 1) * STEP, t.tid);
            multiply<K>(sum, part[s], pieces + s * STEP_BYTES + own / PIECE * K::PIECE_BYTES, lane, T());
            ask<K>(a, row, (now + 2) * STEP + own, lane, part[s]);
        }
    }
    barrier();
    write<K>(out, sum, first, t.tid, (f32*)shared);
}

// ---- few to sum over ----
//
// A SIMD group has 64 columns, and every SLICES-th tile of 16 rows. What it needs of b stays in registers. Columns are dealt to
// lanes so that one has 8 neighbours of a row in its sums: 16 bytes.

// Of 16 pairs: elements k and k + 1 of b's column, in one word.
template <typename K, typename T> FN u32 pair_at(const T* b, i32 k, i32 col) {
    if (k >= K::INNER) return 0;
    const T* const from = b + (typename K::I(k) * K::B_ROW + typename K::I(col) * K::B_COL);
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

template <typename K, typename T> FN void few_inner(const T* a, const T* b, T* out, Thread t) {
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
            store(to, all);
        }
    }
}

}
