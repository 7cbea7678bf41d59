// ---- products of few rows ----
//
// M rows of x times W, which is read once, in accesses of 16 bytes: what such a product takes is the time to read W.

// The sum of column `col`.
template <typename K, typename A, typename T> FN void put_product(DEVICE T* out, DEVICE const T* bias, typename K::I col, A sum) {
    A all = K::alpha() * sum + (K::ACCUMULATE ? A(out[col]) : A(0));
    if (bias) all += A(bias[K::BIAS + col]);
    out[col] = T(all);
}

// Eight neighbours, as they lie.
template <typename T> struct Run {
    enum : i32 { V = 16 / sizeof(T) };
    Pack<T, V> parts[8 / V];
};

template <typename A, typename T> FN void widen(THREAD const Run<T>& run, THREAD A (&to)[8]) {
    for (i32 i = 0; i < 8; ++i) to[i] = A(run.parts[i / Run<T>::V].at[i % Run<T>::V]);
}

template <typename T> FN void ask(DEVICE const T* from, THREAD Run<T>& run) {
    for (i32 i = 0; i < 8 / Run<T>::V; ++i) {
        DEVICE const Pack<T, Run<T>::V>& part = *(DEVICE const Pack<T, Run<T>::V>*)(from + i * Run<T>::V);
        run.parts[i] = part;
    }
}

// What a lane has of a column to begin with: AHEAD runs, APART apart.
template <typename K, i32 AHEAD, i32 APART, typename T> FN void ask_first(DEVICE const T* column, i32 first, THREAD Run<T> (&runs)[AHEAD]) {
#pragma unroll
    for (i32 i = 0; i < AHEAD; ++i) {
        const i32 k = (i * APART + first) * 8;
        if (k < K::INNER) ask(column + k, runs[i]);
    }
}

template <typename K, i32 M, typename A, typename T>
FN void add_run(DEVICE const T* x, typename K::I k, THREAD const A (&b)[8], THREAD A (&sum)[M]) {
    for (i32 m = 0; m < M; ++m) {
        A a[8];
        load_run<K::VECTOR, K::STEP>(x + (K::from(m) + k * K::STEP), a);
        for (i32 j = 0; j < 8; ++j) sum[m] += a[j] * b[j];
    }
}

// W lies column after column: a SIMD group for each, or SPLIT of them for a part each where there are few. The weight is the
// same whatever the kernel before this one writes: the first runs of a lane are asked for before that has ended, and those of
// its next column before the sums of this one are added up.
template <typename K, i32 M, typename T, typename Before>
FN void times_columns(
    DEVICE const T* x, DEVICE const T* w, DEVICE const T* bias, DEVICE T* out, Thread t, SHARED u64* shared, THREAD const Before& before
) {
    typedef typename K::I I;
    typedef typename K::A A;
    // A short column is asked for as a whole. Of a longer one little: the more registers a lane has, the fewer groups run.
    enum : i32 {
        GROUPS = K::BLOCK / 32,
        COLUMNS = GROUPS / K::SPLIT,
        APART = 32 * K::SPLIT,
        RUNS = (K::INNER / 8 + APART - 1) / APART,
        SHORT = 12 / sizeof(T),
        AHEAD = RUNS <= SHORT ? RUNS : 8 / sizeof(T),
    };
    const i32 group = t.tid / 32, lane = t.tid % 32, own = group % K::SPLIT * 32 + lane;
    I first = I(t.block) * COLUMNS, col = first + group / K::SPLIT;
    Run<T> runs[AHEAD];
    if (col < K::COLS) ask_first<K, AHEAD, APART>(w + K::weight(col), own, runs);
    before();
    for (; first < K::COLS; first += I(t.blocks) * COLUMNS) {
        A sum[M];
        for (i32 m = 0; m < M; ++m) sum[m] = 0;
        if (col < K::COLS) {
#pragma unroll
            for (i32 i = 0; i < AHEAD; ++i) {
                const I k = (i * APART + own) * 8;
                if (k >= K::INNER) continue;
                A b[8];
                widen(runs[i], b);
                add_run<K>(x, k, b, sum);
            }
#pragma unroll (8 / sizeof(T))
            for (I k = (AHEAD * APART + own) * 8; k < K::INNER; k += APART * 8) {
                A b[8];
                load_run<16 / sizeof(T), 1>(w + (K::weight(col) + k), b);
                add_run<K>(x, k, b, sum);
            }
        }
        const I now = col;
        col += I(t.blocks) * COLUMNS;
        if (col < K::COLS) ask_first<K, AHEAD, APART>(w + K::weight(col), own, runs);
        for (i32 m = 0; m < M; ++m) {
            const A all = simd_reduce<Sum>(sum[m]);
            const bool puts = lane == 0 && group % K::SPLIT == 0 && now < K::COLS;
            if (K::SPLIT == 1) {
                if (puts) put_product<K>(out + K::to(m), bias, now, all);
                continue;
            }
            SHARED A* const part = (SHARED A*)shared + group;
            if (lane == 0) *part = all;
            barrier();
            if (puts) put_product<K>(out + K::to(m), bias, now, fold<Sum, K::SPLIT>(part, 1));
            barrier();
        }
    }
}

// W lies row after row: a block for each eight accesses of columns. A SIMD group reads four rows of them at once.
template <typename K, i32 M, typename T, typename Before>
FN void times_rows(
    DEVICE const T* x, DEVICE const T* w, DEVICE const T* bias, DEVICE T* out, Thread t, SHARED u64* shared, THREAD const Before& before
) {
    typedef typename K::I I;
    typedef typename K::A A;
    before();
    const i32 V = 16 / sizeof(T), width = 8 * V, groups = K::BLOCK / 32;
    SHARED A* const part = (SHARED A*)shared;
    for (I block = t.block; block < (K::COLS + width - 1) / width; block += t.blocks) {
        const I first = block * width, col = first + t.tid % 8 * V;
        A sum[M][V];
        for (i32 m = 0; m < M; ++m) {
            for (i32 j = 0; j < V; ++j) sum[m][j] = 0;
        }
        for (I k = t.tid / 8; k < K::INNER && col < K::COLS; k += K::BLOCK / 8) {
            A b[V];
            load(b, w + (K::weight(k) + col));
            for (i32 m = 0; m < M; ++m) {
                const A a = A(x[K::from(m) + k * K::STEP]);
                for (i32 j = 0; j < V; ++j) sum[m][j] += a * b[j];
            }
        }
        for (i32 m = 0; m < M; ++m) {
            for (i32 j = 0; j < V; ++j) {
                A all = sum[m][j] + shuffle_xor(sum[m][j], 8);
                all += shuffle_xor(all, 16);
                if (t.tid % 32 < 8) part[t.tid / 32 * width + t.tid % 8 * V + j] = all;
            }
            barrier();
            if (t.tid < width && first + t.tid < K::COLS) {
                put_product<K>(out + K::to(m), bias, first + t.tid, fold<Sum, groups>(part + t.tid, width));
            }
            barrier();
        }
    }
}

// Without a bias.

template <typename K, i32 M, typename T, typename Before>
FN void times_columns(DEVICE const T* x, DEVICE const T* w, DEVICE T* out, Thread t, SHARED u64* shared, THREAD const Before& before) {
    times_columns<K, M>(x, w, (DEVICE const T*)nullptr, out, t, shared, before);
}

template <typename K, i32 M, typename T, typename Before>
FN void times_rows(DEVICE const T* x, DEVICE const T* w, DEVICE T* out, Thread t, SHARED u64* shared, THREAD const Before& before) {
    times_rows<K, M>(x, w, (DEVICE const T*)nullptr, out, t, shared, before);
}
