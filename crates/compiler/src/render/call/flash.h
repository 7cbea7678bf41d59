// Attention on tensor cores, after FlashAttention-2 (Dao 2023), for 16-bit floats. Rows are as in attention.h.
//
// A block has 4 SIMD groups; each has a quarter of a tile's rows (of its keys, in the keys' kernel), in tiles of 16. While one tile is
// worked on, the next one is on its way. How tiles lie, and are multiplied: flash_products.h.

namespace flash {

// N rows of a key head from `first` on; zeros beyond the last.
template <typename S, typename X, i32 N>
FN void copy_rows(u32 to, const typename S::T* from, i32 b, i32 head, i32 first, i32 tid) {
    enum : i32 { PIECES = S::D / 8 };
#pragma unroll
    for (i32 i = 0; i < N * PIECES / S::THREADS; ++i) {
        const i32 at = i * S::THREADS + tid, y = at / PIECES, x = at % PIECES;
        const bool inside = first + y < S::LEN;
        const i32 row = inside ? first + y : 0;
        copy_async(to + piece<N>(y, x), from + X::at(b, row / S::GROUP, head * S::GROUP + row % S::GROUP, 8 * x), inside);
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
        copy_async(to + piece<N>(y, x), from + X::at(b, inside ? keys.start + y : 0, head, 8 * x), inside);
    }
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

// M tiles of 16 rows of sums, each row times its factor, as a tile in a part of shared memory that is the SIMD group's own.
template <typename S, i32 M, i32 F>
FN void settle(u8* to, const f32 (&sums)[M][F][4], const f32 (&factor)[M][2], i32 lane) {
#pragma unroll
    for (i32 m = 0; m < M; ++m) {
#pragma unroll
        for (i32 i = 0; i < 2 * F; ++i) {
            const i32 half = i % 2, f = i / 2;
            const f32 x = sums[m][f][2 * half] * factor[m][half], y = sums[m][f][2 * half + 1] * factor[m][half];
            const u32 place = piece<16 * M>(16 * m + 8 * half + lane / 4, f);
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
        *(Pack<u32, 4>*)place = *(const Pack<u32, 4>*)(from + piece<N>(y, x));
    }
}

template <typename S, typename X, i32 N>
FN void write_keys(typename S::T* to, const u8* from, i32 b, i32 head, i32 first, i32 lane) {
    enum : i32 { PIECES = S::D / 8 };
#pragma unroll
    for (i32 i = 0; i < N * PIECES / 32; ++i) {
        const i32 at = i * 32 + lane, y = at / PIECES, x = at % PIECES, key = first + y;
        if (key < S::TK) *(Pack<u32, 4>*)(to + X::at(b, key, head, 8 * x)) = *(const Pack<u32, 4>*)(from + piece<N>(y, x));
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
    share_copies<S>();
    if (key + S::KEYS < at.seen.end) copy_keys_and_values<S>(tiles + turn * BOTH, in, at, key + S::KEYS);
    return here;
}

// The sums, each row times its factor, to memory; by way of shared memory that held q.
template <typename S, typename X, i32 M, i32 F>
FN void write_own(typename S::T* to, const f32 (&sums)[M][F][4], const f32 (&factor)[M][2], u64* shared, const Tile& at) {
    u8* const mine = (u8*)shared + at.simd * (16 * M * S::D * 2);
    // Others may still read q.
    barrier();
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
        products<S, S::ROWS>(p, q, at.simd * (16 * M), k, at.lane);
        finish<S, 0>(p);
        if (!all_seen<S, S::KEYS>(at.first, key, in.offset)) hide<S>(p, in, at.b, at.own, key, at.lane);
        take<S>(all, p, rescale);
#pragma unroll
        for (i32 i = 0; i < M * F * 4; ++i) sums[i / (4 * F)][i / 4 % F][i % 4] *= rescale[i / (4 * F)][i / 2 % 2];
        add_products<S>(sums, p, v, at.lane);
        finish<S, 0>(sums);
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
