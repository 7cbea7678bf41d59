// ---- indexing ----

// What only moves has its size, and no type.
template <i32 BYTES> struct Moved;
template <> struct Moved<1> { u8 bits; };
template <> struct Moved<2> { u16 bits; };
template <> struct Moved<4> { u32 bits; };
template <> struct alignas(8) Moved<8> { u32 bits[2]; };
template <> struct alignas(16) Moved<16> { u32 bits[4]; };

// out = x at the positions that an index names: gather, index_select, dynamic_slice.
template <typename K, typename T, typename INDEX>
FN void take(DEVICE const T* x, DEVICE const INDEX* index, DEVICE T* out, DEVICE Status* status, Thread t) {
    EACH(i, K::ELEMENTS) {
        const i64 at = i64(index[K::index(i)]);
        if (!in_range(at, K::EXTENT, K::position(i), K::OPERATION, status)) continue;
        out[K::to(i)] = x[K::from(i) + typename K::I(at) * K::ALONG];
    }
}

// out at the position that an index names = x: slice_update.
template <typename K, typename T, typename INDEX>
FN void put(DEVICE const T* x, DEVICE const INDEX* index, DEVICE T* out, DEVICE Status* status, Thread t) {
    EACH(i, K::ELEMENTS) {
        const i64 at = i64(index[K::index(i)]);
        if (!in_range(at, K::EXTENT, K::position(i), K::OPERATION, status)) continue;
        out[K::to(i) + typename K::I(at) * K::ALONG] = x[K::from(i)];
    }
}

// Sums at positions are made by one thread each, in the order of the index and rounded once: the same bits every time.

// out at an index += x, every element with an index of its own: scatter_add. Of the entries of a line with one index,
// the first one's thread adds all of them.
template <typename K, typename T, typename INDEX>
FN void scatter_add(DEVICE const INDEX* index, DEVICE const T* x, DEVICE T* out, DEVICE Status* status, Thread t) {
    typedef typename K::I I;
    EACH(i, K::ELEMENTS) {
        const i64 at = i64(index[K::index(i)]);
        if (!in_range(at, K::EXTENT, i, K::OPERATION, status)) continue;
        const I k = K::along(i), line = K::index(i) - k * K::INDEX_ALONG, from = K::from(i) - k * K::FROM_ALONG;
        bool first = true;
        for (I j = 0; j < k && first; ++j) first = i64(index[line + j * K::INDEX_ALONG]) != at;
        if (!first) continue;
        DEVICE T* const to = out + (K::to(i) + I(at) * K::ALONG);
        typename K::A sum = typename K::A(*to);
        for (I j = k; j < K::LENGTH; ++j) {
            if (i64(index[line + j * K::INDEX_ALONG]) == at) sum = Sum::of(sum, typename K::A(x[from + j * K::FROM_ALONG]));
        }
        *to = T(sum);
    }
}

// Chains the positions of a rank-1 index that have one value: next[k] is the next of them after k, or ELEMENTS;
// it is ~next (negative) where k is not the first of them.
template <typename K, typename INDEX>
FN void chain(DEVICE const INDEX* index, DEVICE i32* next, DEVICE Status* status, Thread t) {
    EACH(k, K::ELEMENTS) {
        const i64 at = i64(index[K::index(k)]);
        if (!in_range(at, K::EXTENT, k, K::OPERATION, status)) {
            next[k] = ~i32(K::ELEMENTS);
            continue;
        }
        bool first = true;
        for (typename K::I j = 0; j < k && first; ++j) first = i64(index[K::index(j)]) != at;
        typename K::I j = k + 1;
        while (j < K::ELEMENTS && i64(index[K::index(j)]) != at) ++j;
        next[k] = first ? i32(j) : ~i32(j);
    }
}

// out at an index += x, whole slices of x with one index each: index_add.
template <typename K, typename T, typename INDEX>
FN void index_add(
    DEVICE const INDEX* index, DEVICE const i32* next, DEVICE const T* x, DEVICE T* out, Thread t
) {
    typedef typename K::I I;
    EACH(i, K::ELEMENTS) {
        const I k = K::along(i), from = K::from(i) - k * K::FROM_ALONG;
        i32 j = next[k];
        if (j < 0) continue;
        DEVICE T* const to = out + (K::to(i) + I(index[K::index(k)]) * K::ALONG);
        typename K::A sum = Sum::of(typename K::A(*to), typename K::A(x[K::from(i)]));
        while (j < K::LENGTH) {
            sum = Sum::of(sum, typename K::A(x[from + j * K::FROM_ALONG]));
            j = next[j] < 0 ? ~next[j] : next[j];
        }
        *to = T(sum);
    }
}
