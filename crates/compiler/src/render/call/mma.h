// What a SIMD group does together on tensor cores of sm_80 and later, after the PTX ISA: "mma.m16n8k16", "ldmatrix",
// "cp.async". A place in shared memory is its address in bytes there.
#ifdef __CUDACC__
FN u32 shared_place(const void* at) { return u32(__cvta_generic_to_shared(at)); }

// 16 bytes, some time before `await_copies`; zeros if not `inside`.
FN void copy_async(u32 to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
// The same for one word of 4 bytes.
FN void copy_word_async(u32 to, const void* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(inside ? 4 : 0) : "memory");
}
FN void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements, whose rows the lanes name in order: row lane / 4, elements 2 (lane % 4) and the next.
FN void load_matrices(u32 (&to)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}
FN void load_transposed(u32 (&to)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}

// to += a b, [16, 16] times [16, 8].
#define MULTIPLY(type, name) \
    FN void multiply_add(f32 (&to)[4], const u32 (&a)[4], u32 b0, u32 b1, type) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 " \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                     : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3]) \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); \
    }
MULTIPLY(bf16, "bf16")
MULTIPLY(f16, "f16")
#undef MULTIPLY

// Two numbers in a register, the first in its lower half.
FN u32 pair_of(f32 a, f32 b, bf16) { u32 x; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(b), "f"(a)); return x; }
FN u32 pair_of(f32 a, f32 b, f16) { u32 x; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(b), "f"(a)); return x; }

FN f32 power_of_2(f32 x) { f32 y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
FN void simd_barrier() { __syncwarp(); }
#endif
