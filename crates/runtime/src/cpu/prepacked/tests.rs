use super::IN_USE;
use crate::{AsyncGraphExecutor, Buffer, Device, Element, Executable};
use half::{bf16, f16};
use metal_candle_compiler::{LibraryCall, Plan, Work, plan};
use metal_candle_graph::{BinaryOp, ComputationGraph, DType, Operation, Shape, TensorType};

/// What a product is of: rows, what is summed over, columns.
type Extents = [usize; 3];

fn input(
    g: &mut ComputationGraph,
    i: u32,
    dtype: DType,
    dims: [usize; 2],
) -> metal_candle_graph::NodeId {
    g.input(i, TensorType::new(dtype, Shape::new(&dims).unwrap()))
}

/// `x w` and, back along the other axis of the same weight, `y wᵀ`; inputs w, x and y.
fn both_ways(dtype: DType, [m, k, n]: Extents) -> Plan {
    let mut g = ComputationGraph::new();
    let w = input(&mut g, 0, dtype, [k, n]);
    let x = input(&mut g, 1, dtype, [m, k]);
    let y = input(&mut g, 2, dtype, [m, n]);
    let turned = g.transpose(w).unwrap();
    g.outputs = [[x, w], [y, turned]].map(|pair| g.add(Operation::Dot, &pair).unwrap()).into();
    plan(&g, Device::Cpu.target(), &[]).unwrap()
}

/// `wᵀ x`: the weight is the factor on the left.
fn from_the_left(dtype: DType, [m, k, n]: Extents) -> Plan {
    let mut g = ComputationGraph::new();
    let w = input(&mut g, 0, dtype, [k, n]);
    let x = input(&mut g, 1, dtype, [k, m]);
    let turned = g.transpose(w).unwrap();
    g.outputs = vec![g.add(Operation::Dot, &[turned, x]).unwrap()];
    plan(&g, Device::Cpu.target(), &[]).unwrap()
}

/// `x w + (x a) b / 2`, a sum of products; inputs w, x, a and b.
fn with_branch(dtype: DType, [m, k, n]: Extents) -> Plan {
    let (mut g, rank) = (ComputationGraph::new(), 5);
    let w = input(&mut g, 0, dtype, [k, n]);
    let x = input(&mut g, 1, dtype, [m, k]);
    let a = input(&mut g, 2, dtype, [k, rank]);
    let b = input(&mut g, 3, dtype, [rank, n]);
    let mut dot = |a, b| g.add(Operation::Dot, &[a, b]).unwrap();
    let (base, low) = (dot(x, w), dot(x, a));
    let high = dot(low, b);
    let scaled = g.binary_scalar(BinaryOp::Mul, high, 0.5).unwrap();
    g.outputs = vec![g.binary(BinaryOp::Add, base, scaled).unwrap()];
    let plan = plan(&g, Device::Cpu.target(), &[]).unwrap();
    let is_sum = |work: &Work| matches!(work, Work::Call(LibraryCall::GemmSum { alphas, .. }) if alphas.len() == 2);
    assert!(plan.steps.iter().any(|step| is_sum(&step.work)), "{plan}");
    plan
}

/// A buffer for an input: numbers that rounding makes others of in another order.
fn values(plan: &Plan, i: usize) -> Buffer {
    let ty = plan.inputs[i].ty;
    let value = |at: usize| ((at * 7919 + i * 31) % 1013) as f32 / 1013.0 - 0.4;
    let all = (0..ty.shape.len()).map(value);
    match ty.dtype {
        DType::BF16 => Buffer::from_vec(all.map(bf16::from_f32).collect()),
        DType::F16 => Buffer::from_vec(all.map(f16::from_f32).collect()),
        DType::F64 => Buffer::from_vec(all.map(f64::from).collect()),
        _ => Buffer::from_vec(all.collect()),
    }
}

fn holding(plan: &Plan, weight: &Buffer) -> Executable {
    let mut held = vec![None; plan.inputs.len()];
    held[0] = Some(weight.clone());
    Executable::holding(plan.clone(), &Device::Cpu, None, held).unwrap()
}

fn bits(executable: &Executable, threads: usize) -> Vec<Vec<u64>> {
    let plan = executable.plan();
    let given = (1..plan.inputs.len()).map(|i| values(plan, i)).collect();
    let results = AsyncGraphExecutor::with_threads(threads).run(executable, given).unwrap();
    let bits = |result: &Buffer| match result.dtype() {
        DType::BF16 => of::<bf16>(result, |x| x.to_bits().into()),
        DType::F16 => of::<f16>(result, |x| x.to_bits().into()),
        DType::F32 => of::<f32>(result, |x| x.to_bits().into()),
        _ => of::<f64>(result, f64::to_bits),
    };
    results.iter().map(bits).collect()
}

fn of<T: Element>(result: &Buffer, bits: fn(T) -> u64) -> Vec<u64> {
    result.to_vec::<T>().unwrap().into_iter().map(bits).collect()
}

/// What the executable says that its panels take.
fn listed(executable: &Executable) -> usize {
    let all = executable.workspaces().into_iter();
    all.filter(|workspace| workspace.name == "prepacked weights")
        .map(|workspace| workspace.bytes)
        .sum()
}

/// How many panels of a buffer there are.
fn in_use(buffer: &Buffer) -> usize {
    let start = super::own_start(buffer).unwrap().addr();
    let in_use = IN_USE.lock().unwrap();
    in_use.iter().filter(|((at, _), held)| *at == start && held.strong_count() > 0).count()
}

#[track_caller]
fn same_bits(plan: &Plan, panels: usize) {
    let weight = values(plan, 0);
    let (plain, prepacking) =
        (holding(plan, &weight), holding(plan, &weight).prepacking().unwrap());
    assert_eq!(in_use(&weight), panels, "{plan}");
    assert_eq!((listed(&plain), listed(&prepacking) > 0), (0, panels > 0));
    for threads in [1, 2] {
        assert_eq!(bits(&plain, threads), bits(&prepacking, threads), "{threads} threads: {plan}");
    }
}

const FLOATS: [DType; 4] = [DType::BF16, DType::F16, DType::F32, DType::F64];

#[test]
fn prepacked_products_have_the_bits_of_others() {
    for dtype in FLOATS {
        // Panels that are not full, sums of odd length; more rows than columns and the reverse; few rows of a.
        for extents in [[130, 97, 75], [64, 128, 512], [33, 65, 2100], [2100, 64, 64]] {
            same_bits(&both_ways(dtype, extents), 2);
            same_bits(&from_the_left(dtype, extents), 1);
        }
    }
}

#[test]
fn prepacked_products_of_long_sums_have_the_bits_of_others() {
    for dtype in FLOATS {
        same_bits(&both_ways(dtype, [100, 2501, 1300]), 2);
    }
}

#[test]
fn prepacked_sums_of_products_have_the_bits_of_others() {
    for dtype in FLOATS {
        // As one product and, of few rows, apart; in several slices, of which the weight covers the first alone.
        for extents in [[130, 96, 75], [130, 97, 75], [40, 96, 75], [130, 2050, 70]] {
            same_bits(&with_branch(dtype, extents), 1);
        }
    }
}

#[test]
fn products_of_few_rows_keep_no_panels() {
    same_bits(&both_ways(DType::F32, [8, 96, 75]), 0);
}

#[test]
fn panels_take_what_is_listed_before_there_are_any() {
    let plan = both_ways(DType::BF16, [64, 128, 512]);
    let weight = values(&plan, 0);
    let executable = holding(&plan, &weight).prepacking().unwrap();
    let told = Device::Cpu.prepacked(&plan, |input| input == 0);
    assert_eq!(listed(&executable), told.bytes);
    // Both orders, at most half a panel more each.
    let weight_bytes = 2 * 128 * 512;
    assert!((2 * weight_bytes..5 * weight_bytes).contains(&told.bytes), "{told:?}");
    assert_eq!(Device::Cpu.prepacked(&plan, |_| false).bytes, 0);
    assert_eq!(Device::Cuda(0).prepacked(&plan, |_| true).bytes, 0);
}

#[test]
fn executables_of_one_weight_share_panels_and_let_go_of_them() {
    let [short, long] = [64, 96].map(|rows| both_ways(DType::F32, [rows, 128, 100]));
    let weight = values(&short, 0);
    let first = holding(&short, &weight).prepacking().unwrap();
    let second = holding(&long, &weight).prepacking().unwrap();
    assert_eq!((in_use(&weight), listed(&first)), (2, listed(&second)));
    drop(first);
    assert_eq!(in_use(&weight), 2);
    assert_eq!(bits(&second, 2), bits(&holding(&long, &weight), 2));
    drop(second);
    assert_eq!(in_use(&weight), 0);
    // The memory itself is the caller's again.
    assert!(weight.into_candle(&Shape::new(&[128, 100]).unwrap()).is_ok());
}

#[test]
fn what_others_may_write_is_not_kept() {
    let plan = both_ways(DType::F32, [64, 128, 100]);
    // Nothing is held of an input that is given to each run, donated or not.
    let given = Executable::new(plan.clone(), &Device::Cpu).unwrap().prepacking().unwrap();
    assert_eq!(listed(&given), 0);
    // A Candle tensor may be written in place by whoever has it.
    let tensor = values(&plan, 0).into_candle(&Shape::new(&[128, 100]).unwrap()).unwrap();
    let shared = Buffer::from_candle(&tensor).unwrap();
    let executable = holding(&plan, &shared).prepacking().unwrap();
    assert_eq!(listed(&executable), 0);
    let before = bits(&executable, 1);
    tensor.slice_set(&(tensor.ones_like().unwrap() * 2.0).unwrap(), 0, 0).unwrap();
    assert_ne!(bits(&executable, 1), before);
}
