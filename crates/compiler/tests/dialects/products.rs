//! The plain kernel of a product, for what a backend's library does not take.

use crate::machine::DIALECTS;
use crate::machine::{Machine, Unit};
use crate::program::{Address, Part, Program, Region};
use crate::random::Rng;
use crate::walk;
use metal_candle_compiler::Layout;
use metal_candle_compiler::render::{Binding, Place, Product, Source, product};
use metal_candle_graph::{DType, Shape};

/// `[batch, rows, columns]` in memory, with room around it.
struct Matrix {
    place: Place,
    values: Vec<f64>,
}

impl Matrix {
    /// With strides and an offset that only a plain kernel takes: the order of the dims, outermost first, a factor for
    /// each, and which way they run.
    fn new(
        rng: &mut Rng,
        binding: Binding,
        dtype: DType,
        dims: &[usize],
        order: &[usize],
        every: usize,
    ) -> Matrix {
        let mut layout = Layout::contiguous(Shape::new(dims).unwrap());
        let mut step = every;
        for dim in order.iter().rev() {
            layout.strides[*dim] = step as isize;
            step *= dims[*dim] + 1;
        }
        layout.offset = 3;
        if every > 1 {
            // Rows from the last to the first.
            let row = dims.len() - 2;
            layout.offset += dims[row].saturating_sub(1) as isize * layout.strides[row];
            layout.strides[row] *= -1;
        }
        let drawn: Vec<f64> = (0..step + 3).map(|_| rng.below(17) as f64 / 4.0 - 2.0).collect();
        let values = walk::decode(dtype, &walk::encode(dtype, &drawn));
        Matrix { place: Place { binding, dtype, layout }, values }
    }

    fn at(&self, index: &[usize]) -> usize {
        let steps = index.iter().zip(self.place.layout.strides());
        (self.place.layout.offset + steps.map(|(i, s)| *i as isize * s).sum::<isize>()) as usize
    }

    fn bytes(&self) -> Vec<u8> {
        walk::encode(self.place.dtype, &self.values)
    }
}

struct Case {
    operands: [Matrix; 3],
    /// With two elements before it.
    bias: Option<(Place, Vec<f64>)>,
    alpha: f64,
    accumulate: bool,
}

/// Batches, rows, columns and depth: within a tile, at its edges, beyond; none of one.
const EXTENTS: [[usize; 5]; 6] = [
    [1, 1, 3, 5, 7],
    [2, 3, 16, 16, 16],
    [1, 2, 17, 33, 31],
    [1, 1, 1, 40, 9],
    [3, 1, 20, 1, 50],
    [1, 1, 4, 4, 0],
];

fn cases() -> Vec<Case> {
    let mut rng = Rng(5);
    let mut cases = Vec::new();
    for (i, [outer, inner, m, n, k]) in EXTENTS.into_iter().enumerate() {
        for (j, dtypes) in [
            [DType::F32; 3],
            [DType::BF16; 3],
            [DType::F64; 3],
            [DType::BF16, DType::F16, DType::F32],
        ]
        .into_iter()
        .enumerate()
        {
            let orders = [[0, 1, 2, 3], [1, 0, 3, 2], [2, 0, 1, 3]];
            let every = 1 + (i + j) % 2;
            let dims = [[outer, inner, m, k], [outer, inner, k, n], [outer, inner, m, n]];
            let bindings = [Binding::Arg(0), Binding::Arg(1), Binding::Out(0)];
            let operands = [0, 1, 2].map(|o| {
                let order = &orders[(i + j + o) % 3];
                Matrix::new(&mut rng, bindings[o], dtypes[o], &dims[o], order, every)
            });
            let (alpha, accumulate) = [(1.0, false), (0.5, true), (-3.0, false)][(i + j) % 3];
            let drawn: Vec<f64> = (0..n + 2).map(|_| rng.below(17) as f64 / 4.0 - 2.0).collect();
            let layout = Layout { offset: 2, ..Layout::contiguous(Shape::new(&[n]).unwrap()) };
            let place = Place { binding: Binding::Arg(2), dtype: dtypes[2], layout };
            let bias = ((i + 2 * j) % 4 < 2).then_some((place, drawn));
            cases.push(Case { operands, bias, alpha, accumulate });
        }
    }
    cases
}

impl Case {
    fn product(&self) -> Product {
        let [a, b, out] = self.operands.each_ref().map(|matrix| matrix.place.clone());
        let bias = self.bias.as_ref().map(|(place, _)| place.clone());
        Product { alpha: self.alpha, accumulate: self.accumulate, a, b, bias, out }
    }

    /// a, b, out, and the bias if there is one.
    fn program(&self, source: &Source) -> Program {
        let start = |buffer| Address { buffer, offset_bytes: 0 };
        let bias =
            self.bias.iter().map(|(place, drawn)| (place.dtype, walk::encode(place.dtype, drawn)));
        let operands = self.operands.iter().map(|matrix| (matrix.place.dtype, matrix.bytes()));
        let operands: Vec<(DType, Vec<u8>)> = operands.chain(bias).collect();
        let region = |(buffer, (dtype, bytes)): (usize, &(DType, Vec<u8>))| Region {
            start: start(buffer),
            len_bytes: bytes.len(),
            element_bytes: dtype.size_bytes(),
            writable: buffer == 2,
        };
        let order = if self.bias.is_some() { &[0, 1, 3, 2][..] } else { &[0, 1, 2] };
        let launch = Part::Launch {
            kernel: source.name.clone(),
            launch: source.launch,
            regions: operands.iter().enumerate().map(region).collect(),
            operands: order.iter().map(|buffer| start(*buffer)).collect(),
        };
        Program { parts: vec![launch], buffers: operands.into_iter().map(|(_, b)| b).collect() }
    }

    fn expected(&self) -> Vec<f64> {
        let [a, b, out] = &self.operands;
        let mut values = out.values.clone();
        let dims = out.place.layout.shape.dims();
        let k = a.place.layout.shape[3];
        for flat in 0..dims.iter().product() {
            let (col, rest) = (flat % dims[3], flat / dims[3]);
            let (row, rest) = (rest % dims[2], rest / dims[2]);
            let (inner, outer) = (rest % dims[1], rest / dims[1]);
            let product = |p| {
                a.values[a.at(&[outer, inner, row, p])] * b.values[b.at(&[outer, inner, p, col])]
            };
            let at = out.at(&[outer, inner, row, col]);
            let before = if self.accumulate { out.values[at] } else { 0.0 };
            // Rounded as it is in memory.
            let bias = self.bias.as_ref().map_or(0.0, |(place, drawn)| {
                walk::decode(place.dtype, &walk::encode(place.dtype, drawn))[2 + col]
            });
            values[at] = before + bias + self.alpha * (0..k).map(product).sum::<f64>();
        }
        walk::decode(out.place.dtype, &walk::encode(out.place.dtype, &values))
    }
}

#[test]
fn plain_products_of_any_strides_and_floats_are_right() {
    let cases = cases();
    for (name, dialect, limits) in DIALECTS {
        let mut sources: Vec<(&Case, Source)> = Vec::new();
        for (i, case) in cases.iter().enumerate() {
            if case.operands[2].place.dtype == DType::F64 && !dialect.has_f64 {
                continue;
            }
            let mut source = product(&case.product(), dialect, &limits);
            source.text = source.text.replace(" product(", &format!(" product{i}("));
            source.name = format!("product{i}");
            sources.push((case, source));
        }
        let unit = Unit {
            header: dialect.header_of(&sources[0].1),
            sources: sources.iter().map(|(_, source)| source.clone()).collect(),
        };
        let machine = Machine::build(dialect, &format!("products-{name}"), &[unit]);
        let programs: Vec<Program> =
            sources.iter().map(|(case, source)| case.program(source)).collect();
        for ((case, source), result) in sources.iter().zip(machine.run(&programs)) {
            let buffers = result.unwrap_or_else(|fault| panic!("{fault}\n{}", source.text));
            let dtype = case.operands[2].place.dtype;
            let (got, want) = (walk::decode(dtype, &buffers[2]), case.expected());
            // Quarters, summed without rounding in f32; a 16-bit result is rounded once.
            assert_eq!(got, want, "{}", source.text);
        }
    }
}
