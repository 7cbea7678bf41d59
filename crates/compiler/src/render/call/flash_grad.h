// The cotangents of attention on tensor cores: p = exp(s - lse), ds = p (dp - delta); see flash.h and attention_grad.h.

namespace flash {
FN f32 in_powers_of_2(f32 log) { return log * 1.4426950408889634f; }

// Scores become weights, given log-sum-exps; and the cotangents of weights those of scores, given deltas. Rows are rows.
template <typename S, i32 M, i32 N> FN void weigh(f32 (&p)[M][N][4], const f32 (&lse2)[M][2]) {
#pragma unroll
    for (i32 i = 0; i < M * N * 4; ++i) {
        f32& x = p[i / (4 * N)][i / 4 % N][i % 4];
        x = power_of_2(x * S::scale2() - lse2[i / (4 * N)][i % 4 / 2]);
    }
}
template <i32 M, i32 N> FN void of_scores(f32 (&ds)[M][N][4], const f32 (&p)[M][N][4], const f32 (&delta)[M][2]) {
#pragma unroll
    for (i32 i = 0; i < M * N * 4; ++i) {
        f32& x = ds[i / (4 * N)][i / 4 % N][i % 4];
        x = p[i / (4 * N)][i / 4 % N][i % 4] * (x - delta[i / (4 * N)][i % 4 / 2]);
    }
}

// A tile of rows: the cotangent of q. Shared: q, dy, then twice a tile of k and one of v.
template <typename S>
FN void grad_rows(
    const attention::Inputs<S>& in, const attention::Cotangents<S>& of, typename S::T* dq, typename S::M*,
    u64* shared, i32 block, i32 tid
) {
    enum : i32 { M = S::ROWS / 64, N = S::KEYS / 8, F = S::D / 8, ALL = S::ROWS * S::D * 2 };
    const Tile at = tile_of<S>(in, block, tid);
    const u32 q = shared_place(shared), dy = q + ALL, tiles = dy + ALL;
    copy_rows<S, typename S::Q, S::ROWS>(q, in.q, at.b, at.head, at.first, tid);
    copy_rows<S, typename S::DY, S::ROWS>(dy, of.dy, at.b, at.head, at.first, tid);
    copy_keys_and_values<S>(tiles, in, at, at.seen.start);
    f32 lse2[M][2], delta[M][2], factor[M][2];
#pragma unroll
    for (i32 i = 0; i < 2 * M; ++i) {
        const i32 m = i / 2, half = i % 2, row = at.own + 16 * m + 8 * half + at.lane / 4;
        const i32 t = row / S::GROUP, h = at.head * S::GROUP + row % S::GROUP;
        lse2[m][half] = row < S::LEN ? in_powers_of_2(of.lse[S::Lse::at(at.b, t, h)]) : INF;
        delta[m][half] = row < S::LEN ? of.delta[S::Delta::at(at.b, t, h)] : 0.0f;
        factor[m][half] = S::scale();
    }
    f32 sums[M][F][4];
    clear(sums);
    i32 turn = 0;
    for (i32 key = at.seen.start; key < at.seen.end; key += S::KEYS) {
        const u32 k = next_keys_and_values<S>(tiles, turn, in, at, key), v = k + S::KEYS * S::D * 2;
        f32 p[M][N][4], ds[M][N][4];
        products<S, S::ROWS>(p, q, at.simd * (16 * M), k, at.lane);
        products<S, S::ROWS>(ds, dy, at.simd * (16 * M), v, at.lane);
        finish<S, 1>(p);
        if (!all_seen<S, S::KEYS>(at.first, key, in.offset)) hide<S>(p, in, at.b, at.own, key, at.lane);
        weigh<S>(p, lse2);
        finish<S, 0>(ds);
        of_scores(ds, p, delta);
        add_products<S>(sums, ds, k, at.lane);
        finish<S, 0>(sums);
    }
    await_copies();
    write_own<S, typename S::DQ>(dq, sums, factor, shared, at);
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

// Where keys are rows: what belongs to a row lies in memory, 8 of each tile of columns.
template <typename S, i32 N> FN void weigh_turned(f32 (&p)[N][4], const f32* lse) {
#pragma unroll
    for (i32 n = 0; n < N; ++n) {
        const Pack<f32, 2> both = *(const Pack<f32, 2>*)(lse + 8 * n);
#pragma unroll
        for (i32 e = 0; e < 4; ++e) p[n][e] = power_of_2(p[n][e] * S::scale2() - in_powers_of_2(both.at[e % 2]));
    }
}
template <i32 N> FN void of_scores_turned(f32 (&ds)[N][4], const f32 (&p)[N][4], const f32* delta) {
#pragma unroll
    for (i32 n = 0; n < N; ++n) {
        const Pack<f32, 2> both = *(const Pack<f32, 2>*)(delta + 8 * n);
#pragma unroll
        for (i32 e = 0; e < 4; ++e) ds[n][e] = p[n][e] * (ds[n][e] - both.at[e % 2]);
    }
}

// ROWS rows on their way: a tile of q and one of dy, then lse and delta as numbers.
template <typename S>
FN void copy_tile(
    u32 to, u32 numbers, const attention::Inputs<S>& in, const attention::Cotangents<S>& of, i32 b, i32 head, i32 first, i32 tid
) {
    enum : i32 { TILE = S::ROWS * S::D * 2 };
    copy_rows<S, typename S::Q, S::ROWS>(to, in.q, b, head, first, tid);
    copy_rows<S, typename S::DY, S::ROWS>(to + TILE, of.dy, b, head, first, tid);
    if (tid >= S::ROWS) return;
    const bool inside = first + tid < S::LEN;
    const i32 row = inside ? first + tid : 0, t = row / S::GROUP, h = head * S::GROUP + row % S::GROUP;
    copy_word_async(numbers + 4 * tid, of.lse + S::Lse::at(b, t, h), inside);
    copy_word_async(numbers + 4 * (S::ROWS + tid), of.delta + S::Delta::at(b, t, h), inside);
}

// A tile of 64 keys: the cotangents of k and v. Shared: k, v, then twice a tile of q and one of dy, then twice their lse
// and delta.
template <typename S>
FN void grad_keys(
    const attention::Inputs<S>& in, const attention::Cotangents<S>& of, typename S::T* dk, typename S::T* dv,
    u64* shared, i32 block, i32 tid
) {
    enum : i32 { N = S::ROWS / 8, F = S::D / 8, TILE = S::ROWS * S::D * 2 };
    enum : i32 { OWN = 16 * S::D * 2, ALL = S::KEYS * S::D * 2 };
    const i32 lane = tid % 32, simd = tid / 32;
    const i32 pair = block % S::PAIRS, b = pair / S::HEADS, head = pair % S::HEADS;
    const i32 first_key = block / S::PAIRS * S::KEYS, own = first_key + 16 * simd;
    const attention::Span keys = {first_key, first_key + S::KEYS < S::TK ? first_key + S::KEYS : i32(S::TK)};
    const attention::Span all = attention::seeing<S>(keys, in.offset);
    const i32 start = all.start / S::ROWS * S::ROWS;
    const u32 k = shared_place(shared), v = k + ALL, tiles = v + ALL, numbers = tiles + 4 * TILE;
    copy_keys<S, typename S::K, S::KEYS>(k, in.k, b, head, keys, tid);
    copy_keys<S, typename S::V, S::KEYS>(v, in.v, b, head, keys, tid);
    if (start < all.end) copy_tile<S>(tiles, numbers, in, of, b, head, start, tid);
    f32 of_k[1][F][4], of_v[1][F][4];
    clear(of_k);
    clear(of_v);
    i32 turn = 0;
    for (i32 first = start; first < all.end; first += S::ROWS) {
        const u32 q = tiles + turn * 2 * TILE, of_dy = q + TILE;
        const f32* const lse = (const f32*)((const u8*)shared + 2 * ALL + 4 * TILE + turn * 8 * S::ROWS);
        turn ^= 1;
        share_copies<S>();
        if (first + S::ROWS < all.end) {
            copy_tile<S>(tiles + turn * 2 * TILE, numbers + turn * 8 * S::ROWS, in, of, b, head, first + S::ROWS, tid);
        }
        f32 p[1][N][4], ds[1][N][4];
        products<S, S::KEYS>(p, k, 16 * simd, q, lane);
        products<S, S::KEYS>(ds, v, 16 * simd, of_dy, lane);
        finish<S, 1>(p);
        if (!all_seen<S, S::KEYS>(first, first_key, in.offset)) hide_turned<S>(p, in, b, first, own, lane);
        weigh_turned<S>(p[0], lse + lane % 4 * 2);
        finish<S, 0>(ds);
        of_scores_turned(ds[0], p[0], lse + S::ROWS + lane % 4 * 2);
        if (S::WANTS_V) add_products<S>(of_v, p, of_dy, lane);
        if (S::WANTS_K) add_products<S>(of_k, ds, q, lane);
        if (S::WANTS_V) finish<S, 0>(of_v);
        if (S::WANTS_K) finish<S, 0>(of_k);
    }
    await_copies();
    u8* const mine = (u8*)shared + simd * OWN;
    const f32 one[1][2] = {{1.0f, 1.0f}}, scale[1][2] = {{S::scale(), S::scale()}};
    // The group's own keys, which nobody else reads any more.
    barrier();
    if (S::WANTS_K) {
        settle<S>(mine, of_k, scale, lane);
        simd_barrier();
        write_keys<S, typename S::DK, 16>(dk, mine, b, head, own, lane);
        simd_barrier();
    }
    if (S::WANTS_V) {
        settle<S>(mine, of_v, one, lane);
        simd_barrier();
        write_keys<S, typename S::DV, 16>(dv, mine, b, head, own, lane);
    }
}
}
