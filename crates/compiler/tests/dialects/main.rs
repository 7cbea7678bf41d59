//! Every rendered kernel, in both dialects, against the scalar walk of the kernel IR: compiled as C++ and run on the
//! CPU, thread by thread, with real barriers.

mod cases;
mod graphs;
mod machine;
#[path = "../../../graph/tests/random/mod.rs"]
mod random;
#[path = "../support/mod.rs"]
mod support;
#[path = "../../../runtime/tests/support/walk.rs"]
mod walk;

use cases::Case;
use machine::{Machine, Run, Unit};
use metal_candle_compiler::kernel::Kernel;
use metal_candle_compiler::render::{Dialect, Limits, RenderError, Source, render};
use random::{Limits as Draw, Rng, SMALL, case, seeds};
use std::collections::HashMap;

/// So few threads at once that grids go round several times.
const CUDA: Limits = Limits::cuda(1, 512);
const METAL: Limits = Limits::metal(1);

/// Kernels of one file: clang takes a second for the headers, and two cores want work.
const UNITS: usize = 8;

const DIALECTS: [(&str, &Dialect, Limits); 2] =
    [("cuda", Dialect::CUDA, CUDA), ("metal", Dialect::METAL, METAL)];

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
    let mut units: Vec<Unit> =
        (0..UNITS).map(|_| Unit { header: dialect.header(), sources: Vec::new() }).collect();
    let mut kernels = HashMap::new();
    for source in sources.iter().flatten() {
        if kernels.insert(&source.name, source).is_none() {
            units[kernels.len() % UNITS].sources.push(source.clone());
        }
    }
    let machine = Machine::build(dialect, &format!("{name}-{dialect_name}"), &units);
    let work: Vec<(&Case, &Source)> = cases
        .iter()
        .zip(&sources)
        .filter_map(|(case, source)| Some((case, source.as_ref()?)))
        .collect();
    let runs: Vec<Run<'_>> = work.iter().map(|(case, source)| case.run(source)).collect();
    for ((case, source), result) in work.iter().zip(machine.run(&runs)) {
        match result {
            Ok(buffers) => case.check(&buffers, source),
            Err(fault) => panic!("{}: {fault}\n{}", case.name, source.text),
        }
    }
    println!(
        "{dialect_name}: {} runs of {} kernels; {} refused for f64",
        work.len(),
        kernels.len(),
        cases.len() - work.len()
    );
    assert!(work.len() > cases.len() / 2, "most were refused");
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
    let mut all = Vec::new();
    for (name, graph, donated) in graphs::all() {
        all.extend(cases::of_graph(name, &graph, &donated, &cases::inputs(&graph)));
    }
    DIALECTS.into_iter().for_each(|dialect| check("real", dialect, &all));
}

/// Around the ends of vectors, SIMD groups, blocks and what a thread keeps.
const EDGES: &[usize] = &[1, 2, 3, 8, 31, 32, 33, 127, 128, 256, 1000, 1024, 1025, 4096];

const KERNELS: Draw = Draw { calls: false, ..SMALL };

#[test]
fn kernels_of_random_graphs_equal_the_walk() {
    let small = random_cases(0, 60, &KERNELS);
    let ragged = Draw { extents: EDGES, max_len: 6_000, ops: 10, ..KERNELS };
    let all: Vec<Case> = small.into_iter().chain(random_cases(1 << 20, 60, &ragged)).collect();
    DIALECTS.into_iter().for_each(|dialect| check("random", dialect, &all));
}
