//! The Metal Shading Language.

use super::dialect::{Dialect, Shared};

pub(super) const DIALECT: Dialect = Dialect {
    language: "Metal",
    has_f64: false,
    // bfloat came with 3.1. No fast math: NaN and infinities mean something.
    options: &["-std=metal3.1", "-fno-fast-math"],
    headers: Dialect::headers(include_str!("metal.h"), [""; 6]),
    kernel: "[[kernel, max_total_threads_per_threadgroup({block})]] void {name}",
    argument: "device const {type}* {name} [[buffer({n})]]",
    output: "device {type}* {name} [[buffer({n})]]",
    ids: &[
        "uint tid [[thread_index_in_threadgroup]]",
        "uint block [[threadgroup_position_in_grid]]",
        "uint blocks [[threadgroups_per_grid]]",
    ],
    first_lines: &[],
    wait: &[],
    before: "const Predecessor before = {};",
    waited: "const Waited before = {};",
    function: None,
    shared: Shared::Parameter("threadgroup u64* shared [[threadgroup(0)]]"),
};
