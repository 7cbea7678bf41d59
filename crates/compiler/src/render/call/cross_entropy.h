// ---- cross-entropy after a linear layer ----

// What is known of a row while its logits come by, a panel of classes at a time.
template <typename A> struct Row {
    // The largest logit, and `Σ exp(logit - max)`.
    A max, sum;
    // The label's logit, and `Σ logit`.
    A picked, total;
    // What the gradient is multiplied with.
    A scale;
    // The label, less the classes that have come by: for the sums, and for the gradient. NONE where the row does not
    // count.
    i64 label[2];
};

// Far below 0, however many classes come by.
FN i64 no_label() { return -(i64(1) << 62); }
FN bool counts(i64 label) { return label > -(i64(1) << 61); }

// `exp(from - to)`, and 0 of a sum that is empty.
template <typename A> FN A rescale(A from, A to) { return from == A(-INF) ? A(0) : math::exp(from - to); }

template <typename K, typename LABEL, typename A>
FN void start_row(LABEL given, A scale, i64 position, DEVICE Row<A>& row, DEVICE Status* status) {
    const i64 label = i64(given);
    const bool ignored = K::IGNORES && label == K::ignored();
    const bool known = !ignored && in_range(label, K::CLASSES, position, K::OPERATION, status);
    row.max = A(-INF);
    row.sum = row.picked = row.total = 0;
    row.scale = scale;
    row.label[0] = row.label[1] = known ? label : no_label();
}

template <typename K, typename LABEL, typename A>
FN void start_rows(DEVICE const LABEL* labels, DEVICE Row<A>* rows, DEVICE Status* status, Thread t) {
    EACH(i, K::ELEMENTS) start_row<K>(labels[K::label(i)], A(1), i, rows[i], status);
}

template <typename K, typename LABEL, typename A>
FN void start_scaled_rows(
    DEVICE const LABEL* labels, DEVICE const A* scale, DEVICE Row<A>* rows, DEVICE Status* status, Thread t
) {
    EACH(i, K::ELEMENTS) start_row<K>(labels[K::label(i)], scale[K::scale(i)], i, rows[i], status);
}

// The first of the N neighbours that are a thread's i-th access. It makes WIDE of them at once, each a block's worth from
// the last.
template <typename K, i32 N> FN typename K::I column(typename K::I first, i32 i, Thread t) {
    return first + (i * K::BLOCK + t.tid) * N;
}

// Nothing is more than a logit beyond the row.
template <typename K, i32 N, typename A>
FN void load_logits(THREAD A (&x)[K::WIDE][N], DEVICE const A* logits, typename K::I first, Thread t) {
    for (i32 i = 0; i < K::WIDE; ++i) {
        const typename K::I c = column<K, N>(first, i, t);
        if (c < K::COLS) {
            load(x[i], logits + c);
        } else {
            for (i32 j = 0; j < N; ++j) x[i][j] = A(-INF);
        }
    }
}

// Takes a panel's logits of a row in.
template <typename K, i32 N, typename A>
FN void add_row(DEVICE const A* logits, DEVICE Row<A>& row, Thread t, SHARED u64* shared) {
    typedef typename K::I I;
    const i32 groups = K::BLOCK / 32;
    const i64 label = row.label[0];
    A max = -INF, sum = 0, total = 0;
    for (I first = 0; first < K::COLS; first += K::WIDE * K::BLOCK * N) {
        A x[K::WIDE][N];
        load_logits<K>(x, logits, first, t);
        A larger = max;
        for (i32 i = 0; i < K::WIDE; ++i) {
            for (i32 j = 0; j < N; ++j) larger = Max::of(larger, x[i][j]);
        }
        sum *= rescale(max, larger);
        for (i32 i = 0; i < K::WIDE; ++i) {
            const bool within = column<K, N>(first, i, t) < K::COLS;
            for (i32 j = 0; j < N; ++j) sum += rescale(x[i][j], larger);
            for (i32 j = 0; j < N; ++j) total += K::SMOOTH && within ? x[i][j] : A(0);
        }
        max = larger;
    }
    const A all = block_reduce<Max, groups>(max, shared, t.tid);
    sum = block_reduce<Sum, groups>(sum * rescale(max, all), shared, t.tid);
    if (K::SMOOTH) total = block_reduce<Sum, groups>(total, shared, t.tid);
    if (t.tid == 0) {
        const A larger = Max::of(row.max, all);
        row.sum = row.sum * rescale(row.max, larger) + sum * rescale(all, larger);
        row.max = larger;
        row.total += total;
        if (label >= 0 && label < K::COLS) row.picked = logits[label];
        row.label[0] = label - K::COLS;
    }
}

// Takes a panel of logits in, a block for each row.
template <typename K, i32 N, typename A>
FN void add_logits(DEVICE const A* logits, DEVICE Row<A>* rows, Thread t, SHARED u64* shared) {
    typedef typename K::I I;
    for (I r = t.block; r < K::ROWS; r += t.blocks) {
        // The same for all threads.
        if (counts(rows[r].label[0])) add_row<K, N>(logits + r * K::STRIDE, rows[r], t, shared);
    }
}

template <typename A> FN A log_sum_exp(DEVICE const Row<A>& row) { return row.max + math::log(row.sum); }

// `logsumexp - (1 - ε) logit[label] - ε mean(logit)`
template <typename K, typename A> FN void losses(DEVICE const Row<A>* rows, DEVICE A* out, Thread t) {
    EACH(i, K::ELEMENTS) {
        DEVICE const Row<A>& row = rows[i];
        // Left out at 0, where an infinite logit would make it NaN.
        const A target = K::SMOOTH ? (A(1) - K::epsilon()) * row.picked + K::epsilon() / A(K::CLASSES) * row.total : row.picked;
        out[K::to(i)] = counts(row.label[0]) ? log_sum_exp(row) - target : A(0);
    }
}

// `(softmax - target) scale` of a panel's logits of a row. It may lie where they do, or in the second half of their place if
// it takes half of it: what it replaces has been read, since the last comes first. A cache that holds a row
// which was just taken in gives its last part, too.
template <typename K, i32 N, typename A, typename D>
FN void grad_row(DEVICE const A* logits, DEVICE Row<A>& row, DEVICE D* out, Thread t) {
    typedef typename K::I I;
    const I step = K::WIDE * K::BLOCK * N;
    const A miss = K::SMOOTH ? K::epsilon() / A(K::CLASSES) : A(0), hit = A(1) - K::epsilon();
    const i64 label = row.label[1];
    const bool own = counts(label);
    const A all = own ? log_sum_exp(row) : A(0), scale = row.scale;
    for (I first = (K::COLS - 1) / step * step; first >= 0; first -= step) {
        A x[K::WIDE][N];
        load_logits<K>(x, logits, first, t);
        barrier();
        for (i32 i = 0; i < K::WIDE; ++i) {
            const I c = column<K, N>(first, i, t);
            if (c >= K::COLS) continue;
            for (i32 j = 0; j < N; ++j) {
                const A p = math::exp(x[i][j] - all) - miss - (c + j == label ? hit : A(0));
                x[i][j] = own ? p * scale : A(0);
            }
            store(out + c, x[i]);
        }
    }
    // Everybody has the label.
    barrier();
    if (t.tid == 0 && own) row.label[1] = label - K::COLS;
}

// The gradient of a panel of logits that were taken in before; a block for each row.
template <typename K, i32 N, typename A, typename D>
FN void logits_grad(DEVICE A* logits, DEVICE Row<A>* rows, DEVICE D* out, Thread t) {
    typedef typename K::I I;
    for (I r = t.block; r < K::ROWS; r += t.blocks) {
        grad_row<K, N>(logits + r * K::STRIDE, rows[r], out + r * K::OUT_STRIDE, t);
    }
}

// Takes whole rows of logits in and gives their gradient.
template <typename K, i32 N, typename A, typename D>
FN void add_logits_and_grad(DEVICE A* logits, DEVICE Row<A>* rows, DEVICE D* out, Thread t, SHARED u64* shared) {
    typedef typename K::I I;
    for (I r = t.block; r < K::ROWS; r += t.blocks) {
        if (counts(rows[r].label[0])) add_row<K, N>(logits + r * K::STRIDE, rows[r], t, shared);
        barrier();
        grad_row<K, N>(logits + r * K::STRIDE, rows[r], out + r * K::OUT_STRIDE, t);
    }
}
