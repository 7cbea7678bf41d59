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

// Takes a panel of logits in, a block for each row.
template <typename K, i32 N, typename A>
FN void add_logits(DEVICE const A* logits, DEVICE Row<A>* rows, Thread t, SHARED u64* shared) {
    typedef typename K::I I;
    const i32 groups = K::BLOCK / 32;
    for (I r = t.block; r < K::ROWS; r += t.blocks) {
        DEVICE Row<A>& row = rows[r];
        const i64 label = row.label[0];
        // The same for all threads.
        if (!counts(label)) continue;
        A max = -INF, sum = 0, total = 0;
        for (I c = t.tid * N; c < K::COLS; c += K::BLOCK * N) {
            A x[N];
            load(x, logits + (r * K::STRIDE + c));
            A larger = max;
            for (i32 j = 0; j < N; ++j) larger = Max::of(larger, x[j]);
            sum *= rescale(max, larger);
            for (i32 j = 0; j < N; ++j) sum += rescale(x[j], larger);
            for (i32 j = 0; j < N; ++j) total += x[j];
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
            if (label >= 0 && label < K::COLS) row.picked = logits[r * K::STRIDE + I(label)];
            row.label[0] = label - K::COLS;
        }
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

// `(softmax - target) scale` of a panel of logits, which it may replace; a block for each row.
template <typename K, i32 N, typename A, typename D>
FN void logits_grad(DEVICE const A* logits, DEVICE Row<A>* rows, DEVICE D* out, Thread t) {
    typedef typename K::I I;
    const A miss = K::SMOOTH ? K::epsilon() / A(K::CLASSES) : A(0), hit = A(1) - K::epsilon();
    for (I r = t.block; r < K::ROWS; r += t.blocks) {
        DEVICE Row<A>& row = rows[r];
        const i64 label = row.label[1];
        const bool own = counts(label);
        const A all = own ? log_sum_exp(row) : A(0), scale = row.scale;
        for (I c = t.tid * N; c < K::COLS; c += K::BLOCK * N) {
            A x[N];
            load(x, logits + (r * K::STRIDE + c));
            for (i32 j = 0; j < N; ++j) {
                const A p = math::exp(x[j] - all) - miss - (c + j == label ? hit : A(0));
                x[j] = own ? p * scale : A(0);
            }
            store(out + (r * K::STRIDE + c), x);
        }
        // Everybody has the label.
        barrier();
        if (t.tid == 0 && own) row.label[1] = label - K::COLS;
    }
}
