//! One instruction, or a pair of them: its loop, what that reads, and where the results go.

use super::Emitter;
use crate::cpu::kernel::compile::{Rate, is_dear};
use crate::cpu::kernel::memory::load_of;
use crate::cpu::kernel::pair::{ahead_of, pair_of};
use crate::cpu::kernel::scalar::{binary_of, cast_of, unary_of};
use crate::cpu::kernel::tile::{select_of, splat_of};
use crate::cpu::kernel::{Op, Place, Seed};
use metal_candle_compiler::kernel::{self, Inst, KernelOp};
use metal_candle_graph::DType;

/// What a transcendental function or a division weighs against an addition.
const DEAR: usize = 6;

impl Emitter<'_> {
    /// The call that computes `reg` into `out`; none if it is there already.
    pub(super) fn emit(&mut self, reg: usize, out: Place, ops: &mut Vec<Op>) {
        let inst = &self.s.kernel.tape[reg];
        let access = self.access_of[reg];
        let dtype = inst.dtype;
        if self.s.rates[reg] == Rate::Col {
            self.weight += if is_dear(&inst.op) { DEAR } else { 1 };
        }
        let op = match &inst.op {
            KernelOp::Load(_) if matches!(out, Place::Memory(_)) => return,
            KernelOp::Load(from) => Op::Load { access, load: load_of(from.dtype), out },
            KernelOp::Const(value) => Op::Const { value: *value, out },
            KernelOp::Index(_) => Op::Index { access, dtype, out },
            KernelOp::Random { distribution, stream, seed, .. } => {
                let seed = seed.index();
                let seed = Seed { place: self.places[seed], is_one: self.s.is_one(seed) };
                let (distribution, stream) = (*distribution, *stream);
                Op::Random { access, distribution, stream, seed, dtype, out }
            }
            KernelOp::Unary(..)
            | KernelOp::Binary(..)
            | KernelOp::Select(..)
            | KernelOp::Cast(_) => {
                return self.map(inst, out, reg, ops);
            }
            KernelOp::Reduce(..) => panic!("metal-candle bug: a reduction among maps"),
        };
        ops.push(op);
    }

    fn map(&mut self, inst: &Inst, out: Place, reg: usize, ops: &mut Vec<Op>) {
        if let Some(inner) = self.pairs.inner(reg) {
            return self.pair(inner, reg, out, ops);
        }
        let mut ins = [Place::Nowhere; 3];
        for (to, from) in ins.iter_mut().zip(kernel::Kernel::operands(&inst.op)) {
            *to = self.places[from.index()];
        }
        let dtype_of = |r: kernel::Reg| self.s.kernel.tape[r.index()].dtype;
        let one = |r: kernel::Reg| self.s.is_one(r.index());
        let mut wraps = matches!(inst.dtype, DType::U8 | DType::U32);
        let f = match inst.op {
            KernelOp::Unary(f, a) => unary_of(f, dtype_of(a).class()),
            KernelOp::Binary(f, a, b) => {
                wraps &= !f.is_comparison();
                binary_of(f, dtype_of(a).class(), [one(a), one(b)])
            }
            KernelOp::Select(c, a, b) => {
                wraps = false;
                select_of(inst.dtype.class(), [one(c), one(a), one(b)])
            }
            KernelOp::Cast(a) => {
                wraps = false;
                match one(a) && !self.s.is_one(reg) {
                    true => splat_of(inst.dtype.class()),
                    false => cast_of(dtype_of(a), inst.dtype),
                }
            }
            ref op => panic!("metal-candle bug: {op:?} is no map"),
        };
        if !wraps {
            ops.push(Op::Map { f, ins, out });
            return;
        }
        let wide = self.lasting(reg);
        ops.push(Op::Map { f, ins, out: wide });
        let f = cast_of(DType::I64, inst.dtype);
        ops.push(Op::Map { f, ins: [wide, Place::Nowhere, Place::Nowhere], out });
        self.release(wide);
    }

    /// Two instructions in one loop.
    fn pair(&mut self, inner: usize, outer: usize, out: Place, ops: &mut Vec<Op>) {
        let [inner_op, outer_op] = [inner, outer].map(|reg| &self.s.kernel.tape[reg].op);
        self.weight += if is_dear(inner_op) { DEAR } else { 1 };
        let pair = pair_of(inner_op, (kernel::Reg(inner as u32), outer_op));
        let pair = pair.expect("metal-candle bug: no loop for a pair");
        let mut ins = [Place::Nowhere; 3];
        for (to, from) in ins.iter_mut().zip(&pair.operands) {
            *to = self.places[from.index()];
        }
        let is_one = |reg: kernel::Reg| self.s.is_one(reg.index());
        // A loop that writes to memory itself is as fast as that.
        let ahead = self.ahead.filter(|_| !matches!(out, Place::Memory(_)));
        if let (Some(ahead), &[a, b]) = (ahead, &pair.operands[..])
            && let Some(f) = ahead_of(inner_op, outer_op, is_one(b)).filter(|_| !is_one(a))
        {
            ops.push(Op::MapAhead { f, ins: [ins[0], ins[1]], ahead, out });
            return;
        }
        let f = pair.loop_of(is_one);
        ops.push(Op::Map { f, ins, out });
    }
}
