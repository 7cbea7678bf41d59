// What runs a grid, for what reads a program.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace machine {

/// An access, as the shadow remembers it. `thread` counts from 1 over the whole grid.
struct Stamp { uint32_t thread = 0, block_epoch = 0, simd_epoch = 0; };

struct Shadow {
    Stamp write;
    /// Who read since: the last thread, the one before it, and the last one of another SIMD group.
    Stamp read[3];
};

/// Memory that a kernel may touch.
struct Region {
    uint8_t* start = nullptr;
    size_t bytes = 0, element = 1;
    bool writable = false, shared = false;
    std::string name;
    std::vector<Shadow> shadow;
};

struct Grid {
    std::string kernel;
    unsigned blocks = 0, block = 0;
    size_t shared_bytes = 0;
};

/// Runs all threads; what they did wrong, if anything.
std::string run_grid(const Grid& grid, std::vector<Region> regions, std::vector<void*> pointers);

std::string text(const char* format, ...);

}
