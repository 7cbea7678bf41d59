//! A few rows times matrices whose rows lie side by side: no packing, every row of the matrix is read once, and widened
//! as it is read.

use super::lanes::{LoadWide, Plain};
use crate::cpu::matrix::Mat;
use crate::cpu::number::{Accumulator, Number};
use half::{bf16, f16};

/// The loops of one instruction set, for a matrix of `E`.
///
/// # Safety
/// They may be called where the processor has it. The elements of a row of the matrix lie side by side.
pub(in crate::cpu) struct Loops<E: 'static> {
    /// `(q, k, scores, stride)`, `scores = q kᵀ`: `q [rows, d]`, `k [keys, d]`, rows of `scores` are `stride` apart.
    pub(in crate::cpu) dots: unsafe fn(&[f32], Mat<'_, E>, &mut [f32], usize),
    /// `(p, stride, v, y)`, `y += p v`: rows of `p` are `stride` apart, `v [keys, dv]`, `y [rows, dv]`.
    pub(in crate::cpu) weigh: unsafe fn(&[f32], usize, Mat<'_, E>, &mut [f32]),
}

/// Rows that share one pass over the matrix.
const AT_ONCE: usize = 4;
/// Lanes of the widest vector.
const MAX_LANES: usize = 16;

#[inline(always)]
unsafe fn dots<V: LoadWide<E>, E: Number>(
    q: &[f32],
    k: Mat<'_, E>,
    scores: &mut [f32],
    stride: usize,
) {
    let (keys, d) = (k.rows(), k.cols());
    if d == 0 {
        return scores.fill(0.0);
    }
    assert!((1..=stride).contains(&keys), "metal-candle bug: {keys} keys of {stride}");
    for (scores, q) in scores.chunks_mut(AT_ONCE * stride).zip(q.chunks(AT_ONCE * d)) {
        // SAFETY: the caller's promise.
        unsafe {
            match q.len() / d {
                1 => dots_of::<V, E, 1>(q, k, scores, stride),
                2 => dots_of::<V, E, 2>(q, k, scores, stride),
                3 => dots_of::<V, E, 3>(q, k, scores, stride),
                _ => dots_of::<V, E, AT_ONCE>(q, k, scores, stride),
            }
        }
    }
}

/// Four keys at a time; the last ones are repeated to make four.
#[inline(always)]
unsafe fn dots_of<V: LoadWide<E>, E: Number, const ROWS: usize>(
    q: &[f32],
    k: Mat<'_, E>,
    scores: &mut [f32],
    stride: usize,
) {
    let (keys, d) = (k.rows(), k.cols());
    let room = (ROWS - 1) * stride + keys;
    assert!(q.len() == ROWS * d && scores.len() >= room, "metal-candle bug: few rows");
    for first in (0..keys).step_by(4) {
        let k = [0, 1, 2, 3].map(|i| dense(&k, (first + i).min(keys - 1)).as_ptr());
        // SAFETY: the caller's promise; every pointer has `d` elements, or those of a vector.
        unsafe {
            let mut sums = [[V::zero(); 4]; ROWS];
            for at in (0..d / V::LANES * V::LANES).step_by(V::LANES) {
                let q: [*const f32; ROWS] = std::array::from_fn(|row| q.as_ptr().add(row * d + at));
                step(&mut sums, q, k.map(|k| k.add(at)));
            }
            if !d.is_multiple_of(V::LANES) {
                let at = d / V::LANES * V::LANES;
                let q: [_; ROWS] =
                    std::array::from_fn(|row| padded(q.as_ptr().add(row * d + at), d - at));
                let k = k.map(|k| padded(k.add(at), d - at));
                step(&mut sums, q.each_ref().map(|q| q.as_ptr()), k.each_ref().map(|k| k.as_ptr()));
            }
            for (row, sums) in sums.into_iter().enumerate() {
                let to = &mut scores[row * stride + first..row * stride + keys];
                let sums = V::sums(sums);
                match to.first_chunk_mut::<4>() {
                    Some(to) => *to = sums,
                    None => to.copy_from_slice(&sums[..to.len()]),
                }
            }
        }
    }
}

/// So many elements, and zeros.
#[inline(always)]
unsafe fn padded<E: Number>(from: *const E, len: usize) -> [E; MAX_LANES] {
    let mut whole = [E::narrow(E::Acc::ZERO); MAX_LANES];
    // SAFETY: the caller's promise: there are as many, less than a vector's.
    unsafe { std::ptr::copy_nonoverlapping(from, whole.as_mut_ptr(), len) };
    whole
}

/// A vector of each.
#[inline(always)]
unsafe fn step<V: LoadWide<E>, E, const ROWS: usize>(
    sums: &mut [[V; 4]; ROWS],
    q: [*const f32; ROWS],
    k: [*const E; 4],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let keys = [V::load_wide(k[0]), V::load_wide(k[1]), V::load_wide(k[2]), V::load_wide(k[3])];
        for (sums, q) in sums.iter_mut().zip(q) {
            let q = V::load(q);
            for (sum, key) in sums.iter_mut().zip(keys) {
                *sum = sum.multiply_add(q, key);
            }
        }
    }
}

#[inline(always)]
fn dense<'a, E: Number>(x: &Mat<'a, E>, row: usize) -> &'a [E] {
    x.row_slice(row).expect("metal-candle bug: no dense rows")
}

#[inline(always)]
unsafe fn weigh<V: LoadWide<E>, E: Number<Acc = f32>>(
    p: &[f32],
    stride: usize,
    v: Mat<'_, E>,
    y: &mut [f32],
) {
    let dv = v.cols();
    for (y, p) in y.chunks_mut(AT_ONCE * dv.max(1)).zip(p.chunks(AT_ONCE * stride)) {
        // SAFETY: the caller's promise.
        unsafe {
            match y.len() / dv {
                1 => weigh_of::<V, E, 1>(p, stride, v, y),
                2 => weigh_of::<V, E, 2>(p, stride, v, y),
                3 => weigh_of::<V, E, 3>(p, stride, v, y),
                _ => weigh_of::<V, E, AT_ONCE>(p, stride, v, y),
            }
        }
    }
}

#[inline(always)]
unsafe fn weigh_of<V: LoadWide<E>, E: Number<Acc = f32>, const ROWS: usize>(
    p: &[f32],
    stride: usize,
    v: Mat<'_, E>,
    y: &mut [f32],
) {
    let dv = v.cols();
    let room = (ROWS - 1) * stride + v.rows();
    assert!(p.len() >= room && y.len() == ROWS * dv, "metal-candle bug: few rows");
    let mut col = 0;
    // SAFETY: the caller's promise; the columns are there.
    unsafe {
        while V::REGISTERS >= 32 && col + 4 * V::LANES <= dv {
            weigh_cols::<V, E, ROWS, 4>(p, stride, v, y, col);
            col += 4 * V::LANES;
        }
        while col + 2 * V::LANES <= dv {
            weigh_cols::<V, E, ROWS, 2>(p, stride, v, y, col);
            col += 2 * V::LANES;
        }
        while col + V::LANES <= dv {
            weigh_cols::<V, E, ROWS, 1>(p, stride, v, y, col);
            col += V::LANES;
        }
    }
    for col in col..dv {
        for (y, p) in y.chunks_exact_mut(dv).zip(p.chunks(stride)) {
            y[col] += (0..v.rows()).map(|key| p[key] * v.get(key, col).widen()).sum::<f32>();
        }
    }
}

/// Columns from `col` on, as many vectors, whose sums stay in registers.
#[inline(always)]
unsafe fn weigh_cols<
    V: LoadWide<E>,
    E: Number<Acc = f32>,
    const ROWS: usize,
    const VECTORS: usize,
>(
    p: &[f32],
    stride: usize,
    v: Mat<'_, E>,
    y: &mut [f32],
    col: usize,
) {
    let (keys, dv) = (v.rows(), v.cols());
    // SAFETY: the caller's promise; `p` and `y` have the rows, as was seen, `v` the rows and columns.
    unsafe {
        let mut sums = [[V::zero(); VECTORS]; ROWS];
        for (row, sums) in sums.iter_mut().enumerate() {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = V::load_sums(y.as_ptr().add(row * dv + col + i * V::LANES));
            }
        }
        for key in 0..keys {
            let from = dense(&v, key).as_ptr().add(col);
            let mut v = [V::zero(); VECTORS];
            for (i, v) in v.iter_mut().enumerate() {
                *v = V::load_wide(from.add(i * V::LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let p = V::splat(p.as_ptr().add(row * stride + key));
                for (sum, v) in sums.iter_mut().zip(v) {
                    *sum = sum.multiply_add(p, v);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            for (i, sum) in sums.into_iter().enumerate() {
                sum.store(y.as_mut_ptr().add(row * dv + col + i * V::LANES));
            }
        }
    }
}

/// The loops with these vectors, compiled for `$features`.
macro_rules! compiled {
    ($lanes:ty, $element:ty $(, $features:literal)?) => {{
        $(#[target_feature(enable = $features)])?
        unsafe fn dots_with(q: &[f32], k: Mat<'_, $element>, scores: &mut [f32], stride: usize) {
            // SAFETY: the caller's promise, and that the processor has the features.
            unsafe { dots::<$lanes, $element>(q, k, scores, stride) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn weigh_with(p: &[f32], stride: usize, v: Mat<'_, $element>, y: &mut [f32]) {
            // SAFETY: as above.
            unsafe { weigh::<$lanes, $element>(p, stride, v, y) }
        }
        static LOOPS: Loops<$element> = Loops { dots: dots_with, weigh: weigh_with };
        &LOOPS
    }};
}

/// Elements of such a matrix.
pub(in crate::cpu) trait InRows: Number<Acc = f32> {
    /// The loops for this processor.
    fn loops() -> &'static Loops<Self>;
}

macro_rules! in_rows {
    ($($element:ty),*) => {$(
        impl InRows for $element {
            fn loops() -> &'static Loops<$element> {
                #[cfg(target_arch = "x86_64")]
                {
                    use super::lanes::x86::{F32x8, F32x16};
                    use crate::cpu::simd::{Level, level};
                    use std::arch::is_x86_feature_detected as has;
                    match level() {
                        Level::Avx512 if has!("fma") => {
                            return compiled!(F32x16, $element, "avx512f,avx512bw,avx512dq,avx512vl,fma");
                        }
                        Level::Avx2 if has!("fma") && has!("f16c") => {
                            return compiled!(F32x8, $element, "avx2,fma,f16c");
                        }
                        _ => {}
                    }
                }
                #[cfg(target_arch = "aarch64")]
                if std::arch::is_aarch64_feature_detected!("neon") {
                    return compiled!(super::lanes::neon::F32x4, $element);
                }
                compiled!(Plain<f32>, $element)
            }
        }
    )*};
}
in_rows!(f32, bf16, f16);
