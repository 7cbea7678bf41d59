//! What a thread does for one vector of elements: loads, values, stores.

use super::{Body, is_vector, place_of};
use crate::kernel::{Access, Affine, Kernel, KernelOp, Level, Reg, Store};
use crate::render::passes::Pass;
use crate::render::scalar::{expression, reducer, register_type, to_memory};

/// One vector of elements in the making.
pub(super) struct Chunk<'b, 'a> {
    pub(super) body: &'b mut Body<'a>,
    /// Registers that are arrays of the chunk: loaded or stored as one.
    pub(super) arrays: Vec<bool>,
}

impl Chunk<'_, '_> {
    pub(super) fn run(&mut self, pass: &Pass, stores: &[&Store]) {
        let (as_one, one_by_one): (Vec<&Store>, Vec<&Store>) =
            stores.iter().partition(|store| self.is_vector(&store.to));
        let (loads, values): (Vec<Reg>, Vec<Reg>) =
            pass.body.iter().partition(|reg| self.is_vector_load(**reg));
        loads.iter().for_each(|reg| self.load(*reg));
        let mut copied = Vec::new();
        for store in &as_one {
            if !self.is_array(store.reg) {
                let value = self.value(store.reg);
                self.declare_array(store.reg);
                if self.body.passes.level[store.reg.index()] == Level::Row {
                    copied.push((store.reg, value));
                }
            }
        }
        let is_loop = self.body.launch.vector > 1
            && !(values.is_empty()
                && pass.reductions.is_empty()
                && copied.is_empty()
                && one_by_one.is_empty());
        if is_loop {
            let vector = self.body.launch.vector;
            self.body.text.unrolled(format!("for (i32 j = 0; j < {vector}; ++j)"));
        }
        values.iter().for_each(|reg| self.compute(*reg));
        for (reg, value) in copied {
            self.body.text.line(format!("v{}[j] = {value};", reg.0));
        }
        for reg in &pass.reductions {
            let (op, of) = self.body.reduction(*reg);
            let (name, op, x) = (reg.0, reducer(op), self.value(of));
            self.body.text.line(format!("r{name} = {op}::of(r{name}, {x});"));
        }
        one_by_one.iter().for_each(|store| self.store_one(store));
        if is_loop {
            self.body.text.close();
        }
        as_one.iter().for_each(|store| self.store_vector(store));
    }

    fn is_vector(&self, access: &Access) -> bool {
        let vector = self.body.launch.vector;
        vector > 1 && self.body.fast.is_some_and(|axis| is_vector(access, axis, vector))
    }

    fn is_vector_load(&self, reg: Reg) -> bool {
        match &self.body.kernel.tape[reg.index()].op {
            KernelOp::Load(access) => self.is_vector(access),
            _ => false,
        }
    }

    fn declare_array(&mut self, reg: Reg) {
        let ty = register_type(self.body.kernel.tape[reg.index()].dtype);
        self.body.text.line(format!("{ty} v{}[{}];", reg.0, self.body.launch.vector));
        self.arrays[reg.index()] = true;
    }

    fn load(&mut self, reg: Reg) {
        let KernelOp::Load(access) = &self.body.kernel.tape[reg.index()].op else {
            panic!("metal-candle bug: {reg:?} is no load")
        };
        if !self.is_array(reg) {
            self.declare_array(reg);
        }
        let (to, at) = (self.array(reg), self.offset(&access.at));
        self.body.text.line(format!("load({to}, in{} + {at});", access.arg));
    }

    fn store_vector(&mut self, store: &Store) {
        let (from, at) = (self.array(store.reg), self.offset(&store.to.at));
        self.body.text.line(format!("store(out{} + {at}, {from});", store.to.arg));
    }

    fn store_one(&mut self, store: &Store) {
        let x = to_memory(store.to.dtype, &self.value(store.reg));
        let at = self.offset_of_one(&store.to.at);
        self.body.text.line(format!("out{}[{at}] = {x};", store.to.arg));
    }

    fn compute(&mut self, reg: Reg) {
        let kernel = self.body.kernel;
        let inst = &kernel.tape[reg.index()];
        if self.is_repeated(reg) {
            return;
        }
        let x: Vec<String> = Kernel::operands(&inst.op).iter().map(|r| self.value(*r)).collect();
        let place = place_of(&inst.op, |at| self.offset_of_one(at));
        let value = expression(kernel, inst, &x, &place);
        let name = self.name(reg);
        let line = match self.is_array(reg) {
            true => format!("{name} = {value};"),
            false => format!("const {} {name} = {value};", register_type(inst.dtype)),
        };
        self.body.text.line(line);
    }

    /// Whether it is a row value that fills its columns, and needs no name of its own.
    fn is_repeated(&self, reg: Reg) -> bool {
        let tape = &self.body.kernel.tape;
        let inst = &tape[reg.index()];
        match inst.op {
            KernelOp::Cast(x) => {
                let from = (tape[x.index()].dtype, self.body.passes.level[x.index()]);
                from == (inst.dtype, Level::Row) && !self.is_array(reg)
            }
            _ => false,
        }
    }

    fn is_array(&self, reg: Reg) -> bool {
        self.arrays[reg.index()] || self.body.passes.kept[reg.index()]
    }

    /// All of a register's vector.
    fn array(&self, reg: Reg) -> String {
        let kept = if self.body.passes.kept[reg.index()] { "[k]" } else { "" };
        format!("v{}{kept}", reg.0)
    }

    fn name(&self, reg: Reg) -> String {
        let each = if self.body.launch.vector > 1 && self.is_array(reg) { "[j]" } else { "" };
        format!("{}{each}", self.array(reg))
    }

    /// A register of this element.
    fn value(&self, reg: Reg) -> String {
        match self.body.kernel.tape[reg.index()].op {
            _ if self.body.passes.level[reg.index()] == Level::Row => self.body.row_value(reg),
            KernelOp::Cast(x) if self.is_repeated(reg) => self.body.row_value(x),
            _ => self.name(reg),
        }
    }

    /// Where the vector's first element is.
    fn offset(&self, at: &Affine) -> String {
        self.body.col.0.offset(at, None)
    }

    /// Where element `j` of the vector is.
    fn offset_of_one(&self, at: &Affine) -> String {
        let along = self.body.fast.filter(|_| self.body.launch.vector > 1);
        self.body.col.0.offset(at, along.map(|axis| ("j", at.strides[axis])))
    }
}
