//! Attention in 16 bits over many tiles of keys, and its cotangents, against the same numbers in f32 on the CPU. Cases of a few
//! tiles, with every attribute, are in `reference`.

#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use metal_candle::{Attention, DType, Device, LazyTensor, grad};
use testbed::{device, largest};

/// Positions, query heads, key heads and features of a head.
type Extents = [usize; 4];

/// Numbers in [-1.5, 1.5) that 16 bits hold as they are.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 57) as f32 - 64.0) * (1.5 / 64.0)
    };
    (0..n).map(|_| next()).collect()
}

/// y, dq, dk and dv of causal attention, for a cotangent that is not the same everywhere.
fn attention([t, heads, key_heads, d]: Extents, dtype: DType, device: &Device) -> [Vec<f32>; 4] {
    let tensor = |heads: usize, seed: u64| {
        let values = numbers(t * heads * d, seed);
        let x = LazyTensor::from_vec(values, &[1, t, heads, d], device).unwrap();
        x.to_dtype(dtype).unwrap().to_owned_copy().unwrap()
    };
    let [q, k, v, dy] = [(heads, 1), (key_heads, 2), (key_heads, 3), (heads, 4)]
        .map(|(heads, seed)| tensor(heads, seed));
    let scale = 1.0 / (d as f64).sqrt();
    let y = Attention::new().scale(scale).causal().forward(&q, &k, &v).unwrap();
    let f32_of = |x: &LazyTensor| x.to_dtype(DType::F32).unwrap();
    let loss = f32_of(&y).mul(&f32_of(&dy)).unwrap().sum_all().unwrap();
    let cotangents = grad(&loss, &[&q, &k, &v]).unwrap();
    let values = |x: &LazyTensor| f32_of(x).to_vec::<f32>().unwrap();
    [values(&y), values(&cotangents[0]), values(&cotangents[1]), values(&cotangents[2])]
}

fn check(extents: Extents, dtype: DType) {
    let want = attention(extents, DType::F32, &Device::Cpu);
    let got = attention(extents, dtype, device());
    for (what, (got, want)) in ["y", "dq", "dk", "dv"].into_iter().zip(got.iter().zip(&want)) {
        let errors = || got.iter().zip(want).map(|(got, want)| f64::from((got - want).abs()));
        let n = want.len() as f64;
        let mean = errors().sum::<f64>() / n;
        let size = want.iter().map(|x| f64::from(x.abs())).sum::<f64>() / n;
        let (most, top) = (largest(errors()), largest(want.iter().map(|x| f64::from(*x))));
        println!(
            "{extents:?} {dtype} {what}: {mean:.1e} of {size:.1e}, at most {most:.1e} of {top:.1e}"
        );
        assert!(mean < 0.01 * size, "{extents:?} {dtype} {what}: off by {mean} of {size}");
        assert!(most < 0.02 * top, "{extents:?} {dtype} {what}: off by up to {most} of {top}");
    }
}

#[test]
fn heads_of_64_features() {
    for dtype in [DType::BF16, DType::F16] {
        check([700, 4, 1, 64], dtype);
        check([330, 6, 3, 64], dtype);
    }
}

#[test]
fn heads_of_128_features() {
    for dtype in [DType::BF16, DType::F16] {
        check([450, 4, 1, 128], dtype);
        check([330, 2, 2, 128], dtype);
    }
}
