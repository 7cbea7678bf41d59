// What four SIMD groups do together on tensor cores of sm_90 alone, after the PTX ISA: "wgmma.mma_async". Each has 16 rows of the
// left factor and of the sums; the right factor is the same for all. Factors in shared memory lie as flash_products.h says
// ("128-byte swizzling"). Products run on after they are asked for: `await_products`.
#ifdef __CUDACC__
// What this thread has written to shared memory is there for products after the next barrier.
FN void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
FN void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FN void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Of those that have ended by `end_products`, all but the last LEFT.
template <i32 LEFT> FN void await_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// What is computed of these before is not computed after, nor the other way round: products are no instructions to a compiler.
template <i32 N> FN void settled(f32 (&x)[N][4]) {
#pragma unroll
    for (i32 i = 0; i < 4 * N; ++i) asm volatile("" : "+f"(x[i / 4][i % 4])::"memory");
}
template <i32 N> FN void settled(u32 (&x)[N][4]) {
#pragma unroll
    for (i32 i = 0; i < 4 * N; ++i) asm volatile("" : "+r"(x[i / 4][i % 4])::"memory");
}

// A factor that begins at this place, 8 rows of 128 bytes after the other: "matrix descriptor".
FN u64 factor_at(u32 place) { return u64(place >> 4 & 0x3fff) | u64(1024 >> 4) << 32 | u64(1) << 62; }

// Of [16, 16] times [16, 64] for each SIMD group.
#define SUMS \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, " \
    "%26, %27, %28, %29, %30, %31}"
#define SUM(i) "+f"(to[i][0]), "+f"(to[i][1]), "+f"(to[i][2]), "+f"(to[i][3])
#define ALL_SUMS SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)
#define MULTIPLY(type, name) \
    /* to = a bT, or to += where `add`: both factors lie in shared memory, a with the rows of all four groups. */ \
    FN void multiply_together(f32 (&to)[8][4], u64 a, u64 b, bool add, type) { \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " SUMS ", %32, %33, add, 1, 1, 0, 0;\n}" \
                     : ALL_SUMS : "l"(a), "l"(b), "r"(i32(add))); \
    } \
    /* to += a b: a is in registers, each group's own; b lies row after row. */ \
    FN void multiply_turned(f32 (&to)[8][4], const u32 (&a)[4], u64 b, type) { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " " SUMS ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;" \
                     : ALL_SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
    }
MULTIPLY(bf16, "bf16")
MULTIPLY(f16, "f16")
#undef MULTIPLY
#undef ALL_SUMS
#undef SUM
#undef SUMS
#endif
