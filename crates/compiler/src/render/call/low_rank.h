// ---- a LoRA branch ----

// `out += scale · low b`, where low is `low_scale · x a`: of ROWS rows at a time, low in shared memory. Each of its numbers
// is computed once, by a SIMD group, or a part of its sum by each of SPLIT groups where there are fewer rows than groups.
// Then a thread has a column of b. `kept` is where low goes, if anything else reads it.
template <typename K, typename T>
FN void low_rank_rows(DEVICE const T* x, DEVICE const T* a, DEVICE const T* b, DEVICE T* out, DEVICE T* kept, Thread t,
                      SHARED u64* shared) {
    typedef typename K::I I;
    typedef typename K::A A;
    const i32 ROWS = K::ROWS, RANK = K::RANK, GROUPS = K::BLOCK / 32, LOW = ROWS * RANK;
    const i32 EACH = ROWS > GROUPS ? ROWS / GROUPS : 1, SPLIT = GROUPS > ROWS ? GROUPS / ROWS : 1;
    const i32 CHUNK = RANK < 8 ? RANK : 8;
    SHARED A* const low = (SHARED A*)shared; // [SPLIT][ROWS][RANK]
    const i32 group = t.tid / 32, lane = t.tid % 32, own = group / SPLIT * EACH, part = group % SPLIT;
    for (I first = I(t.block) * ROWS; first < K::ELEMENTS; first += I(t.blocks) * ROWS) {
        I from[EACH];
        for (i32 m = 0; m < EACH; ++m) {
            // What is beyond the last row is computed as that one is, and goes nowhere.
            const I row = first + own + m;
            from[m] = K::x_row(row < K::ELEMENTS ? row : I(K::ELEMENTS) - 1);
        }
        for (i32 r = 0; r < RANK; r += CHUNK) {
            A sum[EACH][CHUNK];
            for (i32 m = 0; m < EACH; ++m) {
                for (i32 j = 0; j < CHUNK; ++j) sum[m][j] = 0;
            }
            for (I k = part * 32 + lane; k < K::DEPTH; k += SPLIT * 32) {
                A factor[CHUNK];
                for (i32 j = 0; j < CHUNK; ++j) {
                    factor[j] = r + j < RANK ? A(a[I(K::A_START) + k * I(K::A_ROW) + (r + j) * I(K::A_COL)]) : A(0);
                }
                for (i32 m = 0; m < EACH; ++m) {
                    const A value = A(x[from[m] + k * I(K::X_COL)]);
                    for (i32 j = 0; j < CHUNK; ++j) sum[m][j] += value * factor[j];
                }
            }
            for (i32 m = 0; m < EACH; ++m) {
                for (i32 j = 0; j < CHUNK; ++j) {
                    const A all = simd_reduce<Sum>(sum[m][j]);
                    if (lane == 0 && r + j < RANK) low[part * LOW + (own + m) * RANK + r + j] = all;
                }
            }
        }
        barrier();
        for (i32 i = t.tid; i < LOW; i += K::BLOCK) {
            A all = low[i];
            for (i32 p = 1; p < SPLIT; ++p) all += low[p * LOW + i];
            all *= K::low_scale();
            low[i] = all;
            const I row = first + i / RANK;
            if (K::KEEPS && row < K::ELEMENTS) kept[K::low_row(row) + i % RANK] = T(all);
        }
        barrier();
        for (I col = t.tid; col < K::COLS; col += K::BLOCK) {
            A added[ROWS];
            for (i32 m = 0; m < ROWS; ++m) added[m] = 0;
            for (i32 r = 0; r < RANK; ++r) {
                const A factor = A(b[I(K::B_START) + r * I(K::B_ROW) + col * I(K::B_COL)]);
                for (i32 m = 0; m < ROWS; ++m) added[m] += low[m * RANK + r] * factor;
            }
            for (i32 m = 0; m < ROWS; ++m) {
                if (first + m >= K::ELEMENTS) continue;
                const I to = K::out_row(first + m) + col;
                out[to] = T(A(out[to]) + K::scale() * added[m]);
            }
        }
        barrier();
    }
}

template <typename K, typename T>
FN void low_rank(DEVICE const T* x, DEVICE const T* a, DEVICE const T* b, DEVICE T* out, Thread t, SHARED u64* shared) {
    low_rank_rows<K>(x, a, b, out, out, t, shared);
}

template <typename K, typename T>
FN void low_rank_kept(DEVICE const T* x, DEVICE const T* a, DEVICE const T* b, DEVICE T* out, DEVICE T* low, Thread t,
                      SHARED u64* shared) {
    low_rank_rows<K>(x, a, b, out, low, t, shared);
}
