//! Plans of one library call over random strided operands, to be compared with plain loops in f64.
#![allow(dead_code, unreachable_pub, reason = "every test uses its own part")]

use half::{bf16, f16};
use metal_candle_compiler::{
    Layout, LibraryCall, Operand, OutputSource, Plan, PlanInput, PlanOutput, Slot, Step, Work,
};
use metal_candle_graph::{DType, MAX_RANK, Shape, TensorType};
use metal_candle_runtime::{AsyncGraphExecutor, Buffer, Device, Executable, Result};
use std::sync::OnceLock;

pub const FLOATS: [DType; 4] = [DType::BF16, DType::F16, DType::F32, DType::F64];
pub const INDICES: [DType; 3] = [DType::U8, DType::U32, DType::I64];

/// The device that `METAL_CANDLE_TEST_DEVICE` names; the CPU if it names none.
///
/// # Panics
/// If this build or this machine lacks it: a test that is not run must not pass.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| {
        let Ok(name) = std::env::var("METAL_CANDLE_TEST_DEVICE") else { return Device::Cpu };
        let device = Device::parse(&name).and_then(|device| device.check().map(|()| device));
        device.unwrap_or_else(|e| panic!("METAL_CANDLE_TEST_DEVICE: {e}"))
    })
}

/// Whether the device computes in all of these; if not, says so.
pub fn computes(dtypes: &[DType]) -> bool {
    let computes = !(matches!(device(), Device::Metal(_)) && dtypes.contains(&DType::F64));
    if !computes {
        eprintln!("SKIPPED f64 on {}: Metal has no numbers of 64 bits", device());
    }
    computes
}

/// A plan made ready to run on the device.
pub fn executable(plan: Plan) -> Result<Executable> {
    Executable::new(plan, device())
}

/// splitmix64
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// In [-1, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
    pub fn flip(&mut self) -> bool {
        self.next() & 1 == 1
    }
    pub fn units(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.unit()).collect()
    }
    /// Integers in `0..n`.
    pub fn indices(&mut self, count: usize, n: usize) -> Vec<f64> {
        (0..count).map(|_| self.below(n) as f64).collect()
    }
}

pub fn shape(dims: &[usize]) -> Shape {
    Shape::new(dims).unwrap()
}

/// `x` as `dtype` holds it.
pub fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::BF16 => bf16::from_f64(x).to_f64(),
        DType::F16 => f16::from_f64(x).to_f64(),
        DType::F32 => f64::from(x as f32),
        DType::F64 => x,
        DType::U8 | DType::U32 | DType::I64 => x.trunc(),
    }
}

/// How far a result of `dtype` may be from the one in f64, in units of its size.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 8e-3,
        DType::F16 => 1e-3,
        DType::F32 => 2e-5,
        DType::F64 => 1e-12,
        DType::U8 | DType::U32 | DType::I64 => 0.0,
    }
}

pub fn buffer(dtype: DType, values: &[f64]) -> Buffer {
    let values = values.iter().copied();
    match dtype {
        DType::U8 => Buffer::from_vec(values.map(|x| x as u8).collect()),
        DType::U32 => Buffer::from_vec(values.map(|x| x as u32).collect()),
        DType::I64 => Buffer::from_vec(values.map(|x| x as i64).collect()),
        DType::BF16 => Buffer::from_vec(values.map(bf16::from_f64).collect()),
        DType::F16 => Buffer::from_vec(values.map(f16::from_f64).collect()),
        DType::F32 => Buffer::from_vec(values.map(|x| x as f32).collect()),
        DType::F64 => Buffer::from_vec(values.collect()),
    }
}

pub fn values(buffer: &Buffer) -> Vec<f64> {
    macro_rules! wide {
        ($ty:ty, $to:expr) => {
            buffer.to_vec::<$ty>().unwrap().into_iter().map($to).collect()
        };
    }
    match buffer.dtype() {
        DType::U8 => wide!(u8, f64::from),
        DType::U32 => wide!(u32, f64::from),
        DType::I64 => wide!(i64, |x| x as f64),
        DType::BF16 => wide!(bf16, bf16::to_f64),
        DType::F16 => wide!(f16, f16::to_f64),
        DType::F32 => wide!(f32, f64::from),
        DType::F64 => wide!(f64, |x| x),
    }
}

/// A value with the memory it lies in.
pub struct Tensor {
    pub dtype: DType,
    pub layout: Layout,
    /// Rounded, in row-major order of the layout's shape.
    pub values: Vec<f64>,
    pub buffer: Buffer,
    memory_len: usize,
}

impl Tensor {
    pub fn shape(&self) -> Shape {
        self.layout.shape
    }

    pub fn dense(dtype: DType, dims: &[usize], values: &[f64]) -> Tensor {
        let values: Vec<f64> = values.iter().map(|x| round(dtype, *x)).collect();
        assert_eq!(values.len(), shape(dims).len());
        let (buffer, memory_len) = (buffer(dtype, &values), values.len());
        Tensor { dtype, layout: Layout::contiguous(shape(dims)), values, buffer, memory_len }
    }

    /// Permuted, padded, stepped over, flipped and shifted at random; the memory in between is NaN (or 1).
    pub fn strided(rng: &mut Rng, dtype: DType, dims: &[usize], values: &[f64]) -> Tensor {
        let mut layout = Layout::contiguous(shape(dims));
        let mut order: Vec<usize> = (0..dims.len()).collect();
        for i in (1..order.len()).rev() {
            if rng.below(3) == 0 {
                order.swap(i, rng.below(i + 1));
            }
        }
        let mut stride = 1;
        layout.offset = rng.below(4) as isize;
        for d in order.into_iter().rev() {
            let step = if rng.below(4) == 0 { 2 } else { 1 };
            layout.strides[d] = (stride * step) as isize;
            stride *= step * dims[d].max(1) + if rng.below(4) == 0 { rng.below(3) } else { 0 };
            if rng.below(5) == 0 && dims[d] > 0 {
                layout.offset += (dims[d] - 1) as isize * layout.strides[d];
                layout.strides[d] = -layout.strides[d];
            }
        }
        let memory_len = stride + 8;
        let filler = if dtype.is_float() { f64::NAN } else { 1.0 };
        let mut memory = vec![filler; memory_len];
        let values: Vec<f64> = values.iter().map(|x| round(dtype, *x)).collect();
        assert_eq!(values.len(), layout.shape.len());
        for (i, x) in values.iter().enumerate() {
            memory[offset(&layout, i)] = *x;
        }
        Tensor { dtype, layout, values, buffer: buffer(dtype, &memory), memory_len }
    }

    /// Repeats `dim`, of extent 1, `extent` times.
    pub fn broadcast(mut self, dim: usize, extent: usize) -> Tensor {
        let dims = self.layout.shape;
        assert_eq!(dims[dim], 1);
        let outer: usize = dims.dims()[..dim].iter().product();
        let inner: usize = dims.dims()[dim + 1..].iter().product();
        let part = |o: usize| self.values[o * inner..(o + 1) * inner].repeat(extent);
        self.values = (0..outer).flat_map(part).collect();
        self.layout.shape = dims.with(dim, extent);
        self.layout.strides[dim] = 0;
        self
    }

    /// The value at `index`.
    pub fn at(&self, index: &[usize]) -> f64 {
        let strides: [isize; MAX_RANK] = self.shape().contiguous_strides();
        self.values[index.iter().zip(strides).map(|(i, s)| i * s as usize).sum::<usize>()]
    }
}

fn offset(layout: &Layout, index: usize) -> usize {
    let (mut rest, mut at) = (index, layout.offset);
    for d in (0..layout.shape.rank()).rev() {
        at += (rest % layout.shape[d]) as isize * layout.strides[d];
        rest /= layout.shape[d];
    }
    at as usize
}

/// A plan of one call. `base`, if any, is what the only output starts from, in place.
pub fn plan(
    call: LibraryCall,
    args: &[&Tensor],
    outs: &[(DType, Shape)],
    base: Option<&Tensor>,
) -> Plan {
    let memory = |t: &Tensor| TensorType::new(t.dtype, shape(&[t.memory_len]));
    let mut inputs: Vec<PlanInput> =
        args.iter().map(|t| PlanInput { ty: memory(t), donated: false }).collect();
    let slot = |i: usize| match base {
        Some(_) => Slot::Input(args.len() as u32),
        None => Slot::Output(i as u32),
    };
    let out = |(i, (dtype, shape)): (usize, &(DType, Shape))| Operand {
        slot: slot(i),
        dtype: *dtype,
        layout: Layout::contiguous(*shape),
    };
    let source = match base {
        Some(base) => {
            inputs.push(PlanInput { ty: memory(base), donated: true });
            OutputSource::Donated(args.len() as u32)
        }
        None => OutputSource::Written,
    };
    let step = Step {
        args: (args.iter().enumerate())
            .map(|(i, t)| Operand { slot: Slot::Input(i as u32), dtype: t.dtype, layout: t.layout })
            .collect(),
        outs: outs.iter().enumerate().map(out).collect(),
        label: call.name().into(),
        work: Work::Call(call),
        // As if it were large: several threads take part.
        flops: 1 << 40,
        bytes: 0,
    };
    let output = |(dtype, shape): &(DType, Shape)| PlanOutput {
        ty: TensorType::new(*dtype, *shape),
        source,
    };
    let outputs = outs.iter().map(output).collect();
    plan_of(vec![step], inputs, outputs, 0)
}

pub fn plan_of(
    steps: Vec<Step>,
    inputs: Vec<PlanInput>,
    outputs: Vec<PlanOutput>,
    arena_bytes: usize,
) -> Plan {
    Plan {
        target: "cpu",
        steps,
        inputs,
        outputs,
        arena_bytes,
        unshared_bytes: arena_bytes,
        splits: Vec::new(),
    }
}

/// Runs a call on one thread and on two, which must agree to the bit.
pub fn run(
    call: LibraryCall,
    args: &[&Tensor],
    outs: &[(DType, Shape)],
    base: Option<&Tensor>,
) -> Result<Vec<Vec<f64>>> {
    let executable = Executable::new(plan(call, args, outs, base), &Device::Cpu)?;
    let inputs = || -> Vec<Buffer> {
        let args = args.iter().map(|t| t.buffer.clone());
        args.chain(base.map(|t| t.buffer.clone().into_owned().unwrap())).collect()
    };
    thread_local! {
        static EXECUTORS: [AsyncGraphExecutor; 2] = [1, 2].map(AsyncGraphExecutor::with_threads);
    }
    let [one, two] = EXECUTORS
        .with(|executors| executors.each_ref().map(|executor| executor.run(&executable, inputs())));
    let (one, two) = (one?, two?);
    let one: Vec<Vec<f64>> = one.iter().map(values).collect();
    for (one, two) in one.iter().zip(&two) {
        let bits = |x: &f64| x.to_bits();
        let two = values(two);
        assert!(one.iter().map(bits).eq(two.iter().map(bits)), "the number of threads shows");
    }
    Ok(one)
}

/// How much further off a GPU may be, as a part of the largest value: it adds in another order, and its exponentials and
/// the like differ in their last bits.
fn slack(dtype: DType) -> f64 {
    if *device() == Device::Cpu { 0.0 } else { tolerance(dtype) }
}

/// [`close`], and on a GPU so much of the largest value off.
#[track_caller]
pub fn close_on_device(got: &[f64], expected: &[f64], dtype: DType, within: f64, what: &str) {
    let magnitudes = expected.iter().map(|x| x.abs()).filter(|x| x.is_finite());
    close(got, expected, within + slack(dtype) * magnitudes.fold(0.0, f64::max), what);
}

/// Every result within `tolerance · (1 + |expected|) · scale` of what is expected.
#[track_caller]
pub fn close(got: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let same = got == expected || (got.is_nan() && expected.is_nan());
        let near = (got - expected).abs() <= tolerance * (1.0 + expected.abs());
        assert!(same || near, "{what}: element {i}: expected {expected}, got {got}");
    }
}
