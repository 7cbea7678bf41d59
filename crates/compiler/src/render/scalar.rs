//! Instructions as expressions.

use crate::kernel::{Inst, Kernel, KernelOp};
use metal_candle_graph::{BinaryOp, Class, DType, Distribution, ReduceOp, Scalar, UnaryOp};

/// What a value of `dtype` is in memory.
pub(super) fn memory_type(dtype: DType) -> &'static str {
    match dtype {
        DType::U8 => "u8",
        DType::U32 => "u32",
        DType::I64 => "i64",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        DType::F32 => "f32",
        DType::F64 => "f64",
    }
}

/// What holds a value of `dtype` while it is computed with.
pub(super) fn register_type(dtype: DType) -> &'static str {
    memory_type(register(dtype))
}

pub(super) fn register_bytes(dtype: DType) -> usize {
    register(dtype).size_bytes()
}

fn register(dtype: DType) -> DType {
    match dtype.class() {
        Class::F32 => DType::F32,
        Class::F64 => DType::F64,
        Class::I64 => DType::I64,
    }
}

/// The value of `inst` of its operands `x`, and of its position `at` for what has one.
pub(super) fn expression(kernel: &Kernel, inst: &Inst, x: &[String], at: &str) -> String {
    let operand_dtype =
        || kernel.tape[Kernel::operands(&inst.op).last().expect("an operand").index()].dtype;
    match &inst.op {
        KernelOp::Load(access) => to_register(access.dtype, at),
        KernelOp::Const(value) => literal(*value),
        KernelOp::Index(_) if inst.dtype.is_float() => {
            format!("{}({at})", register_type(inst.dtype))
        }
        KernelOp::Index(_) => wrapped(inst.dtype, format!("i64({at})")),
        KernelOp::Random { distribution, stream, .. } => {
            let name = match distribution {
                Distribution::Uniform => "random_uniform",
                Distribution::Normal => "random_normal",
            };
            format!("{}({name}({}, {stream}, i64({at})))", register_type(inst.dtype), x[0])
        }
        KernelOp::Unary(f, _) => unary(*f, inst.dtype, &x[0]),
        KernelOp::Binary(f, ..) => binary(*f, inst.dtype, operand_dtype(), x),
        KernelOp::Select(..) => format!("{} != 0 ? {} : {}", x[0], x[1], x[2]),
        KernelOp::Cast(_) => cast(operand_dtype(), inst.dtype, &x[0]),
        KernelOp::Reduce(..) => panic!("metal-candle bug: a reduction is no expression"),
    }
}

/// A value of `dtype` in memory, in a register.
pub(super) fn to_register(dtype: DType, place: &str) -> String {
    match register(dtype) == dtype {
        true => place.to_owned(),
        false => format!("{}({place})", register_type(dtype)),
    }
}

/// A register, as it is written to memory.
pub(super) fn to_memory(dtype: DType, x: &str) -> String {
    match register(dtype) == dtype {
        true => x.to_owned(),
        false => format!("{}({x})", memory_type(dtype)),
    }
}

/// Integers wrap after every instruction.
fn wrapped(dtype: DType, x: String) -> String {
    match dtype {
        DType::U8 | DType::U32 => format!("i64({}({x}))", memory_type(dtype)),
        _ => x,
    }
}

/// A reduction's result, as its dtype holds it.
pub(super) fn settled(dtype: DType, x: String) -> String {
    wrapped(dtype, x)
}

fn unary(f: UnaryOp, dtype: DType, x: &str) -> String {
    if dtype.is_float() {
        return if f == UnaryOp::Neg { format!("-{x}") } else { format!("math::{f}({x})") };
    }
    match f {
        UnaryOp::Neg | UnaryOp::Abs | UnaryOp::Sqr => wrapped(dtype, format!("integer::{f}({x})")),
        UnaryOp::Sign | UnaryOp::Relu => format!("math::{f}({x})"),
        UnaryOp::Floor | UnaryOp::Ceil | UnaryOp::Round => x.to_owned(),
        f => panic!("metal-candle bug: {f} of integers"),
    }
}

fn binary(f: BinaryOp, dtype: DType, operands: DType, x: &[String]) -> String {
    use BinaryOp::*;
    let (a, b) = (&x[0], &x[1]);
    let compare = |sign: &str| format!("i64({a} {sign} {b})");
    let of_integers = |name: &str| wrapped(dtype, format!("integer::{name}({a}, {b})"));
    let infix = |sign: &str, name: &str| match operands.is_float() {
        true => format!("{a} {sign} {b}"),
        false => of_integers(name),
    };
    match f {
        Add => infix("+", "add"),
        Sub => infix("-", "sub"),
        Mul => infix("*", "mul"),
        Div => infix("/", "div"),
        Pow if operands.is_float() => format!("math::pow({a}, {b})"),
        Pow => of_integers("pow"),
        Maximum => format!("math::maximum({a}, {b})"),
        Minimum => format!("math::minimum({a}, {b})"),
        Eq => compare("=="),
        Ne => compare("!="),
        Lt => compare("<"),
        Le => compare("<="),
        Gt => compare(">"),
        Ge => compare(">="),
    }
}

fn cast(from: DType, to: DType, x: &str) -> String {
    let name = memory_type(to);
    match (from.is_float(), to) {
        _ if from == to => x.to_owned(),
        (true, DType::U8 | DType::U32 | DType::I64) => format!("to_{name}({x})"),
        (false, DType::U8 | DType::U32) => wrapped(to, x.to_owned()),
        (false, DType::I64) => x.to_owned(),
        // Rounded to 16 bits, and held in 32 again.
        (_, DType::BF16 | DType::F16) if register(from) == DType::F32 => {
            format!("f32({name}({x}))")
        }
        (_, DType::BF16 | DType::F16) => format!("f32({name}(f32({x})))"),
        (_, DType::F32 | DType::F64) if register(from) == to => x.to_owned(),
        (_, DType::F32 | DType::F64) => format!("{name}({x})"),
    }
}

fn literal(value: Scalar) -> String {
    let (class, x) = (value.dtype().class(), value.as_f64());
    match class {
        Class::I64 if value.as_i64() == i64::MIN => "i64(u64(1) << 63)".to_owned(),
        Class::I64 => format!("i64({})", value.as_i64()),
        Class::F32 | Class::F64 if x.is_infinite() => {
            let sign = if x < 0.0 { "-" } else { "" };
            format!("{sign}{}", if class == Class::F32 { "INF" } else { "f64(INF)" })
        }
        Class::F32 if x.is_nan() => format!("f32_of_bits({:#x})", (x as f32).to_bits()),
        Class::F64 if x.is_nan() => format!("f64_of_bits({:#x})", x.to_bits()),
        Class::F32 => format!("{:?}f", x as f32),
        Class::F64 => format!("{x:?}"),
    }
}

/// The type that joins two partial results, in the headers.
pub(super) fn reducer(op: ReduceOp) -> &'static str {
    match op {
        ReduceOp::Sum => "Sum",
        ReduceOp::Max => "Max",
        ReduceOp::Min => "Min",
    }
}

/// What changes no result.
pub(super) fn identity(op: ReduceOp, dtype: DType) -> String {
    let register = register(dtype);
    let (float, integer) = match op {
        ReduceOp::Sum => (0.0, 0),
        ReduceOp::Max => (f64::NEG_INFINITY, i64::MIN),
        ReduceOp::Min => (f64::INFINITY, i64::MAX),
    };
    literal(match register.is_float() {
        true => Scalar::from_f64(register, float),
        false => Scalar::from_i64(register, integer),
    })
}
