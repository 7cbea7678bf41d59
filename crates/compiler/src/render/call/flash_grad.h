// The cotangents of attention on tensor cores: p = exp2(s S::scale2() - lse), ds = p (dp - dot); see flash.h and attention_grad.h.

namespace flash {
// A tile of rows: its statistics, for the keys' kernel, and the cotangent of q. Shared: q, dy, then twice a tile of k and one of v.
template <typename S>
FN void grad_rows(
    const attention::Inputs<S>& in, const typename S::T* dy, f32* kept, typename S::T* dq, u64* shared, i32 block, i32 tid
) {
    enum : i32 { M = S::ROWS / 64, N = S::KEYS / 8, F = S::D / 8, TILE = S::KEYS * S::D * 2, OWN = 16 * M * S::D * 2 };
    const i32 lane = tid % 32, simd = tid / 32;
    const i32 pair = block % S::PAIRS, b = pair / S::HEADS, head = pair % S::HEADS;
    const i32 first = (S::ROW_TILES - 1 - block / S::PAIRS) * S::ROWS, own = first + simd * 16 * M;
    const attention::Span seen = attention::seen_by_tile<S>(first, in.offset);
    const u32 q = shared_place(shared), of_dy = q + S::ROWS * S::D * 2, tiles = of_dy + S::ROWS * S::D * 2;
    copy_rows<S, typename S::Q, S::ROWS>(q, in.q, b, head, first, tid);
    copy_rows<S, typename S::DY, S::ROWS>(of_dy, dy, b, head, first, tid);
    f32 lse[M][2], dot[M][2];
    {
        Running<M> all;
        begin(all);
        copy_keys<S, typename S::K, S::KEYS>(tiles, in.k, b, head, seen, tid);
        copy_keys<S, typename S::V, S::KEYS>(tiles + TILE, in.v, b, head, seen, tid);
        i32 turn = 0;
        for (i32 key = seen.start; key < seen.end; key += S::KEYS) {
            const u32 k = tiles + turn * 2 * TILE, v = k + TILE;
            turn ^= 1;
            await_copies();
            barrier();
            if (key + S::KEYS < seen.end) {
                const u32 next = tiles + turn * 2 * TILE;
                copy_keys<S, typename S::K, S::KEYS>(next, in.k, b, head, {key + S::KEYS, seen.end}, tid);
                copy_keys<S, typename S::V, S::KEYS>(next + TILE, in.v, b, head, {key + S::KEYS, seen.end}, tid);
            }
            f32 p[M][N][4], dp[M][N][4], rescale[M][2];
            products<S>(p, q + simd * OWN, k, lane);
            products<S>(dp, of_dy + simd * OWN, v, lane);
            if (!all_seen<S, S::KEYS>(first, key, in.offset)) hide<S>(p, in, b, own, key, lane);
            take<S>(all, p, rescale);
#pragma unroll
            for (i32 i = 0; i < 2 * M; ++i) {
                const i32 m = i / 2, half = i % 2;
                f32 sum = 0.0f;
#pragma unroll
                for (i32 n = 0; n < 2 * N; ++n) sum += p[m][n / 2][2 * half + n % 2] * dp[m][n / 2][2 * half + n % 2];
                all.dot[m][half] = all.dot[m][half] * rescale[m][half] + sum;
            }
        }
#pragma unroll
        for (i32 i = 0; i < 2 * M; ++i) {
            const i32 m = i / 2, half = i % 2;
            const f32 sum = quad_reduce<Sum>(all.sum[m][half]), product = quad_reduce<Sum>(all.dot[m][half]);
            lse[m][half] = sum == 0.0f ? INF : all.max[m][half] * S::scale2() + math::log(sum) * 1.4426950408889634f;
            dot[m][half] = sum == 0.0f ? 0.0f : product / sum;
            const i64 at = 2 * (i64(pair) * S::PADDED + own + 16 * m + 8 * half + lane / 4);
            if (lane % 4 == 0) kept[at] = lse[m][half];
            if (lane % 4 == 1) kept[at + 1] = dot[m][half];
        }
    }
    if (!S::WANTS_Q) {
        await_copies();
        return;
    }
    f32 sums[M][F][4];
    clear(sums);
    // All have done with the last tile.
    await_copies();
    barrier();
    copy_keys<S, typename S::K, S::KEYS>(tiles, in.k, b, head, seen, tid);
    copy_keys<S, typename S::V, S::KEYS>(tiles + TILE, in.v, b, head, seen, tid);
    i32 turn = 0;
    for (i32 key = seen.start; key < seen.end; key += S::KEYS) {
        const u32 k = tiles + turn * 2 * TILE, v = k + TILE;
        turn ^= 1;
        await_copies();
        barrier();
        if (key + S::KEYS < seen.end) {
            const u32 next = tiles + turn * 2 * TILE;
            copy_keys<S, typename S::K, S::KEYS>(next, in.k, b, head, {key + S::KEYS, seen.end}, tid);
            copy_keys<S, typename S::V, S::KEYS>(next + TILE, in.v, b, head, {key + S::KEYS, seen.end}, tid);
        }
        f32 p[M][N][4], ds[M][N][4];
        products<S>(p, q + simd * OWN, k, lane);
        if (!all_seen<S, S::KEYS>(first, key, in.offset)) hide<S>(p, in, b, own, key, lane);
        products<S>(ds, of_dy + simd * OWN, v, lane);
#pragma unroll
        for (i32 i = 0; i < M * N * 4; ++i) {
            const i32 m = i / (4 * N), n = i / 4 % N, e = i % 4;
            ds[m][n][e] = power_of_2(p[m][n][e] * S::scale2() - lse[m][e / 2]) * (ds[m][n][e] - dot[m][e / 2]);
        }
        add_products<S>(sums, ds, k, lane);
    }
    f32 factor[M][2];
#pragma unroll
    for (i32 i = 0; i < 2 * M; ++i) factor[i / 2][i % 2] = S::scale();
    await_copies();
    u8* const mine = (u8*)shared + simd * OWN;
    settle<S>(mine, sums, factor, lane);
    write_rows<S, typename S::DQ, 16 * M>(dq, mine, b, head, own, lane);
}

// Hides what is not seen of a tile that has keys as its rows.
template <typename S, i32 N>
FN void hide_turned(f32 (&s)[1][N][4], const attention::Inputs<S>& in, i32 b, i32 row, i32 key, i32 lane) {
#pragma unroll
    for (i32 n = 0; n < 2 * N; ++n) {
        const i32 r = row + n / 2 * 8 + lane % 4 * 2 + n % 2;
        const attention::Span seen = r < S::LEN ? attention::seen_by<S>(r, in.offset) : attention::Span{0, 0};
#pragma unroll
        for (i32 half = 0; half < 2; ++half) {
            const i32 k = key + 8 * half + lane / 4;
            const bool sees = k >= seen.start && k < seen.end && attention::same_segment<S>(in, b, r, k);
            if (!sees) s[0][n / 2][2 * half + n % 2] = -INF;
        }
    }
}

// ROWS rows with their statistics, on their way to a tile: q, dy, and lse and dot.
template <typename S>
FN void copy_tile(
    u32 to, const attention::Inputs<S>& in, const typename S::T* dy, const f32* kept, i32 pair, i32 first, i32 tid
) {
    enum : i32 { TILE = S::ROWS * S::D * 2 };
    const i32 b = pair / S::HEADS, head = pair % S::HEADS;
    copy_rows<S, typename S::Q, S::ROWS>(to, in.q, b, head, first, tid);
    copy_rows<S, typename S::DY, S::ROWS>(to + TILE, dy, b, head, first, tid);
    if (tid < S::ROWS / 2) copy_async(to + 2 * TILE + 16 * tid, kept + 2 * (i64(pair) * S::PADDED + first) + 4 * tid, true);
}

// A tile of 64 keys: the cotangents of k and v. Shared: k, v, then twice a tile of q, one of dy, and their statistics.
template <typename S>
FN void grad_keys(
    const attention::Inputs<S>& in, const typename S::T* dy, const f32* kept, typename S::T* dk, typename S::T* dv,
    u64* shared, i32 block, i32 tid
) {
    enum : i32 { N = S::ROWS / 8, F = S::D / 8, TILE = S::ROWS * S::D * 2, TURN = 2 * TILE + 8 * S::ROWS };
    enum : i32 { OWN = 16 * S::D * 2, ALL = S::KEYS * S::D * 2 };
    const i32 lane = tid % 32, simd = tid / 32;
    const i32 pair = block % S::PAIRS, b = pair / S::HEADS, head = pair % S::HEADS;
    const i32 first_key = block / S::PAIRS * S::KEYS, own = first_key + 16 * simd;
    const attention::Span keys = {first_key, first_key + S::KEYS < S::TK ? first_key + S::KEYS : i32(S::TK)};
    const attention::Span all = attention::seeing<S>(keys, in.offset);
    const i32 start = all.start / S::ROWS * S::ROWS;
    const u32 k = shared_place(shared), v = k + ALL, tiles = v + ALL;
    copy_keys<S, typename S::K, S::KEYS>(k, in.k, b, head, keys, tid);
    copy_keys<S, typename S::V, S::KEYS>(v, in.v, b, head, keys, tid);
    if (start < all.end) copy_tile<S>(tiles, in, dy, kept, pair, start, tid);
    f32 of_k[1][F][4], of_v[1][F][4];
    clear(of_k);
    clear(of_v);
    i32 turn = 0;
    for (i32 first = start; first < all.end; first += S::ROWS) {
        const u32 q = tiles + turn * TURN, of_dy = q + TILE;
        const f32* const rows = (const f32*)((const u8*)shared + 2 * ALL + turn * TURN + 2 * TILE);
        turn ^= 1;
        await_copies();
        barrier();
        if (first + S::ROWS < all.end) copy_tile<S>(tiles + turn * TURN, in, dy, kept, pair, first + S::ROWS, tid);
        f32 p[1][N][4], ds[1][N][4];
        products<S>(p, k + simd * OWN, q, lane);
        if (!all_seen<S, S::KEYS>(first, first_key, in.offset)) hide_turned<S>(p, in, b, first, own, lane);
        products<S>(ds, v + simd * OWN, of_dy, lane);
#pragma unroll
        for (i32 n = 0; n < N; ++n) {
            const Pack<f32, 4> two = *(const Pack<f32, 4>*)(rows + 16 * n + lane % 4 * 4);
#pragma unroll
            for (i32 e = 0; e < 4; ++e) {
                p[0][n][e] = power_of_2(p[0][n][e] * S::scale2() - two.at[e % 2 * 2]);
                ds[0][n][e] = p[0][n][e] * (ds[0][n][e] - two.at[e % 2 * 2 + 1]);
            }
        }
        if (S::WANTS_V) add_products<S>(of_v, p, of_dy, lane);
        if (S::WANTS_K) add_products<S>(of_k, ds, q, lane);
    }
    await_copies();
    u8* const mine = (u8*)shared + simd * OWN;
    const f32 one[1][2] = {{1.0f, 1.0f}}, scale[1][2] = {{S::scale(), S::scale()}};
    // The group's own keys, which nobody else reads.
    barrier();
    if (S::WANTS_K) {
        settle<S>(mine, of_k, scale, lane);
        write_keys<S, typename S::DK, 16>(dk, mine, b, head, own, lane);
    }
    if (S::WANTS_V) {
        settle<S>(mine, of_v, one, lane);
        write_keys<S, typename S::DV, 16>(dv, mine, b, head, own, lane);
    }
}
}
