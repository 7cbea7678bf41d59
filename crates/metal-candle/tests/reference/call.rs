//! The method that a case of the manifest means.

use crate::Case;
use metal_candle::{Attention, CrossEntropy, DType, LazyTensor, Result};
use serde_json::Value;

/// The attributes of a case. One that is missing or of another type is a fault of the manifest.
struct Attrs<'a>(&'a Case);

impl Attrs<'_> {
    fn get(&self, name: &str) -> &Value {
        let Attrs(case) = self;
        let value = case.attrs.get(name);
        value.unwrap_or_else(|| panic!("{}/{} has no attribute {name}", case.op, case.case))
    }

    fn usize(&self, name: &str) -> usize {
        self.get(name).as_u64().unwrap_or_else(|| panic!("{name} is no size")) as usize
    }

    fn dim(&self) -> usize {
        self.usize("dim")
    }

    fn f64(&self, name: &str) -> f64 {
        self.get(name).as_f64().unwrap_or_else(|| panic!("{name} is no number"))
    }

    fn flag(&self, name: &str) -> bool {
        self.get(name).as_bool().unwrap_or_else(|| panic!("{name} is no truth value"))
    }

    fn text(&self, name: &str) -> &str {
        self.get(name).as_str().unwrap_or_else(|| panic!("{name} is no text"))
    }

    /// `None` where it is null.
    fn sizes(&self, name: &str) -> Option<Vec<usize>> {
        let values = self.get(name).as_array()?;
        Some(values.iter().map(|v| v.as_u64().expect("a size") as usize).collect())
    }
}

/// Records the operation of `case` on `x`.
pub(crate) fn call(case: &Case, x: &[LazyTensor]) -> Result<LazyTensor> {
    let a = Attrs(case);
    let name = case.op.as_str();
    if let Some(y) = scalar(name, x) {
        return y;
    }
    match name {
        "where_cond" => x[0].where_cond(&x[1], &x[2]),
        "clamp" => x[0].clamp(a.f64("min"), a.f64("max")),
        "to_dtype" => x[0].to_dtype(dtype(a.text("dtype"))),
        "sum" | "mean" | "max" | "min" => reduce(&a, name, &x[0]),
        "argmax" | "argmin" | "logsumexp" => along(&a, name, &x[0]),
        "cumsum" => x[0].cumsum(a.dim()),
        "reshape" | "transpose" | "permute" | "squeeze" | "unsqueeze" | "broadcast_as"
        | "narrow" | "slice" | "flip" | "pad" => view(&a, name, &x[0]),
        "cat" => LazyTensor::cat(x, a.dim()),
        "stack" => LazyTensor::stack(x, a.dim()),
        "gather" => x[0].gather(&x[1], a.dim()),
        "index_select" => x[0].index_select(&x[1], a.dim()),
        "embedding" => x[0].embedding(&x[1]),
        "scatter_add" => x[0].scatter_add(&x[1], &x[2], a.dim()),
        "index_add" => x[0].index_add(&x[1], &x[2], a.dim()),
        "slice_update" => x[0].slice_update(a.dim(), &x[1], &x[2]),
        "dynamic_slice" => x[0].dynamic_slice(a.dim(), &x[1], a.usize("len")),
        "matmul" => x[0].matmul(&x[1]),
        "lora" => x[1].lora(&x[0], &x[2], &x[3], a.f64("scale")),
        "softmax" => x[0].softmax(a.dim()),
        "log_softmax" => x[0].log_softmax(a.dim()),
        "rms_norm" => x[0].rms_norm(&x[1], a.f64("eps")),
        "layer_norm" => x[0].layer_norm(&x[1], &x[2], a.f64("eps")),
        "rope" if a.text("layout") == "half" => x[0].rope(&x[1], &x[2]),
        "rope" => x[0].rope_interleaved(&x[1], &x[2]),
        "attention" => attention(&a, x),
        "cross_entropy" => x[0].cross_entropy(&x[1], losses(&a)),
        "linear_cross_entropy" => x[0].linear_cross_entropy(&x[1], &x[2], losses(&a)),
        other => panic!("the manifest has cases of {other}, which no method is known for"),
    }
}

/// Scalar functions of one and of two arguments.
fn scalar(name: &str, x: &[LazyTensor]) -> Option<Result<LazyTensor>> {
    macro_rules! by_name {
        ($($unary:ident)*; $($binary:ident)*) => {
            match name {
                $(stringify!($unary) => x[0].$unary(),)*
                $(stringify!($binary) => x[0].$binary(&x[1]),)*
                _ => return None,
            }
        };
    }
    Some(by_name! {
        neg abs sign recip sqr sqrt rsqrt exp log log1p expm1 sin cos tanh erf sigmoid relu silu
        gelu gelu_tanh floor ceil round;
        add sub mul div pow maximum minimum eq ne lt le gt ge
    })
}

fn reduce(a: &Attrs, name: &str, x: &LazyTensor) -> Result<LazyTensor> {
    let Some(dims) = a.sizes("dims") else {
        return match name {
            "sum" => x.sum_all(),
            "mean" => x.mean_all(),
            "max" => x.max_all(),
            _ => x.min_all(),
        };
    };
    match (name, a.flag("keepdim")) {
        ("sum", false) => x.sum(dims),
        ("sum", true) => x.sum_keepdim(dims),
        ("mean", false) => x.mean(dims),
        ("mean", true) => x.mean_keepdim(dims),
        ("max", false) => x.max(dims),
        ("max", true) => x.max_keepdim(dims),
        (_, false) => x.min(dims),
        (_, true) => x.min_keepdim(dims),
    }
}

fn along(a: &Attrs, name: &str, x: &LazyTensor) -> Result<LazyTensor> {
    match (name, a.flag("keepdim")) {
        ("argmax", false) => x.argmax(a.dim()),
        ("argmax", true) => x.argmax_keepdim(a.dim()),
        ("argmin", false) => x.argmin(a.dim()),
        ("argmin", true) => x.argmin_keepdim(a.dim()),
        (_, false) => x.logsumexp(a.dim()),
        (_, true) => x.logsumexp_keepdim(a.dim()),
    }
}

fn view(a: &Attrs, name: &str, x: &LazyTensor) -> Result<LazyTensor> {
    let sizes = |name| a.sizes(name).expect("a list of sizes");
    match name {
        "reshape" => x.reshape(&sizes("shape")),
        "transpose" => x.transpose(a.usize("dim0"), a.usize("dim1")),
        "permute" => x.permute(sizes("dims")),
        "squeeze" => x.squeeze(a.dim()),
        "unsqueeze" => x.unsqueeze(a.dim()),
        "broadcast_as" => x.broadcast_as(&sizes("shape")),
        "narrow" => x.narrow(a.dim(), a.usize("start"), a.usize("len")),
        "slice" => x.slice(a.dim(), a.usize("start"), a.usize("len"), a.usize("step")),
        "flip" => x.flip(a.dim()),
        _ => x.pad(a.dim(), a.usize("before"), a.usize("after"), a.f64("value")),
    }
}

fn attention(a: &Attrs, x: &[LazyTensor]) -> Result<LazyTensor> {
    let mut attention = Attention::new().scale(a.f64("scale"));
    if a.flag("causal") {
        attention = attention.causal();
    }
    if let Some(window) = a.get("window").as_u64() {
        attention = attention.window(window as usize);
    }
    let mut rest = x[3..].iter();
    let mut next = || rest.next().expect("an input of the attention");
    if a.flag("mask") {
        attention = attention.mask(next());
    }
    if a.flag("segments") {
        attention = attention.segments(next(), next());
    }
    if a.flag("offset") {
        attention = attention.offset(next());
    }
    attention.forward(&x[0], &x[1], &x[2])
}

fn losses(a: &Attrs) -> CrossEntropy {
    CrossEntropy::new()
        .ignore_index(a.get("ignore_index").as_i64())
        .label_smoothing(a.f64("label_smoothing"))
        .per_row()
}

pub(crate) fn dtype(name: &str) -> DType {
    let found = DType::ALL.into_iter().find(|d| d.as_str() == name);
    found.unwrap_or_else(|| panic!("no dtype is called {name}"))
}
