// ---- rotary position embedding ----

// `(a cos - b sin, b cos + a sin)` of N pairs (a, b) whose second elements lie K::SECOND further.
template <typename K, i32 N, typename T, typename COS, typename SIN>
FN void rope(DEVICE const T* x, DEVICE const COS* cos, DEVICE const SIN* sin, DEVICE T* out, Thread t) {
    typedef typename K::A A;
    EACH(i, K::ELEMENTS) {
        A a[N], b[N], c[N], s[N], first[N], second[N];
        load(a, x + K::from(i));
        load(b, x + (K::from(i) + K::SECOND));
        load(c, cos + K::cos(i));
        load(s, sin + K::sin(i));
        for (i32 j = 0; j < N; ++j) {
            first[j] = a[j] * c[j] - b[j] * s[j];
            second[j] = b[j] * c[j] + a[j] * s[j];
        }
        store(out + K::to(i), first);
        store(out + (K::to(i) + K::OUT_SECOND), second);
    }
}
