//! Rendered kernels as text, and how they are launched. What they compute is tested in `dialects`.

#[path = "dialects/graphs.rs"]
mod graphs;
mod support;

use expect_test::{Expect, expect};
use metal_candle_compiler::kernel::Kernel;
use metal_candle_compiler::render::{
    Binding, Dialect, Launch, Limits, Part, RenderError, Source, Team, call, launch, render,
};
use metal_candle_compiler::{Target, Work};
use metal_candle_graph::{
    BinaryOp, ComputationGraph, DType, Dims, NodeId, Operation, Shape, TensorType, UnaryOp,
};

/// An H100, and an M2 Pro.
const CUDA: Limits = Limits::cuda(132, 2048);
const METAL: Limits = Limits::metal(19);

fn kernels(g: &ComputationGraph, donated: &[bool]) -> Vec<Kernel> {
    let plan = metal_candle_compiler::plan(g, &Target::CPU, donated).unwrap();
    let kernel = |work: Work| match work {
        Work::Kernel(kernel) => Some(kernel),
        Work::Call(_) => None,
    };
    plan.steps.into_iter().filter_map(|step| kernel(step.work)).collect()
}

fn input(g: &mut ComputationGraph, i: u32, dtype: DType, dims: &[usize]) -> NodeId {
    g.input(i, TensorType::new(dtype, Shape::new(dims).unwrap()))
}

/// The kernel of `max(x, 0)`.
fn map(dtype: DType, dims: &[usize]) -> Kernel {
    let mut g = ComputationGraph::new();
    let x = input(&mut g, 0, dtype, dims);
    g.outputs = vec![g.unary(UnaryOp::Relu, x).unwrap()];
    kernels(&g, &[]).remove(0)
}

/// The kernel of a sum over `dim`.
fn sum(dtype: DType, dims: &[usize], dim: usize) -> Kernel {
    let mut g = ComputationGraph::new();
    let x = input(&mut g, 0, dtype, dims);
    g.outputs = vec![g.sum(x, Dims::new([dim])).unwrap()];
    kernels(&g, &[]).remove(0)
}

fn check(kernel: &Kernel, dialect: &Dialect, expected: Expect) {
    expected.assert_eq(&render(kernel, dialect, &CUDA, "softmax").unwrap().text);
}

#[test]
fn softmax_keeps_its_row_in_registers() {
    let softmax = kernels(&support::softmax(), &[]).remove(0);
    check(
        &softmax,
        Dialect::CUDA,
        expect![[r#"
            // 64 rows of 512, a SIMD group each, in accesses of 4.
            extern "C" __global__ void __launch_bounds__(256) softmax(
                const f32* in0,
                f32* out0
            ) {
                const u32 tid = threadIdx.x, block = blockIdx.x, blocks = gridDim.x;
                after_predecessor();
                const u32 lane = tid % 32;
                for (i32 row = block * 8 + tid / 32; row < 64; row += blocks * 8) {
                    f32 v0[4][4];
                    f32 r1 = -INF;
                    #pragma unroll
                    for (i32 k = 0; k < 4; ++k) {
                        const i32 col = (k * 32 + lane) * 4;
                        load(v0[k], in0 + row * 512 + col);
                        #pragma unroll
                        for (i32 j = 0; j < 4; ++j) {
                            r1 = Max::of(r1, v0[k][j]);
                        }
                    }
                    r1 = simd_reduce<Max>(r1);
                    f32 v3[4][4];
                    f32 r4 = 0.0f;
                    #pragma unroll
                    for (i32 k = 0; k < 4; ++k) {
                        #pragma unroll
                        for (i32 j = 0; j < 4; ++j) {
                            const f32 v2 = v0[k][j] - r1;
                            v3[k][j] = math::exp(v2);
                            r4 = Sum::of(r4, v3[k][j]);
                        }
                    }
                    r4 = simd_reduce<Sum>(r4);
                    const f32 r5 = math::recip(r4);
                    #pragma unroll
                    for (i32 k = 0; k < 4; ++k) {
                        const i32 col = (k * 32 + lane) * 4;
                        f32 v6[4];
                        #pragma unroll
                        for (i32 j = 0; j < 4; ++j) {
                            v6[j] = v3[k][j] * r5;
                        }
                        store(out0 + row * 512 + col, v6);
                    }
                }
            }
        "#]],
    );
    check(
        &softmax,
        Dialect::METAL,
        expect![[r#"
        // 64 rows of 512, a SIMD group each, in accesses of 4.
        [[kernel, max_total_threads_per_threadgroup(256)]] void softmax(
            device const f32* in0 [[buffer(0)]],
            device f32* out0 [[buffer(1)]],
            uint tid [[thread_index_in_threadgroup]],
            uint block [[threadgroup_position_in_grid]],
            uint blocks [[threadgroups_per_grid]]
        ) {
            const u32 lane = tid % 32;
            for (i32 row = block * 8 + tid / 32; row < 64; row += blocks * 8) {
                f32 v0[4][4];
                f32 r1 = -INF;
                #pragma unroll
                for (i32 k = 0; k < 4; ++k) {
                    const i32 col = (k * 32 + lane) * 4;
                    load(v0[k], in0 + row * 512 + col);
                    #pragma unroll
                    for (i32 j = 0; j < 4; ++j) {
                        r1 = Max::of(r1, v0[k][j]);
                    }
                }
                r1 = simd_reduce<Max>(r1);
                f32 v3[4][4];
                f32 r4 = 0.0f;
                #pragma unroll
                for (i32 k = 0; k < 4; ++k) {
                    #pragma unroll
                    for (i32 j = 0; j < 4; ++j) {
                        const f32 v2 = v0[k][j] - r1;
                        v3[k][j] = math::exp(v2);
                        r4 = Sum::of(r4, v3[k][j]);
                    }
                }
                r4 = simd_reduce<Sum>(r4);
                const f32 r5 = math::recip(r4);
                #pragma unroll
                for (i32 k = 0; k < 4; ++k) {
                    const i32 col = (k * 32 + lane) * 4;
                    f32 v6[4];
                    #pragma unroll
                    for (i32 j = 0; j < 4; ++j) {
                        v6[j] = v3[k][j] * r5;
                    }
                    store(out0 + row * 512 + col, v6);
                }
            }
        }
    "#]],
    );
}

/// Block and grid of what `Limits` promise: "CUDA C++ Programming Guide", and "Metal Feature Set Tables".
#[test]
fn launches_are_within_the_limits() {
    for (name, graph, donated) in graphs::all() {
        for kernel in kernels(&graph, &donated) {
            for limits in [CUDA, METAL] {
                let Launch { team, vector, grid, block, shared_bytes, .. } =
                    launch(&kernel, &limits).unwrap();
                assert!((1..=limits.max_grid).contains(&grid), "{name}: {grid}");
                assert!(block <= limits.max_block && block.is_multiple_of(32), "{name}: {block}");
                assert!(shared_bytes <= limits.max_shared_bytes, "{name}: {shared_bytes}");
                assert!(shared_bytes.is_multiple_of(16), "{name}: {shared_bytes}");
                assert!([1, 2, 4, 8, 16].contains(&vector), "{name}: {vector}");
                let shares = matches!(team, Team::Block | Team::Column { slices: 2.. });
                assert_eq!(shared_bytes > 0, shares, "{name}: {team:?}");
            }
            let source = render(&kernel, Dialect::CUDA, &CUDA, "k").unwrap();
            assert!([1, 2, 4, 8, 16].contains(&source.align_bytes), "{name}");
        }
    }
}

#[test]
fn a_row_is_shared_by_as_many_threads_as_it_is_long() {
    let team = |kernel: &Kernel| {
        let Launch { team, vector, block, .. } = launch(kernel, &CUDA).unwrap();
        (team, vector, block)
    };
    let f32 = DType::F32;
    assert_eq!(team(&map(f32, &[64, 512])), (Team::Element, 4, 256));
    assert_eq!(team(&map(DType::BF16, &[64, 512])), (Team::Element, 8, 256));
    assert_eq!(team(&map(DType::U8, &[64, 512])), (Team::Element, 16, 256));
    assert_eq!(team(&map(f32, &[7, 7])), (Team::Element, 1, 256));
    assert_eq!(team(&sum(f32, &[64, 512], 1)), (Team::Simd, 4, 256));
    assert_eq!(team(&sum(f32, &[64, 1022], 1)), (Team::Simd, 2, 256));
    assert_eq!(team(&sum(DType::BF16, &[64, 4096], 1)), (Team::Block, 8, 128));
    assert_eq!(team(&sum(f32, &[64, 16_384], 1)), (Team::Block, 4, 1024));
    assert_eq!(team(&sum(f32, &[512, 64], 0)), (Team::Column { slices: 8 }, 1, 256));
    assert_eq!(team(&sum(f32, &[3, 1000], 0)), (Team::Column { slices: 1 }, 1, 256));
}

#[test]
fn a_grid_covers_its_work_once_or_fills_the_device_and_goes_round() {
    let grid = |kernel: &Kernel| launch(kernel, &CUDA).unwrap().grid;
    assert_eq!(grid(&map(DType::F32, &[64, 512])), 64 * 512 / (4 * 256));
    assert_eq!(grid(&sum(DType::F32, &[65, 512], 1)), 65_usize.div_ceil(8));
    assert_eq!(grid(&map(DType::F32, &[1 << 28])), 4 * 132 * 2048 / 256);
    assert_eq!(grid(&map(DType::F32, &[0, 4])), 0);
}

#[test]
fn what_32_bits_cannot_count_is_counted_in_64() {
    let text =
        |dims: &[usize]| render(&map(DType::U8, dims), Dialect::CUDA, &CUDA, "k").unwrap().text;
    assert!(text(&[1 << 20]).contains("for (i32 i"));
    assert!(text(&[1 << 16, 1 << 16]).contains("for (i64 i"));
}

#[test]
fn metal_refuses_f64_by_name() {
    let error = render(&map(DType::F64, &[8]), Dialect::METAL, &METAL, "k").unwrap_err();
    assert_eq!(error, RenderError::DType { language: "Metal", dtype: DType::F64 });
    assert_eq!(error.to_string(), "Metal has no f64: cast to f32, or run on the CPU");
    assert!(render(&map(DType::F64, &[8]), Dialect::CUDA, &CUDA, "k").is_ok());
}

#[test]
fn more_operands_than_metal_binds_are_refused_with_both_numbers() {
    let mut g = ComputationGraph::new();
    let x: Vec<_> = (0..31).map(|i| input(&mut g, i, DType::F32, &[8])).collect();
    let sum = x[1..].iter().fold(x[0], |sum, x| g.binary(BinaryOp::Add, sum, *x).unwrap());
    g.outputs = vec![sum];
    let kernel = kernels(&g, &[]).remove(0);
    let error = render(&kernel, Dialect::METAL, &METAL, "k").unwrap_err();
    assert_eq!(error, RenderError::Operands { operands: 32, limit: 31 });
    assert!(render(&kernel, Dialect::CUDA, &CUDA, "k").is_ok());
}

/// Of sums, of values that are computed again where they are needed, and with every sum kept.
#[test]
fn fusion_stops_before_a_kernel_has_more_operands_than_metal_binds() {
    for (silu, keep) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut g = ComputationGraph::new();
        let mut terms: Vec<NodeId> =
            (0..80).map(|i| input(&mut g, i, DType::F32, &[64, 8])).collect();
        if silu {
            terms.iter_mut().for_each(|x| *x = g.unary(UnaryOp::Silu, *x).unwrap());
        }
        let mut sums = vec![terms[0]];
        for term in &terms[1..] {
            sums.push(g.binary(BinaryOp::Add, sums[sums.len() - 1], *term).unwrap());
        }
        g.outputs = if keep { sums } else { vec![sums[sums.len() - 1]] };
        let of = |target| metal_candle_compiler::plan(&g, target, &[]).unwrap();
        let (metal, cpu) = (of(&Target::METAL), of(&Target::CPU));
        let fewest = if keep { 80usize.div_ceil(15) } else { 80usize.div_ceil(29) };
        assert!((fewest..=2 * fewest).contains(&metal.steps.len()), "{metal}");
        assert!(cpu.steps.len() < fewest, "{cpu}");
        for step in metal.steps {
            let Work::Kernel(kernel) = &step.work else { panic!("{} is no kernel", step.label) };
            let source = render(kernel, Dialect::METAL, &METAL, "k").unwrap();
            assert!(source.bindings.len() <= METAL.max_operands);
        }
    }
}

#[test]
fn a_scalar_is_read_once_a_vector() {
    let mut g = ComputationGraph::new();
    let (x, s) = (input(&mut g, 0, DType::F32, &[64, 64]), input(&mut g, 1, DType::F32, &[]));
    let s = g.broadcast_to(s, Shape::new(&[64, 64]).unwrap()).unwrap();
    g.outputs = vec![g.binary(BinaryOp::Mul, x, s).unwrap()];
    let text = render(&kernels(&g, &[]).remove(0), Dialect::CUDA, &CUDA, "k").unwrap().text;
    let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("{part} in\n{text}"));
    assert!(at("= in1[0];") < at("for (i32 j"), "{text}");
}

/// The kernel of one row times a matrix whose columns lie side by side.
fn product_of_one_row() -> Source {
    let mut g = ComputationGraph::new();
    let (x, w) = (input(&mut g, 0, DType::F32, &[1, 64]), input(&mut g, 1, DType::F32, &[32, 64]));
    let columns = g.permute(w, &[1, 0]).unwrap();
    g.outputs = vec![g.add(Operation::Dot, &[x, columns]).unwrap()];
    let step = metal_candle_compiler::plan(&g, &Target::CUDA, &[]).unwrap().steps.remove(0);
    let Work::Call(product) = &step.work else { panic!("{} is no call", step.label) };
    let mut parts = call(product, &step.args, &step.outs, Dialect::CUDA, &CUDA).unwrap().parts;
    let Part::Kernel(source) = parts.remove(0) else { panic!("{product:?} is the library's") };
    source
}

#[test]
fn a_product_of_one_row_asks_for_its_weight_first_unless_it_is_told_to_wait() {
    let first = product_of_one_row();
    assert_eq!(first.asks_first, Some(Binding::Arg(1)));
    assert!(!first.text.contains("after_predecessor();"), "{}", first.text);
    let waiting = Dialect::CUDA.waiting(&first);
    assert_eq!(waiting.asks_first, None);
    assert_ne!(waiting.name, first.name);
    let at =
        |part: &str| waiting.text.find(part).unwrap_or_else(|| panic!("{part} in\n{waiting:?}"));
    assert!(at(&waiting.name) < at("after_predecessor();"));
    assert!(at("after_predecessor();") < at("Waited before"));
    assert!(at("Waited before") < at("times_columns<K"));
}
