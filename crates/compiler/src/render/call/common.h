// ---- library calls ----
//
// A call's kernel is one template here, and a struct K of what it is to know: types, extents, strides, and functions
// from the number of an element to the place where an operand has it. `K::I` counts elements.

struct Thread { u32 tid, block, blocks; };

// The first index out of range that is met.
struct Status { u32 failed, reserved; i64 index, extent, position; };

// Whether index `at`, the one numbered `position`, is below `extent`; what is not is reported, and must not be used.
FN bool in_range(i64 at, i64 extent, i64 position, u32 operation, DEVICE Status* status) {
    if (at >= 0 && at < extent) return true;
    if (claim(&status->failed, operation)) {
        status->index = at;
        status->extent = extent;
        status->position = position;
    }
    return false;
}

// The elements of this thread, of all that the grid walks together.
#define EACH(i, n) \
    for (typename K::I i = typename K::I(t.block) * K::BLOCK + t.tid; i < n; i += typename K::I(t.blocks) * K::BLOCK)

// Eight neighbours, in accesses of VECTOR elements, or STEP elements apart where VECTOR is 1.
template <i64 VECTOR, i64 STEP, typename A, typename T> FN void load_run(DEVICE const T* from, THREAD A (&to)[8]) {
    for (i32 i = 0; i < 8; i += VECTOR) {
        A part[VECTOR];
        load(part, from + i * STEP);
        for (i32 j = 0; j < VECTOR; ++j) to[i + j] = part[j];
    }
}

// The same, to where a run starts at a multiple of 16 bytes.
template <typename T, typename A> FN void store_run(DEVICE T* to, THREAD A (&from)[8]) {
    const i32 vector = sizeof(T) >= 2 ? 16 / sizeof(T) : 8;
    for (i32 i = 0; i < 8; i += vector) {
        A part[vector];
        for (i32 j = 0; j < vector; ++j) part[j] = from[i + j];
        store(to + i, part);
    }
}

// In another dtype, or elsewhere.
template <typename K, i32 N, typename FROM, typename TO> FN void convert(DEVICE const FROM* from, DEVICE TO* to, Thread t) {
    EACH(i, K::ELEMENTS) {
        typename K::A x[N];
        load(x, from + K::from(i));
        store(to + K::to(i), x);
    }
}
