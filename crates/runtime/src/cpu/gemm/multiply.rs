//! Which kernels the products of a dtype go to.

use super::pack::Factor;
use super::{blocked, micro};
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::Number;
use half::{bf16, f16};

/// `out = alpha · a b`, or `out += alpha · a b`.
#[derive(Clone, Copy)]
pub(crate) struct Product<S> {
    /// `[m, n, k]`, none of them 0.
    pub(crate) extents: [usize; 3],
    pub(crate) alpha: S,
    pub(crate) accumulate: bool,
    /// Whether the factors may be rounded to bf16, which some processors multiply faster.
    pub(crate) rounded: bool,
}

/// The dtypes of factors and results.
pub(crate) trait Multiply: Number {
    /// A matrix of rows as a factor.
    fn factor<'m>(rows: &'m Mat<'_, Self>) -> &'m dyn Factor;

    /// The product of a, by rows, and b, by columns.
    fn multiply(
        out: MatMut<'_, Self>,
        a: &dyn Factor,
        b: &dyn Factor,
        product: Product<Self::Acc>,
        parallel: bool,
    );
}

impl Multiply for f32 {
    fn factor<'m>(rows: &'m Mat<'_, f32>) -> &'m dyn Factor {
        rows
    }

    fn multiply(
        out: MatMut<'_, f32>,
        a: &dyn Factor,
        b: &dyn Factor,
        product: Product<f32>,
        parallel: bool,
    ) {
        summed_in_f32(out, a, b, product, parallel);
    }
}

impl Multiply for f16 {
    fn factor<'m>(rows: &'m Mat<'_, f16>) -> &'m dyn Factor {
        rows
    }

    fn multiply(
        out: MatMut<'_, f16>,
        a: &dyn Factor,
        b: &dyn Factor,
        product: Product<f32>,
        parallel: bool,
    ) {
        summed_in_f32(out, a, b, product, parallel);
    }
}

impl Multiply for bf16 {
    fn factor<'m>(rows: &'m Mat<'_, bf16>) -> &'m dyn Factor {
        rows
    }

    fn multiply(
        out: MatMut<'_, bf16>,
        a: &dyn Factor,
        b: &dyn Factor,
        product: Product<f32>,
        parallel: bool,
    ) {
        // They are bf16 already, or as good as.
        summed_in_f32(out, a, b, Product { rounded: true, ..product }, parallel);
    }
}

impl Multiply for f64 {
    fn factor<'m>(rows: &'m Mat<'_, f64>) -> &'m dyn Factor {
        rows
    }

    fn multiply(
        out: MatMut<'_, f64>,
        a: &dyn Factor,
        b: &dyn Factor,
        product: Product<f64>,
        parallel: bool,
    ) {
        blocked::product::<f64, f64>(micro::for_f64(), out, [a, b], &product, parallel);
    }
}

fn summed_in_f32<T: Number<Acc = f32>>(
    out: MatMut<'_, T>,
    a: &dyn Factor,
    b: &dyn Factor,
    product: Product<f32>,
    parallel: bool,
) {
    match micro::for_bf16_pairs().filter(|_| product.rounded) {
        Some(kernels) => blocked::product::<u32, T>(kernels, out, [a, b], &product, parallel),
        None => blocked::product::<f32, T>(micro::for_f32(), out, [a, b], &product, parallel),
    }
}
