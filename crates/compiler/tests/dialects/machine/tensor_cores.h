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

unsigned shared_place(const void* at);

}
