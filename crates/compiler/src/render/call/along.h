// ---- along a dim ----

// Running sums, a thread for each line.
template <typename K, typename T> FN void scan_line(DEVICE const T* x, DEVICE T* out, Thread t) {
    EACH(line, K::ELEMENTS) {
        typename K::A sum = 0;
        for (typename K::I i = 0; i < K::EXTENT; ++i) {
            const typename K::I at = K::REVERSE ? typename K::I(K::EXTENT) - 1 - i : i;
            sum = Sum::of(sum, typename K::A(x[K::from(line) + at * K::FROM_ALONG]));
            out[K::to(line) + at * K::TO_ALONG] = T(sum);
        }
    }
}

// Running sums, a block for each line: each thread has a segment, and starts from the sum of those before it.
template <typename K, typename T>
FN void scan_block(DEVICE const T* x, DEVICE T* out, Thread t, SHARED u64* shared) {
    typedef typename K::I I;
    typedef typename K::A A;
    SHARED A* const part = (SHARED A*)shared;
    const I length = (K::EXTENT + K::BLOCK - 1) / K::BLOCK, first = t.tid * length;
    const I end = first + length < K::EXTENT ? first + length : I(K::EXTENT);
    for (I line = t.block; line < K::ELEMENTS; line += t.blocks) {
        A sum = 0;
        for (I i = first; i < end; ++i) {
            const I at = K::REVERSE ? I(K::EXTENT) - 1 - i : i;
            sum = Sum::of(sum, A(x[K::from(line) + at * K::FROM_ALONG]));
        }
        part[t.tid] = sum;
        barrier();
        for (u32 step = 1; step < K::BLOCK; step *= 2) {
            const A before = t.tid >= step ? part[t.tid - step] : A(0);
            barrier();
            part[t.tid] = Sum::of(part[t.tid], before);
            barrier();
        }
        sum = t.tid > 0 ? part[t.tid - 1] : A(0);
        for (I i = first; i < end; ++i) {
            const I at = K::REVERSE ? I(K::EXTENT) - 1 - i : i;
            sum = Sum::of(sum, A(x[K::from(line) + at * K::FROM_ALONG]));
            out[K::to(line) + at * K::TO_ALONG] = T(sum);
        }
        barrier();
    }
}

// An element and where it is along its line; nowhere is -1.
template <typename A> struct Extreme { A value; i64 at; };

// NaN before everything, then the larger one (the smaller one), then the first one.
template <typename K, typename A> FN bool beats(Extreme<A> a, Extreme<A> b) {
    if (a.at < 0 || b.at < 0) return b.at < 0;
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    if (a_nan || b_nan) return a_nan && (!b_nan || a.at < b.at);
    if (a.value == b.value) return a.at < b.at;
    return K::LARGEST ? a.value > b.value : a.value < b.value;
}

// The extreme of every `step`-th element of a line, from `first` on, before `end`.
template <typename K, typename T>
FN Extreme<typename K::A> extreme(
    DEVICE const T* x, typename K::I line, typename K::I first, typename K::I end, typename K::I step
) {
    Extreme<typename K::A> best = {0, -1};
#pragma unroll 4
    for (typename K::I i = first; i < end; i += step) {
        const Extreme<typename K::A> here = {typename K::A(x[K::from(line) + i * K::FROM_ALONG]), i};
        if (beats<K>(here, best)) best = here;
    }
    return best;
}

// The extreme over the lanes of a SIMD group.
template <typename K, typename A> FN Extreme<A> simd_extreme(Extreme<A> best) {
    for (u32 mask = 16; mask > 0; mask >>= 1) {
        const Extreme<A> other = {shuffle_xor(best.value, mask), shuffle_xor(best.at, mask)};
        if (beats<K>(other, best)) best = other;
    }
    return best;
}

template <typename K, typename T> FN void arg_thread(DEVICE const T* x, DEVICE u32* out, Thread t) {
    EACH(line, K::ELEMENTS) out[K::to(line)] = u32(extreme<K>(x, line, 0, K::EXTENT, 1).at);
}

template <typename K, typename T> FN void arg_simd(DEVICE const T* x, DEVICE u32* out, Thread t) {
    typedef typename K::I I;
    const I groups = K::BLOCK / 32;
    for (I line = I(t.block) * groups + t.tid / 32; line < K::ELEMENTS; line += I(t.blocks) * groups) {
        const Extreme<typename K::A> best = simd_extreme<K>(extreme<K>(x, line, t.tid % 32, K::EXTENT, 32));
        if (t.tid % 32 == 0) out[K::to(line)] = u32(best.at);
    }
}

// The extreme over the threads of a block, of whom the first SIMD group has it.
template <typename K, typename A> FN Extreme<A> block_extreme(Extreme<A> best, SHARED u64* shared, u32 tid) {
    const u32 groups = K::BLOCK / 32;
    SHARED A* const values = (SHARED A*)shared;
    SHARED i64* const places = (SHARED i64*)shared + groups;
    best = simd_extreme<K>(best);
    if (tid % 32 == 0) values[tid / 32] = best.value;
    if (tid % 32 == 0) places[tid / 32] = best.at;
    barrier();
    if (tid < 32) {
        best.at = tid < groups ? places[tid] : -1;
        if (tid < groups) best.value = values[tid];
        best = simd_extreme<K>(best);
    }
    barrier();
    return best;
}

template <typename K, typename T>
FN void arg_block(DEVICE const T* x, DEVICE u32* out, Thread t, SHARED u64* shared) {
    typedef typename K::I I;
    for (I line = t.block; line < K::ELEMENTS; line += t.blocks) {
        const auto best = block_extreme<K>(extreme<K>(x, line, t.tid, K::EXTENT, K::BLOCK), shared, t.tid);
        if (t.tid == 0) out[K::to(line)] = u32(best.at);
    }
}

// The extreme of each of PARTS parts of a line, a block for each.
template <typename K, typename T, typename A>
FN void arg_parts(DEVICE const T* x, DEVICE Extreme<A>* parts, Thread t, SHARED u64* shared) {
    typedef typename K::I I;
    const I share = (K::EXTENT + K::PARTS - 1) / K::PARTS;
    for (I part = t.block; part < K::ELEMENTS * K::PARTS; part += t.blocks) {
        const I start = part % K::PARTS * share, end = start + share < K::EXTENT ? start + share : I(K::EXTENT);
        const Extreme<A> own = extreme<K>(x, part / K::PARTS, start + t.tid, end, K::BLOCK);
        const Extreme<A> best = block_extreme<K>(own, shared, t.tid);
        if (t.tid == 0) parts[part] = best;
    }
}

// The extreme of a line of its parts', a SIMD group for each line.
template <typename K, typename A> FN void arg_join(DEVICE const Extreme<A>* parts, DEVICE u32* out, Thread t) {
    typedef typename K::I I;
    const I groups = K::BLOCK / 32;
    for (I line = I(t.block) * groups + t.tid / 32; line < K::ELEMENTS; line += I(t.blocks) * groups) {
        Extreme<A> best = {0, -1};
        for (I part = t.tid % 32; part < K::PARTS; part += 32) {
            const Extreme<A> here = parts[line * K::PARTS + part];
            if (beats<K>(here, best)) best = here;
        }
        best = simd_extreme<K>(best);
        if (t.tid % 32 == 0) out[K::to(line)] = u32(best.at);
    }
}
