//! From the number of a row, a column or an element to where an access goes.

use super::{Team, accesses};
use crate::kernel::{Affine, Kernel, KernelOp, Lanes};

/// The axis along which neighbouring threads compute neighbouring elements.
pub(super) fn fast_axis(kernel: &Kernel, team: Team) -> Option<usize> {
    let last = kernel.space.len().checked_sub(1)?;
    let across = team == Team::Element && kernel.lanes == Lanes::Rows;
    Some(if across && kernel.row_axes > 0 { kernel.row_axes - 1 } else { last })
}

/// The axes of `range`, outermost first, the fastest one last.
pub(super) fn axes(range: std::ops::Range<usize>, fast: Option<usize>) -> Vec<usize> {
    let slow = range.clone().filter(|axis| Some(*axis) != fast);
    slow.chain(fast.filter(|axis| range.contains(axis))).collect()
}

/// What the index along each axis is called; `None` where no name is in scope.
#[derive(Clone)]
pub(super) struct Names(Vec<Option<String>>);

impl Names {
    pub(super) fn new(kernel: &Kernel) -> Names {
        Names(vec![None; kernel.space.len()])
    }

    /// Takes the number `flat` of a position over `axes` apart: the lines that compute the indices that are used.
    pub(super) fn split(&mut self, kernel: &Kernel, axes: &[usize], flat: &str) -> Vec<String> {
        if let [axis] = axes {
            self.0[*axis] = Some(flat.to_owned());
            return Vec::new();
        }
        let (mut lines, mut inner) = (Vec::new(), 1);
        for (place, axis) in axes.iter().enumerate().rev() {
            // Of nothing, no index is computed; but the text must not divide by 0.
            let extent = kernel.space[*axis].max(1);
            if affines(kernel).any(|at| at.strides[*axis] != 0) {
                let from = if inner == 1 { flat.into() } else { format!("{flat} / {inner}") };
                let index = if place == 0 { from } else { format!("{from} % {extent}") };
                lines.push(format!("i{axis} = {index}"));
                self.0[*axis] = Some(format!("i{axis}"));
            }
            inner *= extent;
        }
        lines.reverse();
        lines
    }

    /// `offset + Σ index·stride` over the axes in scope, then `more`: terms `(name, stride)`.
    pub(super) fn offset(&self, at: &Affine, more: Option<(&str, isize)>) -> String {
        let named = self.0.iter().zip(&at.strides);
        let terms = named.filter_map(|(name, stride)| Some((name.as_deref()?, *stride)));
        let mut text = String::new();
        for (name, stride) in terms.chain(more).filter(|(_, stride)| *stride != 0) {
            let factor = match stride.unsigned_abs() {
                1 => name.to_owned(),
                n => format!("{name} * {n}"),
            };
            add(&mut text, stride < 0, &factor);
        }
        if at.offset != 0 || text.is_empty() {
            add(&mut text, at.offset < 0, &at.offset.unsigned_abs().to_string());
        }
        text
    }
}

fn add(text: &mut String, negative: bool, term: &str) {
    match (text.is_empty(), negative) {
        (true, false) => {}
        (true, true) => text.push('-'),
        (false, false) => text.push_str(" + "),
        (false, true) => text.push_str(" - "),
    }
    text.push_str(term);
}

/// The narrowest type that counts what the kernel counts: 32 bits but for large tensors.
pub(super) fn count_type(kernel: &Kernel, threads: usize) -> &'static str {
    let reach = |at: &Affine| {
        let walked = at.strides.iter().zip(&kernel.space);
        walked.fold(at.offset.unsigned_abs(), |sum, (stride, extent)| {
            sum.saturating_add(stride.unsigned_abs().saturating_mul(*extent))
        })
    };
    // A loop counts one step too far before it ends.
    let counted = kernel.rows().max(1).saturating_mul(kernel.cols().max(1)).saturating_add(threads);
    let most = affines(kernel).map(reach).fold(counted, usize::max);
    if most < 1 << 31 { "i32" } else { "i64" }
}

fn affines(kernel: &Kernel) -> impl Iterator<Item = &Affine> {
    let positions = kernel.tape.iter().filter_map(|inst| match &inst.op {
        KernelOp::Index(at) | KernelOp::Random { at, .. } => Some(at),
        _ => None,
    });
    accesses(kernel).map(|(_, access)| &access.at).chain(positions)
}
