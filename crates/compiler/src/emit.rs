//! From regions and copies to kernels: one tape per kernel, every operand an affine access.

use crate::analysis::{Analysis, Edge, Kind, Located, edge, squeezed};
use crate::kernel::{Access, Affine, KernelOp, Reg};
use crate::region::{Regions, Space};
use crate::{Layout, finish};
use metal_candle_graph::{DType, NodeId, Operation, Scalar, Shape};
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

/// One step before buffers are known: operands are nodes with layouts.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pub(crate) work: crate::Work,
    pub(crate) args: Vec<Located>,
    pub(crate) outs: Vec<Located>,
    pub(crate) label: String,
}

/// What storing decisions a kernel may rely on.
pub(crate) struct Stored<'a> {
    pub(crate) a: &'a Analysis<'a>,
    pub(crate) regions: &'a Regions,
    pub(crate) stored: Vec<bool>,
    /// As [`cheap`].
    cheap: Vec<bool>,
}

/// The most instructions (an `exp` counts as three) that are computed again rather than kept.
const RECOMPUTE_LIMIT: u32 = 8;

impl<'a> Stored<'a> {
    pub(crate) fn new(a: &'a Analysis<'a>, regions: &'a Regions, cheap: Vec<bool>) -> Stored<'a> {
        Stored { a, regions, stored: vec![false; a.g.len()], cheap }
    }

    fn in_memory(&self, id: NodeId) -> bool {
        match self.a.kind(id) {
            Kind::Input | Kind::Call => true,
            Kind::Map | Kind::Reduce | Kind::Virtual => self.stored[id.index()],
            Kind::View | Kind::Dead => panic!("metal-candle bug: {id:?} has no memory of its own"),
        }
    }

    /// How a kernel of `region` gets at an operand.
    fn source(&self, region: Option<usize>, operand: &Located) -> Source {
        let id = operand.base;
        if region.is_some() && self.regions.of(id) == region {
            return Source::Register;
        }
        if self.in_memory(id) {
            return Source::Memory;
        }
        if self.a.kind(id) == Kind::Virtual {
            return Source::Position;
        }
        let direct = || edge(&operand.layout, self.a.node(id).shape()) == Edge::Direct;
        if self.cheap[id.index()] && direct() { Source::Register } else { Source::Missing }
    }

    /// Makes everything that the values `roots` of a kernel of `region` read be stored; what was not before goes to `found`.
    pub(crate) fn require_for(
        &mut self,
        region: Option<usize>,
        roots: &[NodeId],
        found: &mut Vec<NodeId>,
    ) {
        let mut seen = rustc_hash::FxHashSet::default();
        let mut stack = roots.to_vec();
        while let Some(id) = stack.pop() {
            if !seen.insert(id) {
                continue;
            }
            for operand in self.a.operands(id) {
                self.require_operand(region, &operand, &mut stack, found);
            }
        }
    }

    /// As [`Stored::require_for`], for one operand; operands to be computed in the kernel go to `inner`.
    pub(crate) fn require_operand(
        &mut self,
        region: Option<usize>,
        operand: &Located,
        inner: &mut Vec<NodeId>,
        found: &mut Vec<NodeId>,
    ) {
        match self.source(region, operand) {
            Source::Register => inner.push(operand.base),
            Source::Memory => {}
            Source::Position => inner.push(operand.base),
            Source::Missing => self.require(operand.base, found),
        }
    }

    /// Makes `id` be stored.
    pub(crate) fn require(&mut self, id: NodeId, found: &mut Vec<NodeId>) {
        if !self.in_memory(id) {
            self.stored[id.index()] = true;
            found.push(id);
        }
    }
}

enum Source {
    /// Computed in this kernel.
    Register,
    Memory,
    /// Computed from the element's position.
    Position,
    /// Neither: it has to be stored first.
    Missing,
}

/// Which maps are worth computing again instead of keeping in memory, by node.
pub(crate) fn cheap(a: &Analysis) -> Vec<bool> {
    let mut cost = vec![u32::MAX; a.g.len()];
    for id in a.g.ids().filter(|id| a.kind(*id) == Kind::Map) {
        cost[id.index()] = recompute_cost(a, id, &cost);
    }
    cost.iter().map(|c| *c <= RECOMPUTE_LIMIT).collect()
}

/// The cost of computing a map again from what is in memory anyway.
fn recompute_cost(a: &Analysis, id: NodeId, cost: &[u32]) -> u32 {
    let node = a.node(id);
    let own = match node.op {
        Operation::Unary(f) if !is_arithmetic(f) => 3,
        _ => 1,
    };
    a.operands(id).fold(own, |sum: u32, o| {
        let base = o.base;
        let part = match a.kind(base) {
            Kind::Input | Kind::Call => 0,
            Kind::Virtual if matches!(a.node(base).op, Operation::Random { .. }) => 3,
            Kind::Virtual => 0,
            // A row statistic is small enough to be kept.
            _ if a.node(base).shape().len() * 8 <= node.shape().len() => 0,
            Kind::Map if edge(&o.layout, a.node(base).shape()) == Edge::Direct => {
                cost[base.index()]
            }
            _ => u32::MAX,
        };
        sum.saturating_add(part)
    })
}

fn is_arithmetic(f: metal_candle_graph::UnaryOp) -> bool {
    use metal_candle_graph::UnaryOp::*;
    matches!(f, Neg | Abs | Sign | Recip | Sqr | Sqrt | Rsqrt | Relu | Floor | Ceil | Round)
}

/// Builds one kernel.
pub(crate) struct Emitter<'a> {
    s: &'a Stored<'a>,
    region: Option<usize>,
    space: Space,
    memo: FxHashMap<NodeId, Reg>,
    draft: finish::Tape,
    args: Vec<NodeId>,
    names: Vec<&'static str>,
}

impl<'a> Emitter<'a> {
    fn new(s: &'a Stored<'a>, region: Option<usize>, space: Space) -> Emitter<'a> {
        let draft = finish::Tape::new(&space);
        let memo = FxHashMap::default();
        Emitter { s, region, space, memo, draft, args: Vec::new(), names: Vec::new() }
    }

    /// The kernel of a region; it stores those of its nodes that are marked.
    pub(crate) fn region(s: &'a Stored<'a>, index: usize) -> Draft {
        let region = s.regions.get(index);
        let mut e = Emitter::new(s, Some(index), region.space.clone());
        let mut outs = Vec::new();
        for id in region.nodes.iter().filter(|id| s.stored[id.index()]) {
            let reg = e.node(*id);
            let layout = Layout::contiguous(*s.a.node(*id).shape());
            e.store(reg, outs.len(), s.a.node(*id).ty.dtype, &layout);
            outs.push(Located { base: *id, layout });
        }
        e.finish(outs)
    }

    /// A kernel that writes the elements of `value` to the places of `out`, of the same shape.
    pub(crate) fn copy(s: &'a Stored<'a>, value: Located, out: Located, dtype: DType) -> Draft {
        let space = Space::maps(&value.layout.shape);
        let mut e = Emitter::new(s, None, space);
        let reg = e.operand(&value);
        e.store(reg, 0, dtype, &out.layout);
        if e.names.is_empty() {
            e.names.push("copy");
        }
        e.finish(vec![out])
    }

    /// A kernel that stores a value of [`Kind::Virtual`].
    pub(crate) fn position(s: &'a Stored<'a>, own: Located) -> Draft {
        let mut e = Emitter::new(s, None, Space::maps(&own.layout.shape));
        let reg = e.positioned(&own);
        let node = s.a.node(own.base);
        e.store(reg, 0, node.ty.dtype, &own.layout);
        e.names.push(node.op.name());
        e.finish(vec![own])
    }

    /// A kernel that fills `out` with a constant.
    pub(crate) fn fill(s: &'a Stored<'a>, out: Located, value: Scalar) -> Draft {
        let mut e = Emitter::new(s, None, Space::maps(&out.layout.shape));
        let reg = e.draft.push(KernelOp::Const(value), value.dtype());
        e.store(reg, 0, value.dtype(), &out.layout);
        e.names.push("fill");
        e.finish(vec![out])
    }

    fn finish(self, outs: Vec<Located>) -> Draft {
        let whole = |id: &NodeId| Located {
            base: *id,
            layout: Layout::contiguous(*self.s.a.node(*id).shape()),
        };
        Draft {
            args: self.args.iter().map(whole).collect(),
            outs,
            label: label(&self.names),
            work: crate::Work::Kernel(self.draft.finish()),
        }
    }

    fn store(&mut self, reg: Reg, out: usize, dtype: DType, layout: &Layout) {
        let at = self.affine(layout);
        self.draft.store(reg, Access { arg: out as u32, dtype, at });
    }

    /// The register of `id`, computed in this kernel.
    fn node(&mut self, id: NodeId) -> Reg {
        if let Some(reg) = self.memo.get(&id) {
            return *reg;
        }
        let node = self.s.a.node(id);
        let regs: SmallVec<[Reg; 3]> =
            self.s.a.operands(id).map(|operand| self.operand(&operand)).collect();
        let op = match node.op {
            Operation::Unary(f) => KernelOp::Unary(f, regs[0]),
            Operation::Binary(f) => KernelOp::Binary(f, regs[0], regs[1]),
            Operation::Select => KernelOp::Select(regs[0], regs[1], regs[2]),
            Operation::Cast(_) => KernelOp::Cast(regs[0]),
            // Only extents of 1 are reduced: the operand is the result.
            Operation::Reduce { .. } if self.space.reduced.is_empty() => return regs[0],
            Operation::Reduce { op, .. } => KernelOp::Reduce(op, regs[0]),
            op => panic!("metal-candle bug: {} in a region", op.name()),
        };
        self.names.push(node.op.name());
        let reg = self.draft.push(op, node.ty.dtype);
        self.memo.insert(id, reg);
        reg
    }

    fn operand(&mut self, operand: &Located) -> Reg {
        let node = self.s.a.node(operand.base);
        let dtype = node.ty.dtype;
        match self.s.source(self.region, operand) {
            Source::Register => self.node(operand.base),
            Source::Memory => {
                let arg = self.arg(operand.base);
                let at = self.affine(&operand.layout);
                self.draft.push(KernelOp::Load(Access { arg, dtype, at }), dtype)
            }
            Source::Position => self.positioned(operand),
            Source::Missing => panic!("metal-candle bug: {:?} was not stored", operand.base),
        }
    }

    /// An operand of [`Kind::Virtual`]: the affine map of its layout is the element's number.
    fn positioned(&mut self, operand: &Located) -> Reg {
        let node = self.s.a.node(operand.base);
        let at = self.affine(&operand.layout);
        let op = match node.op {
            Operation::Const(c) => KernelOp::Const(c),
            Operation::Iota { .. } => KernelOp::Index(at),
            Operation::Random { distribution, stream, .. } => {
                let seed = self.operand(&self.s.a.operand(operand.base, 0));
                KernelOp::Random { distribution, stream, seed, at }
            }
            op => panic!("metal-candle bug: {} has no position", op.name()),
        };
        self.draft.push(op, node.ty.dtype)
    }

    fn arg(&mut self, base: NodeId) -> u32 {
        let at = self.args.iter().position(|a| *a == base).unwrap_or_else(|| {
            self.args.push(base);
            self.args.len() - 1
        });
        at as u32
    }

    /// `layout` over the axes of the kernel: rows first, then columns.
    fn affine(&self, layout: &Layout) -> Affine {
        let dims = squeezed(&layout.shape);
        let n = self.space.full.len();
        let kept = |axis: &usize| !self.space.reduced.contains(axis);
        let rows: SmallVec<[usize; 4]> = (0..n).filter(kept).collect();
        let mut strides = SmallVec::from_elem(0, n);
        if layout.shape.is_empty() {
            // No element: walked along every axis, or it would be read once a row.
            strides.fill(1);
        } else if dims.len() == n {
            let order = rows.iter().chain(&self.space.reduced);
            for (to, axis) in order.enumerate() {
                strides[to] = layout.strides[dims[*axis].0];
            }
        } else if !dims.is_empty() {
            debug_assert_eq!(dims.len(), rows.len(), "metal-candle bug: {layout:?}");
            for (to, (dim, _)) in dims.iter().enumerate() {
                strides[to] = layout.strides[*dim];
            }
        }
        Affine { offset: layout.offset, strides }
    }
}

impl Space {
    /// The space of a map over `shape`.
    pub(crate) fn maps(shape: &Shape) -> Space {
        let full = squeezed(shape).into_iter().map(|(_, e)| e).collect();
        Space { full, reduced: SmallVec::new() }
    }
}

/// The operations of a kernel, for people.
fn label(names: &[&'static str]) -> String {
    const SHOWN: usize = 8;
    let mut text = names[..names.len().min(SHOWN)].join("+");
    if names.len() > SHOWN {
        text += &format!("+{} more", names.len() - SHOWN);
    }
    text
}
