//! Which kernels the products of a dtype go to.

use super::kept::Panels;
use super::micro::Kernels;
use super::pack::Factor;
use super::{blocked, micro};
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::Number;
use half::{bf16, f16};
use metal_candle_graph::DType;

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

    /// Multiplies without packing, if that is faster and there is a way; whether it did.
    fn multiply_thin(
        _out: &mut MatMut<'_, Self>,
        _a: Mat<'_, Self>,
        _b: Mat<'_, Self>,
        _product: Product<Self::Acc>,
        _parallel: bool,
    ) -> bool {
        false
    }

    /// The product of a, by rows, and b, by columns.
    fn multiply(
        out: MatMut<'_, Self>,
        a: &dyn Factor,
        b: &dyn Factor,
        product: Product<Self::Acc>,
        parallel: bool,
    );

    /// The panels that [`Multiply::multiply`] makes of a factor, by `[rows or columns, k]`, as `a` (side 0) or `b` (side 1);
    /// `rounded` as the [`Product`] says it.
    fn panels(extents: [usize; 2], side: usize, rounded: bool) -> Panels;
}

/// Dtypes that are summed in f32.
macro_rules! summed_in_f32 {
    ($($ty:ty $(, $thin:path)?;)*) => {$(
        impl Multiply for $ty {
            fn factor<'m>(rows: &'m Mat<'_, $ty>) -> &'m dyn Factor {
                rows
            }

            $(
                fn multiply_thin(
                    out: &mut MatMut<'_, $ty>,
                    a: Mat<'_, $ty>,
                    b: Mat<'_, $ty>,
                    product: Product<f32>,
                    parallel: bool,
                ) -> bool {
                    $thin(out, a, b, product, parallel)
                }
            )?

            fn multiply(
                out: MatMut<'_, $ty>,
                a: &dyn Factor,
                b: &dyn Factor,
                product: Product<f32>,
                parallel: bool,
            ) {
                summed_in_f32(out, a, b, product, parallel);
            }

            fn panels(extents: [usize; 2], side: usize, rounded: bool) -> Panels {
                match pairs::<$ty>(rounded) {
                    Some(kernels) => Panels::new(kernels, extents, side),
                    None => Panels::new(micro::for_f32(), extents, side),
                }
            }
        }
    )*};
}
summed_in_f32! {
    f32, super::thin::product_f32;
    f16, super::thin::product;
    bf16, super::thin::product;
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

    fn panels(extents: [usize; 2], side: usize, _rounded: bool) -> Panels {
        Panels::new(micro::for_f64(), extents, side)
    }
}

fn summed_in_f32<T: Number<Acc = f32>>(
    out: MatMut<'_, T>,
    a: &dyn Factor,
    b: &dyn Factor,
    product: Product<f32>,
    parallel: bool,
) {
    match pairs::<T>(product.rounded) {
        Some(kernels) => blocked::product::<u32, T>(kernels, out, [a, b], &product, parallel),
        None => blocked::product::<f32, T>(micro::for_f32(), out, [a, b], &product, parallel),
    }
}

/// Kernels for pairs of bf16, if the factors may be rounded to it and there are such.
fn pairs<T: Number>(rounded: bool) -> Option<&'static Kernels<u32, f32>> {
    // Factors of a bf16 result are bf16 already, or as good as.
    micro::for_bf16_pairs().filter(|_| rounded || T::DTYPE == DType::BF16)
}
