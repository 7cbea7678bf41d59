//! Bad indices.

use super::{Build, attrs, dialects};
use crate::plans::{Outcome, Renderer};
use metal_candle_compiler::render::{Dialect, Limits, RenderError, Status};
use metal_candle_graph::{Composite, DType, Error, NodeId, Operation, Shape, oracle};

/// Of two tensors and an index.
type Op = fn(&mut Build, NodeId, NodeId, NodeId) -> NodeId;

/// Graphs with one bad index each, and the error of it.
fn bad() -> Vec<(Build, Error)> {
    let index_of = |dtype: DType, bad: f64| {
        move |b: &mut Build, n: usize| {
            let data = (0..n).map(|i| if i == n - 2 { bad } else { (i % 3) as f64 }).collect();
            b.given(dtype, &[n], data)
        }
    };
    let mut all = Vec::new();
    let x = |b: &mut Build, dims: &[usize]| b.input(DType::F32, dims);
    for index in [index_of(DType::I64, -1.0), index_of(DType::U32, 7.0), index_of(DType::U8, 250.0)]
    {
        let ops: [Op; 4] = [
            |b, x, _, at| b.op(Operation::IndexSelect { dim: 0 }, &[x, at]),
            |b, x, y, at| b.op(Operation::IndexAdd { dim: 0 }, &[x, at, y]),
            |b, x, _, at| {
                let at = b.g.reshape(at, Shape::new(&[5, 1]).unwrap()).unwrap();
                b.op(Operation::Gather { dim: 0 }, &[x, at])
            },
            |b, x, y, at| {
                let at = b.g.reshape(at, Shape::new(&[5, 1]).unwrap()).unwrap();
                let y = b.op(Operation::Slice { dim: 1, start: 0, len: 1, step: 1 }, &[y]);
                b.op(Operation::ScatterAdd { dim: 0 }, &[x, at, y])
            },
        ];
        for op in ops {
            let mut b = Build::new();
            let (x, y) = (x(&mut b, &[7, 4]), x(&mut b, &[5, 4]));
            let at = index(&mut b, 5);
            b.g.outputs = vec![op(&mut b, x, y, at)];
            let error = oracle::evaluate(&b.g, &b.inputs).expect_err("a bad index");
            all.push((b, error));
        }
    }
    for start in [-1.0, 4.0, f64::from(i32::MAX)] {
        let mut b = Build::new();
        let (x, update) = (x(&mut b, &[7, 4]), x(&mut b, &[4, 4]));
        let at = b.given(DType::I64, &[], vec![start]);
        let mut other = Build { g: b.g.clone(), inputs: b.inputs.clone(), rng: b.rng.clone() };
        b.g.outputs = vec![b.op(Operation::SliceUpdate { dim: 0 }, &[x, update, at])];
        other.g.outputs = vec![other.op(Operation::DynamicSlice { dim: 0, len: 4 }, &[x, at])];
        for b in [b, other] {
            let error = oracle::evaluate(&b.g, &b.inputs).expect_err("a bad start");
            all.push((b, error));
        }
    }
    let op = "linear_cross_entropy";
    for label in [5.0, -2.0] {
        let mut b = Build::new();
        let (x, w) = (x(&mut b, &[3, 4]), x(&mut b, &[5, 4]));
        let labels = b.given(DType::I64, &[3], vec![-100.0, label, 4.0]);
        let loss = Composite::LinearCrossEntropy(attrs(Some(-100), 0.0));
        b.g.outputs = vec![b.composite(loss, &[x, w, labels])];
        all.push((b, Error::IndexOutOfRange { op, index: label as i64, extent: 5, position: 1 }));
    }
    all
}

#[test]
fn a_bad_index_is_reported_and_goes_nowhere() {
    let all = bad();
    for (dialect, limits) in dialects() {
        let mut renderer = Renderer::new(dialect, limits);
        let plan = |(b, _): &(Build, Error)| renderer.plan(&b.g, &[]).unwrap();
        let rendered: Vec<_> = all.iter().map(plan).collect();
        let runs: Vec<_> =
            rendered.into_iter().zip(all.iter().map(|(b, _)| &b.inputs[..])).collect();
        for (Outcome { status, .. }, (b, expected)) in renderer.run("bad", &runs).iter().zip(&all) {
            let Status { index, extent, position, .. } = *status;
            let Some(op) = status.operation() else { panic!("no error in\n{}", b.g) };
            let (extent, position) = (extent as usize, position as usize);
            assert_eq!(
                Error::IndexOutOfRange { op, index, extent, position },
                *expected,
                "{}",
                b.g
            );
        }
    }
}

#[test]
fn f64_is_refused_by_metal() {
    let mut b = Build::new();
    let x = b.input(DType::F64, &[4]);
    b.g.outputs = vec![b.op(Operation::CumSum { dim: 0, reverse: false }, &[x])];
    let error = Renderer::new(Dialect::METAL, Limits::metal(8)).plan(&b.g, &[]).err();
    assert_eq!(error, Some(RenderError::DType { language: "Metal", dtype: DType::F64 }));
}
