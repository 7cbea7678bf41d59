//! What a step becomes for a GPU.

use crate::{Error, Result};
use metal_candle_compiler::render::{self, Call, Dialect, Limits, Part};
use metal_candle_compiler::{Plan, Step, Work};

/// What a device does for a step of this number.
///
/// # Errors
/// [`Error::Render`]
pub(crate) fn parts(plan: &Plan, step: usize, dialect: &Dialect, limits: &Limits) -> Result<Call> {
    let Step { work, args, outs, label, .. } = &plan.steps[step];
    let rendered = match work {
        // One name for all: kernels of one text are one kernel, whichever plan they are in.
        Work::Kernel(kernel) => render::render(kernel, dialect, limits, "fused")
            .map(|source| Call { parts: vec![Part::Kernel(source)], workspace_bytes: 0 }),
        Work::Call(call) => render::call(call, args, outs, dialect, limits),
    };
    rendered.map_err(|source| Error::Render { step, label: label.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use metal_candle_compiler::plan;
    use metal_candle_graph::{ComputationGraph, DType, Operation, Shape, TensorType, UnaryOp};

    /// Metal has no numbers of 64 bits.
    #[test]
    fn a_step_that_a_language_cannot_say_is_an_error_that_names_it() {
        let ty = TensorType::new(DType::F64, Shape::new(&[4, 4]).unwrap());
        let mut exp = ComputationGraph::new();
        let x = exp.input(0, ty);
        exp.outputs = vec![exp.unary(UnaryOp::Exp, x).unwrap()];
        let mut product = ComputationGraph::new();
        let x = product.input(0, ty);
        product.outputs = vec![product.add(Operation::Dot, &[x, x]).unwrap()];
        for (graph, label) in [(exp, "exp"), (product, "matmul")] {
            let plan = plan(&graph, Device::Metal(0).target(), &[]).unwrap();
            let error = parts(&plan, 0, Dialect::METAL, &Limits::metal(8)).unwrap_err();
            assert!(matches!(error, Error::Render { step: 0, .. }), "{error:?}");
            let expected =
                format!("step 0 ({label}): Metal has no f64: cast to f32, or run on the CPU");
            assert_eq!(error.to_string(), expected);
        }
    }
}
