// What the SIMD groups of an NVIDIA GPU of compute capability 8.0 do together, for the kernels that say it in PTX. Lane by
// lane, so that a place that is not in shared memory, an unfinished copy or a missing barrier is a fault here, too.

#pragma once

#include "machine.h"

namespace machine {

/// Begins to copy 16 or 4 bytes into shared memory, or to write zeros there: they are there after `await_copies`.
void copy_async(unsigned to, const void* from, bool inside);
void copy_word_async(unsigned to, const void* from, bool inside);
void await_copies();
/// Four matrices of 8 rows of 16 bytes; this lane names a row.
void load_matrices(uint32_t (&to)[4], unsigned row, bool transposed);

enum class Half { BF16, F16 };
/// `to += a b`: [16, 16] times [16, 8].
void multiply_add(float (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Half kind);

/// What every tile of 16 x 8 sums of a SIMD group takes from all of a tile of 16-bit numbers in shared memory, one step of 16
/// along the inner axis: after the PTX ISA, "Asynchronous warpgroup level matrix instructions".
class Factor {
public:
    /// As a matrix descriptor says; a turned one lies row after row.
    Factor(uint64_t descriptor, bool turned) : descriptor(descriptor), turned(turned) {}
    float at(unsigned outer, unsigned inner, Half kind) const;

private:
    uint64_t descriptor;
    bool turned;
};

/// `to[n] += a b`: [16, 16] times [16, 8], columns 8 n to 8 n + 7 of `b`; the left factor is in registers or in shared memory.
void multiply_tile(float (&to)[4], const uint32_t (&a)[4], const Factor& b, unsigned n, Half kind);
void multiply_tile(float (&to)[4], const Factor& a, const Factor& b, unsigned n, Half kind);

unsigned shared_place(const void* at);

}
