// Fibers, and the shadow of memory.

#include "grid.h"
#include "machine.h"

#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#ifdef __APPLE__
#pragma clang diagnostic ignored "-Wdeprecated-declarations"
#endif

/// The memory that CUDA's kernels declare: `extern __shared__ u64 shared[]`.
alignas(256) unsigned long long shared[227 << 7];

namespace machine {
namespace {

constexpr unsigned SIMD = 32;
constexpr size_t STACK_BYTES = 128 << 10;

enum class State { Ready, AtBarrier, AtShuffle, Done, Faulty };

struct Fiber {
    std::unique_ptr<uint8_t[]> stack{new uint8_t[STACK_BYTES]};
    jmp_buf at;
    bool started = false;
    State state = State::Done;
    /// Where it waits.
    void* site = nullptr;
    uint64_t bits = 0;
    unsigned mask = 0;
};

struct Machine {
    std::vector<Fiber> fibers;
    Fiber* running = nullptr;
    jmp_buf scheduler;
    Call kernel = nullptr;
    std::vector<void*> pointers;
    std::vector<Region> regions;
    unsigned tid = 0, block = 0, block_size = 0, blocks = 0;
    unsigned block_epoch = 0;
    std::vector<unsigned> simd_epoch;
    /// What lanes gather, by SIMD group and by whether its epoch is odd: the next one begins before all have read this one.
    std::vector<std::array<std::array<uint8_t, 32 * SIMD>, 2>> gathered;
    std::string fault;
} gpu;

std::map<std::string, Call>& kernels() {
    static std::map<std::string, Call> all;
    return all;
}

// ---- fibers ----

/// Back to the scheduler, until it resumes this fiber.
void yield(State state) {
    Fiber& self = *gpu.running;
    self.state = state;
    if (_setjmp(self.at) == 0) _longjmp(gpu.scheduler, 1);
}

}

void fail(const std::string& what) {
    gpu.fault = text("block %u, thread %u: ", gpu.block, gpu.tid) + what;
    yield(State::Faulty);
    abort();  // A faulty fiber is not resumed.
}

namespace {

/// A fiber runs one thread after the other.
void fiber_main() {
    for (;;) {
        gpu.kernel(gpu.pointers.data());
        yield(State::Done);
    }
}

void resume(Fiber& fiber) {
    gpu.running = &fiber;
    if (_setjmp(gpu.scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fiber.stack.get();
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, fiber_main, 0);
        setcontext(&context);
    }
    gpu.running = nullptr;
}

// ---- blocks ----

/// Lanes that all wait at one shuffle exchange what they brought.
bool exchange(unsigned first) {
    const unsigned end = std::min(first + SIMD, gpu.block_size);
    std::vector<uint64_t> bits;
    for (unsigned t = first; t < end; ++t) {
        const Fiber& fiber = gpu.fibers[t];
        if (fiber.state != State::AtShuffle || fiber.site != gpu.fibers[first].site) return false;
        bits.push_back(fiber.bits);
    }
    if (bits.size() != SIMD) return false;
    for (unsigned t = first; t < end; ++t) {
        gpu.fibers[t].bits = bits[(t - first) ^ gpu.fibers[t].mask];
        gpu.fibers[t].state = State::Ready;
    }
    ++gpu.simd_epoch[first / SIMD];
    return true;
}

unsigned count(State state) {
    unsigned n = 0;
    for (unsigned t = 0; t < gpu.block_size; ++t) n += gpu.fibers[t].state == state;
    return n;
}

/// Lets those go on who wait for nobody else; false at the end of the block, or at a fault.
bool release() {
    bool any = false;
    for (unsigned first = 0; first < gpu.block_size; first += SIMD) any |= exchange(first);
    if (any) return true;
    const unsigned waiting = count(State::AtBarrier), done = count(State::Done);
    if (done == gpu.block_size) return false;
    bool together = waiting == gpu.block_size;
    for (unsigned t = 0; t < gpu.block_size; ++t) together &= gpu.fibers[t].site == gpu.fibers[0].site;
    if (!together) {
        gpu.fault = text("block %u: divergent barrier: %u of %u threads wait at one, %u in a shuffle, %u have ended",
                         gpu.block, waiting, gpu.block_size, count(State::AtShuffle), done);
        return false;
    }
    for (unsigned t = 0; t < gpu.block_size; ++t) gpu.fibers[t].state = State::Ready;
    ++gpu.block_epoch;
    return true;
}

void run_block() {
    ++gpu.block_epoch;
    for (Region& region : gpu.regions) {
        if (region.shared) region.shadow.assign(region.shadow.size(), Shadow{});
    }
    for (unsigned t = 0; t < gpu.block_size; ++t) gpu.fibers[t].state = State::Ready;
    do {
        for (unsigned t = 0; t < gpu.block_size; ++t) {
            if (gpu.fibers[t].state != State::Ready) continue;
            gpu.tid = t;
            resume(gpu.fibers[t]);
            if (!gpu.fault.empty()) return;
        }
    } while (release());
}

// ---- memory ----

bool ordered(const Stamp& a, const Stamp& b) {
    if (a.thread == 0 || a.thread == b.thread) return true;
    const uint32_t one = a.thread - 1, other = b.thread - 1;
    if (one / gpu.block_size != other / gpu.block_size) return false;
    if (a.block_epoch != b.block_epoch) return true;
    const bool same_simd = one % gpu.block_size / SIMD == other % gpu.block_size / SIMD;
    return same_simd && a.simd_epoch != b.simd_epoch;
}

void check_race(Region& region, size_t element, bool write, const Stamp& now) {
    Shadow& shadow = region.shadow[element];
    if (region.shared && !write && shadow.write.thread == 0) {
        fail(text("reads element %zu of %s, which nobody wrote", element, region.name.c_str()));
    }
    for (const Stamp* stamp : {&shadow.write, &shadow.read[0], &shadow.read[1], &shadow.read[2]}) {
        const bool conflict = write || stamp == &shadow.write;
        if (conflict && !ordered(*stamp, now)) {
            fail(text("race on element %zu of %s with thread %u of block %u", element, region.name.c_str(),
                      (stamp->thread - 1) % gpu.block_size, (stamp->thread - 1) / gpu.block_size));
        }
    }
    if (write) {
        shadow.write = now;
        for (Stamp& read : shadow.read) read = Stamp{};
    } else {
        const Stamp last = std::exchange(shadow.read[0], now);
        if (last.thread != now.thread) shadow.read[1] = last;
        if ((last.thread - 1) / SIMD != (now.thread - 1) / SIMD) shadow.read[2] = last;
    }
}

bool within(const void* address, const void* start, size_t bytes) {
    const auto at = reinterpret_cast<uintptr_t>(address), from = reinterpret_cast<uintptr_t>(start);
    return at >= from && at < from + bytes;
}

}

void access(const void* address, size_t bytes, bool write) {
    if (gpu.running == nullptr || within(address, gpu.running->stack.get(), STACK_BYTES)) return;
    if (within(address, gpu.pointers.data(), gpu.pointers.size() * sizeof(void*))) return;
    const char* verb = write ? "writes" : "reads";
    for (Region& region : gpu.regions) {
        if (!within(address, region.start, region.bytes)) continue;
        const size_t at = static_cast<const uint8_t*>(address) - region.start;
        const char* name = region.name.c_str();
        if (at + bytes > region.bytes) break;
        if (write && !region.writable) fail(text("writes byte %zu of %s, which is read only", at, name));
        const Stamp now{gpu.block * gpu.block_size + gpu.tid + 1, gpu.block_epoch, gpu.simd_epoch[gpu.tid / SIMD]};
        for (size_t e = at / region.element; e <= (at + bytes - 1) / region.element; ++e) {
            check_race(region, e, write, now);
        }
        return;
    }
    fail(text("%s %zu bytes out of bounds of every operand", verb, bytes));
}

std::string run_grid(const Grid& grid, std::vector<Region> regions, std::vector<void*> pointers) {
    const auto kernel = kernels().find(grid.kernel);
    if (kernel == kernels().end()) return text("there is no kernel %s", grid.kernel.c_str());
    Region block_memory{reinterpret_cast<uint8_t*>(shared), grid.shared_bytes, 4, true, true, "shared memory", {}};
    if (grid.shared_bytes > 0) regions.push_back(block_memory);
    for (Region& region : regions) region.shadow.resize((region.bytes + region.element - 1) / region.element);
    pointers.push_back(shared);
    gpu.fault.clear();
    gpu.regions = std::move(regions);
    gpu.pointers = std::move(pointers);
    gpu.kernel = kernel->second;
    gpu.block_size = grid.block;
    gpu.blocks = grid.blocks;
    gpu.simd_epoch.assign((grid.block + SIMD - 1) / SIMD, 0);
    gpu.gathered.resize(gpu.simd_epoch.size());
    if (gpu.fibers.size() < grid.block) gpu.fibers = std::vector<Fiber>(grid.block);
    for (gpu.block = 0; gpu.block < grid.blocks && gpu.fault.empty(); ++gpu.block) run_block();
    if (!gpu.fault.empty()) {
        for (Fiber& fiber : gpu.fibers) fiber.started = false;
    }
    return gpu.fault;
}

std::string text(const char* format, ...) {
    char buffer[512];
    va_list args;
    va_start(args, format);
    vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    return buffer;
}

Ids ids() { return {gpu.tid, gpu.block, gpu.blocks}; }

void barrier() {
    gpu.running->site = __builtin_return_address(0);
    yield(State::AtBarrier);
}

uint64_t shuffle_xor(uint64_t bits, unsigned mask) {
    Fiber& self = *gpu.running;
    self.site = __builtin_return_address(0);
    self.bits = bits;
    self.mask = mask;
    yield(State::AtShuffle);
    return self.bits;
}

const void* gather(const void* mine, size_t bytes, void* site) {
    Fiber& self = *gpu.running;
    const unsigned simd = gpu.tid / SIMD;
    auto& all = gpu.gathered[simd][gpu.simd_epoch[simd] % 2];
    std::memcpy(all.data() + gpu.tid % SIMD * bytes, mine, bytes);
    self.site = site;
    self.mask = 0;
    yield(State::AtShuffle);
    return all.data();
}

unsigned compare_exchange(unsigned* at, unsigned expected, unsigned desired) {
    // Atomic: threads take turns, and an access that is atomic races with nothing.
    for (const Region& region : gpu.regions) {
        if (!region.writable || !within(at, region.start, region.bytes)) continue;
        const unsigned before = *at;
        if (before == expected) *at = desired;
        return before;
    }
    fail("exchanges what is no operand's");
}

Kernel::Kernel(const char* name, Call call) { kernels()[name] = call; }

}

// What -fsanitize=thread calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(n) \
    void __tsan_read##n(void* at) { machine::access(at, n, false); } \
    void __tsan_write##n(void* at) { machine::access(at, n, true); } \
    void __tsan_unaligned_read##n(void* at) { machine::access(at, n, false); } \
    void __tsan_unaligned_write##n(void* at) { machine::access(at, n, true); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void* __tsan_memcpy(void* to, const void* from, size_t n) {
    machine::access(from, n, false);
    machine::access(to, n, true);
    return std::memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
    machine::access(from, n, false);
    machine::access(to, n, true);
    return std::memmove(to, from, n);
}
void* __tsan_memset(void* to, int byte, size_t n) {
    machine::access(to, n, true);
    return std::memset(to, byte, n);
}

// What the other sanitizers call, when something is undefined.
#define UNDEFINED(name, what) \
    void __ubsan_handle_##name() { machine::fail(what); }
UNDEFINED(type_mismatch_v1, "misaligned access")
UNDEFINED(out_of_bounds, "out of bounds of an array")
UNDEFINED(add_overflow, "overflow of +")
UNDEFINED(sub_overflow, "overflow of -")
UNDEFINED(mul_overflow, "overflow of *")
UNDEFINED(negate_overflow, "overflow of -")
UNDEFINED(divrem_overflow, "overflow of /, or a division by 0")
UNDEFINED(shift_out_of_bounds, "shift by too much")
UNDEFINED(float_cast_overflow, "a float beyond the integers")
}
