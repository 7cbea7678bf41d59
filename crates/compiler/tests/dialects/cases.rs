//! Steps of plans, with what they read and what they must write.

use crate::program::{Address, Part, Program, Region};
use crate::random::Rng;
use crate::walk::{self, Memory};
use metal_candle_compiler::kernel::{Kernel, KernelOp};
use metal_candle_compiler::render::{Binding, Source};
use metal_candle_compiler::{Operand, Slot, Target, Work};
use metal_candle_graph::oracle::Value;
use metal_candle_graph::{
    BinaryOp, ComputationGraph, DType, Distribution, Operation, ReduceOp, TensorType, UnaryOp,
};

/// A kernel of a plan, its operands' memory before and after it.
pub(crate) struct Case {
    /// Where it comes from.
    pub(crate) name: String,
    pub(crate) kernel: Kernel,
    args: Vec<usize>,
    outs: Vec<(usize, DType)>,
    before: Vec<Buffer>,
    after: Vec<Vec<u8>>,
}

/// The kernels of the plan of `g`, on these inputs. What library calls would give is drawn at random.
pub(crate) fn of_graph(
    name: &str,
    g: &ComputationGraph,
    donated: &[bool],
    inputs: &[Value],
) -> Vec<Case> {
    let plan = metal_candle_compiler::plan(g, &Target::CPU, donated).unwrap();
    let mut memory = Memory::new(&plan, inputs);
    let mut rng = Rng(7);
    let mut cases = Vec::new();
    for (i, step) in plan.steps.iter().enumerate() {
        let Work::Kernel(kernel) = &step.work else {
            step.outs.iter().for_each(|out| fill(&mut rng, out, &mut memory));
            continue;
        };
        let mut slots: Vec<(Slot, DType, bool)> = Vec::new();
        let mut place = |operand: &Operand, writable: bool| {
            let at = slots.iter().position(|(slot, ..)| *slot == operand.slot);
            let at = at.unwrap_or_else(|| {
                slots.push((operand.slot, operand.dtype, false));
                slots.len() - 1
            });
            slots[at].2 |= writable;
            at
        };
        let args: Vec<usize> = step.args.iter().map(|arg| place(arg, false)).collect();
        let outs: Vec<(usize, DType)> =
            step.outs.iter().map(|out| (place(out, true), out.dtype)).collect();
        let before = slots.iter().map(|(slot, dtype, writable)| Buffer {
            bytes: memory.of(*slot).to_vec(),
            element_bytes: dtype.size_bytes(),
            writable: *writable,
        });
        let before = before.collect();
        walk::kernel_step(kernel, step, &mut memory);
        let after = slots.iter().map(|(slot, ..)| memory.of(*slot).to_vec()).collect();
        let name = format!("{name}, step {i}: {}", step.label);
        cases.push(Case { name, kernel: kernel.clone(), args, outs, before, after });
    }
    cases
}

/// The memory of a slot, before.
struct Buffer {
    bytes: Vec<u8>,
    element_bytes: usize,
    writable: bool,
}

impl Case {
    pub(crate) fn has_f64(&self) -> bool {
        let stores = self.kernel.stores.iter().map(|s| s.to.dtype);
        self.kernel.tape.iter().map(|i| i.dtype).chain(stores).any(|d| d == DType::F64)
    }

    pub(crate) fn buffers(&self) -> usize {
        self.before.len()
    }

    pub(crate) fn program(&self, source: &Source) -> Program {
        let start = |buffer| Address { buffer, offset_bytes: 0 };
        let region = |(i, buffer): (usize, &Buffer)| Region {
            start: start(i),
            len_bytes: buffer.bytes.len(),
            element_bytes: buffer.element_bytes,
            writable: buffer.writable,
        };
        let operand = |binding: &Binding| match *binding {
            Binding::Arg(i) => start(self.args[i as usize]),
            Binding::Out(i) => start(self.outs[i as usize].0),
            other => panic!("a kernel of the IR knows no {other:?}"),
        };
        let launch = Part::Launch {
            kernel: source.name.clone(),
            launch: source.launch,
            regions: self.before.iter().enumerate().map(region).collect(),
            operands: source.bindings.iter().map(operand).collect(),
        };
        let buffers = self.before.iter().map(|buffer| buffer.bytes.clone()).collect();
        Program { buffers, parts: vec![launch] }
    }

    /// Panics where a result is too far from the walk's.
    pub(crate) fn check(&self, got: &[Vec<u8>], source: &Source) {
        let tolerance = self.tolerance();
        for (at, dtype) in &self.outs {
            let [got, want] = [&got[*at], &self.after[*at]].map(|b| walk::decode(*dtype, b));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let same = got == want || (got.is_nan() && want.is_nan());
                let near = (got - want).abs() <= tolerance * (1.0 + want.abs());
                assert!(
                    same || (dtype.is_float() && near),
                    "{}, element {i} of {dtype}: expected {want}, got {got}\n{}",
                    self.name,
                    source.text
                );
            }
        }
    }

    /// In units of `1 + |x|`, by the coarsest float on the way: a rounding that goes the other way is one of its steps.
    fn tolerance(&self) -> f64 {
        if self.kernel.tape.iter().all(|inst| is_exact(&inst.op)) {
            return 0.0;
        }
        let stores = self.kernel.stores.iter().map(|s| s.to.dtype);
        let of = |dtype: DType| match dtype {
            DType::BF16 => 1e-2,
            DType::F16 => 2e-3,
            DType::F32 => 2e-5,
            DType::F64 => 1e-11,
            DType::U8 | DType::U32 | DType::I64 => 0.0,
        };
        self.kernel.tape.iter().map(|i| i.dtype).chain(stores).map(of).fold(0.0, f64::max)
    }
}

/// What rounds nothing: it moves, compares, or draws uniform numbers, which are the same bits everywhere.
fn is_exact(op: &KernelOp) -> bool {
    use BinaryOp::{Add, Div, Mul, Pow, Sub};
    use UnaryOp::{Abs, Neg, Relu, Sign};
    match op {
        KernelOp::Load(_) | KernelOp::Const(_) | KernelOp::Index(_) => true,
        KernelOp::Select(..) | KernelOp::Cast(_) => true,
        KernelOp::Random { distribution, .. } => *distribution == Distribution::Uniform,
        KernelOp::Unary(f, _) => matches!(f, Neg | Abs | Sign | Relu),
        KernelOp::Binary(f, ..) => !matches!(f, Add | Sub | Mul | Div | Pow),
        KernelOp::Reduce(op, _) => *op != ReduceOp::Sum,
    }
}

/// Floats of either sign, or small whole numbers.
fn draw(rng: &mut Rng, dtype: DType, n: usize) -> Vec<f64> {
    let mut number = || match dtype.is_float() {
        true => rng.below(4001) as f64 / 1000.0 - 2.0,
        false => rng.below(6) as f64,
    };
    (0..n).map(|_| number()).collect()
}

fn fill(rng: &mut Rng, out: &Operand, memory: &mut Memory) {
    let bytes = memory.of(out.slot);
    let numbers = draw(rng, out.dtype, bytes.len() / out.dtype.size_bytes());
    bytes.copy_from_slice(&walk::encode(out.dtype, &numbers));
}

/// Random values for the inputs of `g`.
pub(crate) fn inputs(g: &ComputationGraph) -> Vec<Value> {
    let mut types: Vec<(u32, TensorType)> = Vec::new();
    for id in g.ids() {
        if let Operation::Input(i) = g[id].op {
            types.push((i, g.ty(id)));
        }
    }
    types.sort_by_key(|(i, _)| *i);
    let mut rng = Rng(3);
    let value = |(_, ty): &(u32, TensorType)| {
        let data = draw(&mut rng, ty.dtype, ty.shape.len());
        Value { ty: *ty, data: walk::decode(ty.dtype, &walk::encode(ty.dtype, &data)) }
    };
    types.iter().map(value).collect()
}
