// ---- weights in blocks ----
//
// The layouts are llama.cpp's (`ggml-common.h`), but for NF4. A format gives runs of eight neighbouring weights of a block, which it
// reads in words of W: as wide as the place of its blocks allows.

// Eight bytes.
template <typename W> FN void bytes(DEVICE const u8* from, THREAD u8 (&to)[8]) {
    for (u32 i = 0; i < 8 / sizeof(W); ++i) {
        const W word = ((DEVICE const W*)from)[i];
        for (u32 b = 0; b < sizeof(W); ++b) to[i * sizeof(W) + b] = u8(u64(word) >> (8 * b));
    }
}

template <typename W> FN u32 u16_at(DEVICE const u8* from) {
    if (sizeof(W) > 1) return *(DEVICE const u16*)from;
    return u32(from[0]) | u32(from[1]) << 8;
}

template <typename W> FN u32 u32_at(DEVICE const u8* from) {
    if (sizeof(W) > 2) return *(DEVICE const u32*)from;
    return u16_at<W>(from) | u16_at<W>(from + 2) << 16;
}

template <typename W> FN f32 half_at(DEVICE const u8* from) { return f16_of_bits(u16(u16_at<W>(from))); }

// Runs 0 and 1 of a block of 32 are the low nibbles of 16 bytes, 2 and 3 the high ones.
template <typename W> FN void nibbles(DEVICE const u8* from, u32 run, THREAD u8 (&to)[8]) {
    bytes<W>(from + run % 2 * 8, to);
    for (u32 i = 0; i < 8; ++i) to[i] = to[i] >> (run / 2 * 4) & 15;
}

template <typename W> struct Q4_0 {
    enum : u32 { LENGTH = 32, BYTES = 18 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) {
        u8 q[8];
        nibbles<W>(block + 2, run, q);
        const f32 d = half_at<W>(block);
        for (u32 i = 0; i < 8; ++i) w[i] = d * (f32(q[i]) - 8.0f);
    }
};

template <typename W> struct Q4_1 {
    enum : u32 { LENGTH = 32, BYTES = 20 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) {
        u8 q[8];
        nibbles<W>(block + 4, run, q);
        const f32 d = half_at<W>(block), m = half_at<W>(block + 2);
        for (u32 i = 0; i < 8; ++i) w[i] = d * f32(q[i]) + m;
    }
};

// A fifth bit for each of 32 weights.
FN f32 with_fifth(u8 q, u32 high, u32 at) { return f32(u32(q) | (high >> at & 1) << 4); }

template <typename W> struct Q5_0 {
    enum : u32 { LENGTH = 32, BYTES = 22 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) {
        u8 q[8];
        nibbles<W>(block + 6, run, q);
        const u32 high = u32_at<W>(block + 2);
        const f32 d = half_at<W>(block);
        for (u32 i = 0; i < 8; ++i) w[i] = d * (with_fifth(q[i], high, run * 8 + i) - 16.0f);
    }
};

template <typename W> struct Q5_1 {
    enum : u32 { LENGTH = 32, BYTES = 24 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) {
        u8 q[8];
        nibbles<W>(block + 8, run, q);
        const u32 high = u32_at<W>(block + 4);
        const f32 d = half_at<W>(block), m = half_at<W>(block + 2);
        for (u32 i = 0; i < 8; ++i) w[i] = d * with_fifth(q[i], high, run * 8 + i) + m;
    }
};

// Signed bytes, from byte START on.
template <typename W, i32 START> FN void signed_run(DEVICE const u8* block, u32 run, f32 d, THREAD f32 (&w)[8]) {
    u8 q[8];
    bytes<W>(block + (START + run * 8), q);
    for (u32 i = 0; i < 8; ++i) w[i] = d * f32(i32(q[i] ^ 128) - 128);
}

template <typename W> struct Q8_0 {
    enum : u32 { LENGTH = 32, BYTES = 34 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) { signed_run<W, 2>(block, run, half_at<W>(block), w); }
};

template <typename W> struct Q8_1 {
    enum : u32 { LENGTH = 32, BYTES = 36 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) { signed_run<W, 4>(block, run, half_at<W>(block), w); }
};

template <typename W> struct Q8K {
    enum : u32 { LENGTH = 256, BYTES = 292 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) {
        signed_run<W, 4>(block, run, f32_of_bits(u32_at<W>(block)), w);
    }
};

// Of Q2K and Q3K, run 4 p + r of a half block has bits 2 p of bytes 8 r on.
template <typename W> FN void pairs(DEVICE const u8* from, u32 run, THREAD u8 (&to)[8]) {
    bytes<W>(from + (run / 16 * 32 + run % 4 * 8), to);
    for (u32 i = 0; i < 8; ++i) to[i] = to[i] >> (run % 16 / 4 * 2) & 3;
}

template <typename W> struct Q2K {
    enum : u32 { LENGTH = 256, BYTES = 84 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) {
        u8 q[8];
        pairs<W>(block + 16, run, q);
        const u32 scale = block[run / 2];
        const f32 d = half_at<W>(block + 80) * f32(scale & 15), m = half_at<W>(block + 82) * f32(scale >> 4);
        for (u32 i = 0; i < 8; ++i) w[i] = d * f32(q[i]) - m;
    }
};

template <typename W> struct Q3K {
    enum : u32 { LENGTH = 256, BYTES = 110 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) {
        u8 q[8], high[8];
        pairs<W>(block + 32, run, q);
        bytes<W>(block + run % 4 * 8, high);
        // Six bits: the low four in eight bytes, the high two in four.
        const u32 at = run / 2, low = block[96 + at % 8] >> (at / 8 * 4) & 15, top = block[104 + at % 4] >> (at / 4 * 2) & 3;
        const f32 d = half_at<W>(block + 108) * f32(i32(low | top << 4) - 32);
        for (u32 i = 0; i < 8; ++i) w[i] = d * f32(i32(q[i]) - ((high[i] >> (run / 4) & 1) != 0 ? 0 : 4));
    }
};

// Scale and minimum of a part of 32, six bits each, of the twelve bytes that hold eight of them.
FN void scale_and_min(DEVICE const u8* from, u32 part, THREAD u32& scale, THREAD u32& min) {
    if (part < 4) {
        scale = from[part] & 63;
        min = from[part + 4] & 63;
    } else {
        scale = (from[part + 4] & 15) | from[part - 4] >> 6 << 4;
        min = from[part + 4] >> 4 | from[part] >> 6 << 4;
    }
}

// Of Q4K and Q5K, parts of 32 take turns in the low and the high nibbles of 32 bytes.
template <typename W> FN void nibble_part(DEVICE const u8* from, u32 run, THREAD u8 (&to)[8]) {
    bytes<W>(from + (run / 8 * 32 + run % 4 * 8), to);
    for (u32 i = 0; i < 8; ++i) to[i] = to[i] >> (run / 4 % 2 * 4) & 15;
}

template <typename W> struct Q4K {
    enum : u32 { LENGTH = 256, BYTES = 144 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) {
        u8 q[8];
        u32 scale, min;
        nibble_part<W>(block + 16, run, q);
        scale_and_min(block + 4, run / 4, scale, min);
        const f32 d = half_at<W>(block) * f32(scale), m = half_at<W>(block + 2) * f32(min);
        for (u32 i = 0; i < 8; ++i) w[i] = d * f32(q[i]) - m;
    }
};

template <typename W> struct Q5K {
    enum : u32 { LENGTH = 256, BYTES = 176 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) {
        u8 q[8], high[8];
        u32 scale, min;
        nibble_part<W>(block + 48, run, q);
        bytes<W>(block + (16 + run % 4 * 8), high);
        scale_and_min(block + 4, run / 4, scale, min);
        const f32 d = half_at<W>(block) * f32(scale), m = half_at<W>(block + 2) * f32(min);
        for (u32 i = 0; i < 8; ++i) w[i] = d * with_fifth(q[i], high[i], run / 4) - m;
    }
};

template <typename W> struct Q6K {
    enum : u32 { LENGTH = 256, BYTES = 210 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) {
        // Two halves, each of four parts of 32: low nibbles of 64 bytes, then the high ones; two more bits elsewhere.
        const u32 side = run / 16, part = run / 4 % 4, at = run % 4 * 8;
        u8 q[8], high[8];
        bytes<W>(block + (side * 64 + part % 2 * 32 + at), q);
        bytes<W>(block + (128 + side * 32 + at), high);
        const i32 scale = i32(block[192 + run / 2] ^ 128) - 128;
        const f32 d = half_at<W>(block + 208) * f32(scale);
        for (u32 i = 0; i < 8; ++i) {
            const u32 low = q[i] >> (part / 2 * 4) & 15, top = high[i] >> (2 * part) & 3;
            w[i] = d * f32(i32(low | top << 4) - 32);
        }
    }
};

// The entries are looked up by each thread at a place of its own, which constant memory would do one after the other: this
// lies in one line of the cache instead.
TABLE f32 NF4_VALUES[16] = {
    -1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
    0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f,
};

// Codes of four bits, the high ones of a byte first: four bytes are a run.
template <typename W> struct NF4 {
    enum : u32 { LENGTH = 64, BYTES = 36 };
    FN void run(DEVICE const u8* block, u32 run, THREAD f32 (&w)[8]) {
        const u32 codes = u32_at<W>(block + 4 + run * 4);
        const f32 largest = f32_of_bits(u32_at<W>(block));
        for (u32 i = 0; i < 8; ++i) w[i] = largest * NF4_VALUES[codes >> (i / 2 * 8 + 4 - i % 2 * 4) & 15];
    }
};

// Run number `run` of a row of blocks.
template <typename FORMAT> FN void row_run(DEVICE const u8* row, u32 run, THREAD f32 (&w)[8]) {
    const u32 runs = FORMAT::LENGTH / 8;
    FORMAT::run(row + u64(run / runs) * FORMAT::BYTES, run % runs, w);
}

// The blocks of a matrix, or of a part of it, as T[ROWS, 8 RUNS].
template <typename K, typename FORMAT, typename T> FN void dequantize(DEVICE const u8* blocks, DEVICE T* out, Thread t) {
    EACH(i, K::ELEMENTS) {
        f32 w[8];
        row_run<FORMAT>(blocks + u64(i / K::RUNS) * K::ROW_BYTES, u32(i % K::RUNS), w);
        store_run(out + i * 8, w);
    }
}

// Of N rows, from `first` on, what a lane has of AHEAD runs, 32 lanes' worth apart.
template <typename K, typename FORMAT, i32 N, i32 AHEAD>
FN void read_runs(DEVICE const u8* blocks, typename K::I first, u32 run, THREAD f32 (&w)[AHEAD][N][8]) {
#pragma unroll
    for (i32 i = 0; i < AHEAD; ++i) {
        if (run + 32 * i >= K::RUNS) continue;
        for (i32 n = 0; n < N; ++n) {
            // Beyond the last row, that one again: nobody asks for its sum.
            const typename K::I row = first + n < K::ROWS ? first + n : first;
            row_run<FORMAT>(blocks + u64(row) * K::ROW_BYTES, run + 32 * i, w[i][n]);
        }
    }
}

// x Wᵀ for M rows of x: a SIMD group has N rows of W at once, so that what it reads of x serves all of them, and reads W
// once, and as blocks, several runs at a time. The first ones come before the kernel before this one has ended.
template <typename K, typename FORMAT, i32 M, i32 N, typename T, typename Before>
FN void quant_rows(DEVICE const T* x, DEVICE const u8* blocks, DEVICE T* out, Thread t, THREAD const Before& before) {
    typedef typename K::I I;
    typedef typename K::A A;
    enum : i32 { AHEAD = 4 / N };
    const I groups = K::BLOCK / 32 * N;
    const u32 lane = t.tid % 32;
    I first = I(t.block) * groups + t.tid / 32 * N;
    f32 w[AHEAD][N][8];
    if (first < K::ROWS) read_runs<K, FORMAT>(blocks, first, lane, w);
    before();
    while (first < K::ROWS) {
        A sum[M][N];
        for (i32 m = 0; m < M; ++m) {
            for (i32 n = 0; n < N; ++n) sum[m][n] = 0;
        }
        for (u32 run = lane; run < K::RUNS; run += 32 * AHEAD) {
            if (run >= 32 * AHEAD) read_runs<K, FORMAT>(blocks, first, run, w);
#pragma unroll
            for (i32 i = 0; i < AHEAD; ++i) {
                if (run + 32 * i >= K::RUNS) continue;
                for (i32 m = 0; m < M; ++m) {
                    A a[8];
                    load_run<K::VECTOR, K::STEP>(x + (K::from(m) + I(run + 32 * i) * 8 * K::STEP), a);
                    for (i32 n = 0; n < N; ++n) {
                        for (i32 j = 0; j < 8; ++j) sum[m][n] += a[j] * A(w[i][n][j]);
                    }
                }
            }
        }
        const I next = first + I(t.blocks) * groups;
        if (next < K::ROWS) read_runs<K, FORMAT>(blocks, next, lane, w);
        for (i32 m = 0; m < M; ++m) {
            for (i32 n = 0; n < N; ++n) {
                const A all = simd_reduce<Sum>(sum[m][n]);
                if (lane == 0 && first + n < K::ROWS) out[K::to(m) + first + n] = T(all);
            }
        }
        first = next;
    }
}
