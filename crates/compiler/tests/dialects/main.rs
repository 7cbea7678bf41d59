//! Every rendered kernel, in both dialects, against the scalar walk of the kernel IR: compiled as C++ and run on the
//! CPU, thread by thread, with real barriers.

mod attention;
mod calls;
mod cases;
mod graphs;
mod lora;
mod machine;
#[allow(dead_code, reason = "shared with the library's tests")]
mod plans;
mod products;
mod program;
#[path = "../../../graph/tests/random/mod.rs"]
mod random;
#[path = "../support/mod.rs"]
mod support;
#[path = "../../../runtime/tests/support/walk.rs"]
mod walk;

use cases::Case;
use machine::{CUDA, DIALECTS, Machine, Unit, units};
use metal_candle_compiler::kernel::Kernel;
use metal_candle_compiler::render::{Dialect, Limits, RenderError, Source, beside, render};
use metal_candle_graph::{Composite, ComputationGraph, DType, Operation, oracle};
use plans::{Rendered, Renderer, Task};
use program::{Part, Program};
use random::{Limits as Draw, Rng, SMALL, case, seeds};
use std::collections::HashMap;
use std::path::Path;

/// Renders each kernel once; `None` where Metal has no such numbers.
fn sources(cases: &[Case], dialect: &Dialect, limits: &Limits) -> Vec<Option<Source>> {
    let mut known: HashMap<&Kernel, Option<Source>> = HashMap::new();
    let mut source = |case: &'_ Case, kernel| {
        let name = format!("k{}", known.len());
        let rendered =
            known.entry(kernel).or_insert_with(|| match render(kernel, dialect, limits, &name) {
                Ok(source) => Some(source),
                Err(RenderError::DType { .. }) if case.has_f64() && !dialect.has_f64 => None,
                Err(error) => panic!("{}: {error}", case.name),
            });
        rendered.clone()
    };
    cases.iter().map(|case| source(case, &case.kernel)).collect()
}

/// Runs all cases in a dialect, and says how many there were.
fn check(name: &str, (dialect_name, dialect, limits): (&str, &Dialect, Limits), cases: &[Case]) {
    let sources = sources(cases, dialect, &limits);
    let units = units(sources.iter().flatten(), dialect);
    let machine = Machine::build(dialect, &format!("{name}-{dialect_name}"), &units);
    let work: Vec<(&Case, &Source)> = cases
        .iter()
        .zip(&sources)
        .filter_map(|(case, source)| Some((case, source.as_ref()?)))
        .collect();
    let programs: Vec<Program> = work.iter().map(|(case, source)| case.program(source)).collect();
    for ((case, source), result) in work.iter().zip(machine.run(&programs)) {
        match result {
            Ok(buffers) => case.check(&buffers, source),
            Err(fault) => panic!("{}: {fault}\n{}", case.name, source.text),
        }
    }
    let kernels: usize = units.iter().map(|unit| unit.sources.len()).sum();
    let refused = cases.len() - work.len();
    println!("{dialect_name}: {} runs of {kernels} kernels; {refused} of f64 refused", work.len());
    assert!(work.len() > cases.len() / 2, "most were refused");
}

fn real_cases() -> Vec<Case> {
    let cases = |(name, graph, donated): (&str, _, Vec<bool>)| {
        cases::of_graph(name, &graph, &donated, &cases::inputs(&graph))
    };
    graphs::all().into_iter().flat_map(cases).collect()
}

/// Small graphs, and such around the edges.
fn all_random_cases() -> Vec<Case> {
    let ragged = Draw { extents: EDGES, max_len: 6_000, ops: 10, ..KERNELS };
    [random_cases(0, 60, &KERNELS), random_cases(1 << 20, 60, &ragged)]
        .into_iter()
        .flatten()
        .collect()
}

fn random_cases(from: u64, n: u64, limits: &Draw) -> Vec<Case> {
    let graph = |seed: u64| {
        let drawn = case(from + seed, limits);
        let mut rng = Rng(seed);
        let donated: Vec<bool> = drawn.inputs.iter().map(|_| rng.one_in(3)).collect();
        cases::of_graph(&format!("graph {seed}"), &drawn.graph, &donated, &drawn.inputs)
    };
    seeds(n).flat_map(graph).collect()
}

#[test]
fn kernels_of_real_work_equal_the_walk() {
    let all = real_cases();
    DIALECTS.into_iter().for_each(|dialect| check("real", dialect, &all));
}

/// Around the ends of vectors, SIMD groups, blocks and what a thread keeps.
const EDGES: &[usize] = &[1, 2, 3, 8, 31, 32, 33, 127, 128, 256, 1000, 1024, 1025, 4096];

const KERNELS: Draw = Draw { calls: false, ..SMALL };

#[test]
fn kernels_of_random_graphs_equal_the_walk() {
    let all = all_random_cases();
    DIALECTS.into_iter().for_each(|dialect| check("random", dialect, &all));
}

/// The parts of all, each on buffers of its own.
fn one_after_the_other(all: impl Iterator<Item = Program>) -> Program {
    let mut joined = Program::default();
    for Program { buffers, mut parts } in all {
        let further = joined.buffers.len();
        joined.buffers.extend(buffers);
        for part in &mut parts {
            let Part::Launch { regions, operands, .. } = part else { panic!("a product") };
            operands.iter_mut().for_each(|at| at.buffer += further);
            regions.iter_mut().for_each(|region| region.start.buffer += further);
        }
        joined.parts.append(&mut parts);
    }
    joined
}

/// Up to four neighbours of one block size, and the first of them once more, on memory of its own.
#[test]
fn kernels_side_by_side_do_what_they_do_alone() {
    let (all, dialect) = (real_cases(), Dialect::CUDA);
    let sources = sources(&all, dialect, &CUDA);
    let work: Vec<(&Case, &Source)> = all.iter().zip(sources.iter().flatten()).collect();
    let mut groups: Vec<(Source, Vec<(&Case, &Source)>)> = Vec::new();
    for work in work.chunk_by(|a, b| a.1.launch.block == b.1.launch.block).flat_map(|c| c.chunks(4))
    {
        let members = [work, &work[..1]].concat();
        let sources: Vec<&Source> = members.iter().map(|(_, source)| *source).collect();
        groups.push((beside(&sources, None, dialect).expect("several of CUDA's"), members));
    }
    let machine = Machine::build(dialect, "beside", &units(groups.iter().map(|g| &g.0), dialect));
    let programs: Vec<Program> = groups
        .iter()
        .map(|(joined, members)| {
            let alone = members.iter().map(|(case, source)| case.program(source));
            one_after_the_other(alone).joined(&joined.name, joined.launch)
        })
        .collect();
    for ((joined, members), result) in groups.iter().zip(machine.run(&programs)) {
        let mut buffers = &result.unwrap_or_else(|fault| panic!("{fault}\n{}", joined.text))[..];
        for (case, _) in members {
            case.check(buffers, joined);
            buffers = &buffers[case.buffers()..];
        }
    }
    assert!(groups.len() > 10, "{} groups", groups.len());
}

/// A norm of one row, and two products of that row: as three kernels, and as one that makes the norm in every block.
#[test]
fn what_is_made_ahead_is_what_the_kernel_alone_makes() {
    let mut graph = ComputationGraph::new();
    let [x, norm] =
        [(0, &[1, 64][..]), (1, &[64])].map(|(i, dims)| graph.input(i, support::f32(dims)));
    let eps = support::eps();
    let normed = support::composite(&mut graph, Composite::RmsNorm { eps }, &[x, norm]);
    graph.outputs = [(2, 96), (3, 40)]
        .map(|(i, columns)| {
            let weight = graph.input(i, support::f32(&[columns, 64]));
            let transposed = graph.permute(weight, &[1, 0]).unwrap();
            graph.add(Operation::Dot, &[normed, transposed]).unwrap()
        })
        .to_vec();
    let inputs = cases::inputs(&graph);
    let want = oracle::evaluate(&graph, &inputs).unwrap();
    let mut renderer = Renderer::new(Dialect::CUDA, CUDA);
    let rendered = renderer.plan(&graph, &[]).unwrap();
    for joined in [false, true] {
        let outcome = renderer.run_joined(&rendered, &inputs, joined);
        for (got, want) in outcome.outputs.iter().zip(&want) {
            assert_eq!(got.len(), want.data.len());
            for (got, want) in got.iter().zip(&want.data) {
                assert!((got - want).abs() <= 1e-5 * (1.0 + want.abs()), "{got} for {want}");
            }
        }
    }
}

/// What a kernel may do wrong, as a change of its text or of its headers, and what the machine says of it.
const FAULTS: [(&str, &str, &str, &str); 6] = [
    ("beyond_the_rows", "row < 3", "row < 4", "out of bounds"),
    ("off_by_one_element", "k * 512 + tid) * 4;", "k * 512 + tid) * 4 + 1;", "misaligned"),
    (
        "no_barrier_before_reading",
        "= x;\n    barrier();\n    x = fold<Op, N>(part, 1)",
        "= x;\n    x = fold<Op, N>(part, 1)",
        "nobody wrote",
    ),
    ("no_barrier_after_reading", "(part, 1);\n    barrier();", "(part, 1);", "race on element"),
    (
        "barrier_of_some",
        "r1 = block_reduce",
        "if (tid < 64) r1 = block_reduce",
        "divergent barrier",
    ),
    ("store_by_all", "out0 + row * 5000 + col", "out0 + row * 5000", "race on element"),
];

/// Softmax of rows that a block computes together.
#[test]
fn planted_faults_are_found() {
    let graph = graphs::softmax_of(DType::F32, &[3, 5000]);
    let case = cases::of_graph("softmax", &graph, &[], &cases::inputs(&graph)).remove(0);
    for (dialect_name, dialect, limits) in DIALECTS {
        let planted = FAULTS.map(|(name, from, to, _)| {
            let right = render(&case.kernel, dialect, &limits, name).unwrap();
            let [header, text] =
                [dialect.header(), right.text.clone()].map(|t| t.replace(from, to));
            let changed = header != dialect.header() || text != right.text;
            assert!(changed, "{name}: {from} is not in\n{}", right.text);
            Unit { header, sources: vec![Source { text, ..right }] }
        });
        let machine = Machine::build(dialect, &format!("faults-{dialect_name}"), &planted);
        let programs: Vec<Program> = planted.iter().map(|u| case.program(&u.sources[0])).collect();
        for ((name, .., message), result) in FAULTS.iter().zip(machine.run(&programs)) {
            let fault = result.expect_err(name);
            assert!(fault.contains(message), "{name}: {fault}");
        }
    }
}

/// Where a CUDA toolkit is: NVRTC needs no GPU.
#[test]
fn cuda_kernels_compile_for_sm_80_and_sm_90() {
    let Some(home) = std::env::var_os("CUDA_HOME") else {
        println!("CUDA_HOME is not set: NVRTC was not asked");
        return;
    };
    let all: Vec<Case> = [real_cases(), all_random_cases()].into_iter().flatten().collect();
    let limits = Limits::cuda(132, 2048);
    let fused = sources(&all, Dialect::CUDA, &limits);
    let compile = |capability: u32, architecture: &str| {
        let mut renderer = Renderer::new(Dialect::CUDA, limits.of_capability(capability, 0));
        let every = [calls::every(), attention::on_tensor_cores().concat()].concat();
        let plan = |task: Task| renderer.plan(&task.graph, &task.donated).unwrap();
        let plans: Vec<Rendered> = every.into_iter().map(plan).collect();
        let of_calls = plans::sources(&plans).filter(|source| !source.name.starts_with('k'));
        let units = units(fused.iter().flatten().chain(of_calls), Dialect::CUDA);
        machine::compile_by_nvrtc(Path::new(&home), architecture, Dialect::CUDA, &units);
    };
    compile(8, "sm_80");
    compile(9, "sm_90a");
}

/// What a dialect cannot, or a library call that has no kernels yet.
fn refused(error: &RenderError) -> bool {
    matches!(error, RenderError::DType { .. } | RenderError::Call { .. })
}

fn random_tasks(from: u64, n: u64, limits: &Draw) -> Vec<Task> {
    let task = |seed: u64| {
        let random::Case { graph, inputs, tolerances, .. } = case(from + seed, limits);
        let mut rng = Rng(seed);
        let donated = inputs.iter().map(|_| rng.one_in(3)).collect();
        let want = oracle::evaluate(&graph, &inputs).unwrap();
        Task { name: format!("graph {}", from + seed), graph, inputs, donated, want, tolerances }
    };
    seeds(n).map(task).collect()
}

#[test]
fn plans_of_random_graphs_equal_the_oracle() {
    let single = Draw { floats: &[DType::F32, DType::F32, DType::BF16, DType::F16], ..SMALL };
    let tasks =
        [random_tasks(0, 60, &Draw { ops: 8, ..single }), random_tasks(1 << 21, 30, &SMALL)]
            .concat();
    for (_, dialect, limits) in DIALECTS {
        plans::check("plans", dialect, limits, &tasks, refused);
    }
}
