//! The cotangents of attention, with the weights recomputed block by block.
//!
//! A task is one batch entry and one key head: the gradients of k and v are summed over its query heads and
//! blocks in one order, whatever the number of threads.

use crate::cpu::attention::{Attention, Block};
use crate::cpu::gemm::gemm_of;
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::{Accumulator, Float, Number, Real, for_float};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch;
use crate::cpu::view::{Arg, Out, Strided};
use metal_candle_graph::DType;
use metal_candle_graph::composite::{AttentionAttrs, AttentionInput};

/// `args = [dy, lse, delta, ..attention's]`, one output for each of `wrt`.
pub(crate) fn call(
    args: &[Arg],
    outs: &mut [Out],
    attrs: &AttentionAttrs,
    wrt: &[AttentionInput],
    parallel: bool,
) {
    let [dy, lse, delta, inputs @ ..] = args else {
        panic!("metal-candle bug: attention_grad lacks its cotangent")
    };
    let rows = [*lse, *delta];
    for_float!(dy.dtype(), T => grad::<T>(dy, rows, inputs, outs, attrs, wrt, parallel));
}

fn grad<T: Float>(
    dy: &Arg,
    [lse, delta]: [Arg; 2],
    inputs: &[Arg],
    outs: &mut [Out],
    attrs: &AttentionAttrs,
    wrt: &[AttentionInput],
    parallel: bool,
) {
    let it = Attention::<T>::new(inputs, attrs);
    let expected = [it.b, it.tq, it.hq, it.dv];
    assert_eq!(dy.shape().dims(), expected, "metal-candle bug: attention_grad");
    for x in [&lse, &delta] {
        assert_eq!(*x.shape().dims(), expected[..3], "metal-candle bug: attention_grad");
    }
    let (dy, lse, delta) = (dy.read(), lse.read(), delta.read());
    let grad = Grad { dy, lse, delta, outs: Outs::new(&it, outs, wrt), it };
    let (d, dv) = (grad.outs.needs_dk(grad.it.d), grad.outs.needs_dv(grad.it.dv));
    let (hk, tk) = (grad.it.hk, grad.it.tk);
    parallel::for_each(parallel, grad.it.b * hk, |pair| {
        let (b, head) = (pair / hk, pair % hk);
        scratch::split([tk * d, tk * dv], |[dk, dv]: [&mut [T::Acc]; 2]| {
            dk.fill(T::Acc::ZERO);
            dv.fill(T::Acc::ZERO);
            for block in 0..grad.it.blocks() {
                grad.block(b, head, &grad.it.block(block), dk, dv);
            }
            grad.store_keys(grad.outs.k, b, head, dk);
            grad.store_keys(grad.outs.v, b, head, dv);
        });
    });
}

/// Where the gradients go, those that are asked for.
struct Outs<T> {
    q: Option<Parts<T>>,
    k: Option<Parts<T>>,
    v: Option<Parts<T>>,
    mask: Option<MaskOut>,
}

/// The mask has a dtype of its own.
enum MaskOut {
    BF16(Parts<half::bf16>),
    F16(Parts<half::f16>),
    F32(Parts<f32>),
    F64(Parts<f64>),
}

impl<T: Float> Outs<T> {
    fn new(it: &Attention<T>, outs: &mut [Out], wrt: &[AttentionInput]) -> Outs<T> {
        assert_eq!(outs.len(), wrt.len(), "metal-candle bug: attention_grad");
        let mut found = Outs { q: None, k: None, v: None, mask: None };
        for (out, wrt) in outs.iter_mut().zip(wrt) {
            let (len, expected) = (out.shape().len(), it.len_of(*wrt));
            assert_eq!(len, expected, "metal-candle bug: attention_grad of {wrt:?}");
            match wrt {
                AttentionInput::Query => found.q = Some(Parts::new(out.slice())),
                AttentionInput::Key => found.k = Some(Parts::new(out.slice())),
                AttentionInput::Value => found.v = Some(Parts::new(out.slice())),
                AttentionInput::Mask => found.mask = Some(MaskOut::new(out)),
            }
        }
        found
    }

    fn needs_dk(&self, d: usize) -> usize {
        if self.k.is_some() { d } else { 0 }
    }

    fn needs_dv(&self, dv: usize) -> usize {
        if self.v.is_some() { dv } else { 0 }
    }

    fn needs_dscores(&self) -> bool {
        self.q.is_some() || self.k.is_some() || self.mask.is_some()
    }
}

impl MaskOut {
    fn new(out: &mut Out) -> MaskOut {
        match out.dtype() {
            DType::BF16 => MaskOut::BF16(Parts::new(out.slice())),
            DType::F16 => MaskOut::F16(Parts::new(out.slice())),
            DType::F32 => MaskOut::F32(Parts::new(out.slice())),
            DType::F64 => MaskOut::F64(Parts::new(out.slice())),
            other => panic!("metal-candle bug: expected a float, got {other}"),
        }
    }

    /// Writes one row of the mask's gradient: `from`, starting at key `first`, and 0 around it.
    fn store<A: Real>(&self, row: usize, tk: usize, first: usize, from: &[A]) {
        fn write<T: Number<Acc: Real>, A: Real>(to: &mut [T], first: usize, from: &[A]) {
            to.fill(T::narrow(T::Acc::ZERO));
            for (to, x) in to[first..].iter_mut().zip(from) {
                *to = T::narrow(T::Acc::from_f64(x.to_f64()));
            }
        }
        // SAFETY: every row of the mask belongs to one row of one task.
        unsafe {
            match self {
                MaskOut::BF16(out) => write(out.part(row * tk, tk), first, from),
                MaskOut::F16(out) => write(out.part(row * tk, tk), first, from),
                MaskOut::F32(out) => write(out.part(row * tk, tk), first, from),
                MaskOut::F64(out) => write(out.part(row * tk, tk), first, from),
            }
        }
    }
}

impl<T: Float> Attention<'_, T> {
    fn len_of(&self, input: AttentionInput) -> usize {
        match input {
            AttentionInput::Query => self.q.shape().len(),
            AttentionInput::Key => self.k.shape().len(),
            AttentionInput::Value => self.v.shape().len(),
            AttentionInput::Mask => self.attention_mask.map_or(0, |mask| mask.shape().len()),
        }
    }
}

struct Grad<'a, T: Float> {
    it: Attention<'a, T>,
    dy: Strided<'a, T>,
    /// `[b, tq, hq]`
    lse: Strided<'a, T::Acc>,
    delta: Strided<'a, T::Acc>,
    outs: Outs<T>,
}

impl<T: Float> Grad<'_, T> {
    /// Adds what one block contributes to dk and dv, `[tk, ..]`, and stores its rows of dq and dmask.
    fn block(&self, b: usize, head: usize, block: &Block, dk: &mut [T::Acc], dv: &mut [T::Acc]) {
        let (it, rows, keys) = (&self.it, block.rows.len(), block.keys.len());
        let lens = [rows * it.d, rows * it.dv, rows * keys, rows * keys, rows, rows];
        scratch::split(lens, |[q, dy, p, ds, lse, delta]: [&mut [T::Acc]; 6]| {
            it.pack_query(b, head, block, q);
            it.scores(b, head, block, q, p);
            it.mask(b, head, block, p);
            self.pack_rows(b, head, block, [lse, delta]);
            it.weights(block, p, lse);
            for (dy, row) in dy.chunks_exact_mut(it.dv.max(1)).zip(block.rows.clone()) {
                self.dy.row(it.query_row(b, head, row)).widen_to(dy);
            }
            let one = T::Acc::from_f64(1.0);
            let dy = Mat::dense(dy, rows, it.dv);
            if self.outs.v.is_some() {
                // dv += pᵀ dy
                let dv = MatMut::dense(part(dv, block, it.dv), keys, it.dv);
                gemm_of::<T, _, _>(dv, Mat::dense(p, rows, keys).transposed(), dy, one, true);
            }
            if !self.outs.needs_dscores() {
                return;
            }
            let v = it.values(b, head, block).transposed();
            gemm_of::<T, _, _>(MatMut::dense(ds, rows, keys), dy, v, one, false);
            let pairs = p.chunks_exact(keys.max(1)).zip(ds.chunks_exact_mut(keys.max(1)));
            for ((p, ds), delta) in pairs.zip(&*delta) {
                T::Acc::softmax_vjp(p, ds, *delta);
            }
            self.store_mask(b, head, block, ds);
            if self.outs.k.is_some() {
                // dk += scale · dsᵀ q
                let dk = MatMut::dense(part(dk, block, it.d), keys, it.d);
                let ds = Mat::dense(ds, rows, keys).transposed();
                gemm_of::<T, _, _>(dk, ds, Mat::dense(q, rows, it.d), it.scale(), true);
            }
            if let Some(out) = &self.outs.q {
                // dq = scale · ds k
                let (ds, k) = (Mat::dense(ds, rows, keys), it.keys(b, head, block));
                gemm_of::<T, _, _>(MatMut::dense(q, rows, it.d), ds, k, it.scale(), false);
                for (q, row) in q.chunks_exact(it.d.max(1)).zip(block.rows.clone()) {
                    // SAFETY: every row of dq belongs to one row of one task.
                    let to = unsafe { out.part(it.query_row(b, head, row) * it.d, it.d) };
                    T::narrow_all(q, to);
                }
            }
        });
    }

    /// What the forward pass says of the block's rows.
    fn pack_rows(&self, b: usize, head: usize, block: &Block, [lse, delta]: [&mut [T::Acc]; 2]) {
        for ((row, lse), delta) in block.rows.clone().zip(lse).zip(delta) {
            let (at, h) = (b * self.it.tq + self.it.position(row), self.it.head(head, row));
            *lse = self.lse.row(at).get(h);
            *delta = self.delta.row(at).get(h);
        }
    }

    fn store_mask(&self, b: usize, head: usize, block: &Block, ds: &[T::Acc]) {
        let Some(mask) = &self.outs.mask else { return };
        let (it, keys) = (&self.it, block.keys.len());
        for (r, row) in block.rows.clone().enumerate() {
            let at = (b * it.hq + it.head(head, row)) * it.tq + it.position(row);
            mask.store(at, it.tk, block.keys.start, &ds[r * keys..(r + 1) * keys]);
        }
    }

    /// Rounds the sums of one key head, `[tk, n]`, into the output, `[b, tk, hk, n]`.
    fn store_keys(&self, out: Option<Parts<T>>, b: usize, head: usize, sums: &[T::Acc]) {
        let Some(out) = out else { return };
        let n = sums.len() / self.it.tk.max(1);
        for (key, sums) in sums.chunks_exact(n.max(1)).enumerate() {
            let row = (b * self.it.tk + key) * self.it.hk + head;
            // SAFETY: the rows of a key head belong to its task.
            T::narrow_all(sums, unsafe { out.part(row * n, n) });
        }
    }
}

/// The rows of the block's keys.
fn part<'a, A>(all: &'a mut [A], block: &Block, cols: usize) -> &'a mut [A] {
    &mut all[block.keys.start * cols..block.keys.end * cols]
}
