// Attention of few queries to many keys, as when a token is generated. A block has up to AT_ONCE rows. Where there are very many keys, they are
// split over blocks, each of which gives a part of the result, and a second kernel joins the parts. See attention.h for rows and constants.
//
// Eight lanes have a key in common: lane l of them has features V (8 i + l) and the V - 1 after it.

namespace attention {
// Features of one row that a lane has, as they lie: PIECES pieces of V, zeros beyond the last.
template <typename S, i32 PIECES> struct Features {
    Pack<typename S::T, S::VECTOR> pieces[PIECES];
};

template <typename S, typename X, i32 PIECES>
FN void load_features(THREAD Features<S, PIECES>& to, DEVICE const typename S::T* from, i32 b, i32 t, i32 h, i32 lane, bool inside) {
    typedef Pack<typename S::T, S::VECTOR> Piece;
#pragma unroll
    for (i32 i = 0; i < PIECES; ++i) {
        const i32 feature = S::VECTOR * (8 * i + lane);
        if (inside && feature < X::FEATURES) {
            DEVICE const Piece& piece = *(DEVICE const Piece*)(from + X::at(b, t, h, feature));
            to.pieces[i] = piece;
        } else {
            for (i32 j = 0; j < S::VECTOR; ++j) to.pieces[i].at[j] = typename S::T(0.0f);
        }
    }
}

// The features of AHEAD keys of a lane, KEYS_AT_ONCE apart, from `first` on and before `end`.
template <typename S, typename X, i32 KEYS_AT_ONCE, i32 PIECES>
FN void load_keys_of_lane(
    THREAD Features<S, PIECES> (&to)[S::AHEAD], DEVICE const typename S::T* from, i32 b, i32 head, i32 first, i32 end, i32 lane
) {
#pragma unroll
    for (i32 i = 0; i < S::AHEAD; ++i) {
        const i32 key = first + i * KEYS_AT_ONCE;
        load_features<S, X>(to[i], from, b, key, head, lane, key < end);
    }
}

// What a part of the keys gives a row: the largest score, the sum of the exponentials, and that of the values they weigh.
template <i32 PIECES, i32 V> struct Part {
    f32 max, sum;
    f32 values[PIECES][V];
};

// What numbers relative to maximum `from` are multiplied with, to be relative to `to`.
FN f32 relative(f32 from, f32 to) { return from == -INF ? 0.0f : math::exp(from - to); }

// Joins the parts of the lanes that have the same features.
template <i32 PIECES, i32 V> FN void join_lanes(THREAD Part<PIECES, V>& part) {
    for (u32 mask = 8; mask <= 16; mask <<= 1) {
        const f32 other = shuffle_xor(part.max, mask), top = math::maximum(part.max, other);
        const f32 own_factor = relative(part.max, top), factor = relative(other, top);
        part.max = top;
        part.sum = part.sum * own_factor + shuffle_xor(part.sum, mask) * factor;
#pragma unroll
        for (i32 i = 0; i < PIECES; ++i) {
            for (i32 j = 0; j < V; ++j) {
                part.values[i][j] = part.values[i][j] * own_factor + shuffle_xor(part.values[i][j], mask) * factor;
            }
        }
    }
}

// A block has some rows and a part of the keys that they see: of all of them it gives the result, of some its part.
template <typename S>
FN void forward_few(
    THREAD const Inputs<S>& in, DEVICE f32* parts, DEVICE typename S::T* out, SHARED u64* memory, i32 block, i32 tid
) {
    enum : i32 { KEYS_AT_ONCE = S::THREADS / 8, GROUPS = S::THREADS / 32, AHEAD = S::AHEAD, ROWS = S::AT_ONCE };
    enum : i32 { D_PIECES = S::D_PIECES, DV_PIECES = S::DV_PIECES, DV = S::V_FEATURES, V = S::VECTOR };
    SHARED f32* const shared = (SHARED f32*)memory;
    const i32 split = block % S::SPLITS, pair = block / S::SPLITS % S::PAIRS, b = pair / S::HEADS, head = pair % S::HEADS;
    const i32 first = block / S::SPLITS / S::PAIRS * ROWS;
    const i32 lane = tid % 8, simd = tid / 32, own = tid / 8;
    Features<S, D_PIECES> q[ROWS], k[AHEAD];
    Features<S, DV_PIECES> v[AHEAD];
    // Where all begin with the first key, that and those after it are asked for before it is known how many there are.
    const bool from_first = S::SPLITS == 1 && S::WINDOW == 0;
    if (from_first) {
        load_keys_of_lane<S, typename S::K, KEYS_AT_ONCE>(k, in.k, b, head, own, S::TK, lane);
        load_keys_of_lane<S, typename S::V, KEYS_AT_ONCE>(v, in.v, b, head, own, S::TK, lane);
    }
    const Span seen = seen_by_tile<S>(first, in.offset);
    // What is seen is shared out evenly.
    const i32 share = (seen.end - seen.start + S::SPLITS * 16 - 1) / (S::SPLITS * 16) * 16;
    const i32 start = seen.start + split * share;
    const i32 end = start + share < seen.end ? start + share : seen.end;
    Part<DV_PIECES, V> all[ROWS];
    Span rows_see[ROWS];
    for (i32 r = 0; r < ROWS; ++r) {
        const i32 row = first + r, h = head * S::GROUP + row % S::GROUP;
        load_features<S, typename S::Q>(q[r], in.q, b, row < S::LEN ? row / S::GROUP : 0, h, lane, row < S::LEN);
        rows_see[r] = seen_by<S>(row, in.offset);
        if (row >= S::LEN) rows_see[r].end = 0;
        all[r].max = -INF;
        all[r].sum = 0.0f;
        for (i32 i = 0; i < DV_PIECES; ++i) {
            for (i32 j = 0; j < V; ++j) all[r].values[i][j] = 0.0f;
        }
    }
    for (i32 base = start; base < end; base += AHEAD * KEYS_AT_ONCE) {
        if (!from_first || base > start) {
            load_keys_of_lane<S, typename S::K, KEYS_AT_ONCE>(k, in.k, b, head, base + own, end, lane);
            load_keys_of_lane<S, typename S::V, KEYS_AT_ONCE>(v, in.v, b, head, base + own, end, lane);
        }
#pragma unroll
        for (i32 n = 0; n < AHEAD * ROWS; ++n) {
            const i32 ahead = n / ROWS, r = n % ROWS, key = base + ahead * KEYS_AT_ONCE + own;
            // The same for all threads.
            if (base + ahead * KEYS_AT_ONCE >= end) continue;
            const i32 row = first + r, h = head * S::GROUP + row % S::GROUP;
            f32 s = 0.0f;
            for (i32 i = 0; i < D_PIECES; ++i) {
                for (i32 j = 0; j < V; ++j) s += f32(q[r].pieces[i].at[j]) * f32(k[ahead].pieces[i].at[j]);
            }
            for (u32 mask = 4; mask > 0; mask >>= 1) s += shuffle_xor(s, mask);
            bool sees = key < end && key >= rows_see[r].start && key < rows_see[r].end;
            sees = sees && same_segment<S>(in, b, row, key);
            s *= S::scale();
            if (S::MASK && sees) s += f32(in.mask[S::Mask::at(b, h, row / S::GROUP, key)]);
            if (!sees) s = -INF;
            const f32 top = math::maximum(all[r].max, s);
            const f32 factor = relative(all[r].max, top), p = relative(s, top);
            all[r].max = top;
            all[r].sum = all[r].sum * factor + p;
            for (i32 i = 0; i < DV_PIECES; ++i) {
                for (i32 j = 0; j < V; ++j) {
                    // Beyond the end there may be anything.
                    const f32 x = key < end ? f32(v[ahead].pieces[i].at[j]) : 0.0f;
                    all[r].values[i][j] = all[r].values[i][j] * factor + p * x;
                }
            }
        }
    }
    // [SIMD group][row][DV + 2]
    for (i32 r = 0; r < ROWS; ++r) {
        join_lanes(all[r]);
        SHARED f32* const to = shared + (simd * ROWS + r) * (DV + 2);
        if (tid % 32 >= 8) continue;
        for (i32 i = 0; i < DV_PIECES; ++i) {
            for (i32 j = 0; j < V; ++j) {
                const i32 feature = V * (8 * i + lane) + j;
                if (feature < DV) to[feature] = all[r].values[i][j];
            }
        }
        if (lane == 0) {
            to[DV] = all[r].max;
            to[DV + 1] = all[r].sum;
        }
    }
    barrier();
    for (i32 at = tid; at < ROWS * (DV + 2); at += S::THREADS) {
        const i32 row = first + at / (DV + 2), i = at % (DV + 2);
        if (row >= S::LEN) continue;
        SHARED const f32* const from = shared + at / (DV + 2) * (DV + 2);
        f32 top = -INF, sum = 0.0f, total = 0.0f;
        for (i32 g = 0; g < GROUPS; ++g) top = math::maximum(top, from[g * ROWS * (DV + 2) + DV]);
        for (i32 g = 0; g < GROUPS; ++g) {
            SHARED const f32* const group = from + g * ROWS * (DV + 2);
            const f32 factor = relative(group[DV], top);
            sum += group[i] * factor;
            total += group[DV + 1] * factor;
        }
        if (S::SPLITS > 1) {
            parts[(i64(pair * S::LEN + row) * S::SPLITS + split) * (DV + 2) + i] = i == DV ? top : sum;
        } else if (i < DV) {
            const i32 h = head * S::GROUP + row % S::GROUP;
            out[S::Y::at(b, row / S::GROUP, h, i)] = typename S::T(total == 0.0f ? 0.0f : sum / total);
        }
    }
}

// A block joins the parts of a row.
template <typename S> FN void join(DEVICE const f32* parts, DEVICE typename S::T* out, i32 block, i32 tid) {
    enum : i32 { DV = S::V_FEATURES };
    const i32 pair = block / S::LEN, row = block % S::LEN, b = pair / S::HEADS, head = pair % S::HEADS;
    DEVICE const f32* const from = parts + i64(block) * S::SPLITS * (DV + 2);
    f32 top = -INF, sum = 0.0f;
    for (i32 s = 0; s < S::SPLITS; ++s) top = math::maximum(top, from[s * (DV + 2) + DV]);
    for (i32 s = 0; s < S::SPLITS; ++s) sum += from[s * (DV + 2) + DV + 1] * relative(from[s * (DV + 2) + DV], top);
    for (i32 feature = tid; feature < DV; feature += S::THREADS) {
        f32 x = 0.0f;
        for (i32 s = 0; s < S::SPLITS; ++s) x += from[s * (DV + 2) + feature] * relative(from[s * (DV + 2) + DV], top);
        const i32 h = head * S::GROUP + row % S::GROUP;
        out[S::Y::at(b, row / S::GROUP, h, feature)] = typename S::T(sum == 0.0f ? 0.0f : x / sum);
    }
}
}
