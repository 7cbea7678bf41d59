// A GPU of one core that forgives nothing: runs kernels block by block, thread by thread, on the CPU.
//
// Every thread of a block is a fiber that runs until it waits. A barrier holds it until all threads of the
// block are there, a shuffle until all lanes of its SIMD group are; if they cannot come any more, that is a fault. Kernels
// are compiled with -fsanitize=thread, whose calls before each access to memory end up here, not in its library: an access
// must lie within a buffer or the block's shared memory, write only what may be written, and not race. What the other
// sanitizers find is a fault, too: misaligned vectors, indices beyond a thread's own arrays, overflowing counters.
//
// Two accesses to one element, one of them a write, race unless they are one thread's, or a barrier of their block or a
// shuffle of their SIMD group lies between them.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>

namespace machine {

struct Ids { unsigned tid, block, blocks; };

/// What all threads do together, and where: a compiler may not copy it into the branches that some of them take.
#define TOGETHER __attribute__((convergent))

/// Of the running thread.
Ids ids();
TOGETHER void barrier();
/// Gives `bits` to the other lanes, and takes those of lane `lane ^ mask`.
TOGETHER uint64_t shuffle_xor(uint64_t bits, unsigned mask);

/// Gives up to 32 bytes to the other lanes, and takes those of all, in order: each lane's begin at a multiple of `bytes`. `site` is
/// where all lanes must be.
TOGETHER const void* gather(const void* mine, size_t bytes, void* site);

/// Of the running thread, to memory that it does not itself touch.
void access(const void* address, size_t bytes, bool write);
[[noreturn]] void fail(const std::string& what);

/// Writes `desired` if `expected` is there; gives what was there.
unsigned compare_exchange(unsigned* at, unsigned expected, unsigned desired);

template <typename T> TOGETHER T shuffle_xor(T x, unsigned mask) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof(T));
    bits = shuffle_xor(bits, mask);
    std::memcpy(&x, &bits, sizeof(T));
    return x;
}

/// Calls a kernel with its operands, then the shared memory.
using Call = void (*)(void* const* pointers);

struct Kernel { Kernel(const char* name, Call call); };

/// Hands a kernel's parameters over: addresses in order, then what the dialect says of the thread.
struct Parameters {
    void* const* pointers;
    unsigned id = 0;

    template <typename T> T next() {
        if constexpr (std::is_pointer_v<T>) {
            return static_cast<T>(*pointers++);
        } else {
            const Ids all = ids();
            return std::array{all.tid, all.block, all.blocks}[id++];
        }
    }
};

template <typename... A> void call(void (*kernel)(A...), void* const* pointers) {
    Parameters from{pointers};
    // In braces, the parameters are made one after the other.
    std::tuple<A...> parameters{from.next<A>()...};
    std::apply(kernel, parameters);
}

}
