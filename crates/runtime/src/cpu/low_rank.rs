//! A LoRA branch as one call: the two products, one after the other. Plans for the CPU ask for them one by one, so that
//! the first is memory of the arena; those for other targets can be run here, too.

use crate::cpu::gemm;
use crate::cpu::number::for_float;
use crate::cpu::view::{Arg, Out};
use crate::element::Element;
use metal_candle_compiler::{Layout, Operand, Slot};
use metal_candle_graph::Shape;

/// `low = low_scale · x a; out += scale · low b`
pub(crate) fn call(args: &[Arg], outs: &mut [Out], [low_scale, scale]: [f64; 2], parallel: bool) {
    let ([x, a, b], [out, kept @ ..]) = (args, outs) else {
        panic!("metal-candle bug: a LoRA branch takes three operands and gives one or two")
    };
    let mut both = |low: &mut Out| {
        gemm::call(&[*x, *a], std::slice::from_mut(low), low_scale, false, parallel);
        gemm::call(&[low.written(), *b], std::slice::from_mut(out), scale, true, parallel);
    };
    if let [low] = kept {
        return both(low);
    }
    let (last, rank) = (x.shape().rank() - 1, a.shape().last().unwrap_or(0));
    let shape = x.shape().with(last, rank);
    for_float!(x.dtype(), T => with_memory::<T>(shape, both));
}

/// `f` with memory of its own for a tensor of this shape.
fn with_memory<T: Element + Default + Copy>(shape: Shape, f: impl FnOnce(&mut Out)) {
    let mut memory = vec![T::default(); shape.len()];
    let len_bytes = size_of_val(&memory[..]);
    let slot = Slot::Arena { offset_bytes: 0, len_bytes };
    let operand = Operand { slot, dtype: T::DTYPE, layout: Layout::contiguous(shape) };
    // SAFETY: a dense layout reaches exactly these elements, which are ours.
    f(&mut unsafe { Out::new(memory.as_mut_ptr().cast(), &operand) });
}

#[cfg(test)]
pub(super) mod tests {
    use crate::{AsyncGraphExecutor, Buffer, Device, Executable};
    use metal_candle_compiler::{LibraryCall, Target, Work, plan};
    use metal_candle_graph::{BinaryOp, ComputationGraph, DType, Operation, Shape, TensorType};

    /// `x w + (x a) b / 2`, and x a as well if it is `kept`. Rows, what is summed over, columns and rank.
    pub(crate) fn branch([m, k, n, rank]: [usize; 4], kept: bool) -> ComputationGraph {
        let mut g = ComputationGraph::new();
        let mut input =
            |i, dims: &[usize]| g.input(i, TensorType::new(DType::F32, Shape::new(dims).unwrap()));
        let [x, w] = [input(0, &[m, k]), input(1, &[k, n])];
        let [a, b] = [input(2, &[k, rank]), input(3, &[rank, n])];
        let base = g.add(Operation::Dot, &[x, w]).unwrap();
        let low = g.add(Operation::Dot, &[x, a]).unwrap();
        let high = g.add(Operation::Dot, &[low, b]).unwrap();
        let scaled = g.binary_scalar(BinaryOp::Mul, high, 0.5).unwrap();
        g.outputs = vec![g.binary(BinaryOp::Add, base, scaled).unwrap()];
        g.outputs.extend(kept.then_some(low));
        g
    }

    /// Whether the plan has such a call, and what it gives: of small whole numbers, without rounding.
    pub(crate) fn results(
        g: &ComputationGraph,
        target: &Target,
        is: fn(&LibraryCall) -> bool,
    ) -> (bool, Vec<Vec<f32>>) {
        let plan = plan(g, target, &[]).unwrap();
        let has_call =
            plan.steps.iter().any(|step| matches!(&step.work, Work::Call(call) if is(call)));
        let input = |(i, input): (usize, &metal_candle_compiler::PlanInput)| {
            let value = |at: usize| ((at * 7 + i) % 11) as f32 - 5.0;
            Buffer::from_vec((0..input.ty.shape.len()).map(value).collect())
        };
        let inputs = plan.inputs.iter().enumerate().map(input).collect();
        let executable = Executable::new(plan, &Device::Cpu).unwrap();
        let buffers = AsyncGraphExecutor::global().run(&executable, inputs).unwrap();
        (has_call, buffers.iter().map(|buffer| buffer.to_vec().unwrap()).collect())
    }

    #[test]
    fn a_branch_as_one_call_equals_its_products() {
        let products = Target { max_products: 1, ..Target::CPU };
        let is_branch = |call: &LibraryCall| matches!(call, LibraryCall::LowRank { .. });
        let branches = Target { max_low_rank: 8, ..products.clone() };
        for kept in [false, true] {
            let graph = branch([9, 20, 30, 3], kept);
            let (apart, want) = results(&graph, &products, is_branch);
            let (as_one, got) = results(&graph, &branches, is_branch);
            assert!(as_one && !apart);
            assert_eq!(got, want);
        }
    }
}
