// Products of tiles of 16-bit floats on tensor cores, for flash.h.
//
// A tile lies in shared memory as columns of 64 features, one after the other, whose rows are 8 pieces of 16 bytes: their number
// is turned by the row's, so that eight rows are read without a conflict. Places of tiles are multiples of 1024 bytes.
//
// SIMD groups multiply by themselves (mma.h), or, if S::WGMMA, the four of a block together (wgmma.h): then each has one tile of 16
// rows, and products run on until `finish`. Both factors of scores are read from shared memory then: left ones that are loaded into
// registers at each turn were no faster on an H100, and ptxas 12.9 and 13 lost some of those that were kept from turn to turn.
//
// Of a tile of 16 x 8 sums, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.

namespace flash {
// In a tile of N rows.
template <i32 N> FN u32 piece(i32 row, i32 number) {
    return number / 8 * (N * 128) + row * 128 + ((number % 8 ^ (row & 7)) << 4);
}
// The place 2 k pieces further on than one of the first two.
template <i32 N> FN u32 pieces_on(u32 place, i32 k) { return (place ^ (k % 4 * 32)) + k / 4 * (N * 128); }

// Of the matrices that a SIMD group loads, the row that this lane names: piece lane / 16 of row lane % 16; or, of four that are to be
// the right factor of a product with their transpose, piece lane / 8 % 2 of row lane % 8 + lane / 16 * 8.
FN u32 lane_piece(i32 lane) { return piece<0>(lane % 16, lane / 16); }
FN u32 lane_piece_turned(i32 lane) { return piece<0>(lane / 16 * 8 + lane % 8, lane / 8 % 2); }

// Before the next copies: all that were begun have ended, of all threads.
template <typename S> FN void share_copies() {
    await_copies();
    if constexpr (S::WGMMA) publish();
    barrier();
}

// Eight tiles of sums from this one on.
FN f32 (&slice(f32 (&first)[4]))[8][4] { return reinterpret_cast<f32 (&)[8][4]>(first); }

// s = a bT over the features: of a, a tile of A rows, the SIMD group's own 16 M rows from `own` on; b is a tile of 8 N rows.
template <typename S, i32 A, i32 M, i32 N> FN void products(f32 (&s)[M][N][4], u32 a, i32 own, u32 b, i32 lane) {
    if constexpr (S::WGMMA) {
        settled(s[0]);
        begin_products();
#pragma unroll
        for (i32 k = 0; k < S::D / 16; ++k) {
            const u64 left = factor_at(pieces_on<A>(a, k)), right = factor_at(pieces_on<8 * N>(b, k));
            multiply_together(s[0], left, right, k > 0, typename S::T());
        }
        end_products();
        return;
    }
#pragma unroll
    for (i32 i = 0; i < M * N * 4; ++i) s[i / (4 * N)][i / 4 % N][i % 4] = 0.0f;
    const u32 left_place = a + own * 128 + lane_piece(lane), right_place = b + lane_piece_turned(lane);
#pragma unroll
    for (i32 k = 0; k < S::D / 16; ++k) {
        u32 left[M][4];
#pragma unroll
        for (i32 m = 0; m < M; ++m) load_matrices(left[m], pieces_on<A>(left_place, k) + 16 * m * 128);
#pragma unroll
        for (i32 n = 0; n < N; n += 2) {
            u32 right[4];
            load_matrices(right, pieces_on<8 * N>(right_place, k) + 8 * n * 128);
#pragma unroll
            for (i32 m = 0; m < M; ++m) {
                multiply_add(s[m][n], left[m], right[0], right[1], typename S::T());
                multiply_add(s[m][n + 1], left[m], right[2], right[3], typename S::T());
            }
        }
    }
}

// 16 columns of p, from tile n on, as a left factor.
template <typename T, i32 N> FN void narrow(u32 (&left)[4], const f32 (&p)[N][4], i32 n) {
#pragma unroll
    for (i32 i = 0; i < 4; ++i) left[i] = pair_of(p[n + i / 2][i % 2 * 2], p[n + i / 2][i % 2 * 2 + 1], T());
}

// sums += p y: y is a tile of 8 N rows.
template <typename S, i32 M, i32 N, i32 F> FN void add_products(f32 (&sums)[M][F][4], const f32 (&p)[M][N][4], u32 y, i32 lane) {
    if constexpr (S::WGMMA) {
        u32 left[N / 2][4];
#pragma unroll
        for (i32 n = 0; n < N / 2; ++n) narrow<typename S::T>(left[n], p[0], 2 * n);
        settled(left);
        settled(sums[0]);
        begin_products();
#pragma unroll
        for (i32 n = 0; n < N / 2; ++n) {
#pragma unroll
            for (i32 f = 0; f < F; f += 8) {
                const u64 right = factor_at(y + f / 8 * (8 * N * 128) + n * (16 * 128));
                multiply_turned(slice(sums[0][f]), left[n], right, typename S::T());
            }
        }
        end_products();
        return;
    }
    y += lane_piece(lane);
#pragma unroll
    for (i32 n = 0; n < N; n += 2) {
        u32 left[M][4];
#pragma unroll
        for (i32 m = 0; m < M; ++m) narrow<typename S::T>(left[m], p[m], n);
#pragma unroll
        for (i32 f = 0; f < F; f += 2) {
            u32 right[4];
            load_transposed(right, pieces_on<8 * N>(y, f / 2) + 8 * n * 128);
#pragma unroll
            for (i32 m = 0; m < M; ++m) {
                multiply_add(sums[m][f], left[m], right[0], right[1], typename S::T());
                multiply_add(sums[m][f + 1], left[m], right[2], right[3], typename S::T());
            }
        }
    }
}

// Until all products but the last LEFT have ended: these are their sums.
template <typename S, i32 LEFT, i32 M, i32 N> FN void finish(f32 (&sums)[M][N][4]) {
    if constexpr (S::WGMMA) {
        await_products<LEFT>();
        settled(sums[0]);
    }
}

template <i32 M, i32 F> FN void clear(f32 (&sums)[M][F][4]) {
#pragma unroll
    for (i32 i = 0; i < M * F * 4; ++i) sums[i / (4 * F)][i / 4 % F][i % 4] = 0.0f;
}
}
