//! What the Metal kernels of metal-candle 1.x got wrong, each as the law that it broke. (That a shader is compiled once is a
//! test of the runtime's library of kernels, that a run is over when its work is one of its executor.)

#[path = "support/mod.rs"]
mod support;

use metal_candle_compiler::render::{Dialect, Launch, Limits, Part, Team, call, launch, render};
use metal_candle_compiler::{LibraryCall, Plan, Slot, Step, Target, Work, plan};
use metal_candle_graph::{BinaryOp, Composite, ComputationGraph, DType, Shape, TensorType};
use support::{composite, eps, gradients, lora_forward, lora_step, total};

/// An M2 Pro.
const LIMITS: Limits = Limits::metal(19);

fn planned(g: &ComputationGraph) -> Plan {
    plan(g, &Target::METAL, &[]).unwrap()
}

fn reads(step: &Step, slot: Slot) -> bool {
    step.args.iter().any(|arg| arg.slot == slot)
}

/// What is done for a step.
fn parts(step: &Step) -> Vec<Part> {
    match &step.work {
        Work::Kernel(kernel) => {
            vec![Part::Kernel(render(kernel, Dialect::METAL, &LIMITS, "k").unwrap())]
        }
        Work::Call(c) => call(c, &step.args, &step.outs, Dialect::METAL, &LIMITS).unwrap().parts,
    }
}

/// Its fused kernel multiplied x by A again for every element of the output.
#[test]
fn x_a_is_computed_once_and_not_for_every_output_element() {
    const ROWS: u64 = 64;
    const WIDTH: u64 = 512;
    const RANK: u64 = 8;
    let (x, a) = (Slot::Input(0), Slot::Input(2));
    for (name, graph) in [("forward", lora_forward()), ("a step", lora_step())] {
        let plan = planned(&graph);
        let calls = plan.steps.iter().filter(|s| reads(s, x) && reads(s, a));
        let calls: Vec<&Work> = calls.map(|step| &step.work).collect();
        assert!(matches!(calls[..], [Work::Call(LibraryCall::LowRank { .. })]), "{name}: {plan}");
    }
    // The base, x A, and what that times B is: nothing is multiplied twice.
    let products = 2 * ROWS * (WIDTH * WIDTH + 2 * WIDTH * RANK);
    let forward = planned(&lora_forward());
    assert_eq!((forward.flops(), forward.steps.len()), (products, 2), "{forward}");
    // The same where the last two are one call, as a sum is.
    let cpu = plan(&lora_forward(), &Target::CPU, &[]).unwrap();
    assert_eq!((cpu.flops(), cpu.steps.len()), (products, 2), "{cpu}");
    // And for a rank above that of the call.
    let none = Target { max_low_rank: RANK as usize - 1, ..Target::METAL };
    assert_eq!(plan(&lora_forward(), &none, &[]).unwrap().steps.len(), 3);
}

fn norm_with_gradients(norm: &str, dtype: DType, dims: &[usize]) -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let ty = |dims: &[usize]| TensorType::new(dtype, Shape::new(dims).unwrap());
    let (x, c) = (g.input(0, ty(dims)), g.input(1, ty(dims)));
    let y = match norm {
        "softmax" => composite(&mut g, Composite::Softmax { dim: 1 }, &[x]),
        _ => {
            let w = g.input(2, ty(&dims[1..]));
            composite(&mut g, Composite::RmsNorm { eps: eps() }, &[x, w])
        }
    };
    let weighted = g.binary(BinaryOp::Mul, y, c).unwrap();
    let loss = total(&mut g, weighted);
    let grads = gradients(&mut g, loss, &[x]);
    g.outputs = [vec![y], grads].concat();
    g
}

/// Its RMSNorm and softmax gave a row to one thread, which read it three times.
#[test]
fn a_row_is_shared_by_a_simd_group_or_a_threadgroup() {
    for norm in ["softmax", "rms_norm"] {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for cols in [64, 576, 1000, 4096, 32_000] {
                let plan = planned(&norm_with_gradients(norm, dtype, &[128, cols]));
                let kernels = plan.steps.iter().filter_map(|step| match &step.work {
                    Work::Kernel(kernel) => Some(kernel),
                    Work::Call(_) => None,
                });
                // Forward and backward.
                let rows: Vec<_> = kernels.filter(|k| k.stages() > 1 && k.cols() == cols).collect();
                assert!(!rows.is_empty(), "{norm} of {cols}: {plan}");
                for kernel in rows {
                    let Launch { team, block, .. } = launch(kernel, &LIMITS).unwrap();
                    let threads = match team {
                        Team::Simd => 32,
                        Team::Block => block,
                        Team::Element | Team::Column { .. } => 1,
                    };
                    assert!(threads >= 32, "{norm} of {cols} in {dtype}: {team:?}\n{plan}");
                }
            }
        }
    }
}

/// Its kernels had no backward: what was upstream of them was never trained.
#[test]
fn every_kernel_has_its_gradient_in_metal() {
    let graphs = [
        ("LoRA", lora_step()),
        ("softmax", norm_with_gradients("softmax", DType::F32, &[64, 512])),
        ("rms_norm", norm_with_gradients("rms_norm", DType::BF16, &[64, 512])),
    ];
    for (name, graph) in graphs {
        let plan = planned(&graph);
        for (i, output) in plan.outputs.iter().enumerate() {
            let slot = Slot::Output(i as u32);
            let written = plan.steps.iter().any(|s| s.outs.iter().any(|out| out.slot == slot));
            assert!(written, "{name}: nothing writes output {i} of {}\n{plan}", output.ty);
        }
        for step in &plan.steps {
            assert!(!parts(step).is_empty(), "{name}: nothing is done for {}", step.label);
        }
    }
}

/// What "Metal Feature Set Tables" allows, of families Apple7 and later, by every step of a training plan.
#[test]
fn launches_and_argument_tables_are_within_metals_limits() {
    const THREADS_OF_A_GROUP: usize = 1024;
    const THREADGROUP_BYTES: usize = 32 << 10;
    const BUFFERS: usize = 31;
    for graph in [lora_step(), support::swiglu_with_loss(), support::rms_norm_with_gradients()] {
        for step in &planned(&graph).steps {
            for part in parts(step) {
                let Part::Kernel(source) = part else { continue };
                let Launch { grid, block, shared_bytes, .. } = source.launch;
                assert!(block <= THREADS_OF_A_GROUP && block.is_multiple_of(32), "{}", step.label);
                assert!(grid * block < 1 << 32, "{}: threads are counted in 32 bits", step.label);
                assert!(shared_bytes <= THREADGROUP_BYTES, "{}", step.label);
                assert!(shared_bytes.is_multiple_of(16), "{}: lengths are so in Metal", step.label);
                assert!(source.bindings.len() <= BUFFERS, "{}", step.label);
                for i in 0..source.bindings.len() {
                    assert!(source.text.contains(&format!("[[buffer({i})]]")), "{}", source.text);
                }
                let is_aligned = |slot: &Slot| match slot {
                    Slot::Arena { offset_bytes, .. } => {
                        offset_bytes.is_multiple_of(source.align_bytes)
                    }
                    Slot::Input(_) | Slot::Output(_) => true,
                };
                let mut operands = step.args.iter().chain(&step.outs);
                assert!(operands.all(|operand| is_aligned(&operand.slot)), "{}", step.label);
            }
        }
    }
}
