//! CUDA C, as NVRTC compiles it.

use super::dialect::{Dialect, Shared};

/// What has a dialect of its own.
const TENSOR_CORES: [&str; 6] = [
    include_str!("call/mma.h"),
    include_str!("call/thin.h"),
    include_str!("call/wgmma.h"),
    include_str!("call/flash_products.h"),
    include_str!("call/flash.h"),
    include_str!("call/flash_grad.h"),
];

pub(super) const DIALECT: Dialect = Dialect {
    language: "CUDA C",
    has_f64: true,
    // No fast math: NaN and infinities mean something. Rounding once in a * b + c is welcome.
    options: &["--std=c++17"],
    headers: Dialect::headers(include_str!("cuda.h"), TENSOR_CORES),
    kernel: "extern \"C\" __global__ void __launch_bounds__({block}{resident}) {name}",
    argument: "const {type}* {name}",
    output: "{type}* {name}",
    ids: &[],
    first_lines: &["const u32 tid = threadIdx.x, block = blockIdx.x, blocks = gridDim.x;"],
    wait: &["after_predecessor();"],
    before: "const Predecessor before = {};",
    waited: "const Waited before = {};",
    function: Some([
        "FN void {name}(const u32 block, const u32 blocks,",
        "const u32 tid = threadIdx.x;",
    ]),
    shared: Shared::Line("extern __shared__ __align__(1024) u64 shared[];"),
};
