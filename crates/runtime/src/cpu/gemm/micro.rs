//! The micro kernel: a tile of the product, whose sums stay in registers while `k` runs by.

#[cfg(target_arch = "x86_64")]
use super::lanes::Rounds;
use super::lanes::{Lanes, Plain};

/// One tile: `c = alpha · a b`, or `c += alpha · a b`.
///
/// `a` is packed `[k, rows]`; the rows of `b`, of all the vectors' lanes, are `b_stride` apart; those of `c`,
/// `row_stride`.
pub(super) struct Tile<P, S> {
    /// Packed steps: `k`, or half of it where pairs are packed.
    pub(super) k: usize,
    pub(super) a: *const P,
    pub(super) b: *const P,
    pub(super) b_stride: usize,
    /// Of bf16, for kernels that round.
    pub(super) c: *mut S,
    pub(super) row_stride: usize,
    pub(super) alpha: S,
    pub(super) accumulate: bool,
}

/// # Safety
/// `a`, `b` and `c` are as large as the kernel's tile, `c` is initialised if it is accumulated onto, and ours alone.
pub(super) type MicroFn<P, S> = unsafe fn(&Tile<P, S>);

/// The micro kernels of one instruction set.
pub(super) struct Kernels<P: 'static, S: 'static> {
    /// Lanes of a vector.
    pub(super) lanes: usize,
    /// Elements along `k` of a packed word.
    pub(super) steps: usize,
    /// Rows of a tile, from the most on, and its kernels with one vector and with two in a row.
    pub(super) by_rows: &'static [(usize, [MicroFn<P, S>; 2])],
    /// The same tiles with results in bf16, where the processor rounds to it.
    pub(super) to_bf16: Option<&'static Kernels<P, S>>,
}

impl<P, S> Kernels<P, S> {
    /// The rows of the tallest tile.
    pub(super) fn max_rows(&self) -> usize {
        self.by_rows[0].0
    }

    /// Rows of a panel of `a`, and columns of one of `b`.
    pub(super) fn widths(&self) -> [usize; 2] {
        [self.max_rows(), 2 * self.lanes]
    }

    /// The width at which a panel of `a` (side 0) or `b` (side 1) is packed that holds `len` of its rows or columns: that of the
    /// smallest tile.
    pub(super) fn width(&self, side: usize, len: usize) -> usize {
        match side {
            0 => self.of_rows(len).0,
            _ => len.next_multiple_of(self.lanes),
        }
    }

    /// The shortest tile that holds `rows`.
    pub(super) fn of_rows(&self, rows: usize) -> &'static (usize, [MicroFn<P, S>; 2]) {
        let fits = self.by_rows.iter().rev().find(|(height, _)| *height >= rows);
        fits.expect("metal-candle bug: a tile of too many rows")
    }
}

/// The sums of a tile.
#[inline(always)]
unsafe fn sums<V: Lanes, const ROWS: usize, const VECTORS: usize>(
    tile: &Tile<V::Packed, V::Sum>,
) -> [[V; VECTORS]; ROWS] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::zero(); VECTORS]; ROWS];
        let (mut a, mut b) = (tile.a, tile.b);
        for _ in 0..tile.k {
            let mut row = [V::zero(); VECTORS];
            for (v, row) in row.iter_mut().enumerate() {
                *row = V::load(b.add(v * V::LANES));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = V::splat(a.add(i));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = sum.multiply_add(x, row);
                }
            }
            a = a.add(ROWS);
            b = b.wrapping_add(tile.b_stride);
        }
        sums
    }
}

#[inline(always)]
unsafe fn body<V: Lanes, const ROWS: usize, const VECTORS: usize>(tile: &Tile<V::Packed, V::Sum>) {
    // SAFETY: the caller's promise.
    unsafe {
        let sums = sums::<V, ROWS, VECTORS>(tile);
        let alpha = V::splat_sum(tile.alpha);
        for (i, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let to = tile.c.add(i * tile.row_stride + v * V::LANES);
                if tile.accumulate {
                    V::load_sums(to).multiply_add_sums(*sum, alpha).store(to);
                } else {
                    sum.scaled(alpha).store(to);
                }
            }
        }
    }
}

/// The same with results in bf16.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn rounding_body<V: Rounds, const ROWS: usize, const VECTORS: usize>(
    tile: &Tile<V::Packed, V::Sum>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let sums = sums::<V, ROWS, VECTORS>(tile);
        let alpha = V::splat_sum(tile.alpha);
        for (i, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let to = tile.c.cast::<u16>().add(i * tile.row_stride + v * V::LANES);
                let sum = if tile.accumulate {
                    V::load_bf16(to).multiply_add_sums(*sum, alpha)
                } else {
                    sum.scaled(alpha)
                };
                sum.store_bf16(to);
            }
        }
    }
}

/// A table of kernels with this body, compiled for `$features`.
macro_rules! kernels {
    ($name:ident: $body:ident<$lanes:ty>, $packed:ty, $sum:ty, [$($rows:literal),*], $to_bf16:expr $(, $features:literal)?) => {
        pub(super) static $name: Kernels<$packed, $sum> = {
            $(#[target_feature(enable = $features)])?
            unsafe fn kernel<const ROWS: usize, const VECTORS: usize>(tile: &Tile<$packed, $sum>) {
                // SAFETY: the caller's promise, and that the processor has the features.
                unsafe { $body::<$lanes, ROWS, VECTORS>(tile) }
            }
            Kernels {
                lanes: <$lanes as Lanes>::LANES,
                steps: <$lanes as Lanes>::STEPS,
                by_rows: &[$(($rows, [kernel::<$rows, 1>, kernel::<$rows, 2>])),*],
                to_bf16: $to_bf16,
            }
        };
    };
}

#[cfg(target_arch = "x86_64")]
mod tables {
    use super::*;
    use crate::cpu::gemm::lanes::x86::*;

    kernels!(AVX512_F32: body<F32x16>, f32, f32, [14, 8, 4, 1], None, "avx512f,avx512bw,avx512dq,avx512vl,fma");
    kernels!(AVX512_F64: body<F64x8>, f64, f64, [14, 8, 4, 1], None, "avx512f,avx512bw,avx512dq,avx512vl,fma");
    kernels!(AVX512_BF16: body<Bf16Pairs>, u32, f32, [14, 8, 4, 1], Some(&AVX512_TO_BF16), "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma");
    kernels!(AVX512_TO_BF16: rounding_body<Bf16Pairs>, u32, f32, [14, 8, 4, 1], None, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma");
    kernels!(AVX2_F32: body<F32x8>, f32, f32, [6, 4, 1], None, "avx2,fma");
    kernels!(AVX2_F64: body<F64x4>, f64, f64, [6, 4, 1], None, "avx2,fma");
}

#[cfg(target_arch = "aarch64")]
mod tables {
    use super::*;
    use crate::cpu::gemm::lanes::neon::*;

    kernels!(NEON_F32: body<F32x4>, f32, f32, [12, 8, 4, 1], None);
    kernels!(NEON_F64: body<F64x2>, f64, f64, [12, 8, 4, 1], None);
}

kernels!(PLAIN_F32: body<Plain<f32>>, f32, f32, [4, 1], None);
kernels!(PLAIN_F64: body<Plain<f64>>, f64, f64, [4, 1], None);

/// The kernels for this processor.
macro_rules! widest_kernels {
    ($name:ident, $sum:ty, $avx512:ident, $avx2:ident, $neon:ident, $plain:ident) => {
        pub(super) fn $name() -> &'static Kernels<$sum, $sum> {
            #[cfg(target_arch = "x86_64")]
            {
                use crate::cpu::simd::{Level, level};
                let fma = std::arch::is_x86_feature_detected!("fma");
                match level() {
                    Level::Avx512 if fma => return &tables::$avx512,
                    Level::Avx2 if fma => return &tables::$avx2,
                    _ => {}
                }
            }
            #[cfg(target_arch = "aarch64")]
            if std::arch::is_aarch64_feature_detected!("neon") {
                return &tables::$neon;
            }
            &$plain
        }
    };
}
widest_kernels!(for_f32, f32, AVX512_F32, AVX2_F32, NEON_F32, PLAIN_F32);
widest_kernels!(for_f64, f64, AVX512_F64, AVX2_F64, NEON_F64, PLAIN_F64);

/// Kernels that multiply pairs of bf16, if this processor has such instructions.
pub(super) fn for_bf16_pairs() -> Option<&'static Kernels<u32, f32>> {
    #[cfg(target_arch = "x86_64")]
    {
        use crate::cpu::simd::{Level, level};
        use std::arch::is_x86_feature_detected as has;
        if matches!(level(), Level::Avx512) && has!("avx512bf16") && has!("fma") {
            return Some(&tables::AVX512_BF16);
        }
    }
    None
}
