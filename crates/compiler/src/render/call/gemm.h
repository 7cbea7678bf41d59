// ---- products of few rows ----
//
// M rows of x times W, which is read once, in accesses of 16 bytes: what such a product takes is the time to read W.

template <typename K, typename A, typename T> FN void put_product(DEVICE T* out, A sum) {
    *out = T(K::alpha() * sum + (K::ACCUMULATE ? A(*out) : A(0)));
}

// W lies column after column: a SIMD group for each.
template <typename K, i32 M, typename T>
FN void times_columns(DEVICE const T* x, DEVICE const T* w, DEVICE T* out, Thread t) {
    typedef typename K::I I;
    typedef typename K::A A;
    const I groups = K::BLOCK / 32;
    // The weight is the same whatever the kernel before this one writes.
    for (I col = I(t.block) * groups + t.tid / 32, k = t.tid % 32 * 64; k < K::INNER && k < 1024; k += 32 * 64) {
        if (col < K::COLS) prefetch(w + (K::weight(col) + k));
    }
    after_predecessor();
    for (I col = I(t.block) * groups + t.tid / 32; col < K::COLS; col += I(t.blocks) * groups) {
        A sum[M];
        for (i32 m = 0; m < M; ++m) sum[m] = 0;
#pragma unroll 4
        for (I k = t.tid % 32 * 8; k < K::INNER; k += 32 * 8) {
            A b[8], a[8];
            load_run<16 / sizeof(T), 1>(w + (K::weight(col) + k), b);
            for (i32 m = 0; m < M; ++m) {
                load_run<K::VECTOR, K::STEP>(x + (K::from(m) + k * K::STEP), a);
                for (i32 j = 0; j < 8; ++j) sum[m] += a[j] * b[j];
            }
        }
        for (i32 m = 0; m < M; ++m) {
            const A all = simd_reduce<Sum>(sum[m]);
            if (t.tid % 32 == 0) put_product<K>(out + (K::to(m) + col), all);
        }
    }
}

// W lies row after row: a block for each eight accesses of columns. A SIMD group reads four rows of them at once.
template <typename K, i32 M, typename T>
FN void times_rows(DEVICE const T* x, DEVICE const T* w, DEVICE T* out, Thread t, SHARED u64* shared) {
    typedef typename K::I I;
    typedef typename K::A A;
    after_predecessor();
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
                put_product<K>(out + (K::to(m) + first + t.tid), fold<Sum, groups>(part + t.tid, width));
            }
            barrier();
        }
    }
}
