//! The calls of a program: every instruction finds its loop, and every value its place.

mod inst;

use super::compile::{PassNeeds, Rate, Strategy, VectorAxis};
use super::memory::{register_bytes, store_of};
use super::pair::{Pairs, factors};
use super::reduce::{LANES, dot_f32, reducer_of};
use super::scalar::cast_of;
use super::tile::splat_of;
use super::{Access, Op, Place, Reduction, RowWalk};
use metal_candle_compiler::kernel::{self, Affine, Inst, KernelOp};
use metal_candle_graph::DType;
use rustc_hash::FxHashMap;

pub(super) struct Emitter<'a> {
    s: &'a Strategy<'a>,
    kept: FxHashMap<usize, Place>,
    /// Of the pass that is being written.
    pairs: Pairs,
    /// What is asked for in it, while something dear is computed.
    ahead: Option<[Place; 2]>,
    /// By register: in the pass that is being written, or for good.
    places: Vec<Place>,
    /// The partial results, by reduction.
    accs: FxHashMap<usize, Place>,
    /// By register, for loads and positions.
    access_of: Vec<u16>,
    /// By store.
    store_access: Vec<u16>,
    accesses: Vec<Access>,
    fixed_bytes: usize,
    free_tiles: Vec<u16>,
    tiles: u16,
    weight: usize,
}

impl<'a> Emitter<'a> {
    pub(super) fn new(s: &'a Strategy<'a>, kept: &FxHashMap<usize, Place>) -> Emitter<'a> {
        let n = s.kernel.tape.len();
        let kept_end = |place: &Place| match place {
            Place::Kept { at, bytes } => at + s.cols() * bytes,
            _ => 0,
        };
        let mut e = Emitter {
            s,
            kept: kept.clone(),
            pairs: Pairs::default(),
            ahead: None,
            places: vec![Place::Nowhere; n],
            accs: FxHashMap::default(),
            access_of: vec![0; n],
            store_access: Vec::new(),
            accesses: Vec::new(),
            fixed_bytes: kept.values().map(kept_end).max().unwrap_or(0).next_multiple_of(64),
            free_tiles: Vec::new(),
            tiles: 0,
            weight: 0,
        };
        for (reg, inst) in s.kernel.tape.iter().enumerate() {
            match &inst.op {
                KernelOp::Load(access) => e.access_of[reg] = e.access(access, false),
                KernelOp::Index(at) | KernelOp::Random { at, .. } => {
                    let position = kernel::Access { arg: 0, dtype: inst.dtype, at: at.clone() };
                    e.access_of[reg] = e.access(&position, false);
                }
                _ => {}
            }
        }
        e.store_access = s.kernel.stores.iter().map(|store| e.access(&store.to, true)).collect();
        e
    }

    pub(super) fn fixed_bytes(&self) -> usize {
        self.fixed_bytes.next_multiple_of(64)
    }

    pub(super) fn tiles(&self) -> usize {
        self.tiles as usize
    }

    /// Element operations for one element, at least one.
    pub(super) fn weight(&self) -> usize {
        self.weight.max(1)
    }

    pub(super) fn into_accesses(self) -> Vec<Access> {
        self.accesses
    }

    /// The instructions of a rate that `wanted` picks; their values stay for good.
    pub(super) fn at_rate(&mut self, rate: Rate, wanted: impl Fn(&Inst) -> bool) -> Vec<Op> {
        let mut ops = Vec::new();
        for (reg, inst) in self.s.kernel.tape.iter().enumerate() {
            let is_reduction = matches!(inst.op, KernelOp::Reduce(..));
            if self.s.rates[reg] == rate && !is_reduction && wanted(inst) {
                let out = self.lasting(reg);
                self.emit(reg, out, &mut ops);
                self.places[reg] = out;
            }
        }
        ops
    }

    /// A place that is never given to another value.
    fn lasting(&mut self, reg: usize) -> Place {
        if self.s.is_one(reg) { self.fixed(1) } else { self.tile() }
    }

    fn fixed(&mut self, registers: usize) -> Place {
        let at = self.fixed_bytes;
        self.fixed_bytes += registers * 8;
        Place::Scratch(at)
    }

    fn tile(&mut self) -> Place {
        Place::Tile(self.free_tiles.pop().unwrap_or_else(|| {
            self.tiles += 1;
            self.tiles - 1
        }))
    }

    fn release(&mut self, place: Place) {
        if let Place::Tile(tile) = place {
            self.free_tiles.push(tile);
        }
    }

    /// Places for the partial results and the row values of a pass.
    pub(super) fn reductions(&mut self, needs: &PassNeeds) -> Vec<Reduction> {
        let reduction = |reg: &usize| {
            let inst = &self.s.kernel.tape[*reg];
            let KernelOp::Reduce(op, _) = inst.op else {
                panic!("metal-candle bug: {inst:?} is no reduction")
            };
            let (acc, joined) = match self.s.axis {
                VectorAxis::Along => (self.fixed(LANES), self.fixed(1)),
                VectorAxis::Across => {
                    let acc = self.tile();
                    (acc, acc)
                }
            };
            let is_narrow = matches!(inst.dtype, DType::U8 | DType::U32);
            let wrap = is_narrow.then(|| (cast_of(DType::I64, inst.dtype), self.lasting(*reg)));
            self.places[*reg] = wrap.map_or(joined, |(_, out)| out);
            self.accs.insert(*reg, acc);
            Reduction { reducer: reducer_of(op, inst.dtype.class()), acc, joined, wrap }
        };
        needs.reductions.iter().map(reduction).collect()
    }

    /// The column values of a pass, and what they feed. A `later` one finds the row in a cache.
    pub(super) fn body(&mut self, needs: &PassNeeds, later: bool) -> Vec<Op> {
        let mut ops = Vec::new();
        self.ahead = self.ahead().filter(|_| later || self.s.is_flat());
        self.pairs = Pairs::of(self.s, needs, |reg| self.kept.contains_key(&reg));
        let last_use = self.last_uses(needs);
        let mut stored = vec![false; self.s.kernel.stores.len()];
        self.feed(None, needs, &mut stored, &mut ops);
        for (i, &reg) in needs.computed.iter().enumerate() {
            if self.pairs.is_inner(reg) {
                continue;
            }
            if !self.pairs.is_dot(reg) {
                let out = self.column_place(reg, needs, &mut stored);
                self.emit(reg, out, &mut ops);
                self.places[reg] = out;
            }
            self.feed(Some(reg), needs, &mut stored, &mut ops);
            for dying in last_use.get(&i).into_iter().flatten() {
                self.release(self.places[*dying]);
            }
        }
        if self.s.in_place {
            for &store in needs.stores.iter().filter(|store| !stored[**store]) {
                self.store(store, &mut ops);
            }
            for &reg in last_use.get(&usize::MAX).into_iter().flatten() {
                self.release(self.places[reg]);
            }
        }
        // In the passes to come, a row that is kept is found where this one left it.
        for reg in &needs.computed {
            if !matches!(self.places[*reg], Place::Kept { .. }) {
                self.places[*reg] = Place::Nowhere;
            }
        }
        ops
    }

    /// The values of the pass by the position of their last use; `usize::MAX` is its end.
    fn last_uses(&self, needs: &PassNeeds) -> FxHashMap<usize, Vec<usize>> {
        let mut last: FxHashMap<usize, usize> = FxHashMap::default();
        for (i, &reg) in needs.computed.iter().enumerate() {
            if self.pairs.is_inner(reg) {
                continue;
            }
            last.insert(reg, i);
            for operand in self.pairs.operands(self.s.kernel, reg) {
                last.entry(operand.index()).and_modify(|last| *last = i);
            }
        }
        if self.s.in_place {
            for store in &needs.stores {
                let reg = self.s.stored(&self.s.kernel.stores[*store]);
                last.entry(reg).and_modify(|last| *last = usize::MAX);
            }
        }
        let mut by_position: FxHashMap<usize, Vec<usize>> = FxHashMap::default();
        for (reg, last) in last {
            by_position.entry(last).or_default().push(reg);
        }
        by_position
    }

    /// Where a column value goes: to memory, if that is what it is for.
    fn column_place(&mut self, reg: usize, needs: &PassNeeds, stored: &mut [bool]) -> Place {
        if let Some(place) = self.kept.get(&reg) {
            return *place;
        }
        let inst = &self.s.kernel.tape[reg];
        if let KernelOp::Load(_) = inst.op {
            let access = self.access_of[reg];
            let is_overwritten = self.s.in_place && self.is_stored(reg);
            return if self.is_direct(access) && !is_overwritten {
                Place::Memory(access)
            } else {
                self.tile()
            };
        }
        let is_map = !matches!(inst.op, KernelOp::Index(_) | KernelOp::Random { .. });
        let direct = needs.stores.iter().copied().find(|store| {
            let is_its = self.s.stored(&self.s.kernel.stores[*store]) == reg;
            is_its && self.is_direct(self.store_access[*store])
        });
        // What lies in the memory of an argument is written once nothing reads that any more.
        let is_read = |reg: &usize| matches!(self.s.kernel.tape[*reg].op, KernelOp::Load(_));
        let waits = self.s.in_place && needs.computed.iter().any(is_read);
        match direct.filter(|_| is_map && !waits) {
            Some(store) => {
                stored[store] = true;
                Place::Memory(self.store_access[store])
            }
            None => self.tile(),
        }
    }

    /// What a pass that computes may ask for: where it, or a later one, stores, and what is read next, for which memory would
    /// else be idle until then. Both lie in memory as in registers.
    fn ahead(&self) -> Option<[Place; 2]> {
        let s = self.s;
        let is_near = |access: u16| {
            self.is_direct(access) && self.accesses[access as usize].rows == RowWalk::Flat
        };
        let loads = s.kernel.tape.iter().enumerate().filter(|(reg, inst)| {
            s.rates[*reg] == Rate::Col && matches!(inst.op, KernelOp::Load(_))
        });
        let mut loads = loads.map(|(reg, _)| self.access_of[reg]);
        let next = Place::Next(loads.find(|access| is_near(*access))?);
        let stores = s.kernel.stores.iter().zip(&self.store_access);
        let mut stores = stores.filter(|(store, _)| s.store_pass(store).is_some());
        let stored = stores.find(|(_, access)| is_near(**access));
        Some([stored.map_or(next, |(_, access)| Place::Memory(*access)), next])
    }

    fn is_stored(&self, reg: usize) -> bool {
        self.s.kernel.stores.iter().any(|store| self.s.stored(store) == reg)
    }

    /// Whether a tile of the access lies in memory as in registers.
    fn is_direct(&self, access: u16) -> bool {
        let a = &self.accesses[access as usize];
        a.elem_bytes == a.register_bytes && a.step == 1 && a.rows != RowWalk::Broken
    }

    /// What waits for `reg`; `None` stands for all values that this pass does not compute.
    fn feed(
        &mut self,
        reg: Option<usize>,
        needs: &PassNeeds,
        stored: &mut [bool],
        ops: &mut Vec<Op>,
    ) {
        let is_fed = |from: usize| match reg {
            Some(reg) => from == reg,
            None => !needs.computed.contains(&from),
        };
        for (reduction, inst) in needs.reductions.iter().map(|r| (*r, &self.s.kernel.tape[*r])) {
            let KernelOp::Reduce(op, from) = inst.op else { continue };
            if is_fed(from.index()) {
                let reducer = reducer_of(op, inst.dtype.class());
                let f = match self.s.axis {
                    VectorAxis::Along => reducer.along,
                    VectorAxis::Across => reducer.across,
                };
                let acc = self.accs[&reduction];
                self.weight += 1;
                ops.push(match factors(self.s, from.index()) {
                    Some(factors) if self.pairs.is_dot(from.index()) => {
                        self.weight += 1;
                        let from = factors.map(|factor| self.places[factor.index()]);
                        Op::Dot { f: dot_f32(), acc, from }
                    }
                    _ => Op::Fold { f, acc, from: self.places[from.index()] },
                });
            }
        }
        if self.s.in_place {
            return;
        }
        for &store in &needs.stores {
            let from = self.s.stored(&self.s.kernel.stores[store]);
            if is_fed(from) && !std::mem::replace(&mut stored[store], true) {
                self.store(store, ops);
            }
        }
    }

    /// What is written once a row.
    pub(super) fn row_stores(&mut self) -> Vec<Op> {
        let mut ops = Vec::new();
        for (i, store) in self.s.kernel.stores.iter().enumerate() {
            if self.s.store_pass(store).is_none() {
                self.store(i, &mut ops);
            }
        }
        ops
    }

    fn store(&mut self, store: usize, ops: &mut Vec<Op>) {
        let to = &self.s.kernel.stores[store].to;
        let reg = self.s.stored(&self.s.kernel.stores[store]);
        let access = self.store_access[store];
        let mut from = self.places[reg];
        // One register for all, and several places to fill.
        if self.s.is_one(reg) && self.s.axis == VectorAxis::Across {
            let tile = self.tile();
            let f = splat_of(self.s.kernel.tape[reg].dtype.class());
            ops.push(Op::Map { f, ins: [from, Place::Nowhere, Place::Nowhere], out: tile });
            from = tile;
        }
        self.weight += 1;
        ops.push(Op::Store { access, store: store_of(to.dtype), from });
        if from != self.places[reg] {
            self.release(from);
        }
    }

    fn access(&mut self, access: &kernel::Access, is_out: bool) -> u16 {
        let Affine { offset, ref strides } = access.at;
        let s = self.s;
        let (space, rows) = (&s.kernel.space, s.row_axes);
        let is_flat = (1..rows).all(|i| strides[i - 1] == strides[i] * space[i] as isize);
        let vector_axis = match s.axis {
            VectorAxis::Along => space.len().checked_sub(1),
            VectorAxis::Across => rows.checked_sub(1),
        };
        self.accesses.push(Access {
            operand: access.arg,
            is_out,
            elem_bytes: access.dtype.size_bytes(),
            register_bytes: register_bytes(access.dtype),
            offset,
            strides: strides.clone(),
            step: vector_axis.map_or(1, |axis| strides[axis]),
            rows: match (is_flat, s.crossing) {
                (true, _) => RowWalk::Flat,
                (false, true) => RowWalk::Broken,
                (false, false) => RowWalk::Axes,
            },
        });
        self.accesses.len() as u16 - 1
    }
}
