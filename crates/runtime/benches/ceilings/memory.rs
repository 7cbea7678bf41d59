//! Bytes a second.

use super::{Ceiling, shortest};
use rayon::prelude::*;
use std::hint::black_box;

/// From one buffer to another, by the best of three ways.
pub(crate) fn copy(bytes: usize) -> Ceiling {
    let n = bytes / size_of::<f32>();
    let source = vec![1f32; n];
    let mut target = vec![0f32; n];
    let part = n.div_ceil(rayon::current_num_threads()).next_multiple_of(16);
    let mut best = Ceiling { per_second: 0.0, by: "" };
    let mut time = |by, way: &mut dyn FnMut(&[f32], &mut [f32])| {
        let seconds = shortest(|| way(black_box(&source), black_box(&mut target))).as_secs_f64();
        let per_second = 2.0 * bytes as f64 / seconds;
        if per_second > best.per_second {
            best = Ceiling { per_second, by };
        }
    };
    let pairs = |from: &[f32], to: &mut [f32], f: fn(&[f32], &mut [f32])| {
        to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| f(from, to));
    };
    // Small tensors stay with the thread that has them in its cache.
    time("memcpy, one thread", &mut |from, to| to.copy_from_slice(from));
    time("memcpy", &mut |from, to| pairs(from, to, |from, to| to.copy_from_slice(from)));
    #[cfg(target_arch = "x86_64")]
    time("non-temporal stores", &mut |from, to| pairs(from, to, stream));
    best
}

/// Copies past the caches, where the target would only be read to be overwritten.
#[cfg(target_arch = "x86_64")]
fn stream(from: &[f32], to: &mut [f32]) {
    use std::arch::x86_64::{_mm_loadu_ps, _mm_sfence, _mm_stream_ps};
    let n = from.len().min(to.len());
    let head = to.as_ptr().align_offset(16).min(n);
    to[..head].copy_from_slice(&from[..head]);
    let body = (n - head) / 4 * 4;
    for i in (head..head + body).step_by(4) {
        // SAFETY: `i + 4 <= head + body <= n`, which is within both slices; `to[head]` is aligned to 16 bytes, and so is
        // every fourth element after it.
        unsafe { _mm_stream_ps(to.as_mut_ptr().add(i), _mm_loadu_ps(from.as_ptr().add(i))) };
    }
    to[head + body..n].copy_from_slice(&from[head + body..n]);
    // Others may read what was written once this call has returned.
    // SAFETY: SSE is part of x86-64.
    unsafe { _mm_sfence() };
}

/// All of a buffer, added up.
pub(crate) fn read(bytes: usize) -> Ceiling {
    let source = vec![1u64; bytes / size_of::<u64>()];
    let part = source.len().div_ceil(rayon::current_num_threads());
    let sum = |part: &[u64]| {
        let (blocks, rest) = part.as_chunks::<64>();
        let mut sums = [0u64; 64];
        for block in blocks {
            sums.iter_mut().zip(block).for_each(|(sum, x)| *sum = sum.wrapping_add(*x));
        }
        sums.iter().chain(rest).fold(0u64, |a, b| a.wrapping_add(*b))
    };
    let seconds = shortest(|| {
        let parts = black_box(&source[..]).par_chunks(part);
        black_box(parts.map(sum).reduce(|| 0, u64::wrapping_add));
    });
    Ceiling { per_second: bytes as f64 / seconds.as_secs_f64(), by: "sum of integers" }
}
