//! What a plan of kernels means, element by element: no tiles, no lanes, no threads, and nothing
//! shared with the interpreter or the rendered kernels, whose tests both compare with it.
#![allow(dead_code, reason = "every test uses its own part")]

use half::{bf16, f16};
use metal_candle_compiler::kernel::{Access, Affine, Inst, Kernel, KernelOp, Level, Reg};
use metal_candle_compiler::{Operand, OutputSource, Plan, Slot, Step, Work};
use metal_candle_graph::oracle::Value;
use metal_candle_graph::{BinaryOp, Class, DType, ReduceOp, UnaryOp, random_f64};
use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// A register: floats of both classes as f64, rounded to their class.
#[derive(Clone, Copy, Debug)]
enum Num {
    F(f64),
    I(i64),
}

impl Num {
    fn f(self) -> f64 {
        match self {
            Num::F(x) => x,
            Num::I(_) => panic!("an integer where a float was expected"),
        }
    }
    fn i(self) -> i64 {
        match self {
            Num::I(x) => x,
            Num::F(_) => panic!("a float where an integer was expected"),
        }
    }
    /// As a register of `dtype` holds it after an instruction.
    fn settle(self, dtype: DType) -> Num {
        match (self, dtype) {
            (Num::F(x), _) if dtype.class() == Class::F32 => Num::F(f64::from(x as f32)),
            (Num::I(x), DType::U8) => Num::I(i64::from(x as u8)),
            (Num::I(x), DType::U32) => Num::I(i64::from(x as u32)),
            (x, _) => x,
        }
    }
}

/// The slots' memory.
pub(crate) struct Memory {
    inputs: Vec<Vec<u8>>,
    outputs: Vec<Vec<u8>>,
    arena: Vec<u8>,
}

impl Memory {
    pub(crate) fn new(plan: &Plan, inputs: &[Value]) -> Memory {
        Memory {
            inputs: inputs.iter().map(|v| encode(v.ty.dtype, &v.data)).collect(),
            // What nobody wrote is seen: these bytes are no number that a test expects.
            outputs: plan.outputs.iter().map(|o| vec![0xaa; o.ty.size_bytes()]).collect(),
            arena: vec![0xaa; plan.arena_bytes],
        }
    }

    pub(crate) fn of(&mut self, slot: Slot) -> &mut [u8] {
        match slot {
            Slot::Input(i) => &mut self.inputs[i as usize],
            Slot::Output(i) => &mut self.outputs[i as usize],
            Slot::Arena { offset_bytes, len_bytes } => {
                &mut self.arena[offset_bytes..offset_bytes + len_bytes]
            }
        }
    }

    fn read(&mut self, operand: &Operand, at: isize) -> Num {
        let dtype = operand.dtype;
        let start = at as usize * dtype.size_bytes();
        number(dtype, &self.of(operand.slot)[start..start + dtype.size_bytes()])
    }

    fn write(&mut self, operand: &Operand, at: isize, x: Num) {
        let dtype = operand.dtype;
        let start = at as usize * dtype.size_bytes();
        let to = &mut self.of(operand.slot)[start..start + dtype.size_bytes()];
        to.copy_from_slice(&bytes(dtype, x));
    }
}

/// The values of a buffer.
pub(crate) fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let value = |bytes: &[u8]| match number(dtype, bytes) {
        Num::F(x) => x,
        Num::I(x) => x as f64,
    };
    bytes.chunks(dtype.size_bytes()).map(value).collect()
}

/// A buffer of these values.
pub(crate) fn encode(dtype: DType, values: &[f64]) -> Vec<u8> {
    let num = |x: f64| if dtype.is_float() { Num::F(x) } else { Num::I(x as i64) };
    values.iter().flat_map(|x| bytes(dtype, num(*x))).collect()
}

fn number(dtype: DType, bytes: &[u8]) -> Num {
    match dtype {
        DType::U8 => Num::I(i64::from(bytes[0])),
        DType::U32 => Num::I(i64::from(u32::from_ne_bytes(bytes.try_into().unwrap()))),
        DType::I64 => Num::I(i64::from_ne_bytes(bytes.try_into().unwrap())),
        DType::BF16 => Num::F(bf16::from_ne_bytes(bytes.try_into().unwrap()).to_f64()),
        DType::F16 => Num::F(f16::from_ne_bytes(bytes.try_into().unwrap()).to_f64()),
        DType::F32 => Num::F(f64::from(f32::from_ne_bytes(bytes.try_into().unwrap()))),
        DType::F64 => Num::F(f64::from_ne_bytes(bytes.try_into().unwrap())),
    }
}

fn bytes(dtype: DType, x: Num) -> Vec<u8> {
    match dtype {
        DType::U8 => vec![x.i() as u8],
        DType::U32 => (x.i() as u32).to_ne_bytes().to_vec(),
        DType::I64 => x.i().to_ne_bytes().to_vec(),
        DType::BF16 => bf16::from_f32(x.f() as f32).to_ne_bytes().to_vec(),
        DType::F16 => f16::from_f32(x.f() as f32).to_ne_bytes().to_vec(),
        DType::F32 => (x.f() as f32).to_ne_bytes().to_vec(),
        DType::F64 => x.f().to_ne_bytes().to_vec(),
    }
}

/// The results of `plan`, whose steps are all kernels.
pub(crate) fn run(plan: &Plan, inputs: &[Value]) -> Vec<Vec<f64>> {
    let mut memory = Memory::new(plan, inputs);
    for step in &plan.steps {
        let Work::Kernel(kernel) = &step.work else { panic!("{} is no kernel", step.label) };
        kernel_step(kernel, step, &mut memory);
    }
    let mut results: Vec<Vec<f64>> = Vec::new();
    for (i, output) in plan.outputs.iter().enumerate() {
        let slot = match output.source {
            OutputSource::Written => Slot::Output(i as u32),
            OutputSource::Donated(input) | OutputSource::Input(input) => Slot::Input(input),
            OutputSource::SameAs(other) => {
                results.push(results[other as usize].clone());
                continue;
            }
        };
        let bytes = &memory.of(slot)[..output.ty.size_bytes()];
        results.push(decode(output.ty.dtype, bytes));
    }
    results
}

/// Computes every point of the space, then writes.
pub(crate) fn kernel_step(kernel: &Kernel, step: &Step, memory: &mut Memory) {
    let mut writes: Vec<(&Access, isize, Num)> = Vec::new();
    for row in 0..kernel.rows() {
        let values = row_values(kernel, step, memory, row);
        for store in &kernel.stores {
            let made = &values[store.reg.index()];
            match kernel.tape[store.reg.index()].level {
                Level::Row => {
                    writes.push((&store.to, place(kernel, &store.to.at, row, 0), made[0]))
                }
                Level::Col => {
                    for (col, x) in made.iter().enumerate() {
                        writes.push((&store.to, place(kernel, &store.to.at, row, col), *x));
                    }
                }
            }
        }
    }
    for (to, at, x) in writes {
        memory.write(&step.outs[to.arg as usize], at, x);
    }
}

/// By register: one value, or one a column.
fn row_values(kernel: &Kernel, step: &Step, memory: &mut Memory, row: usize) -> Vec<Vec<Num>> {
    let mut values: Vec<Vec<Num>> = Vec::with_capacity(kernel.tape.len());
    for inst in &kernel.tape {
        let cols = match inst.level {
            Level::Row => 1,
            Level::Col => kernel.cols(),
        };
        let made = match inst.op {
            KernelOp::Reduce(op, x) => {
                vec![reduce(op, &values[x.index()], inst.dtype).settle(inst.dtype)]
            }
            _ => (0..cols)
                .map(|col| element(kernel, step, memory, inst, [row, col], &values))
                .collect(),
        };
        values.push(made);
    }
    values
}

fn element(
    kernel: &Kernel,
    step: &Step,
    memory: &mut Memory,
    inst: &Inst,
    [row, col]: [usize; 2],
    values: &[Vec<Num>],
) -> Num {
    let reg = |r: Reg| {
        let made = &values[r.index()];
        if kernel.tape[r.index()].level == Level::Row { made[0] } else { made[col] }
    };
    let from = |r: Reg| kernel.tape[r.index()].dtype;
    let made = match &inst.op {
        KernelOp::Load(access) => {
            let operand = &step.args[access.arg as usize];
            assert_eq!(operand.dtype, access.dtype, "{}", step.label);
            memory.read(operand, place(kernel, &access.at, row, col))
        }
        KernelOp::Const(c) if c.dtype().is_float() => Num::F(c.as_f64()),
        KernelOp::Const(c) => Num::I(c.as_i64()),
        KernelOp::Index(at) => {
            let at = place(kernel, at, row, col) as i64;
            if inst.dtype.is_float() { Num::F(at as f64) } else { Num::I(at) }
        }
        KernelOp::Random { distribution, stream, seed, at } => {
            let at = place(kernel, at, row, col) as u64;
            Num::F(random_f64(*distribution, reg(*seed).i(), *stream, at))
        }
        KernelOp::Unary(f, x) => match reg(*x) {
            Num::F(x) => Num::F(unary(*f, x)),
            Num::I(x) => Num::I(integer_unary(*f, x)),
        },
        KernelOp::Binary(f, a, b) => binary(*f, reg(*a), reg(*b)),
        KernelOp::Select(c, a, b) => {
            if reg(*c).i() != 0 {
                reg(*a)
            } else {
                reg(*b)
            }
        }
        // A row value that is repeated, or a conversion.
        KernelOp::Cast(x) if from(*x) == inst.dtype => reg(*x),
        KernelOp::Cast(x) => cast(reg(*x), inst.dtype),
        KernelOp::Reduce(..) => unreachable!("reductions are no elements"),
    };
    made.settle(inst.dtype)
}

fn place(kernel: &Kernel, at: &Affine, row: usize, col: usize) -> isize {
    assert_eq!(at.strides.len(), kernel.space.len());
    let (rows, cols) = kernel.space.split_at(kernel.row_axes);
    let walk = |extents: &[usize], strides: &[isize], mut i: usize| {
        let mut sum = 0;
        for (extent, stride) in extents.iter().zip(strides).rev() {
            // A row of no columns still has row values.
            let extent = (*extent).max(1);
            sum += (i % extent) as isize * stride;
            i /= extent;
        }
        sum
    };
    let (row_strides, col_strides) = at.strides.split_at(kernel.row_axes);
    at.offset + walk(rows, row_strides, row) + walk(cols, col_strides, col)
}

fn reduce(op: ReduceOp, values: &[Num], dtype: DType) -> Num {
    let float =
        |start: f64, f: fn(f64, f64) -> f64| Num::F(values.iter().fold(start, |a, x| f(a, x.f())));
    let integer =
        |start: i64, f: fn(i64, i64) -> i64| Num::I(values.iter().fold(start, |a, x| f(a, x.i())));
    match (op, dtype.is_float()) {
        (ReduceOp::Sum, true) => float(0.0, |a, b| a + b),
        (ReduceOp::Max, true) => float(f64::NEG_INFINITY, larger),
        (ReduceOp::Min, true) => float(f64::INFINITY, |a, b| -larger(-a, -b)),
        (ReduceOp::Sum, false) => integer(0, i64::wrapping_add),
        (ReduceOp::Max, false) => integer(i64::MIN, i64::max),
        (ReduceOp::Min, false) => integer(i64::MAX, i64::min),
    }
}

/// NaN if either is.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

fn unary(f: UnaryOp, x: f64) -> f64 {
    let erf = libm::erf;
    match f {
        UnaryOp::Neg => -x,
        UnaryOp::Abs => x.abs(),
        UnaryOp::Sign if x == 0.0 || x.is_nan() => x,
        UnaryOp::Sign => x.signum(),
        UnaryOp::Recip => 1.0 / x,
        UnaryOp::Sqr => x * x,
        UnaryOp::Sqrt => x.sqrt(),
        UnaryOp::Rsqrt => 1.0 / x.sqrt(),
        UnaryOp::Exp => x.exp(),
        UnaryOp::Log => x.ln(),
        UnaryOp::Log1p => x.ln_1p(),
        UnaryOp::Expm1 => x.exp_m1(),
        UnaryOp::Sin => x.sin(),
        UnaryOp::Cos => x.cos(),
        UnaryOp::Tanh => x.tanh(),
        UnaryOp::Erf => erf(x),
        UnaryOp::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        UnaryOp::Relu => larger(x, 0.0),
        UnaryOp::Silu => x / (1.0 + (-x).exp()),
        UnaryOp::Gelu => x * (1.0 + erf(x * FRAC_1_SQRT_2)) / 2.0,
        UnaryOp::GeluTanh => {
            x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh()) / 2.0
        }
        UnaryOp::Floor => x.floor(),
        UnaryOp::Ceil => x.ceil(),
        UnaryOp::Round => x.round_ties_even(),
    }
}

fn integer_unary(f: UnaryOp, x: i64) -> i64 {
    match f {
        UnaryOp::Neg => x.wrapping_neg(),
        UnaryOp::Abs => x.wrapping_abs(),
        UnaryOp::Sign => x.signum(),
        UnaryOp::Sqr => x.wrapping_mul(x),
        UnaryOp::Relu => x.max(0),
        UnaryOp::Floor | UnaryOp::Ceil | UnaryOp::Round => x,
        f => panic!("{f} of an integer"),
    }
}

fn binary(f: BinaryOp, a: Num, b: Num) -> Num {
    use BinaryOp::*;
    let holds = |yes: bool| Num::I(i64::from(yes));
    if let (Num::I(a), Num::I(b)) = (a, b) {
        return match f {
            Add => Num::I(a.wrapping_add(b)),
            Sub => Num::I(a.wrapping_sub(b)),
            Mul => Num::I(a.wrapping_mul(b)),
            Div => Num::I(if b == 0 { 0 } else { a.wrapping_div(b) }),
            Pow if b < 0 => Num::I(if a.abs() == 1 { a.pow((b & 1) as u32) } else { 0 }),
            Pow => Num::I((0..b).fold(1, |y: i64, _| y.wrapping_mul(a))),
            Maximum => Num::I(a.max(b)),
            Minimum => Num::I(a.min(b)),
            Eq => holds(a == b),
            Ne => holds(a != b),
            Lt => holds(a < b),
            Le => holds(a <= b),
            Gt => holds(a > b),
            Ge => holds(a >= b),
        };
    }
    let (a, b) = (a.f(), b.f());
    match f {
        Add => Num::F(a + b),
        Sub => Num::F(a - b),
        Mul => Num::F(a * b),
        Div => Num::F(a / b),
        Pow => Num::F(a.powf(b)),
        Maximum => Num::F(larger(a, b)),
        Minimum => Num::F(-larger(-a, -b)),
        Eq => holds(a == b),
        Ne => holds(a != b),
        Lt => holds(a < b),
        Le => holds(a <= b),
        Gt => holds(a > b),
        Ge => holds(a >= b),
    }
}

fn cast(x: Num, to: DType) -> Num {
    match (x, to) {
        (Num::I(x), _) if !to.is_float() => Num::I(x),
        (Num::F(x), DType::U8) => Num::I(i64::from(x as u8)),
        (Num::F(x), DType::U32) => Num::I(i64::from(x as u32)),
        (Num::F(x), DType::I64) => Num::I(x as i64),
        (x, _) => {
            let x = match x {
                Num::F(x) => x,
                Num::I(x) => x as f64,
            };
            Num::F(match to {
                DType::BF16 => bf16::from_f32(x as f32).to_f64(),
                DType::F16 => f16::from_f32(x as f32).to_f64(),
                _ => x,
            })
        }
    }
}
