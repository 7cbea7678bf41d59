//! Which products run as one call with their scales, their addend and their bias: `out = addend + bias + alpha · a b + ..`.
//!
//! This is how LoRA is lowered: `x W + s (x A) B` is the thin product `x A`, and the sum of two products, as the gradient of x is;
//! or, where a target has no call for such sums, a product that accumulates onto the other one's result. No operation of
//! the graph knows about it. Targets may have a call for the thin two ([`crate::low_rank`]).

use crate::analysis::{Analysis, Kind, Located};
use crate::{Layout, Target};
use metal_candle_graph::{BinaryOp, DType, NodeId, Operation, Shape};
use rustc_hash::FxHashMap;

/// A product, or a sum of some, as it will be called.
#[derive(Clone, Debug)]
pub(crate) struct Gemm {
    pub(crate) a: Located,
    pub(crate) b: Located,
    pub(crate) alpha: f64,
    /// What is added to it by the same call.
    pub(crate) more: Vec<Term>,
    /// The stored result onto which this one accumulates, in place.
    pub(crate) addend: Option<NodeId>,
    /// `[n]`, dense: added to every row.
    pub(crate) bias: Option<Located>,
    /// The product that gives `a`, where one call computes both.
    pub(crate) low: Option<NodeId>,
    /// Whether it is such a product: no call of its own computes it.
    pub(crate) is_low: bool,
}

/// `alpha · a b`
#[derive(Clone, Copy, Debug)]
pub(crate) struct Term {
    a: Located,
    b: Located,
    alpha: f64,
}

impl Gemm {
    fn of(a: Located, b: Located, alpha: f64) -> Gemm {
        Gemm { a, b, alpha, more: Vec::new(), addend: None, bias: None, low: None, is_low: false }
    }

    fn terms(&self) -> impl Iterator<Item = Term> + '_ {
        let first = Term { a: self.a, b: self.b, alpha: self.alpha };
        std::iter::once(first).chain(self.more.iter().copied())
    }

    /// a and b of the first product, of the second ...
    pub(crate) fn factors(&self) -> impl Iterator<Item = Located> + '_ {
        self.terms().flat_map(|term| [term.a, term.b])
    }

    /// What its call reads.
    pub(crate) fn operands(&self) -> impl Iterator<Item = Located> + '_ {
        self.factors().chain(self.bias)
    }

    pub(crate) fn alphas(&self) -> impl Iterator<Item = f64> + '_ {
        self.terms().map(|term| term.alpha)
    }

    /// Of the product, in whatever shape it is seen.
    pub(crate) fn shape(&self) -> Shape {
        let (a, b) = (self.a.layout.shape, self.b.layout.shape);
        a.with(a.rank() - 1, b[b.rank() - 1])
    }

    fn scale(&mut self, by: f64) {
        self.alpha *= by;
        self.more.iter_mut().for_each(|term| term.alpha *= by);
    }

    /// Whether nothing is added to its product.
    pub(crate) fn is_plain(&self) -> bool {
        self.addend.is_none() && self.bias.is_none()
    }

    /// Whether both give results of one shape, and so few that one call adds them up.
    fn adds_up_with(&self, other: &Gemm, target: &Target) -> bool {
        let products = 2 + self.more.len() + other.more.len();
        let has_bias = self.bias.is_some() || other.bias.is_some();
        products <= target.max_products && !has_bias && self.shape() == other.shape()
    }
}

/// The products, by the node that holds their final result.
pub(crate) type Gemms = FxHashMap<NodeId, Gemm>;

/// A product that sums over at least so many takes longer to compute than its result to be read and written.
const DEEP: usize = 1024;

/// Finds the products. Their results become calls; the nodes that they absorb are dead afterwards. Two that are added are one
/// call, or the one of [`goes_last`] accumulates onto the other.
pub(crate) fn find(a: &mut Analysis, target: &Target) -> Gemms {
    let mut gemms = Gemms::default();
    for id in a.g.ids() {
        if !matches!(a.kind(id), Kind::Call | Kind::Map) {
            continue;
        }
        match a.node(id).op {
            Operation::Dot => {
                let (lhs, l) = unscaled(a, a.operand(id, 0));
                let (rhs, r) = unscaled(a, a.operand(id, 1));
                gemms.insert(id, Gemm::of(lhs, rhs, l * r));
            }
            Operation::Binary(BinaryOp::Mul) => absorb_scale(a, id, &mut gemms),
            Operation::Binary(BinaryOp::Add) => absorb_term(a, id, &mut gemms, target),
            _ => {}
        }
    }
    gemms
}

/// `x · const` as x and the constant, where x may be read instead.
fn unscaled(a: &Analysis, operand: Located) -> (Located, f64) {
    let (mut located, mut scale) = (operand, 1.0);
    // One that is a call has absorbed its product: nothing else is left to be read.
    while a.kind(located.base) == Kind::Map
        && a.node(located.base).op == Operation::Binary(BinaryOp::Mul)
    {
        match scaled_by(a, located.base) {
            // The layout of the product serves x only if x is laid out as the product would be.
            Some((x, s)) if x.layout.is_contiguous() && a.kind(x.base) != Kind::Virtual => {
                located.base = x.base;
                scale *= s;
            }
            _ => break,
        }
    }
    (located, scale)
}

/// The other operand and the value, if `id` is a product with a constant.
fn scaled_by(a: &Analysis, id: NodeId) -> Option<(Located, f64)> {
    let value = |i: usize| a.constant(a.node(id).inputs[i]).map(|c| c.as_f64());
    match (value(0), value(1)) {
        (None, Some(c)) => Some((a.operand(id, 0), c)),
        (Some(c), None) => Some((a.operand(id, 1), c)),
        _ => None,
    }
}

/// A product, quantised ones included, that only `reader` reads, element for element.
fn sole_product(a: &Analysis, gemms: &Gemms, operand: Located, reader: NodeId) -> Option<NodeId> {
    let base = operand.base;
    // In whatever shape: a batch of rows is one product of all of them.
    let len = a.node(base).shape().len();
    let whole = operand.layout.is_contiguous() && operand.layout.shape.len() == len;
    let same_dtype = a.node(base).ty.dtype == a.node(reader).ty.dtype;
    let sole = a.uses[base.index()] == 1 && whole && same_dtype;
    let quantised = matches!(a.node(base).op, Operation::QuantDot { .. });
    (sole && (quantised || gemms.contains_key(&base))).then_some(base)
}

fn absorb_scale(a: &mut Analysis, id: NodeId, gemms: &mut Gemms) {
    let Some((x, scale)) = scaled_by(a, id) else { return };
    let Some(base) = sole_product(a, gemms, x, id) else { return };
    if gemms.get(&base).is_some_and(Gemm::is_plain) {
        move_result(a, gemms, base, id, |gemm| gemm.scale(scale));
    }
}

/// What is added to a product: a bias, or another product.
fn absorb_term(a: &mut Analysis, id: NodeId, gemms: &mut Gemms, target: &Target) {
    let is_bias = target.adds_bias && absorb_bias(a, id, gemms);
    if !is_bias {
        absorb_addend(a, id, gemms, target);
    }
}

/// Whether `id` is a product and a bias that lies in memory; that is added by the product, or by the one onto which it accumulates.
fn absorb_bias(a: &mut Analysis, id: NodeId, gemms: &mut Gemms) -> bool {
    let operands = [a.operand(id, 0), a.operand(id, 1)];
    let products = operands.map(|operand| sole_product(a, gemms, operand, id));
    let (base, bias) = match products {
        [Some(base), None] => (base, operands[1]),
        [None, Some(base)] => (base, operands[0]),
        _ => return false,
    };
    let Some(bias) = bias_of(a, bias) else { return false };
    // A quantised product adds none.
    let mut first = base;
    while let Some(onto) = gemms.get(&first).and_then(|gemm| gemm.addend)
        && gemms.contains_key(&onto)
    {
        first = onto;
    }
    let Some(gemm) = gemms.get_mut(&first) else { return false };
    let cols = gemm.b.layout.shape.last();
    if gemm.bias.is_some() || !gemm.more.is_empty() || cols != bias.layout.shape.last() {
        return false;
    }
    gemm.bias = Some(bias);
    move_result(a, gemms, base, id, |_| {});
    true
}

/// An input that gives every row the same dense vector, as that vector.
fn bias_of(a: &Analysis, value: Located) -> Option<Located> {
    let Located { base, layout } = value;
    let last = layout.shape.rank().checked_sub(1)?;
    let is_repeated = (0..last).all(|d| layout.shape[d] == 1 || layout.strides[d] == 0);
    let is_dense = layout.shape[last] > 1 && layout.strides[last] == 1;
    let is_float = matches!(a.node(base).ty.dtype, DType::F32 | DType::F16 | DType::BF16);
    let shape = Shape::new(&[layout.shape[last]]).ok()?;
    let vector = Layout { offset: layout.offset, ..Layout::contiguous(shape) };
    let suits = a.kind(base) == Kind::Input && is_repeated && is_dense && is_float;
    suits.then_some(Located { base, layout: vector })
}

/// Whether this is a GEMM whose addend is still free; a quantised product has none.
fn starts_from_nothing(gemms: &Gemms, id: NodeId) -> bool {
    gemms.get(&id).is_some_and(|gemm| gemm.addend.is_none())
}

fn absorb_addend(a: &mut Analysis, id: NodeId, gemms: &mut Gemms, target: &Target) {
    let (l, r) = (a.operand(id, 0), a.operand(id, 1));
    let (left, right) = (sole_product(a, gemms, l, id), sole_product(a, gemms, r, id));
    let (Some(left), Some(right)) = (left, right) else { return };
    // The product that starts from nothing accumulates onto the other.
    let (onto, product) = match [left, right].map(|product| starts_from_nothing(gemms, product)) {
        [true, true] if goes_last(a, gemms, left, right, target) => (right, left),
        [_, true] => (left, right),
        [true, false] => (right, left),
        [false, false] => return,
    };
    let adds_up = gemms.get(&onto).is_some_and(|base| base.adds_up_with(&gemms[&product], target));
    if !adds_up {
        return move_result(a, gemms, product, id, |gemm| gemm.addend = Some(onto));
    }
    let product = take(a, gemms, product);
    move_result(a, gemms, onto, id, |gemm| gemm.more.extend(product.terms()));
}

/// Whether `left` is to accumulate onto `right`, where each could onto the other.
///
/// A branch goes last where it is one call with the product that it begins with. Elsewhere, what is known of a result that no
/// cache holds goes into it first: the deep product hides that it reads it, as a thin one cannot. Else the later one can wait.
fn goes_last(a: &Analysis, gemms: &Gemms, left: NodeId, right: NodeId, target: &Target) -> bool {
    let depth = |id| gemms[&id].a.layout.shape.last().unwrap_or(0);
    let is_branch = |id| depth(id) <= target.max_low_rank && gemms.contains_key(&gemms[&id].a.base);
    let ty = a.node(left).ty;
    let is_far = ty.shape.len() * ty.dtype.size_bytes() >= target.cache_bytes;
    let hides = |id| is_far && depth(id) >= DEEP;
    match [is_branch(left), is_branch(right)] {
        [true, false] => true,
        [false, true] => false,
        _ if hides(left) != hides(right) => hides(left),
        _ => left > right,
    }
}

/// The result of `from` is now that of `to`, which no kernel computes any more.
fn move_result(
    a: &mut Analysis,
    gemms: &mut Gemms,
    from: NodeId,
    to: NodeId,
    change: impl FnOnce(&mut Gemm),
) {
    let mut gemm = take(a, gemms, from);
    change(&mut gemm);
    a.kinds[to.index()] = Kind::Call;
    gemms.insert(to, gemm);
}

/// The product whose result is not that of `from` any more.
fn take(a: &mut Analysis, gemms: &mut Gemms, from: NodeId) -> Gemm {
    a.kinds[from.index()] = Kind::Dead;
    gemms.remove(&from).expect("metal-candle bug: no gemm to absorb")
}
