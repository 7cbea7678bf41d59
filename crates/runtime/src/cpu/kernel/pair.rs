//! Two instructions in one loop: what is between them stays in a vector register, instead of going to a tile and back.
//!
//! The same operations on the same values as one by one, so the same bits: nothing is contracted.

use super::compile::{PassNeeds, Strategy, VectorAxis};
use super::scalar::gelu_f32;
use super::tile::{AheadFn, Map2, Map3, TileFn, map2, map2_ahead, map2_of_each, map3};
use crate::cpu::math;
use crate::cpu::simd::MulAdd;
use metal_candle_compiler::kernel::{Kernel, KernelOp, Reg};
use metal_candle_graph::{BinaryOp, Class, ReduceOp, UnaryOp};
use rustc_hash::{FxHashMap, FxHashSet};
use smallvec::{SmallVec, smallvec};

/// The loop of `outer` on the result of `inner`.
pub(super) struct Pair {
    pub(super) operands: SmallVec<[Reg; 3]>,
    f: Loops,
}

/// Given which operands are one for all.
enum Loops {
    /// Of a function of the first operand, which is not one for all.
    Of1(fn(bool) -> TileFn),
    Of2(fn([bool; 2]) -> TileFn),
    Of3(fn([bool; 3]) -> TileFn),
}

impl Pair {
    /// The loop, given which operands are one for all.
    pub(super) fn loop_of(&self, is_one: impl Fn(Reg) -> bool) -> TileFn {
        match (&self.f, &self.operands[..]) {
            (Loops::Of1(f), &[_, b]) => f(is_one(b)),
            (Loops::Of2(f), &[a, b]) => f([a, b].map(is_one)),
            (Loops::Of3(f), &[a, b, c]) => f([a, b, c].map(is_one)),
            (_, operands) => panic!("metal-candle bug: {} operands of a pair", operands.len()),
        }
    }
}

/// Declares maps of two f32 whose loops take so long that memory comes nearer meanwhile.
macro_rules! dear {
    ($($(#[$meta:meta])* $name:ident: |$a:ident, $b:ident| $body:expr;)*) => {$(
        $(#[$meta])*
        struct $name;
        impl Map2<f32, f32> for $name {
            #[inline(always)]
            fn apply<M: MulAdd>($a: f32, $b: f32) -> f32 {
                $body
            }
        }
    )*};
}

dear! {
    ExpOfSub: |a, b| math::exp_f32::<M>(a - b);
    SiluMul: |a, b| a / (1.0 + math::exp_f32::<M>(-a)) * b;
    GeluMul: |a, b| gelu_f32::<M>(a) * b;
}

/// The loop of a dear pair whose first operand is not one for all, which asks for memory.
pub(super) fn ahead_of(inner: &KernelOp, outer: &KernelOp, second_is_one: bool) -> Option<AheadFn> {
    let f = match (inner, outer) {
        (KernelOp::Binary(BinaryOp::Sub, ..), KernelOp::Unary(UnaryOp::Exp, _)) => {
            map2_ahead::<ExpOfSub>
        }
        (KernelOp::Unary(UnaryOp::Silu, _), KernelOp::Binary(BinaryOp::Mul, ..)) => {
            map2_ahead::<SiluMul>
        }
        (KernelOp::Unary(UnaryOp::Gelu, _), KernelOp::Binary(BinaryOp::Mul, ..)) => {
            map2_ahead::<GeluMul>
        }
        _ => return None,
    };
    Some(f(second_is_one))
}

/// Declares a map of two or three registers, and gives what finds its loop.
macro_rules! of {
    ($loops:ident, $map2:ident, |$a:ident, $b:ident| $body:expr) => {{
        struct F;
        impl Map2<f32, f32> for F {
            #[inline(always)]
            fn apply<M: MulAdd>($a: f32, $b: f32) -> f32 {
                $body
            }
        }
        Loops::$loops($map2::<f32, f32, F>)
    }};
    (|$a:ident, $b:ident, $c:ident| $body:expr) => {{
        struct F;
        impl Map3 for F {
            #[inline(always)]
            fn apply($a: f32, $b: f32, $c: f32) -> f32 {
                $body
            }
        }
        Loops::Of3(map3::<F>)
    }};
}

/// One of f32: what occurs in the rows of norms and softmax, in gated units and in optimisers.
pub(super) fn pair_of(inner: &KernelOp, (result, outer): (Reg, &KernelOp)) -> Option<Pair> {
    use BinaryOp::{Add, Mul, Sub};
    match (inner, outer) {
        (&KernelOp::Binary(Sub, a, b), &KernelOp::Unary(UnaryOp::Exp, _)) => {
            let f = Loops::Of2(map2::<f32, f32, ExpOfSub>);
            Some(Pair { operands: smallvec![a, b], f })
        }
        (&KernelOp::Binary(Add, a, b), &KernelOp::Unary(UnaryOp::Relu, _)) => {
            let f = of!(Of2, map2, |a, b| if a + b < 0.0 { 0.0 } else { a + b });
            Some(Pair { operands: smallvec![a, b], f })
        }
        (&KernelOp::Unary(f, a), &KernelOp::Binary(Mul, x, y)) if x != y => {
            let f = match f {
                UnaryOp::Silu => Loops::Of1(map2_of_each::<f32, f32, SiluMul>),
                UnaryOp::Gelu => Loops::Of1(map2_of_each::<f32, f32, GeluMul>),
                _ => return None,
            };
            Some(Pair { operands: smallvec![a, if x == result { y } else { x }], f })
        }
        (&KernelOp::Binary(first, a, b), &KernelOp::Binary(second, x, y)) if x != y => {
            let c = if x == result { y } else { x };
            let f = match (first, second) {
                (Mul, Add) => of!(|a, b, c| a * b + c),
                (Mul, Mul) => of!(|a, b, c| a * b * c),
                (Mul, Sub) if x == result => of!(|a, b, c| a * b - c),
                (Mul, Sub) => of!(|a, b, c| c - a * b),
                (Sub, Mul) => of!(|a, b, c| (a - b) * c),
                _ => return None,
            };
            Some(Pair { operands: smallvec![a, b, c], f })
        }
        _ => None,
    }
}

/// What one pass computes in the loop of another instruction: each is needed there only.
#[derive(Default)]
pub(super) struct Pairs {
    /// The inner instruction, by the outer one.
    inner: FxHashMap<usize, usize>,
    /// Products of which only the sum is needed.
    dots: FxHashSet<usize>,
}

impl Pairs {
    pub(super) fn of(s: &Strategy<'_>, needs: &PassNeeds, kept: impl Fn(usize) -> bool) -> Pairs {
        let mut pairs = Pairs::default();
        let tape = &s.kernel.tape;
        let users = users(s, needs);
        let is_f32 = |reg: usize| tape[reg].dtype.class() == Class::F32;
        let is_free = |reg: usize| {
            users.get(&reg) == Some(&1) && is_f32(reg) && !kept(reg) && has_each(s, reg)
        };
        for &sum in needs.reductions.iter().filter(|_| s.axis == VectorAxis::Along) {
            let KernelOp::Reduce(ReduceOp::Sum, from) = tape[sum].op else { continue };
            if is_free(from.index()) && factors(s, from.index()).is_some() {
                pairs.dots.insert(from.index());
            }
        }
        for &outer in &needs.computed {
            let inner = Kernel::operands(&tape[outer].op).into_iter().find(|inner| {
                let i = inner.index();
                let is_free =
                    is_free(i) && !pairs.dots.contains(&i) && !pairs.inner.contains_key(&i);
                is_free
                    && is_f32(outer)
                    && pair_of(&tape[i].op, (*inner, &tape[outer].op)).is_some()
            });
            if let Some(inner) = inner.filter(|_| !pairs.dots.contains(&outer)) {
                pairs.inner.insert(outer, inner.index());
            }
        }
        pairs
    }

    /// The instruction whose loop computes another one first, and that one.
    pub(super) fn inner(&self, outer: usize) -> Option<usize> {
        self.inner.get(&outer).copied()
    }

    /// Whether a value never lies anywhere.
    pub(super) fn is_inner(&self, reg: usize) -> bool {
        self.inner.values().any(|inner| *inner == reg)
    }

    /// Whether of a product only the sum is needed.
    pub(super) fn is_dot(&self, reg: usize) -> bool {
        self.dots.contains(&reg)
    }

    /// What the loop of an instruction reads.
    pub(super) fn operands(&self, kernel: &Kernel, reg: usize) -> SmallVec<[Reg; 4]> {
        let mut operands: SmallVec<[Reg; 4]> = SmallVec::new();
        for operand in Kernel::operands(&kernel.tape[reg].op) {
            match self.inner(reg) == Some(operand.index()) {
                true => operands.extend(Kernel::operands(&kernel.tape[operand.index()].op)),
                false => operands.push(operand),
            }
        }
        operands
    }
}

/// How often the pass needs each of its values.
fn users(s: &Strategy<'_>, needs: &PassNeeds) -> FxHashMap<usize, usize> {
    let mut users = FxHashMap::default();
    for reg in needs.computed.iter().chain(&needs.reductions) {
        for operand in Kernel::operands(&s.kernel.tape[*reg].op) {
            *users.entry(operand.index()).or_default() += 1;
        }
    }
    for store in &needs.stores {
        *users.entry(s.stored(&s.kernel.stores[*store])).or_default() += 1;
    }
    users.retain(|reg, _| needs.computed.contains(reg));
    users
}

/// Whether an operand has a register for each result.
fn has_each(s: &Strategy<'_>, reg: usize) -> bool {
    Kernel::operands(&s.kernel.tape[reg].op).into_iter().any(|r| !s.is_one(r.index()))
}

/// The factors of a product of two tiles.
pub(super) fn factors(s: &Strategy<'_>, reg: usize) -> Option<[Reg; 2]> {
    let factors = match s.kernel.tape[reg].op {
        KernelOp::Unary(UnaryOp::Sqr, x) => [x, x],
        KernelOp::Binary(BinaryOp::Mul, a, b) => [a, b],
        _ => return None,
    };
    factors.iter().all(|r| !s.is_one(r.index())).then_some(factors)
}

#[cfg(test)]
mod tests {
    use super::super::scalar::{binary_of, unary_of};
    use super::*;
    use std::ptr::{from_ref, null};

    const N: usize = 83;
    const A: Reg = Reg(0);
    const B: Reg = Reg(1);
    const C: Reg = Reg(2);
    const INNER: Reg = Reg(3);

    /// Runs a loop over these operands; one for all has one register.
    fn run(f: TileFn, ins: &[&[f32]]) -> Vec<u32> {
        let mut out = vec![0f32; N];
        let mut pointers = [null(); 3];
        for (to, from) in pointers.iter_mut().zip(ins) {
            *to = from_ref(&from[0]).cast::<u8>();
        }
        // SAFETY: as many registers as the loop was asked for, and room for the results.
        unsafe { f(out.as_mut_ptr().cast(), pointers, N) };
        out.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
    }

    /// [`run`], asking for memory behind all that there is.
    fn run_ahead(f: AheadFn, ins: [&[f32]; 2]) -> Vec<u32> {
        let mut out = vec![0f32; N];
        let ins = ins.map(|from| from_ref(&from[0]).cast::<u8>());
        let ahead = ins.map(|from| from.wrapping_add(1 << 40));
        // SAFETY: as many registers as the loop was asked for, and room for the results.
        unsafe { f(out.as_mut_ptr().cast(), ins, ahead, N) };
        out.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
    }

    /// The loop of one instruction, where operands are one for all.
    fn alone(op: &KernelOp, one: [bool; 2]) -> TileFn {
        match *op {
            KernelOp::Unary(f, _) => unary_of(f, Class::F32),
            KernelOp::Binary(f, ..) => binary_of(f, Class::F32, one),
            ref op => panic!("{op:?} is in no pair"),
        }
    }

    #[test]
    fn a_pair_has_the_bits_of_its_instructions_one_by_one() {
        use BinaryOp::{Add, Mul, Sub};
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e30, -1e30, 1e-40];
        let values = |seed: usize| -> Vec<f32> {
            let of = |i: usize| ((i * 37 + seed * 11) % 101) as f32 * 0.17 - 8.0;
            (0..N).map(|i| *special.get((i * 5 + seed) % 29).unwrap_or(&of(i))).collect()
        };
        let data = [values(1), values(2), values(3)];
        let binary = |f| KernelOp::Binary(f, A, B);
        let after = |f, left: bool| match left {
            true => KernelOp::Binary(f, INNER, C),
            false => KernelOp::Binary(f, C, INNER),
        };
        let gated = |f| (KernelOp::Unary(f, A), KernelOp::Binary(Mul, INNER, B));
        let mut pairs = vec![
            (binary(Sub), KernelOp::Unary(UnaryOp::Exp, INNER)),
            (binary(Add), KernelOp::Unary(UnaryOp::Relu, INNER)),
            gated(UnaryOp::Silu),
            gated(UnaryOp::Gelu),
        ];
        for left in [true, false] {
            let seconds = [(Mul, Add), (Mul, Mul), (Mul, Sub), (Sub, Mul)];
            pairs.extend(seconds.map(|(first, second)| (binary(first), after(second, left))));
        }
        for (inner, outer) in &pairs {
            let pair = pair_of(inner, (INNER, outer)).unwrap();
            for one in [[false; 3], [false, true, false], [true, false, true], [false, false, true]]
            {
                if one[0] && matches!(inner, KernelOp::Unary(..)) {
                    continue;
                }
                let operand = |r: &Reg| &data[r.index()][..];
                let ins: Vec<&[f32]> = pair.operands.iter().map(operand).collect();
                let together = run(pair.loop_of(|r| one[r.index()]), &ins);
                let inner_ins: Vec<&[f32]> = Kernel::operands(inner).iter().map(operand).collect();
                let middle = run(alone(inner, [one[0], one[1]]), &inner_ins);
                let middle: Vec<f32> = middle.into_iter().map(f32::from_bits).collect();
                let at = |r: &Reg| if *r == INNER { &middle[..] } else { operand(r) };
                let outer_operands = Kernel::operands(outer);
                let outer_ins: Vec<&[f32]> = outer_operands.iter().map(at).collect();
                let mut outer_one = [false; 2];
                for (to, r) in outer_one.iter_mut().zip(&outer_operands) {
                    *to = *r != INNER && one[r.index()];
                }
                let apart = run(alone(outer, outer_one), &outer_ins);
                assert_eq!(together, apart, "{inner:?}, then {outer:?}, one for all: {one:?}");
                let second_is_one = pair.operands.get(1).is_some_and(|b| one[b.index()]);
                if let Some(f) = ahead_of(inner, outer, second_is_one).filter(|_| !one[0]) {
                    assert_eq!(run_ahead(f, [ins[0], ins[1]]), apart, "{inner:?}, then {outer:?}");
                }
            }
        }
    }
}
