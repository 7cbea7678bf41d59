//! Operations that mean their decomposition.

use super::{Gen, Var};
use metal_candle_graph::composite::{AttentionAttrs, CrossEntropyAttrs, RopeLayout};
use metal_candle_graph::{BinaryOp, Composite, DType, NodeId, Operation, Scalar, Shape};

fn scalar(value: f64) -> Scalar {
    Scalar::from_f64(DType::F64, value)
}

impl Gen {
    pub(super) fn composite(&mut self) {
        match self.rng.below(if self.limits.calls { 8 } else { 5 }) {
            0 | 1 => self.softmax(),
            2 | 3 => self.norm(),
            4 => self.cross_entropy(),
            5 => self.rope(),
            6 => self.attention(),
            _ => self.linear_cross_entropy(),
        }
    }

    fn apply(&mut self, composite: Composite, inputs: &[NodeId]) -> NodeId {
        self.g.add(Operation::Composite(composite), inputs).unwrap()
    }

    fn row_of_floats(&mut self) -> Option<Var> {
        self.any_where(|s, v| s.is_float(v.id) && s.shape(v).rank() > 0 && !s.shape(v).is_empty())
    }

    fn softmax(&mut self) {
        let Some(x) = self.row_of_floats() else { return };
        let dim = self.rng.below(self.shape(x).rank());
        let all = [
            Composite::Softmax { dim },
            Composite::LogSoftmax { dim },
            Composite::LogSumExp { dim },
        ];
        let composite = self.rng.pick(&all);
        let y = self.apply(composite, &[x.id]);
        if matches!(composite, Composite::Softmax { .. }) {
            let v = self.derived(y, &[x], false);
            self.push(v);
        } else {
            self.keep(y, &[x]);
        }
    }

    fn norm(&mut self) {
        let Some(x) = self.row_of_floats() else { return };
        let n = Shape::new(&[self.shape(x).last().unwrap()]).unwrap();
        let eps = scalar(0.1);
        let weight = self.input(self.dtype(x.id), n);
        if self.rng.one_in(2) {
            let y = self.apply(Composite::RmsNorm { eps }, &[x.id, weight.id]);
            self.keep(y, &[x, weight]);
        } else {
            let bias = self.input(self.dtype(x.id), n);
            let y = self.apply(Composite::LayerNorm { eps }, &[x.id, weight.id, bias.id]);
            self.keep(y, &[x, weight, bias]);
        }
    }

    fn rope(&mut self) {
        let even = |s: &Gen, v: Var| {
            let last = s.shape(v).last();
            s.is_float(v.id) && last.is_some_and(|d| d.is_multiple_of(2))
        };
        let Some(x) = self.any_where(even) else { return };
        let shape = self.shape(x);
        let last = shape.rank() - 1;
        let table = shape.with(last, shape[last] / 2);
        let dtype = self.dtype(x.id);
        let (cos, sin) = (self.input(dtype, table), self.input(dtype, table));
        let layout = self.rng.pick(&[RopeLayout::Half, RopeLayout::Interleaved]);
        let y = self.apply(Composite::Rope { layout }, &[x.id, cos.id, sin.id]);
        self.keep(y, &[x, cos, sin]);
    }

    fn attention(&mut self) {
        let dtype = self.rng.pick(self.limits.floats);
        let [b, tq, tk] = [0; 3].map(|_: usize| 1 + self.rng.below(3));
        let (hk, group) = (1 + self.rng.below(2), 1 + self.rng.below(2));
        let [d, dv] = [0; 2].map(|_: usize| 1 + self.rng.below(3));
        let causal = self.rng.one_in(2);
        let attrs = AttentionAttrs {
            scale: scalar(0.5),
            causal,
            window: (causal && self.rng.one_in(2)).then_some(2),
            mask: self.rng.one_in(3),
            segments: self.rng.one_in(3),
            offset: self.rng.one_in(3),
        };
        let shape = |dims: &[usize]| Shape::new(dims).unwrap();
        let q = self.input(dtype, shape(&[b, tq, hk * group, d]));
        let k = self.input(dtype, shape(&[b, tk, hk, d]));
        let v = self.input(dtype, shape(&[b, tk, hk, dv]));
        let mut inputs = vec![q, k, v];
        if attrs.mask {
            inputs.push(self.input(dtype, shape(&[b, hk * group, tq, tk])));
        }
        if attrs.segments {
            let of_q = self.input(DType::U32, shape(&[b, tq]));
            let of_k = self.input(DType::U32, shape(&[b, tk]));
            inputs.extend([of_q, of_k]);
        }
        if attrs.offset {
            let offset = self.rng.below(4) as i64 - 1;
            inputs.push(self.scalar_i64(offset));
        }
        let ids: Vec<NodeId> = inputs.iter().map(|v| v.id).collect();
        let y = self.apply(Composite::Attention(attrs), &ids);
        self.keep(y, &inputs);
    }

    fn cross_entropy_attrs(&mut self) -> CrossEntropyAttrs {
        CrossEntropyAttrs {
            ignore_index: self.rng.pick(&[None, Some(-100), Some(1)]),
            label_smoothing: scalar(self.rng.clone().pick(&[0.0, 0.1])),
            blocks: None,
        }
    }

    /// Class labels, some of them to be ignored.
    fn labels(&mut self, n: usize, classes: usize, attrs: &CrossEntropyAttrs) -> Var {
        let label = |rng: &mut super::Rng| match attrs.ignore_index {
            Some(index) if rng.one_in(3) => index as f64,
            _ => rng.below(classes) as f64,
        };
        let data: Vec<f64> = (0..n).map(|_| label(&mut self.rng)).collect();
        let v = self.input_of(DType::I64, Shape::new(&[n]).unwrap(), data);
        self.pool.pop();
        v
    }

    fn cross_entropy(&mut self) {
        let Some(x) = self.row_of_floats() else { return };
        let shape = self.shape(x);
        let classes = shape.last().unwrap();
        let rows = shape.len() / classes;
        let logits = self.g.reshape(x.id, Shape::new(&[rows, classes]).unwrap()).unwrap();
        let attrs = self.cross_entropy_attrs();
        let labels = self.labels(rows, classes, &attrs);
        let y = self.apply(Composite::CrossEntropy(attrs), &[logits, labels.id]);
        let y = self.g.binary_scalar(BinaryOp::Mul, y, 0.25).unwrap();
        self.keep(y, &[x]);
    }

    fn linear_cross_entropy(&mut self) {
        let dtype = self.rng.pick(self.limits.floats);
        let [n, v, d] = [0; 3].map(|_: usize| 1 + self.rng.below(5));
        let x = self.input(dtype, Shape::new(&[n, d]).unwrap());
        let weight = self.input(dtype, Shape::new(&[v, d]).unwrap());
        let attrs = self.cross_entropy_attrs();
        let labels = self.labels(n, v, &attrs);
        let inputs = [x.id, weight.id, labels.id];
        let y = self.apply(Composite::LinearCrossEntropy(attrs), &inputs);
        self.keep(y, &[x, weight]);
    }
}
