// ---- rotary position embedding ----

// `(a cos - b sin, b cos + a sin)` of N pairs (a, b) whose second elements lie K::SECOND further.
template <typename K, i32 N, typename T, typename COS, typename SIN, typename I>
FN void rotate(DEVICE const T* x, DEVICE const COS* cos, DEVICE const SIN* sin, DEVICE T* out, I i) {
    typedef typename K::A A;
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

template <typename K, i32 N, typename T, typename COS, typename SIN>
FN void rope(DEVICE const T* x, DEVICE const COS* cos, DEVICE const SIN* sin, DEVICE T* out, Thread t) {
    EACH(i, K::ELEMENTS) rotate<K, N>(x, cos, sin, out, i);
}

// The same from the position on that an index names.
template <typename K, i32 N, typename T, typename COS, typename SIN, typename INDEX>
FN void rope_put(
    DEVICE const T* x, DEVICE const COS* cos, DEVICE const SIN* sin, DEVICE const INDEX* index,
    DEVICE T* out, DEVICE Status* status, Thread t
) {
    const i64 at = i64(index[K::START]);
    EACH(i, K::ELEMENTS) {
        if (!in_range(at, K::EXTENT, 0, K::OPERATION, status)) continue;
        rotate<K, N>(x, cos, sin, out + typename K::I(at) * K::ALONG, i);
    }
}
