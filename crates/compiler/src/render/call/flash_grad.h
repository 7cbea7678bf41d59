// The cotangents of attention on tensor cores, in one pass over the scores: p = exp(s - lse), ds = p (dp - delta); see flash.h and
// attention_grad.h.
//
// A block has a tile of keys, and walks over the rows that see them, from the last to the first. A tile of rows gets the cotangent of
// its q from all blocks whose keys it sees: they add to it in the order of the keys, each SIMD group for its own rows.

namespace flash {
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

// ROWS rows on their way to a tile: q, dy, lse and delta.
template <typename S>
FN void copy_tile(
    u32 to, const attention::Inputs<S>& in, const attention::Cotangents<S>& of, i32 b, i32 head, i32 first, i32 tid
) {
    enum : i32 { TILE = S::ROWS * S::D * 2 };
    copy_rows<S, typename S::Q, S::ROWS>(to, in.q, b, head, first, tid);
    copy_rows<S, typename S::DY, S::ROWS>(to + TILE, of.dy, b, head, first, tid);
    if (tid >= S::ROWS) return;
    const bool inside = first + tid < S::LEN;
    const i32 row = inside ? first + tid : 0, t = row / S::GROUP, h = head * S::GROUP + row % S::GROUP;
    copy_word_async(to + 2 * TILE + 4 * tid, of.lse + S::Lse::at(b, t, h), inside);
    copy_word_async(to + 2 * TILE + 4 * (S::ROWS + tid), of.delta + S::Delta::at(b, t, h), inside);
}

// sums = dsT k over the block's keys, for 16 rows from `row` on: ds lies in shared memory as rows of keys.
template <typename S, i32 F> FN void rows_of_keys(f32 (&sums)[1][F][4], u32 ds, u32 k, i32 row, i32 lane) {
    clear(sums);
    k += lane_piece<S>(lane);
#pragma unroll
    for (i32 n = 0; n < S::KEYS / 16; ++n) {
        u32 left[4];
        load_transposed(left, ds + piece_of<S::ROWS>(16 * n + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
#pragma unroll
        for (i32 f = 0; f < F; f += 2) {
            u32 right[4];
            load_transposed(right, (k ^ (16 * f)) + 16 * n * (2 * S::D));
            multiply_add(sums[0][f], left, right[0], right[1], typename S::T());
            multiply_add(sums[0][f + 1], left, right[2], right[3], typename S::T());
        }
    }
}

// Where the cotangent of q is summed: `turns` holds the next number to be drawn, then how many blocks have added to each 16 rows.
struct RowSums {
    u32* turns;
    f32* at;
};

// A SIMD group adds its 16 rows from `row` on, as the `number`-th of those who do; the last one writes the result.
template <typename S, i32 F>
FN void add_in_turn(
    const RowSums& to, typename S::T* dq, const f32 (&sums)[1][F][4], i32 pair, i32 row, i32 number, bool last, i32 lane
) {
    const i32 tile = pair * (S::ROW_TILES * S::ROWS / 16) + row / 16;
    u32* const turn = to.turns + 1 + tile;
    if (number > 0) {
        if (lane == 0) await_turn(turn, number);
        simd_barrier();
    }
#pragma unroll
    for (i32 i = 0; i < 2 * F; ++i) {
        const i32 half = i % 2, f = i / 2, y = lane / 4 + 8 * half, x = 8 * f + lane % 4 * 2;
        f32* const at = to.at + (i64(tile) * 16 + y) * S::D + x;
        f32 a = sums[0][f][2 * half], b = sums[0][f][2 * half + 1];
        if (!last) {
            if (number == 0) put_two(at, a, b);
            else add_two(at, a, b);
            continue;
        }
        if (number > 0) {
            f32 others[2];
            get_two(at, others[0], others[1]);
            a += others[0];
            b += others[1];
        }
        const i32 r = row + y, h = pair % S::HEADS * S::GROUP + r % S::GROUP;
        if (r >= S::LEN) continue;
        *(u32*)(dq + S::DQ::at(pair / S::HEADS, r / S::GROUP, h, x)) = pair_of(a * S::scale(), b * S::scale(), typename S::T());
    }
    simd_barrier();
    if (!last && lane == 0) end_turn(turn);
}

// Shared: k, v, ds, then twice a tile of q, one of dy, and their lse and delta.
template <typename S>
FN void grad(
    const attention::Inputs<S>& in, const attention::Cotangents<S>& of, const RowSums& to,
    typename S::T* dq, typename S::T* dk, typename S::T* dv, u64* shared, i32 block, i32 tid
) {
    enum : i32 { N = S::ROWS / 8, F = S::D / 8, TILE = S::ROWS * S::D * 2, TURN = 2 * TILE + 8 * S::ROWS };
    enum : i32 { OWN = 16 * S::D * 2, ALL = S::KEYS * S::D * 2, OF_DS = 2 * ALL, TILES = OF_DS + S::KEYS * S::ROWS * 2 };
    const i32 lane = tid % 32, simd = tid / 32;
    if (S::WANTS_Q) {
        u32* const number = (u32*)shared + OF_DS / 4;
        if (tid == 0) *number = draw_number(to.turns);
        barrier();
        block = *number;
    }
    const i32 pair = block % S::PAIRS, b = pair / S::HEADS, head = pair % S::HEADS;
    const i32 first_key = block / S::PAIRS * S::KEYS, own = first_key + 16 * simd;
    const attention::Span keys = {first_key, first_key + S::KEYS < S::TK ? first_key + S::KEYS : i32(S::TK)};
    const attention::Span all = attention::seeing<S>(keys, in.offset);
    const i32 start = all.start / S::ROWS * S::ROWS, last = (all.end - 1) / S::ROWS * S::ROWS;
    const u32 k = shared_place(shared), v = k + ALL, of_ds = k + OF_DS, tiles = k + TILES;
    copy_keys<S, typename S::K, S::KEYS>(k, in.k, b, head, keys, tid);
    copy_keys<S, typename S::V, S::KEYS>(v, in.v, b, head, keys, tid);
    if (all.start < all.end) copy_tile<S>(tiles, in, of, b, head, last, tid);
    f32 of_k[1][F][4], of_v[1][F][4];
    clear(of_k);
    clear(of_v);
    i32 turn = 0;
    for (i32 first = last; all.start < all.end && first >= start; first -= S::ROWS) {
        const u32 q = tiles + turn * TURN, of_dy = q + TILE;
        const f32* const lse = (const f32*)((const u8*)shared + TILES + turn * TURN + 2 * TILE);
        turn ^= 1;
        await_copies();
        barrier();
        if (first > start) copy_tile<S>(tiles + turn * TURN, in, of, b, head, first - S::ROWS, tid);
        f32 p[1][N][4], ds[1][N][4];
        products<S>(p, k + simd * OWN, q, lane);
        if (!all_seen<S, S::KEYS>(first, first_key, in.offset)) hide_turned<S>(p, in, b, first, own, lane);
        products<S>(ds, v + simd * OWN, of_dy, lane);
#pragma unroll
        for (i32 n = 0; n < N; ++n) {
            const Pack<f32, 2> sums = *(const Pack<f32, 2>*)(lse + 8 * n + lane % 4 * 2);
            const Pack<f32, 2> deltas = *(const Pack<f32, 2>*)(lse + S::ROWS + 8 * n + lane % 4 * 2);
#pragma unroll
            for (i32 e = 0; e < 4; ++e) {
                p[0][n][e] = power_of_2(p[0][n][e] * S::scale2() - sums.at[e % 2] * 1.4426950408889634f);
                ds[0][n][e] = p[0][n][e] * (ds[0][n][e] - deltas.at[e % 2]);
            }
        }
        if (S::WANTS_V) add_products<S>(of_v, p, of_dy, lane);
        if (S::WANTS_K) add_products<S>(of_k, ds, q, lane);
        if (S::WANTS_Q) {
            const f32 one[1][2] = {{1.0f, 1.0f}};
            settle<S>((u8*)shared + OF_DS + simd * (16 * S::ROWS * 2), ds, one, lane);
            barrier();
            const i32 row = first + 16 * simd;
            f32 of_q[1][F][4];
            rows_of_keys<S>(of_q, of_ds, k, 16 * simd, lane);
            const attention::Span seen = attention::seen_by_tile<S>(first, in.offset);
            const i32 number = first_key / S::KEYS - seen.start / S::KEYS;
            add_in_turn<S>(to, dq, of_q, pair, row, number, first_key + S::KEYS >= seen.end, lane);
        }
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
