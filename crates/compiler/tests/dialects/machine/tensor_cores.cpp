// After the PTX ISA, "Warp Level Matrix Instructions": which lane holds which elements.

#include "tensor_cores.h"

#include "grid.h"
#include "metal_stdlib"

#include <vector>

extern unsigned long long shared[];

namespace machine {
namespace {

constexpr unsigned SIMD = 32;

struct Copy {
    uint8_t* to;
    const uint8_t* from;
    size_t bytes;
};

/// By thread, those of the block that runs.
std::vector<std::vector<Copy>> unfinished(1024);

uint8_t* in_shared(unsigned place) { return reinterpret_cast<uint8_t*>(shared) + place; }

float number(uint32_t both, unsigned which, Half kind) {
    const auto bits = ushort(both >> (16 * which));
    if (kind == Half::F16) return float(metal::as_type<half>(bits));
    return metal::as_type<float>(uint(bits) << 16);
}

}

unsigned shared_place(const void* at) { return unsigned(static_cast<const uint8_t*>(at) - in_shared(0)); }

namespace {

void begin_copy(unsigned to, const void* from, size_t bytes, bool inside) {
    // Others must not touch the place any more.
    access(in_shared(to), bytes, true);
    if (inside) access(from, bytes, false);
    const auto address = reinterpret_cast<uintptr_t>(from);
    if (to % bytes != 0 || address % bytes != 0) fail("an asynchronous copy of misaligned bytes");
    unfinished[ids().tid].push_back({in_shared(to), inside ? static_cast<const uint8_t*>(from) : nullptr, bytes});
}

}

void copy_async(unsigned to, const void* from, bool inside) { begin_copy(to, from, 16, inside); }
void copy_word_async(unsigned to, const void* from, bool inside) { begin_copy(to, from, 4, inside); }

void await_copies() {
    for (const Copy& copy : unfinished[ids().tid]) {
        access(copy.to, copy.bytes, true);
        if (copy.from != nullptr) std::memcpy(copy.to, copy.from, copy.bytes);
        else std::memset(copy.to, 0, copy.bytes);
    }
    unfinished[ids().tid].clear();
}

void load_matrices(uint32_t (&to)[4], unsigned row, bool transposed) {
    if (row % 16 != 0) fail("a row of a matrix that is misaligned");
    access(in_shared(row), 16, false);
    using Row = std::array<ushort, 8>;
    Row mine;
    std::memcpy(&mine, in_shared(row), sizeof mine);
    const auto rows = static_cast<const Row*>(gather(&mine, sizeof mine, __builtin_return_address(0)));
    const unsigned lane = ids().tid % SIMD, major = lane / 4, minor = lane % 4 * 2;
    for (unsigned i = 0; i < 4; ++i) {
        const Row* matrix = rows + 8 * i;
        const ushort a = transposed ? matrix[minor][major] : matrix[major][minor];
        const ushort b = transposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
        to[i] = uint32_t(a) | uint32_t(b) << 16;
    }
}

void multiply_add(float (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half kind) {
    using Factors = std::array<uint32_t, 6>;
    const Factors mine = {a[0], a[1], a[2], a[3], b0, b1};
    const auto all = static_cast<const Factors*>(gather(&mine, sizeof mine, __builtin_return_address(0)));
    const unsigned lane = ids().tid % SIMD;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; ++k) {
            const unsigned part = k % 8 / 2;
            const Factors& left = all[row % 8 * 4 + part];
            const Factors& right = all[col * 4 + part];
            to[i] += number(left[k / 8 * 2 + row / 8], k % 2, kind) * number(right[4 + k / 8], k % 2, kind);
        }
    }
}

float Factor::at(unsigned outer, unsigned inner, Half kind) const {
    const auto field = [this](unsigned from) { return unsigned(descriptor >> from & 0x3fff) << 4; };
    if (descriptor >> 62 != 1) fail("a factor without 128-byte swizzling");
    const unsigned row = turned ? inner : outer, col = turned ? outer : inner;
    const unsigned place = row / 8 * field(32) + row % 8 * 128 + col * 2;
    const unsigned whole = field(0) + place, swizzled = whole ^ (whole >> 7 & 7) << 4;
    access(in_shared(swizzled), 2, false);
    ushort bits;
    std::memcpy(&bits, in_shared(swizzled), sizeof bits);
    return number(bits, 0, kind);
}

void multiply_tile(float (&to)[4], const uint32_t (&a)[4], const Factor& b, unsigned n, Half kind) {
    using Left = std::array<uint32_t, 4>;
    const Left mine = {a[0], a[1], a[2], a[3]};
    const auto all = static_cast<const Left*>(gather(&mine, sizeof mine, __builtin_return_address(0)));
    const unsigned lane = ids().tid % SIMD;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; ++k) {
            const uint32_t left = all[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8];
            to[i] += number(left, k % 2, kind) * b.at(8 * n + col, k, kind);
        }
    }
}

void multiply_tile(float (&to)[4], const Factor& a, const Factor& b, unsigned n, Half kind) {
    const unsigned lane = ids().tid % SIMD, simd = ids().tid / SIMD % 4;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; ++k) to[i] += a.at(16 * simd + row, k, kind) * b.at(8 * n + col, k, kind);
    }
}

}
