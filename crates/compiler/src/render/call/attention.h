// Attention in tiles, whatever the dtype, the strides and the extents; see attention.rs.
//
// The query heads that share a key head are rows like any other: row r of a key head is query r / GROUP of head
// r % GROUP, so that k and v are read once for all of them. A block has 16 x 16 threads; of a tile of ROWS x KEYS scores,
// thread (y, x) holds rows y + 16 i and keys x + 16 j. Products take STEP features at a time through shared memory.
//
// S holds the shape as constants, the types (T in memory, R in registers, M of the mask, I of the segments), and where an element of
// each operand lies: S::Q::at(b, t, h, feature).

namespace attention {
template <typename S> struct Inputs {
    DEVICE const typename S::T* q;
    DEVICE const typename S::T* k;
    DEVICE const typename S::T* v;
    DEVICE const typename S::M* mask;
    DEVICE const typename S::I* of_q;
    DEVICE const typename S::I* of_k;
    i64 offset;
};

// Keys, or queries: [start, end).
struct Span { i32 start, end; };

FN i32 clamped(i64 x, i32 most) { return x < 0 ? 0 : x > most ? most : i32(x); }

// A position far beyond all keys is as good as any other, and leaves room for sums.
FN i64 held(i64 x) {
    const i64 far = i64(1) << 40;
    return x > far ? far : x < -far ? -far : x;
}

// The keys that a row sees by its position.
template <typename S> FN Span seen_by(i32 row, i64 offset) {
    if (!S::CAUSAL) return {0, S::TK};
    const i64 end = offset + row / S::GROUP + 1;
    return {S::WINDOW > 0 ? clamped(end - S::WINDOW, S::TK) : 0, clamped(end, S::TK)};
}

// The keys that any row of a tile sees, which begins with this one.
template <typename S> FN Span seen_by_tile(i32 first, i64 offset) {
    const i32 last = (first + S::ROWS < S::LEN ? first + S::ROWS : i32(S::LEN)) - 1;
    return {seen_by<S>(first, offset).start, seen_by<S>(last, offset).end};
}

// The rows that see any of these keys by their position.
template <typename S> FN Span seeing(Span keys, i64 offset) {
    if (!S::CAUSAL) return {0, S::LEN};
    const i32 start = clamped(keys.start - offset, S::TQ);
    const i32 end = S::WINDOW > 0 ? clamped(keys.end - 1 - offset + S::WINDOW, S::TQ) : i32(S::TQ);
    return {start * S::GROUP, end * S::GROUP};
}

// Segments, for those who have them.
template <typename S> FN bool same_segment(THREAD const Inputs<S>& in, i32 b, i32 row, i32 key) {
    return !S::SEGMENTS || in.of_q[S::OfQ::at(b, row / S::GROUP)] == in.of_k[S::OfK::at(b, key)];
}

// ---- tiles ----

// STEP features of ROWS rows of a key head: [ROWS][STEP + 1], 0 beyond the last row and the last feature.
template <typename S, typename X>
FN void load_rows(SHARED typename S::R* to, DEVICE const typename S::T* from, i32 b, i32 head, i32 first, i32 feature, i32 tid) {
    for (i32 i = tid; i < S::ROWS * S::STEP; i += S::THREADS) {
        const i32 y = i / S::STEP, x = i % S::STEP, row = first + y;
        const bool inside = row < S::LEN && feature + x < X::FEATURES;
        const i32 h = head * S::GROUP + row % S::GROUP;
        to[y * (S::STEP + 1) + x] =
            inside ? typename S::R(from[X::at(b, row / S::GROUP, h, feature + x)]) : typename S::R(0);
    }
}

// STEP features of the keys from `keys.start` on: [KEYS][STEP + 1], 0 from `keys.end` on.
template <typename S, typename X>
FN void load_keys(SHARED typename S::R* to, DEVICE const typename S::T* from, i32 b, i32 head, Span keys, i32 feature, i32 tid) {
    for (i32 i = tid; i < S::KEYS * S::STEP; i += S::THREADS) {
        const i32 y = i / S::STEP, x = i % S::STEP, key = keys.start + y;
        const bool inside = key < keys.end && feature + x < X::FEATURES;
        to[y * (S::STEP + 1) + x] =
            inside ? typename S::R(from[X::at(b, key, head, feature + x)]) : typename S::R(0);
    }
}

// to += a b, of K summands, where a thread has rows y + 16 i and columns x + 16 j; elements lie as the strides say.
template <i32 K, i32 A_ROW, i32 A_K, i32 B_K, i32 B_COL, typename R, i32 M, i32 N>
FN void multiply(THREAD R (&to)[M][N], SHARED const R* a, SHARED const R* b, i32 tid) {
    a += tid / 16 * A_ROW;
    b += tid % 16 * B_COL;
#pragma unroll 4
    for (i32 k = 0; k < K; ++k) {
        R left[M], right[N];
        for (i32 i = 0; i < M; ++i) left[i] = a[16 * i * A_ROW + k * A_K];
        for (i32 j = 0; j < N; ++j) right[j] = b[16 * j * B_COL + k * B_K];
        for (i32 i = 0; i < M; ++i) {
            for (i32 j = 0; j < N; ++j) to[i][j] += left[i] * right[j];
        }
    }
}

// Rows times keys: x of each row with y of each key.
template <typename S, typename X, typename Y, i32 M, i32 N>
FN void rows_times_keys(
    THREAD typename S::R (&to)[M][N], DEVICE const typename S::T* x, DEVICE const typename S::T* y,
    i32 b, i32 head, i32 first, Span keys, SHARED typename S::R* shared, i32 tid
) {
    SHARED typename S::R* const right = shared + S::ROWS * (S::STEP + 1);
    for (i32 i = 0; i < M; ++i) {
        for (i32 j = 0; j < N; ++j) to[i][j] = 0;
    }
    for (i32 feature = 0; feature < X::FEATURES; feature += S::STEP) {
        barrier();
        load_rows<S, X>(shared, x, b, head, first, feature, tid);
        load_keys<S, Y>(right, y, b, head, keys, feature, tid);
        barrier();
        multiply<S::STEP, S::STEP + 1, 1, 1, S::STEP + 1>(to, shared, right, tid);
    }
}

// scale q k, with the mask; -INF where a row does not see a key.
template <typename S, i32 M, i32 N>
FN void scores(
    THREAD typename S::R (&s)[M][N], THREAD const Inputs<S>& in,
    i32 b, i32 head, i32 first, Span keys, SHARED typename S::R* shared, i32 tid
) {
    typedef typename S::R R;
    rows_times_keys<S, typename S::Q, typename S::K>(s, in.q, in.k, b, head, first, keys, shared, tid);
    for (i32 i = 0; i < M; ++i) {
        const i32 row = first + tid / 16 + 16 * i, h = head * S::GROUP + row % S::GROUP;
        const Span seen = seen_by<S>(row, in.offset);
        for (i32 j = 0; j < N; ++j) {
            const i32 key = keys.start + tid % 16 + 16 * j;
            bool sees = row < S::LEN && key < keys.end && key >= seen.start && key < seen.end;
            sees = sees && same_segment<S>(in, b, row, key);
            s[i][j] *= R(S::scale());
            if (S::MASK && sees) s[i][j] += R(in.mask[S::Mask::at(b, h, row / S::GROUP, key)]);
            if (!sees) s[i][j] = -R(INF);
        }
    }
}

// A tile of scores, for all: [ROWS][KEYS + 1].
template <typename S, typename R, i32 M, i32 N>
FN void share(SHARED R* to, THREAD const R (&tile)[M][N], i32 tid) {
    barrier();
    for (i32 i = 0; i < M; ++i) {
        for (i32 j = 0; j < N; ++j) to[(tid / 16 + 16 * i) * (S::KEYS + 1) + tid % 16 + 16 * j] = tile[i][j];
    }
}

// Over the 16 threads that have a row in common.
template <typename Op, typename R> FN R row_reduce(R x) {
    for (u32 mask = 8; mask > 0; mask >>= 1) x = Op::of(x, shuffle_xor(x, mask));
    return x;
}

// The running maximum, and the sum of the exponentials, of the rows of a thread.
template <typename R, i32 M> struct Running { R max[M], sum[M]; };

template <typename R, i32 M> FN void begin(THREAD Running<R, M>& all) {
    for (i32 i = 0; i < M; ++i) {
        all.max[i] = -R(INF);
        all.sum[i] = 0;
    }
}

// Takes a tile in: s becomes exp(s - max), and `rescale` what earlier exponentials are to be multiplied with.
template <typename R, i32 M, i32 N>
FN void take(THREAD Running<R, M>& all, THREAD R (&s)[M][N], THREAD R (&rescale)[M]) {
    for (i32 i = 0; i < M; ++i) {
        R top = s[i][0];
        for (i32 j = 1; j < N; ++j) top = math::maximum(top, s[i][j]);
        top = math::maximum(all.max[i], row_reduce<Max>(top));
        // A row that has seen nothing has no maximum.
        const R base = top == -R(INF) ? R(0) : top;
        rescale[i] = math::exp(all.max[i] - base);
        all.max[i] = top;
        all.sum[i] *= rescale[i];
        for (i32 j = 0; j < N; ++j) {
            s[i][j] = math::exp(s[i][j] - base);
            all.sum[i] += s[i][j];
        }
    }
}

// Sums of products with a shared tile: STEP features for each of CHUNKS.
template <typename R, i32 CHUNKS, i32 M> struct Sums { R at[CHUNKS][M][2]; };

template <typename R, i32 CHUNKS, i32 M> FN void begin(THREAD Sums<R, CHUNKS, M>& sums) {
    for (i32 c = 0; c < CHUNKS; ++c) {
        for (i32 i = 0; i < M; ++i) sums.at[c][i][0] = sums.at[c][i][1] = 0;
    }
}

// sums += p y: p is shared, of rows, y is of keys.
template <typename S, typename Y, i32 CHUNKS, i32 M>
FN void add_keys(
    THREAD Sums<typename S::R, CHUNKS, M>& sums, SHARED typename S::R* p, DEVICE const typename S::T* y,
    i32 b, i32 head, Span keys, i32 tid
) {
    SHARED typename S::R* const right = p + S::ROWS * (S::KEYS + 1);
#pragma unroll
    for (i32 c = 0; c < CHUNKS; ++c) {
        barrier();
        load_keys<S, Y>(right, y, b, head, keys, c * S::STEP, tid);
        barrier();
        multiply<S::KEYS, S::KEYS + 1, 1, S::STEP + 1, 1>(sums.at[c], p, right, tid);
    }
}

// sums += pT y: p is shared, of rows, and so is y.
template <typename S, typename Y, i32 CHUNKS, i32 M>
FN void add_rows(
    THREAD Sums<typename S::R, CHUNKS, M>& sums, SHARED typename S::R* p, DEVICE const typename S::T* y,
    i32 b, i32 head, i32 first, i32 tid
) {
    SHARED typename S::R* const right = p + S::ROWS * (S::KEYS + 1);
#pragma unroll
    for (i32 c = 0; c < CHUNKS; ++c) {
        barrier();
        load_rows<S, Y>(right, y, b, head, first, c * S::STEP, tid);
        barrier();
        multiply<S::ROWS, 1, S::KEYS + 1, S::STEP + 1, 1>(sums.at[c], p, right, tid);
    }
}

// Rows of sums, each times its factor.
template <typename S, typename X, i32 CHUNKS, i32 M>
FN void store_rows(
    DEVICE typename S::T* to, THREAD const Sums<typename S::R, CHUNKS, M>& sums, THREAD const typename S::R (&factor)[M],
    i32 b, i32 head, i32 first, i32 tid
) {
    for (i32 i = 0; i < M; ++i) {
        const i32 row = first + tid / 16 + 16 * i;
        if (row >= S::LEN) continue;
#pragma unroll
        for (i32 c = 0; c < CHUNKS; ++c) {
            for (i32 j = 0; j < 2; ++j) {
                const i32 feature = c * S::STEP + tid % 16 + 16 * j;
                if (feature >= X::FEATURES) continue;
                const i32 h = head * S::GROUP + row % S::GROUP;
                to[X::at(b, row / S::GROUP, h, feature)] = typename S::T(sums.at[c][i][j] * factor[i]);
            }
        }
    }
}

// Keys of sums, all times one factor.
template <typename S, typename X, i32 CHUNKS, i32 M>
FN void store_keys(
    DEVICE typename S::T* to, THREAD const Sums<typename S::R, CHUNKS, M>& sums, typename S::R factor,
    i32 b, i32 head, i32 first, i32 tid
) {
    for (i32 i = 0; i < M; ++i) {
        const i32 key = first + tid / 16 + 16 * i;
        if (key >= S::TK) continue;
#pragma unroll
        for (i32 c = 0; c < CHUNKS; ++c) {
            for (i32 j = 0; j < 2; ++j) {
                const i32 feature = c * S::STEP + tid % 16 + 16 * j;
                if (feature < X::FEATURES) to[X::at(b, key, head, feature)] = typename S::T(sums.at[c][i][j] * factor);
            }
        }
    }
}

// ---- forward ----

// A block has a tile of rows. Those that see most come first.
template <typename S>
FN void forward(
    THREAD const Inputs<S>& in, DEVICE typename S::T* out, DEVICE typename S::R* lse,
    SHARED u64* memory, i32 block, i32 tid
) {
    typedef typename S::R R;
    enum : i32 { M = S::ROWS / 16, N = S::KEYS / 16 };
    SHARED R* const shared = (SHARED R*)memory;
    const i32 pair = block % S::PAIRS, b = pair / S::HEADS, head = pair % S::HEADS;
    const i32 first = (S::ROW_TILES - 1 - block / S::PAIRS) * S::ROWS;
    const Span seen = seen_by_tile<S>(first, in.offset);
    Running<R, M> all;
    Sums<R, S::V_CHUNKS, M> sums;
    begin(all);
    begin(sums);
    for (i32 key = seen.start; key < seen.end; key += S::KEYS) {
        R p[M][N], rescale[M];
        scores<S>(p, in, b, head, first, {key, seen.end}, shared, tid);
        take(all, p, rescale);
        for (i32 c = 0; c < S::V_CHUNKS; ++c) {
            for (i32 i = 0; i < M; ++i) {
                sums.at[c][i][0] *= rescale[i];
                sums.at[c][i][1] *= rescale[i];
            }
        }
        share<S>(shared, p, tid);
        add_keys<S, typename S::V>(sums, shared, in.v, b, head, {key, seen.end}, tid);
    }
    R factor[M];
    for (i32 i = 0; i < M; ++i) {
        const R sum = row_reduce<Sum>(all.sum[i]);
        factor[i] = sum == R(0) ? R(0) : R(1) / sum;
        const i32 row = first + tid / 16 + 16 * i;
        if (!S::WANTS_LSE || row >= S::LEN || tid % 16 != 0) continue;
        lse[S::Lse::at(b, row / S::GROUP, head * S::GROUP + row % S::GROUP)] =
            sum == R(0) ? R(INF) : all.max[i] + math::log(sum);
    }
    if (S::WANTS_Y) store_rows<S, typename S::Y>(out, sums, factor, b, head, first, tid);
}
}
