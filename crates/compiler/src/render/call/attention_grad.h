// The cotangents of attention, with the weights recomputed: p = exp(s - lse), ds = p (dp - delta), where dp = dy vT, and delta is the
// sum of dy y over the features: the mean of dp that p weighs. See attention.h.

namespace attention {
// Of the result, and what the forward pass says of every row.
template <typename S> struct Cotangents {
    DEVICE const typename S::T* dy;
    DEVICE const typename S::R* lse;
    DEVICE const typename S::R* delta;
};

// The weights of a tile, and the cotangents of its scores.
template <typename S, i32 M, i32 N>
FN void weights(
    THREAD typename S::R (&p)[M][N], THREAD typename S::R (&ds)[M][N], THREAD const Inputs<S>& in,
    THREAD const Cotangents<S>& of, i32 b, i32 head, i32 first, Span keys, SHARED typename S::R* shared, i32 tid
) {
    typedef typename S::R R;
    scores<S>(p, in, b, head, first, keys, shared, tid);
    rows_times_keys<S, typename S::DY, typename S::V>(ds, of.dy, in.v, b, head, first, keys, shared, tid);
    for (i32 i = 0; i < M; ++i) {
        const i32 row = first + tid / 16 + 16 * i, t = row / S::GROUP, h = head * S::GROUP + row % S::GROUP;
        const bool inside = row < S::LEN;
        const R lse = inside ? of.lse[S::Lse::at(b, t, h)] : R(INF);
        const R delta = inside ? of.delta[S::Delta::at(b, t, h)] : R(0);
        for (i32 j = 0; j < N; ++j) {
            p[i][j] = math::exp(p[i][j] - lse);
            ds[i][j] = p[i][j] * (ds[i][j] - delta);
        }
    }
}

// A tile of rows: the cotangents of q and of the mask.
template <typename S>
FN void grad_rows(
    THREAD const Inputs<S>& in, THREAD const Cotangents<S>& of,
    DEVICE typename S::T* dq, DEVICE typename S::M* dmask, SHARED u64* memory, i32 block, i32 tid
) {
    typedef typename S::R R;
    enum : i32 { M = S::ROWS / 16, N = S::KEYS / 16 };
    SHARED R* const shared = (SHARED R*)memory;
    const i32 pair = block % S::PAIRS, b = pair / S::HEADS, head = pair % S::HEADS;
    const i32 first = (S::ROW_TILES - 1 - block / S::PAIRS) * S::ROWS;
    Sums<R, S::Q_CHUNKS, M> sums;
    begin(sums);
    const Span seen = seen_by_tile<S>(first, in.offset);
    // The mask has a cotangent, 0, where nothing is seen, too.
    const Span walk = {S::WANTS_MASK ? 0 : seen.start, S::WANTS_MASK ? i32(S::TK) : seen.end};
    for (i32 key = walk.start; key < walk.end; key += S::KEYS) {
        R p[M][N], ds[M][N];
        weights<S>(p, ds, in, of, b, head, first, {key, seen.end}, shared, tid);
        if (S::WANTS_MASK) {
            for (i32 i = 0; i < M; ++i) {
                const i32 row = first + tid / 16 + 16 * i, h = head * S::GROUP + row % S::GROUP;
                for (i32 j = 0; j < N; ++j) {
                    const i32 k = key + tid % 16 + 16 * j;
                    if (row < S::LEN && k < S::TK) dmask[S::DMask::at(b, h, row / S::GROUP, k)] = typename S::M(ds[i][j]);
                }
            }
        }
        if (S::WANTS_Q) {
            share<S>(shared, ds, tid);
            add_keys<S, typename S::K>(sums, shared, in.k, b, head, {key, seen.end}, tid);
        }
    }
    R factor[M];
    for (i32 i = 0; i < M; ++i) factor[i] = R(S::scale());
    if (S::WANTS_Q) store_rows<S, typename S::DQ>(dq, sums, factor, b, head, first, tid);
}

// A tile of keys: the cotangents of k and v, summed over the rows of all query heads that share the key head.
template <typename S>
FN void grad_keys(
    THREAD const Inputs<S>& in, THREAD const Cotangents<S>& of,
    DEVICE typename S::T* dk, DEVICE typename S::T* dv, SHARED u64* memory, i32 block, i32 tid
) {
    typedef typename S::R R;
    enum : i32 { M = S::ROWS / 16, N = S::KEYS / 16 };
    SHARED R* const shared = (SHARED R*)memory;
    const i32 pair = block % S::PAIRS, b = pair / S::HEADS, head = pair % S::HEADS;
    const i32 first_key = block / S::PAIRS * S::KEYS;
    const Span keys = {first_key, first_key + S::KEYS < S::TK ? first_key + S::KEYS : i32(S::TK)};
    const Span all = seeing<S>(keys, in.offset);
    Sums<R, S::Q_CHUNKS, N> of_k;
    Sums<R, S::V_CHUNKS, N> of_v;
    begin(of_k);
    begin(of_v);
    for (i32 first = all.start / S::ROWS * S::ROWS; first < all.end; first += S::ROWS) {
        R p[M][N], ds[M][N];
        weights<S>(p, ds, in, of, b, head, first, keys, shared, tid);
        if (S::WANTS_V) {
            share<S>(shared, p, tid);
            add_rows<S, typename S::DY>(of_v, shared, of.dy, b, head, first, tid);
        }
        if (S::WANTS_K) {
            share<S>(shared, ds, tid);
            add_rows<S, typename S::Q>(of_k, shared, in.q, b, head, first, tid);
        }
    }
    if (S::WANTS_V) store_keys<S, typename S::DV>(dv, of_v, R(1), b, head, keys.start, tid);
    if (S::WANTS_K) store_keys<S, typename S::DK>(dk, of_k, R(S::scale()), b, head, keys.start, tid);
}
}
