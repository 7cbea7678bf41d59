//! Cross-entropy after a linear layer: some logits at a time, in the workspace.
//!
//! The loss has whole rows of logits, some rows at a time; the gradient of the weight has all rows, some classes at a
//! time, so that no part of it is added to in its own dtype. Logits are held in f32 (f64 for f64), for rounding them would
//! cost the loss its digits; their gradient is rounded to what products multiply, and lies where they did.
//!
//! The kernels know a row by a few numbers in the workspace. None knows which rows or classes it is at, so that all
//! launches but the last have one text.

use super::draft::{BLOCK, Draft, Gpu};
use super::factor::{Matrix, Workspace, at_start, convert, dense, product, rows};
use super::quant::{Blocks, factor, panel, rows_of};
use super::walk::Walk;
use super::{Call, Part, Place};
use crate::Operand;
use crate::render::launch::SIMD;
use crate::render::{Binding, scalar};
use metal_candle_graph::DType;
use metal_candle_graph::composite::CrossEntropyAttrs;
use std::ops::Range;

/// Threads that work on a row of logits.
const ROW_BLOCK: usize = 2 * BLOCK;
/// Accesses that each of them makes at once.
const WIDE: usize = 8;

/// What the losses and the gradients share.
struct Linear<'a> {
    gpu: Gpu<'a>,
    call: &'static str,
    attrs: CrossEntropyAttrs,
    /// `[n, d]`, a factor.
    x: Place,
    /// `[classes, d]`
    weight: Matrix,
    /// In which products are made, and in which logits are held.
    factor: DType,
    acc: DType,
    n: usize,
    d: usize,
    classes: usize,
    /// By row, what is known of it.
    row_state: usize,
    workspace: Workspace,
    parts: Vec<Part>,
}

/// Bytes of `Row<A>`: five numbers and two labels.
fn row_bytes(acc: DType) -> usize {
    (5 * acc.size_bytes()).next_multiple_of(8) + 16
}

impl<'a> Linear<'a> {
    /// `args = [x, weight, labels]`, of which x is the call's argument number `first`.
    fn new(
        gpu: Gpu<'a>,
        call: &'static str,
        attrs: CrossEntropyAttrs,
        args: &[Operand],
        first: u32,
    ) -> Linear<'a> {
        let [n, d] = [0, 1].map(|dim| args[0].layout.shape[dim]);
        let dtype = args[0].dtype;
        let acc = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let classes = attrs.classes(d, &args[1].layout.shape);
        let weight = match attrs.blocks {
            Some(format) => Matrix::Blocks(Blocks::new(first + 1, &args[1], format, [classes, d])),
            None => Matrix::dense(first + 1, &args[1]),
        };
        let factor = match attrs.blocks {
            Some(_) => factor(gpu, dtype),
            None => dtype,
        };
        // Rounded logits are no logits.
        let factor = if gpu.limits.multiplies(factor, acc) { factor } else { acc };
        let (mut workspace, mut parts) = (Workspace::default(), Vec::new());
        let x = (Binding::Arg(first), &args[0]);
        let x = rows_of(gpu, x, factor, &mut workspace, &mut parts);
        let row_state = workspace.take(n * row_bytes(acc));
        Linear {
            gpu,
            call,
            attrs,
            x,
            weight,
            factor,
            acc,
            n,
            d,
            classes,
            row_state,
            workspace,
            parts,
        }
    }

    fn rows(&self, first: usize) -> Binding {
        Binding::Workspace { offset_bytes: self.row_state + first * row_bytes(self.acc) }
    }

    fn row_type(&self) -> &'static str {
        if self.acc == DType::F64 { "Row<f64>" } else { "Row<f32>" }
    }

    /// Looks at the labels, and at what the gradient of each row is to be multiplied with.
    fn start(&mut self, (label, labels): (u32, &Operand), scale: Option<&Operand>) {
        let place =
            |walk: Walk, name, o: &Operand| walk.place(name, o.layout.strides(), o.layout.offset);
        let mut walk = place(Walk::over(&[self.n]), "label", labels);
        let template = if scale.is_some() { "start_scaled_rows" } else { "start_rows" };
        let mut draft = Draft::new(self.gpu, self.call, template).reads(
            Binding::Arg(label),
            "labels",
            labels.dtype,
        );
        if let Some(dy) = scale {
            walk = place(walk, "scale", dy);
            draft = draft.reads(Binding::Arg(0), "scale", dy.dtype);
        }
        let ignored = self.attrs.ignore_index;
        let draft = draft
            .operand(self.rows(0), "rows", self.row_type(), true)
            .reports()
            .constant("CLASSES", self.classes as i64)
            .constant("IGNORES", i64::from(ignored.is_some()))
            .function("i64", "ignored", &integer(ignored.unwrap_or(0)))
            .walk(&walk, 0);
        self.parts.push(draft.finish(self.gpu.elements(self.n)));
    }

    /// A kernel with a block for each row of `logits`, which gives their gradient if it does.
    fn row_kernel(
        &self,
        template: &'static str,
        logits: &Place,
        first_row: usize,
        grad: Option<&Place>,
    ) -> (Draft<'a>, usize) {
        let [rows, cols] = [0, 1].map(|dim| logits.layout.shape[dim]);
        let stride = |place: &Place| place.layout.strides[0] as usize;
        let mut n = 16 / self.acc.size_bytes();
        while !(cols.is_multiple_of(n) && stride(logits).is_multiple_of(n)) {
            n /= 2;
        }
        let epsilon = self.attrs.label_smoothing.as_f64();
        let a_type = scalar::memory_type(self.acc);
        let mut draft = Draft::new(self.gpu, self.call, template)
            .template(n)
            .operand(logits.binding, "logits", a_type, grad.is_some())
            .operand(self.rows(first_row), "rows", self.row_type(), true);
        if let Some(grad) = grad {
            draft = draft
                .writes(grad.binding, "out", grad.dtype)
                .constant("OUT_STRIDE", stride(grad) as i64);
        }
        let draft = draft
            .constant("ROWS", rows as i64)
            .constant("COLS", cols as i64)
            .constant("STRIDE", stride(logits) as i64)
            .constant("CLASSES", self.classes as i64)
            .constant("WIDE", WIDE as i64)
            .constant("SMOOTH", i64::from(epsilon != 0.0))
            .function(acc_name(self.acc), "epsilon", &format!("{epsilon:?}"))
            .walk(&Walk::over(&[rows]), 2 * rows * stride(logits) + WIDE * ROW_BLOCK * n);
        (draft, rows)
    }

    /// Memory that a row's block shares to reduce over it.
    fn shared_bytes(&self) -> usize {
        ROW_BLOCK / SIMD * self.acc.size_bytes()
    }

    /// Takes logits in.
    fn add_logits(&mut self, logits: &Place, first_row: usize) {
        let (draft, rows) = self.row_kernel("add_logits", logits, first_row, None);
        let launch = self.gpu.block_rows(rows, ROW_BLOCK, self.shared_bytes());
        self.parts.push(draft.finish(launch));
    }

    /// Turns logits that were taken in into their gradient, at `out`.
    fn logits_grad(&mut self, logits: &Place, first_row: usize, out: &Place) {
        let (draft, rows) = self.row_kernel("logits_grad", logits, first_row, Some(out));
        self.parts.push(draft.finish(self.gpu.block_rows(rows, ROW_BLOCK, 0)));
    }

    /// Both for whole rows, while each is in the cache.
    fn add_logits_and_grad(&mut self, logits: &Place, first_row: usize, out: &Place) {
        let (draft, rows) = self.row_kernel("add_logits_and_grad", logits, first_row, Some(out));
        let launch = self.gpu.cached_rows(rows, ROW_BLOCK, self.shared_bytes());
        self.parts.push(draft.finish(launch));
    }

    /// From one row of a panel of logits to the next: of a length that products and 16-byte accesses like.
    fn stride(cols: usize) -> usize {
        cols.next_multiple_of(8)
    }

    /// Bytes of a panel.
    fn panel_bytes(&self, rows: usize, cols: usize) -> usize {
        rows * Self::stride(cols) * self.acc.size_bytes()
    }

    /// A panel of logits at `offset_bytes`, and where its gradient replaces it: in the second half of each row's place, if it
    /// takes half of it.
    fn logits(&self, offset_bytes: usize, [rows, cols]: [usize; 2]) -> (Place, Place) {
        let stride = Self::stride(cols);
        let part = |dtype: DType| {
            let (own, whole) = (dtype.size_bytes(), self.acc.size_bytes());
            let row = stride * whole / own;
            at_start(
                &dense(offset_bytes, dtype, [rows, row])
                    .narrow(1, row - stride..row - stride + cols),
            )
        };
        (part(self.acc), part(self.factor))
    }

    /// The weights of these classes as a factor: where they are, or unpacked to `unpacked`.
    fn weights(&mut self, classes: Range<usize>, unpacked: usize) -> Place {
        let (gpu, call, factor) = (self.gpu, self.call, self.factor);
        self.weight.part(gpu, call, (0, classes), factor, unpacked, &mut self.parts)
    }

    fn done(self) -> Call {
        Call { parts: self.parts, workspace_bytes: self.workspace.bytes() }
    }
}

fn acc_name(acc: DType) -> &'static str {
    if acc == DType::F64 { "f64" } else { "f32" }
}

fn integer(x: i64) -> String {
    if x == i64::MIN { "i64(u64(1) << 63)".into() } else { format!("i64({x})") }
}

/// So many of `n` at once that each, of so many bytes, fits.
fn at_once(gpu: Gpu<'_>, n: usize, bytes: usize) -> usize {
    let most = gpu.limits.workspace_bytes / bytes.max(1);
    if n <= most { n.max(1) } else { most.max(1).next_multiple_of(64).min(n) }
}

/// `args = [x, weight, labels]`; outputs: the losses if `losses`, then the gradient rows if `grad_x`.
pub(super) fn loss(
    gpu: Gpu<'_>,
    args: &[Operand],
    outs: &[Operand],
    attrs: CrossEntropyAttrs,
    [losses, grad_x]: [bool; 2],
) -> Call {
    let mut it = Linear::new(gpu, "linear_cross_entropy", attrs, args, 0);
    if it.n == 0 {
        return it.done();
    }
    it.start((2, &args[2]), None);
    let grad = grad_x.then(|| {
        let at = outs.len() - 1;
        let layout =
            rows(&outs[at].layout).expect("metal-candle bug: a gradient that is not dense");
        Place { binding: Binding::Out(at as u32), dtype: outs[at].dtype, layout }
    });
    let chunk = at_once(gpu, it.n, it.panel_bytes(1, it.classes));
    let panel_at = it.workspace.take(it.panel_bytes(chunk, it.classes));
    let bytes = it.d * it.factor.size_bytes();
    // A weight that is read where it lies is one panel.
    let panel =
        if it.weight.is(it.factor) { it.classes.max(1) } else { panel(gpu, it.classes, bytes) };
    let unpacked = it.workspace.take(if it.weight.is(it.factor) { 0 } else { panel * bytes });
    for first in (0..it.n).step_by(chunk) {
        let rows = first..(first + chunk).min(it.n);
        let x = it.x.narrow(0, rows.clone());
        let (logits, dlogits) = it.logits(panel_at, [rows.len(), it.classes]);
        let mut last = None;
        for start in (0..it.classes).step_by(panel) {
            let classes = start..(start + panel).min(it.classes);
            let w = it.weights(classes.clone(), unpacked);
            it.parts.push(product(&x, &w.transposed(), &logits.narrow(1, classes.clone()), false));
            last = Some((classes, w));
        }
        let Some(grad) = &grad else {
            it.add_logits(&logits, first);
            continue;
        };
        it.add_logits_and_grad(&logits, first, &dlogits);
        let grad = grad.narrow(0, rows);
        for start in (0..it.classes).step_by(panel) {
            let classes = start..(start + panel).min(it.classes);
            let w = match &last {
                Some((of, w)) if *of == classes && panel >= it.classes => w.clone(),
                _ => it.weights(classes.clone(), unpacked),
            };
            it.parts.push(product(&dlogits.narrow(1, classes), &w, &grad, start > 0));
        }
    }
    if losses {
        write_losses(&mut it, &outs[0]);
    }
    it.done()
}

fn write_losses(it: &mut Linear<'_>, out: &Operand) {
    let epsilon = it.attrs.label_smoothing.as_f64();
    let walk = Walk::over(&[it.n]).place("to", out.layout.strides(), out.layout.offset);
    let draft = Draft::new(it.gpu, it.call, "losses")
        .operand(it.rows(0), "rows", it.row_type(), false)
        .writes(Binding::Out(0), "out", out.dtype)
        .constant("CLASSES", it.classes as i64)
        .constant("SMOOTH", i64::from(epsilon != 0.0))
        .function(acc_name(it.acc), "epsilon", &format!("{epsilon:?}"))
        .walk(&walk, 0);
    it.parts.push(draft.finish(it.gpu.elements(it.n)));
}

/// `args = [dy, x, weight, labels]`
pub(super) fn grad_weight(
    gpu: Gpu<'_>,
    args: &[Operand],
    out: &Operand,
    attrs: CrossEntropyAttrs,
) -> Call {
    let mut it = Linear::new(gpu, "linear_cross_entropy_grad_weight", attrs, &args[1..], 1);
    it.start((3, &args[3]), Some(&args[0]));
    let out = Place { binding: Binding::Out(0), dtype: out.dtype, layout: out.layout };
    let at_once = at_once(gpu, it.classes, it.panel_bytes(it.n, 8) / 8);
    let panel_at = it.workspace.take(it.panel_bytes(it.n, at_once));
    let bytes = it.d * it.factor.size_bytes();
    let unpacked = it.workspace.take(if it.weight.is(it.factor) { 0 } else { at_once * bytes });
    let direct = gpu.limits.multiplies(it.factor, out.dtype);
    let wide = it.workspace.take(if direct { 0 } else { at_once * it.d * it.acc.size_bytes() });
    let panels = (0..it.classes).step_by(at_once);
    let x = it.x.clone();
    for gradient in [false, true] {
        for start in panels.clone() {
            let classes = start..(start + at_once).min(it.classes);
            let (panel, dlogits) = it.logits(panel_at, [it.n, classes.len()]);
            if !gradient || at_once < it.classes {
                let w = it.weights(classes.clone(), unpacked);
                it.parts.push(product(&x, &w.transposed(), &panel, false));
            }
            if !gradient {
                it.add_logits(&panel, 0);
                continue;
            }
            it.logits_grad(&panel, 0, &dlogits);
            let to = out.narrow(0, classes.clone());
            if direct {
                it.parts.push(product(&dlogits.transposed(), &x, &to, false));
            } else {
                let wide = dense(wide, it.acc, [classes.len(), it.d]);
                it.parts.push(product(&dlogits.transposed(), &x, &wide, false));
                it.parts.extend(convert(gpu, it.call, &wide, &to));
            }
        }
    }
    it.done()
}
