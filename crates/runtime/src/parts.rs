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

/// The scratch memory that the greediest of a plan's calls wants: they take turns in it.
///
/// # Errors
/// [`Error::Render`]
pub(crate) fn scratch_bytes(plan: &Plan, dialect: &Dialect, limits: &Limits) -> Result<usize> {
    let calls = (0..plan.steps.len()).filter(|i| matches!(plan.steps[*i].work, Work::Call(_)));
    let bytes = calls.map(|step| Ok(parts(plan, step, dialect, limits)?.workspace_bytes));
    bytes.collect::<Result<Vec<_>>>().map(|all| all.into_iter().max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use metal_candle_compiler::plan;
    use metal_candle_graph::{ComputationGraph, DType, Operation, Shape, TensorType, UnaryOp};

    #[test]
    fn calls_take_turns_in_the_scratch_memory() {
        let mut g = ComputationGraph::new();
        let ty = |dtype, dims: &[usize]| TensorType::new(dtype, Shape::new(dims).unwrap());
        let mut inputs = 0;
        let mut add = |g: &mut ComputationGraph, len: usize| {
            let types =
                [ty(DType::F32, &[9, 4]), ty(DType::U32, &[len]), ty(DType::F32, &[len, 4])];
            let args = types.map(|ty| {
                inputs += 1;
                g.input(inputs - 1, ty)
            });
            g.add(Operation::IndexAdd { dim: 0 }, &args).unwrap()
        };
        g.outputs = vec![add(&mut g, 100), add(&mut g, 1000), add(&mut g, 10)];
        for device in [Device::Cuda(0), Device::Metal(0)] {
            let plan = plan(&g, device.target(), &[false; 9]).unwrap();
            let (dialect, limits) = match device {
                Device::Metal(_) => (Dialect::METAL, Limits::metal(8)),
                Device::Cuda(_) | Device::Cpu => (Dialect::CUDA, Limits::cuda(132, 2048)),
            };
            let each = (0..plan.steps.len())
                .map(|step| parts(&plan, step, dialect, &limits).unwrap().workspace_bytes);
            let each: Vec<usize> = each.filter(|bytes| *bytes > 0).collect();
            // Four bytes for each index.
            assert_eq!(each, [400, 4000, 40]);
            assert_eq!(scratch_bytes(&plan, dialect, &limits).unwrap(), 4000);
        }
    }

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
