// Attention on tensor cores, after FlashAttention-2 (Dao 2023), for 16-bit floats. Rows are as in attention.h.
//
// A block has 4 SIMD groups; each has a quarter of a tile's rows (of its keys, in the keys' kernel), in tiles of 16. Tiles lie in shared
// memory as rows of D elements, in pieces of 16 bytes whose number is turned by the row's, so that eight rows are read without a conflict.
// While one tile is worked on, the next one is on its way.
//
// Of a tile of 16 x 8 sums, lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.

namespace flash {
template <i32 WIDTH> FN u32 piece_of(i32 row, i32 number) { return row * (2 * WIDTH) + ((number ^ (row & 7)) << 4); }
template <typename S> FN u32 piece(i32 row, i32 number) { return piece_of<S::D>(row, number); }

// N rows of a key head from `first` on; zeros beyond the last.
template <typename S, typename X, i32 N>
FN void copy_rows(u32 to, const typename S::T* from, i32 b, i32 head, i32 first, i32 tid) {
    enum : i32 { PIECES = S::D / 8 };
#pragma unroll
    for (i32 i = 0; i < N * PIECES / S::THREADS; ++i) {
        const i32 at = i * S::THREADS + tid, y = at / PIECES, x = at % PIECES;
        const bool inside = first + y < S::LEN;
        const i32 row = inside ? first + y : 0;
        copy_async(to + piece<S>(y, x), from + X::at(b, row / S::GROUP, head * S::GROUP + row % S::GROUP, 8 * x), inside);
    }
}

// N keys from `keys.start` on; zeros from `keys.end` on.
template <typename S, typename X, i32 N>
FN void copy_keys(u32 to, const typename S::T* from, i32 b, i32 head, attention::Span keys, i32 tid) {
    enum : i32 { PIECES = S::D / 8 };
#pragma unroll
    for (i32 i = 0; i < N * PIECES / S::THREADS; ++i) {
        const i32 at = i * S::THREADS + tid, y = at / PIECES, x = at % PIECES;
        const bool inside = keys.start + y < keys.end;
        copy_async(to + piece<S>(y, x), from + X::at(b, inside ? keys.start + y : 0, head, 8 * x), inside);
    }
}

// Of the matrices that a SIMD group loads, the row that this lane names: piece lane / 16 of row lane % 16; or, of four that are to be
// the right factor of a product with their transpose, piece lane / 8 % 2 of row lane % 8 + lane / 16 * 8. The pieces `2 k` further on are at
// this place ^ 32 k, for the rows begin at multiples of 2 D.
template <typename S> FN u32 lane_piece(i32 lane) { return piece<S>(lane % 16, lane / 16); }
template <typename S> FN u32 lane_piece_turned(i32 lane) { return piece<S>(lane / 16 * 8 + lane % 8, lane / 8 % 2); }

// s = a bT over the features: a has M tiles of 16 rows, b has 8 N rows.
template <typename S, i32 M, i32 N> FN void products(f32 (&s)[M][N][4], u32 a, u32 b, i32 lane) {
#pragma unroll
    for (i32 i = 0; i < M * N * 4; ++i) s[i / (4 * N)][i / 4 % N][i % 4] = 0.0f;
    a += lane_piece<S>(lane);
    b += lane_piece_turned<S>(lane);
#pragma unroll
    for (i32 k = 0; k < S::D / 16; ++k) {
        u32 left[M][4];
#pragma unroll
        for (i32 m = 0; m < M; ++m) load_matrices(left[m], (a ^ (32 * k)) + 16 * m * (2 * S::D));
#pragma unroll
        for (i32 n = 0; n < N; n += 2) {
            u32 right[4];
            load_matrices(right, (b ^ (32 * k)) + 8 * n * (2 * S::D));
#pragma unroll
            for (i32 m = 0; m < M; ++m) {
                multiply_add(s[m][n], left[m], right[0], right[1], typename S::T());
                multiply_add(s[m][n + 1], left[m], right[2], right[3], typename S::T());
            }
        }
    }
}

// sums += p y: p has M tiles of 16 rows and 8 N columns, y has 8 N rows.
template <typename S, i32 M, i32 N, i32 F> FN void add_products(f32 (&sums)[M][F][4], const f32 (&p)[M][N][4], u32 y, i32 lane) {
    y += lane_piece<S>(lane);
#pragma unroll
    for (i32 n = 0; n < N; n += 2) {
        u32 left[M][4];
#pragma unroll
        for (i32 m = 0; m < M; ++m) {
#pragma unroll
            for (i32 i = 0; i < 4; ++i) {
                left[m][i] = pair_of(p[m][n + i / 2][i % 2 * 2], p[m][n + i / 2][i % 2 * 2 + 1], typename S::T());
            }
        }
#pragma unroll
        for (i32 f = 0; f < F; f += 2) {
            u32 right[4];
            load_transposed(right, (y ^ (16 * f)) + 8 * n * (2 * S::D));
#pragma unroll
            for (i32 m = 0; m < M; ++m) {
                multiply_add(sums[m][f], left[m], right[0], right[1], typename S::T());
                multiply_add(sums[m][f + 1], left[m], right[2], right[3], typename S::T());
            }
        }
    }
}

template <i32 M, i32 F> FN void clear(f32 (&sums)[M][F][4]) {
#pragma unroll
    for (i32 i = 0; i < M * F * 4; ++i) sums[i / (4 * F)][i / 4 % F][i % 4] = 0.0f;
}

// Whether all rows of the tile from `first` on see all N keys from `key` on.
template <typename S, i32 N> FN bool all_seen(i32 first, i32 key, i64 offset) {
    const i32 last = (first + S::ROWS < S::LEN ? first + S::ROWS : i32(S::LEN)) - 1;
    return !S::SEGMENTS && key >= attention::seen_by<S>(last, offset).start && key + N <= attention::seen_by<S>(first, offset).end;
}

// Hides what is not seen: rows from `row` on, keys from `key` on.
template <typename S, i32 M, i32 N>
FN void hide(f32 (&s)[M][N][4], const attention::Inputs<S>& in, i32 b, i32 row, i32 key, i32 lane) {
#pragma unroll
    for (i32 m = 0; m < M; ++m) {
#pragma unroll
        for (i32 half = 0; half < 2; ++half) {
            const i32 r = row + 16 * m + 8 * half + lane / 4;
            const attention::Span seen = r < S::LEN ? attention::seen_by<S>(r, in.offset) : attention::Span{0, 0};
#pragma unroll
            for (i32 n = 0; n < 2 * N; ++n) {
                const i32 k = key + n / 2 * 8 + lane % 4 * 2 + n % 2;
                const bool sees = k >= seen.start && k < seen.end && attention::same_segment<S>(in, b, r, k);
                if (!sees) s[m][n / 2][2 * half + n % 2] = -INF;
            }
        }
    }
}

// One instruction. A NaN may get lost: its exponential is NaN all the same.
struct Larger { FN f32 of(f32 a, f32 b) { return fmaxf(a, b); } };

// Over the 4 lanes that have a row in common.
template <typename Op> FN f32 quad_reduce(f32 x) {
    x = Op::of(x, shuffle_xor(x, 1));
    return Op::of(x, shuffle_xor(x, 2));
}

// The running maximum (of s), and the sum of exp2(s S::scale2() - max), of rows l / 4 and l / 4 + 8.
template <i32 M> struct Running { f32 max[M][2], sum[M][2]; };

template <i32 M> FN void begin(Running<M>& all) {
#pragma unroll
    for (i32 i = 0; i < 2 * M; ++i) {
        all.max[i / 2][i % 2] = -INF;
        all.sum[i / 2][i % 2] = 0.0f;
    }
}

// Takes a tile in: s becomes its exponentials, and `rescale` what earlier ones are to be multiplied with.
template <typename S, i32 M, i32 N> FN void take(Running<M>& all, f32 (&s)[M][N][4], f32 (&rescale)[M][2]) {
#pragma unroll
    for (i32 m = 0; m < M; ++m) {
#pragma unroll
        for (i32 half = 0; half < 2; ++half) {
            f32 top = s[m][0][2 * half];
#pragma unroll
            for (i32 n = 1; n < 2 * N; ++n) top = Larger::of(top, s[m][n / 2][2 * half + n % 2]);
            top = Larger::of(all.max[m][half], quad_reduce<Larger>(top));
            const f32 base = top == -INF ? 0.0f : top * S::scale2();
            rescale[m][half] = power_of_2(all.max[m][half] * S::scale2() - base);
            all.max[m][half] = top;
            f32 sum = 0.0f;
#pragma unroll
            for (i32 n = 0; n < 2 * N; ++n) {
                f32& x = s[m][n / 2][2 * half + n % 2];
                x = power_of_2(x * S::scale2() - base);
                sum += x;
            }
            all.sum[m][half] = all.sum[m][half] * rescale[m][half] + sum;
        }
    }
}

// M tiles of 16 rows of sums, each row times its factor, as they lie in shared memory: in a part of it that is the SIMD group's own.
template <typename S, i32 M, i32 F>
FN void settle(u8* to, const f32 (&sums)[M][F][4], const f32 (&factor)[M][2], i32 lane) {
#pragma unroll
    for (i32 m = 0; m < M; ++m) {
#pragma unroll
        for (i32 i = 0; i < 2 * F; ++i) {
            const i32 half = i % 2, f = i / 2;
            const f32 x = sums[m][f][2 * half] * factor[m][half], y = sums[m][f][2 * half + 1] * factor[m][half];
            const u32 place = piece_of<8 * F>(16 * m + 8 * half + lane / 4, f);
            *(u32*)(to + place + lane % 4 * 4) = pair_of(x, y, typename S::T());
        }
    }
}

// From there to memory, 16 bytes at once: N rows from `first` on.
template <typename S, typename X, i32 N>
FN void write_rows(typename S::T* to, const u8* from, i32 b, i32 head, i32 first, i32 lane) {
    enum : i32 { PIECES = S::D / 8 };
#pragma unroll
    for (i32 i = 0; i < N * PIECES / 32; ++i) {
        const i32 at = i * 32 + lane, y = at / PIECES, x = at % PIECES, row = first + y;
        if (row >= S::LEN) continue;
        typename S::T* const place = to + X::at(b, row / S::GROUP, head * S::GROUP + row % S::GROUP, 8 * x);
        *(Pack<u32, 4>*)place = *(const Pack<u32, 4>*)(from + piece<S>(y, x));
    }
}

template <typename S, typename X, i32 N>
FN void write_keys(typename S::T* to, const u8* from, i32 b, i32 head, i32 first, i32 lane) {
    enum : i32 { PIECES = S::D / 8 };
#pragma unroll
    for (i32 i = 0; i < N * PIECES / 32; ++i) {
        const i32 at = i * 32 + lane, y = at / PIECES, x = at % PIECES, key = first + y;
        if (key < S::TK) *(Pack<u32, 4>*)(to + X::at(b, key, head, 8 * x)) = *(const Pack<u32, 4>*)(from + piece<S>(y, x));
    }
}

// ---- a tile of rows ----

// A block's rows of a batch and key head, of which `own` is the SIMD group's first, and the keys that they see.
struct Tile {
    i32 tid, lane, simd, b, head, first, own;
    attention::Span seen;
};

template <typename S> FN Tile tile_of(const attention::Inputs<S>& in, i32 block, i32 tid) {
    const i32 simd = tid / 32, pair = block % S::PAIRS, first = (S::ROW_TILES - 1 - block / S::PAIRS) * S::ROWS;
    return {
        tid, tid % 32, simd, pair / S::HEADS, pair % S::HEADS, first, first + simd * (S::ROWS / 4),
        attention::seen_by_tile<S>(first, in.offset)
    };
}

// A tile of k and one of v on their way, from `key` on.
template <typename S> FN void copy_keys_and_values(u32 to, const attention::Inputs<S>& in, const Tile& at, i32 key) {
    const attention::Span keys = {key, at.seen.end};
    copy_keys<S, typename S::K, S::KEYS>(to, in.k, at.b, at.head, keys, at.tid);
    copy_keys<S, typename S::V, S::KEYS>(to + S::KEYS * S::D * 2, in.v, at.b, at.head, keys, at.tid);
}

// Where those from `key` on are, once they are there; from then on the next ones are on their way.
template <typename S> FN u32 next_keys_and_values(u32 tiles, i32& turn, const attention::Inputs<S>& in, const Tile& at, i32 key) {
    enum : i32 { BOTH = 2 * S::KEYS * S::D * 2 };
    const u32 here = tiles + turn * BOTH;
    turn ^= 1;
    await_copies();
    barrier();
    if (key + S::KEYS < at.seen.end) copy_keys_and_values<S>(tiles + turn * BOTH, in, at, key + S::KEYS);
    return here;
}

// s = q kT of the SIMD group's own rows, as far as it is seen.
template <typename S, i32 M, i32 N>
FN void scores(f32 (&s)[M][N][4], u32 q, u32 k, const attention::Inputs<S>& in, const Tile& at, i32 key) {
    products<S>(s, q + at.simd * (16 * M * S::D * 2), k, at.lane);
    if (!all_seen<S, S::KEYS>(at.first, key, in.offset)) hide<S>(s, in, at.b, at.own, key, at.lane);
}

// The sums, each row times its factor, to memory; by way of the SIMD group's own rows of q, which nobody else reads.
template <typename S, typename X, i32 M, i32 F>
FN void write_own(typename S::T* to, const f32 (&sums)[M][F][4], const f32 (&factor)[M][2], u64* shared, const Tile& at) {
    u8* const mine = (u8*)shared + at.simd * (16 * M * S::D * 2);
    simd_barrier();
    settle<S>(mine, sums, factor, at.lane);
    simd_barrier();
    write_rows<S, X, 16 * M>(to, mine, at.b, at.head, at.own, at.lane);
}

// ---- forward ----

// A block has a tile of rows. Shared: q, then twice a tile of k and one of v.
template <typename S>
FN void forward(const attention::Inputs<S>& in, typename S::T* out, f32* lse, u64* shared, i32 block, i32 tid) {
    enum : i32 { M = S::ROWS / 64, N = S::KEYS / 8, F = S::D / 8, TILE = S::KEYS * S::D * 2 };
    const Tile at = tile_of<S>(in, block, tid);
    const u32 q = shared_place(shared), tiles = q + S::ROWS * S::D * 2;
    copy_rows<S, typename S::Q, S::ROWS>(q, in.q, at.b, at.head, at.first, tid);
    copy_keys_and_values<S>(tiles, in, at, at.seen.start);
    Running<M> all;
    f32 sums[M][F][4];
    begin(all);
    clear(sums);
    i32 turn = 0;
    for (i32 key = at.seen.start; key < at.seen.end; key += S::KEYS) {
        const u32 k = next_keys_and_values<S>(tiles, turn, in, at, key), v = k + TILE;
        f32 p[M][N][4], rescale[M][2];
        scores<S>(p, q, k, in, at, key);
        take<S>(all, p, rescale);
#pragma unroll
        for (i32 i = 0; i < M * F * 4; ++i) sums[i / (4 * F)][i / 4 % F][i % 4] *= rescale[i / (4 * F)][i / 2 % 2];
        add_products<S>(sums, p, v, at.lane);
    }
    f32 factor[M][2];
#pragma unroll
    for (i32 i = 0; i < 2 * M; ++i) {
        const i32 m = i / 2, half = i % 2, row = at.own + 16 * m + 8 * half + at.lane / 4;
        const f32 sum = quad_reduce<Sum>(all.sum[m][half]);
        factor[m][half] = sum == 0.0f ? 0.0f : 1.0f / sum;
        if (!S::WANTS_LSE || at.lane % 4 != 0 || row >= S::LEN) continue;
        lse[S::Lse::at(at.b, row / S::GROUP, at.head * S::GROUP + row % S::GROUP)] =
            sum == 0.0f ? INF : all.max[m][half] * S::scale() + math::log(sum);
    }
    await_copies();
    if (S::WANTS_Y) write_own<S, typename S::Y>(out, sums, factor, shared, at);
}
}
