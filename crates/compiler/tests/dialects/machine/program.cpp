// The protocol with the test: `machine PROGRAMS RESULTS`. A program is buffers, and launches and products on them.

#include "grid.h"
#include "metal_stdlib"

#include <cstdio>
#include <cstdlib>
#include <optional>

namespace machine {
namespace {

struct Reader {
    FILE* file;
    template <typename T> T get() {
        T x;
        if (fread(&x, sizeof x, 1, file) != 1) { fprintf(stderr, "the file of programs ends too early\n"); exit(1); }
        return x;
    }
    size_t size() { return get<uint64_t>(); }
    void bytes(uint8_t* to, size_t n) {
        if (n > 0 && fread(to, 1, n, file) != n) { fprintf(stderr, "the file of programs ends too early\n"); exit(1); }
    }
    std::string string() {
        std::string s(size(), 0);
        bytes(reinterpret_cast<uint8_t*>(s.data()), s.size());
        return s;
    }
};

void put(FILE* file, const void* from, size_t n) {
    if (n > 0 && fwrite(from, 1, n, file) != n) { fprintf(stderr, "cannot write the results\n"); exit(1); }
}

/// A buffer starts at a multiple of 16 and of no more, between two stretches that are nobody's.
constexpr size_t GUARD_BYTES = 1 << 14;

struct Buffer {
    std::vector<uint8_t> memory;
    uint8_t* start = nullptr;
    size_t bytes = 0;

    void read(Reader& in) {
        bytes = in.size();
        memory.resize(bytes + 2 * GUARD_BYTES + 64);
        const auto from = reinterpret_cast<uintptr_t>(memory.data()) + GUARD_BYTES;
        start = reinterpret_cast<uint8_t*>((from + 31) / 32 * 32 + 16);
        in.bytes(start, bytes);
    }
};

using Buffers = std::vector<Buffer>;

// ---- launches ----

uint8_t* address(Reader& in, Buffers& buffers) {
    Buffer& buffer = buffers.at(in.size());
    return buffer.start + in.size();
}

std::string launch(Reader& in, Buffers& buffers) {
    Grid grid;
    grid.kernel = in.string();
    grid.blocks = unsigned(in.size());
    grid.block = unsigned(in.size());
    grid.shared_bytes = in.size();
    std::vector<Region> regions(in.size());
    for (size_t i = 0; i < regions.size(); ++i) {
        regions[i].start = address(in, buffers);
        regions[i].bytes = in.size();
        regions[i].element = in.size();
        regions[i].writable = in.size() != 0;
        regions[i].name = text("operand %zu", i);
    }
    std::vector<void*> pointers(in.size());
    for (void*& pointer : pointers) pointer = address(in, buffers);
    return run_grid(grid, std::move(regions), std::move(pointers));
}

// ---- products ----

enum class DType : size_t { BF16, F16, F32, F64 };

struct Place {
    uint8_t* start;
    DType dtype;
    std::vector<size_t> dims;
    std::vector<long> strides;
    long offset;

    Place(Reader& in, Buffers& buffers)
        : start(address(in, buffers)), dtype(DType(in.size())), dims(in.size()), strides(dims.size()) {
        for (size_t& dim : dims) dim = in.size();
        for (long& stride : strides) stride = long(in.size());
        offset = long(in.size());
    }

    /// The element of matrix `batch`, in row-major order of the leading dims.
    long at(size_t batch, size_t row, size_t col) const {
        const size_t rank = dims.size();
        long at = offset + long(row) * strides[rank - 2] + long(col) * strides[rank - 1];
        for (size_t d = rank - 2; d-- > 0; batch /= dims[d]) at += long(batch % dims[d]) * strides[d];
        return at;
    }

    double get(long at) const {
        switch (dtype) {
            case DType::BF16: return reinterpret_cast<const bfloat*>(start)[at];
            case DType::F16: return double(reinterpret_cast<const half*>(start)[at]);
            case DType::F32: return reinterpret_cast<const float*>(start)[at];
            default: return reinterpret_cast<const double*>(start)[at];
        }
    }

    void set(long at, double x) const {
        switch (dtype) {
            case DType::BF16: reinterpret_cast<bfloat*>(start)[at] = bfloat(float(x)); break;
            case DType::F16: reinterpret_cast<half*>(start)[at] = half(float(x)); break;
            case DType::F32: reinterpret_cast<float*>(start)[at] = float(x); break;
            default: reinterpret_cast<double*>(start)[at] = x;
        }
    }
};

/// As the library of a backend: `out = alpha a b`, or `out += alpha a b`, and a bias for every row.
void product(Reader& in, Buffers& buffers) {
    const auto alpha = in.get<double>();
    const bool accumulate = in.size() != 0;
    const bool has_bias = in.size() != 0;
    const Place a(in, buffers), b(in, buffers);
    std::optional<Place> bias;
    if (has_bias) bias.emplace(in, buffers);
    const Place out(in, buffers);
    const size_t rank = out.dims.size(), rows = out.dims[rank - 2], cols = out.dims[rank - 1], inner = a.dims[rank - 1];
    size_t batches = 1;
    for (size_t d = 0; d + 2 < rank; ++d) batches *= out.dims[d];
    for (size_t batch = 0; batch < batches; ++batch) {
        for (size_t row = 0; row < rows; ++row) {
            for (size_t col = 0; col < cols; ++col) {
                double sum = 0;
                for (size_t k = 0; k < inner; ++k) sum += a.get(a.at(batch, row, k)) * b.get(b.at(batch, k, col));
                const long at = out.at(batch, row, col);
                const double more = bias ? bias->get(bias->offset + long(col) * bias->strides[0]) : 0;
                out.set(at, alpha * sum + (accumulate ? out.get(at) : 0) + more);
            }
        }
    }
}

// ---- programs ----

enum class Kind : size_t { Launch, Product };

void run_program(Reader& in, FILE* out) {
    Buffers buffers(in.size());
    for (Buffer& buffer : buffers) buffer.read(in);
    std::string fault;
    for (size_t step = 0, steps = in.size(); step < steps; ++step) {
        if (Kind(in.size()) == Kind::Product) {
            product(in, buffers);
        } else if (const std::string wrong = launch(in, buffers); !wrong.empty() && fault.empty()) {
            fault = steps == 1 ? wrong : text("part %zu: ", step) + wrong;
        }
    }
    const uint64_t length = fault.size();
    put(out, &length, sizeof length);
    put(out, fault.data(), length);
    for (const Buffer& buffer : buffers) put(out, buffer.start, buffer.bytes);
}

}
}

int main(int argc, char** argv) {
    if (argc != 3) { fprintf(stderr, "machine PROGRAMS RESULTS\n"); return 2; }
    machine::Reader in{fopen(argv[1], "rb")};
    FILE* out = fopen(argv[2], "wb");
    if (in.file == nullptr || out == nullptr) { fprintf(stderr, "cannot open the files\n"); return 1; }
    for (size_t n = in.size(); n > 0; --n) machine::run_program(in, out);
    return fclose(out) == 0 ? 0 : 1;
}
