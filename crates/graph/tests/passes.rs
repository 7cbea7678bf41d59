//! A pass may change how a graph computes, never what: oracle(g) = oracle(pass(g)), on random
//! graphs.

mod random;

use metal_candle_graph::oracle::{self, Value};
use metal_candle_graph::{
    BinaryOp, Composite, ComputationGraph, DType, Operation, Result, UnaryOp, pass,
};
use random::{Case, Limits, Rng, SMALL, case, seeds};
use std::collections::BTreeSet;

const GRAPHS: u64 = 2_500;

type Pass = fn(&ComputationGraph, &mut Rng) -> Result<ComputationGraph>;

/// What a target that has a call for some composites asks for; which ones is drawn by kind, as a
/// target decides.
fn expand_some(g: &ComputationGraph, rng: &mut Rng) -> Result<ComputationGraph> {
    let kept = rng.next();
    pass::expand(g, |c: &Composite| kept >> (c.as_str().len() % 32) & 1 == 1)
}

fn expand(g: &ComputationGraph, _: &mut Rng) -> Result<ComputationGraph> {
    let expanded = pass::expand(g, |_| false)?;
    let composite = |n: &metal_candle_graph::Node| matches!(n.op, Operation::Composite(_));
    assert!(!expanded.nodes().iter().any(composite), "a composite is left in\n{expanded}");
    Ok(expanded)
}

fn simplify(g: &ComputationGraph, _: &mut Rng) -> Result<ComputationGraph> {
    pass::simplify(g)
}

fn split_reductions(g: &ComputationGraph, rng: &mut Rng) -> Result<ComputationGraph> {
    pass::split_reductions(g, 1 + rng.below(8))
}

/// The passes of a plan, in its order.
fn all(g: &ComputationGraph, rng: &mut Rng) -> Result<ComputationGraph> {
    let g = expand_some(g, rng)?;
    let g = pass::join_sums(&pass::share_factors(&pass::simplify(&g)?)?)?;
    split_reductions(&g, rng)
}

/// The same one after the other, until nothing is left to do, and in another order.
fn all_twice(g: &ComputationGraph, rng: &mut Rng) -> Result<ComputationGraph> {
    let g = split_reductions(&pass::simplify(g)?, rng)?;
    all(&expand(&g, rng)?, rng)
}

fn assert_same(seed: u64, case: &Case, after: &ComputationGraph, want: &[Value]) {
    let got = oracle::evaluate(after, &case.inputs).unwrap();
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.ty, want.ty, "graph {seed}, output {i}");
        // Both are oracles: only the order of sums and the product of two constants may round
        // apart.
        let tolerance = case.tolerances[i].min(1e-6);
        for (at, (got, want)) in got.data.iter().zip(&want.data).enumerate() {
            let near = (got - want).abs() <= tolerance * (1.0 + want.abs());
            assert!(
                near && want.is_finite(),
                "graph {seed}, output {i}, element {at}: {want} became {got}\n{}\nafter\n{after}",
                case.graph
            );
        }
    }
}

fn check(pass: Pass, limits: &Limits, graphs: u64) {
    for seed in seeds(graphs) {
        let case = case(seed, limits);
        let want = oracle::evaluate(&case.graph, &case.inputs).unwrap();
        let after = pass(&case.graph, &mut Rng(seed)).unwrap();
        assert_same(seed, &case, &after, &want);
    }
}

#[test]
fn expanding_keeps_every_value() {
    check(expand, &SMALL, GRAPHS);
    check(expand_some, &SMALL, GRAPHS / 4);
}

#[test]
fn simplifying_keeps_every_value() {
    check(simplify, &SMALL, GRAPHS);
    check(|g, rng| simplify(&expand(g, rng)?, rng), &SMALL, GRAPHS);
}

#[test]
fn splitting_reductions_keeps_every_value() {
    check(split_reductions, &SMALL, GRAPHS);
    // One long dim, which is cut near its root; several dims, of which the inner ones go first.
    let long = Limits { extents: &[1, 4, 36, 60, 128], max_len: 2_000, calls: false, ..SMALL };
    check(split_reductions, &long, GRAPHS / 10);
    let flat = Limits { max_rank: 1, ..long };
    check(split_reductions, &flat, GRAPHS / 10);
}

#[test]
fn all_passes_together_keep_every_value() {
    check(all, &SMALL, GRAPHS);
    check(all_twice, &SMALL, GRAPHS / 4);
    let deep = Limits { ops: 60, ..SMALL };
    check(all, &deep, GRAPHS / 10);
}

#[test]
fn passes_keep_types_and_leave_no_dead_node() {
    for seed in 0..GRAPHS / 4 {
        let case = case(seed, &SMALL);
        let after = all(&case.graph, &mut Rng(seed)).unwrap();
        let types = |g: &ComputationGraph| g.outputs.iter().map(|o| g.ty(*o)).collect::<Vec<_>>();
        assert_eq!(types(&case.graph), types(&after), "graph {seed}");
        // What a rule looked at and did not use is dropped by one more rebuild, which changes
        // nothing else.
        let rebuilt = after.rebuild(|out, node, inputs| Ok(out.copy(node, inputs))).unwrap();
        assert!(rebuilt.live().iter().all(|live| *live), "graph {seed}");
        assert_eq!(rebuilt, rebuilt.rebuild(|out, node, i| Ok(out.copy(node, i))).unwrap());
    }
}

/// The graphs above say something about every operation there is.
#[test]
fn random_graphs_reach_every_operation() {
    let mut seen = BTreeSet::new();
    let mut dtypes = BTreeSet::new();
    for seed in 0..GRAPHS {
        let g = case(seed, &SMALL).graph;
        let live = g.live();
        for (node, _) in g.nodes().iter().zip(&live).filter(|(_, live)| **live) {
            seen.insert(node.op.name());
            dtypes.insert(node.ty.dtype);
        }
    }
    let scalars = UnaryOp::ALL.iter().map(|f| f.as_str());
    let scalars = scalars.chain(BinaryOp::ALL.iter().map(|f| f.as_str()));
    let others = [
        "input",
        "const",
        "iota",
        "random",
        "where_cond",
        "to_dtype",
        "sum",
        "max",
        "min",
        "argmax",
        "argmin",
        "cumsum",
        "reshape",
        "permute",
        "broadcast_as",
        "slice",
        "flip",
        "pad",
        "cat",
        "gather",
        "index_select",
        "scatter_add",
        "index_add",
        "slice_update",
        "dynamic_slice",
        "matmul",
        "quant_matmul",
        "dequantize",
        "softmax",
        "log_softmax",
        "logsumexp",
        "rms_norm",
        "layer_norm",
        "rope",
        "attention",
        "attention_grad",
        "cross_entropy",
        "linear_cross_entropy",
        "linear_cross_entropy_grad_x",
        "linear_cross_entropy_grad_weight",
    ];
    let missing: Vec<&str> = scalars.chain(others).filter(|name| !seen.contains(name)).collect();
    assert!(missing.is_empty(), "no graph has {missing:?}");
    assert_eq!(dtypes.len(), DType::ALL.len());
}
