//! Operands laid out for the micro kernel: panels `[k, width]`, in which it reads on and on.

#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::cpu::matrix::Mat;
use crate::cpu::number::{Accumulator, Number};
use crate::cpu::scratch::Pod;
use crate::cpu::simd::widest;
use half::{bf16, f16};
use std::ops::Range;

/// Words of a tile that is transposed at a time, each way.
const TILE: usize = 16;
/// The most `k` that one packed word holds.
const MAX_STEPS: usize = 2;

/// A factor of a product: rows of `a` or columns of `b`, by `k`.
pub(crate) trait Source<P>: Sync {
    /// Packs `outer` by `k` into `[k, width]`, with zeros for what is missing.
    fn pack(&self, outer: Range<usize>, k: Range<usize>, width: usize, to: &mut [P]);

    /// Where element `(outer, k)` lies, and how far it is from one `k` to the next, if those of one `k` lie side by side
    /// as the kernel wants them.
    fn in_place(&self, _outer: usize, _k: usize) -> Option<(*const P, usize)> {
        None
    }

    /// What [`Source::pack`] would give, if that lies packed already: then so do all panels of these `k`.
    fn packed(&self, _outer: Range<usize>, _k: Range<usize>, _width: usize) -> Option<&[P]> {
        None
    }
}

/// A factor that packs itself for whatever kernels there are.
pub(crate) trait Factor: Source<u32> + Source<f32> + Source<f64> {}
impl<S: Source<u32> + Source<f32> + Source<f64>> Factor for S {}

/// What is packed, whatever it is packed of.
pub(super) trait Word: Pod {
    const ZERO: Self;
    /// Consecutive elements along `k`.
    const STEPS: usize;

    /// Each of its elements times `by`.
    fn scaled(self, by: f64) -> Self;
}

macro_rules! float_words {
    ($($ty:ty),*) => {$(
        impl Word for $ty {
            const ZERO: $ty = 0.0;
            const STEPS: usize = 1;
            #[inline(always)]
            fn scaled(self, by: f64) -> $ty {
                self * by as $ty
            }
        }
    )*};
}
float_words!(f32, f64);

/// Pairs of bf16.
impl Word for u32 {
    const ZERO: u32 = 0;
    const STEPS: usize = 2;
    #[inline(always)]
    fn scaled(self, by: f64) -> u32 {
        let [x, y] = [self << 16, self & 0xffff_0000]
            .map(|bits| (f32::from_bits(bits) * by as f32).to_bf16());
        x | y << 16
    }
}

/// What the micro kernel multiplies: `STEPS` consecutive elements along `k`.
pub(super) trait Packed<T>: Word {
    /// The words of up to `TILE · STEPS` consecutive elements.
    fn along(from: &[T], to: &mut [Self; TILE]);
    /// The words of elements that lie side by side; each of `from` is one of the word's steps.
    fn across(from: [&[T]; MAX_STEPS], to: &mut [Self]);
    fn word(from: [T; MAX_STEPS]) -> Self;
    /// Packs rows whose elements lie side by side, as [`pack_along`], if this processor has instructions for it;
    /// whether it did.
    fn by_instructions(_from: Mat<'_, T>, _width: usize, _to: &mut [Self]) -> bool {
        false
    }
    /// An element that is its own word.
    fn itself(_from: *const T) -> Option<*const Self> {
        None
    }
    /// Writes the first `width` columns of the tile's transpose, `stride` words apart.
    ///
    /// # Safety
    /// `to` has room for `steps` rows of `stride` words, of which the first `width` are written.
    unsafe fn transpose(
        tile: &[[Self; TILE]; TILE],
        to: *mut Self,
        stride: usize,
        width: usize,
        steps: usize,
    );
}

impl<T: Number, P: Packed<T>> Source<P> for Mat<'_, T> {
    fn pack(&self, outer: Range<usize>, k: Range<usize>, width: usize, to: &mut [P]) {
        let from = self.row_range(outer.start, outer.len()).col_range(k.start, k.len());
        let room = k.len().div_ceil(P::STEPS) * width;
        assert!(outer.len() <= width && to.len() >= room, "metal-candle bug: a panel of its size");
        pack(from, width, to);
    }

    fn in_place(&self, outer: usize, k: usize) -> Option<(*const P, usize)> {
        let stride = usize::try_from(self.col_stride()).ok()?;
        let data = P::itself(self.row_range(outer, 1).col_range(k, 1).as_ptr())?;
        (self.row_stride() == 1).then_some((data, stride))
    }
}

fn pack<T: Number, P: Packed<T>>(from: Mat<'_, T>, width: usize, to: &mut [P]) {
    let to = &mut to[..from.cols().div_ceil(P::STEPS) * width];
    if from.row_stride() == 1 && from.cols() > 1 {
        let f = widest!([T: Number, P: Packed<T>] pack_across<T, P>(from: Mat<'_, T>, width: usize, to: &mut [P]));
        // SAFETY: this processor has what the function was compiled for.
        unsafe { f(from, width, to) }
    } else if from.col_stride() == 1 {
        if P::by_instructions(from, width, to) {
            return;
        }
        let f = widest!([T: Number, P: Packed<T>] pack_along<T, P>(from: Mat<'_, T>, width: usize, to: &mut [P]));
        // SAFETY: as above.
        unsafe { f(from, width, to) }
    } else {
        pack_strided(from, width, to);
    }
}

/// Where outer elements lie side by side: the panel's rows are copied as they are.
#[inline(always)]
unsafe fn pack_across<T: Number, P: Packed<T>>(from: Mat<'_, T>, width: usize, to: &mut [P]) {
    let outer = from.rows();
    let by_k = from.transposed();
    for (step, to) in to.chunks_exact_mut(width).enumerate() {
        let k = step * P::STEPS;
        let row = |k| by_k.row_slice(k).expect("metal-candle bug: no dense rows");
        let (to, padding) = to.split_at_mut(outer);
        padding.fill(P::ZERO);
        if k + P::STEPS <= from.cols() {
            P::across([row(k), row(k + P::STEPS - 1)], to);
        } else {
            for (to, x) in to.iter_mut().zip(row(k)) {
                *to = P::word([*x, T::narrow(T::Acc::ZERO)]);
            }
        }
    }
}

/// Where elements along `k` lie side by side: tiles are transposed.
#[inline(always)]
unsafe fn pack_along<T: Number, P: Packed<T>>(from: Mat<'_, T>, width: usize, to: &mut [P]) {
    let (outer, k) = (from.rows(), from.cols());
    let mut tile = [[P::ZERO; TILE]; TILE];
    for first in (0..width).step_by(TILE) {
        let lanes = TILE.min(width - first);
        let rows = outer.saturating_sub(first).min(TILE);
        tile[rows..].fill([P::ZERO; TILE]);
        for start in (0..k).step_by(TILE * P::STEPS) {
            let end = k.min(start + TILE * P::STEPS);
            for (i, words) in tile[..rows].iter_mut().enumerate() {
                let row = from.row_slice(first + i).expect("metal-candle bug: no dense rows");
                P::along(&row[start..end], words);
            }
            let steps = (end - start).div_ceil(P::STEPS);
            let to = &mut to[start / P::STEPS * width + first..];
            assert!(
                (steps - 1) * width + lanes <= to.len(),
                "metal-candle bug: a panel of its size"
            );
            // SAFETY: as was just seen.
            unsafe { P::transpose(&tile, to.as_mut_ptr(), width, lanes, steps) };
        }
    }
}

fn pack_strided<T: Number, P: Packed<T>>(from: Mat<'_, T>, width: usize, to: &mut [P]) {
    let zero = T::narrow(T::Acc::ZERO);
    for (step, to) in to.chunks_exact_mut(width).enumerate() {
        to.fill(P::ZERO);
        let k = step * P::STEPS;
        for (i, to) in to.iter_mut().enumerate().take(from.rows()) {
            let last = k + P::STEPS - 1;
            let next = if last < from.cols() { from.get(i, last) } else { zero };
            *to = P::word([from.get(i, k), next]);
        }
    }
}

/// Elements that are their own words.
macro_rules! itself {
    ($ty:ty $(, $by_instructions:path)?) => {
        impl Packed<$ty> for $ty {
            #[inline(always)]
            fn along(from: &[$ty], to: &mut [$ty; TILE]) {
                // Of a length that is known, a copy is an instruction or two, else a call.
                match <&[$ty; TILE]>::try_from(from) {
                    Ok(whole) => *to = *whole,
                    Err(_) => to[..from.len()].copy_from_slice(from),
                }
            }
            #[inline(always)]
            fn across([from, _]: [&[$ty]; MAX_STEPS], to: &mut [$ty]) {
                // As above: two vectors of the widest are the width of most panels.
                match (
                    <&[$ty; 2 * TILE]>::try_from(from),
                    <&mut [$ty; 2 * TILE]>::try_from(&mut *to),
                ) {
                    (Ok(from), Ok(to)) => *to = *from,
                    _ => to.copy_from_slice(from),
                }
            }
            #[inline(always)]
            fn word([x, _]: [$ty; MAX_STEPS]) -> $ty {
                x
            }
            $(
                #[cfg(target_arch = "x86_64")]
                fn by_instructions(from: Mat<'_, $ty>, width: usize, to: &mut [$ty]) -> bool {
                    $by_instructions(from, width, to)
                }
            )?
            fn itself(from: *const $ty) -> Option<*const $ty> {
                Some(from)
            }
            #[inline(always)]
            unsafe fn transpose(
                tile: &[[$ty; TILE]; TILE],
                to: *mut $ty,
                stride: usize,
                width: usize,
                steps: usize,
            ) {
                // SAFETY: the caller's promise.
                unsafe { transpose(tile, to, stride, width, steps) }
            }
        }
    };
}
itself!(f32, avx512::pack_f32);
itself!(f64);

/// Elements in words of another float.
macro_rules! converted {
    ($($ty:ty => $word:ty: |$x:ident| $convert:expr),* $(,)?) => {$(
        impl Packed<$ty> for $word {
            #[inline(always)]
            fn along(from: &[$ty], to: &mut [$word; TILE]) {
                for (to, from) in to.iter_mut().zip(from) {
                    let $x = *from;
                    *to = $convert;
                }
            }
            #[inline(always)]
            fn across([from, _]: [&[$ty]; MAX_STEPS], to: &mut [$word]) {
                for (to, from) in to.iter_mut().zip(from) {
                    let $x = *from;
                    *to = $convert;
                }
            }
            #[inline(always)]
            fn word([$x, _]: [$ty; MAX_STEPS]) -> $word {
                $convert
            }
            #[inline(always)]
            unsafe fn transpose(
                tile: &[[$word; TILE]; TILE],
                to: *mut $word,
                stride: usize,
                width: usize,
                steps: usize,
            ) {
                // SAFETY: the caller's promise.
                unsafe { transpose(tile, to, stride, width, steps) }
            }
        }
    )*};
}
converted!(
    bf16 => f32: |x| f32::from_bits(u32::from(x.to_bits()) << 16),
    f16 => f32: |x| x.to_f32(),
    f64 => f32: |x| x as f32,
    bf16 => f64: |x| x.to_f64(),
    f16 => f64: |x| x.to_f64(),
    f32 => f64: |x| f64::from(x),
);

/// The bits of a float in bf16, rounded to nearest even.
trait ToBf16: Copy {
    fn to_bf16(self) -> u32;
}

impl ToBf16 for f32 {
    #[inline(always)]
    fn to_bf16(self) -> u32 {
        let bits = self.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // A NaN stays one, whatever its low bits.
        if bits & 0x7fff_ffff > 0x7f80_0000 { (bits >> 16) | 0x40 } else { rounded }
    }
}

impl ToBf16 for f64 {
    #[inline(always)]
    fn to_bf16(self) -> u32 {
        (self as f32).to_bf16()
    }
}

impl ToBf16 for bf16 {
    #[inline(always)]
    fn to_bf16(self) -> u32 {
        u32::from(self.to_bits())
    }
}

impl ToBf16 for f16 {
    #[inline(always)]
    fn to_bf16(self) -> u32 {
        self.to_f32().to_bf16()
    }
}

/// Pairs of bf16, the first in the low half.
macro_rules! pairs {
    ($ty:ty $(, $by_instructions:path)?) => {
        impl Packed<$ty> for u32 {
            #[inline(always)]
            fn along(from: &[$ty], to: &mut [u32; TILE]) {
                let (pairs, odd) = from.as_chunks::<2>();
                for (to, [x, y]) in to.iter_mut().zip(pairs) {
                    *to = x.to_bf16() | y.to_bf16() << 16;
                }
                if let [last] = odd {
                    to[pairs.len()] = last.to_bf16();
                }
            }
            #[inline(always)]
            fn across([first, second]: [&[$ty]; MAX_STEPS], to: &mut [u32]) {
                for ((to, x), y) in to.iter_mut().zip(first).zip(second) {
                    *to = x.to_bf16() | y.to_bf16() << 16;
                }
            }
            #[inline(always)]
            fn word([x, y]: [$ty; MAX_STEPS]) -> u32 {
                x.to_bf16() | y.to_bf16() << 16
            }
            $(
                #[cfg(target_arch = "x86_64")]
                fn by_instructions(from: Mat<'_, $ty>, width: usize, to: &mut [u32]) -> bool {
                    $by_instructions(from, width, to)
                }
            )?
            #[inline(always)]
            unsafe fn transpose(
                tile: &[[u32; TILE]; TILE],
                to: *mut u32,
                stride: usize,
                width: usize,
                steps: usize,
            ) {
                // SAFETY: the caller's promise.
                unsafe { transpose(tile, to, stride, width, steps) }
            }
        }
    };
}
pairs!(f32, avx512::pack_pairs);
pairs!(bf16, avx512::pack_pairs);
pairs!(f16);
pairs!(f64);

/// # Safety
/// See [`Packed::transpose`].
#[inline(always)]
unsafe fn transpose<W: Copy>(
    tile: &[[W; TILE]; TILE],
    to: *mut W,
    stride: usize,
    width: usize,
    steps: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if size_of::<W>() == 4 && matches!(crate::cpu::simd::level(), crate::cpu::simd::Level::Avx512) {
        // SAFETY: words of four bytes; the caller's promise, and the processor has AVX-512.
        return unsafe { avx512::transpose(tile.as_ptr().cast(), to.cast(), stride, width, steps) };
    }
    for step in 0..steps {
        for (lane, row) in tile[..width].iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { *to.add(step * stride + lane) = row[step] };
        }
    }
}
