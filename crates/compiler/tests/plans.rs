//! Plans of real work: what is fused, and where everything lives. A lost fusion fails here.

mod support;

use expect_test::{Expect, expect};
use metal_candle_compiler::kernel::KernelOp;
use metal_candle_compiler::{
    LibraryCall, Operand, OutputSource, Plan, Slot, Step, Target, Work, plan,
};
use metal_candle_graph::{BinaryOp, ComputationGraph, Operation, Shape, UnaryOp};
use support::*;

fn planned(g: &ComputationGraph, donated: &[bool]) -> Plan {
    let plan = plan(g, &Target::CPU, donated).unwrap();
    check_memory(&plan);
    plan
}

/// Step labels, the shape of the plan at a glance.
fn check(g: &ComputationGraph, donated: &[bool], expected: Expect) -> Plan {
    let plan = planned(g, donated);
    let steps: Vec<String> = plan.steps.iter().map(|s| format!("{}\n", s.label)).collect();
    expected.assert_eq(&steps.concat());
    plan
}

fn kernels(plan: &Plan) -> usize {
    plan.steps.iter().filter(|s| matches!(s.work, Work::Kernel(_))).count()
}

/// No two arena buffers that are alive at once overlap, and all lie within the arena.
fn check_memory(plan: &Plan) {
    let mut lives: Vec<(usize, usize, usize, usize)> = Vec::new();
    for (t, step) in plan.steps.iter().enumerate() {
        for operand in step.args.iter().chain(&step.outs) {
            let Slot::Arena { offset_bytes, len_bytes } = operand.slot else { continue };
            assert!(offset_bytes + len_bytes <= plan.arena_bytes, "beyond the arena\n{plan}");
            let written = step.outs.iter().any(|o| o.slot == operand.slot);
            let range = (offset_bytes, offset_bytes + len_bytes);
            match lives.iter_mut().rev().find(|l| (l.0, l.1) == range) {
                // A value is written before it is read, and a rewritten range may hold a new value.
                Some(life) if !written || life.3 == t => life.3 = t,
                Some(life) if step.args.iter().any(|a| a.slot == operand.slot) => life.3 = t,
                _ => {
                    assert!(written, "step {t} reads {range:?}, which nothing wrote\n{plan}");
                    lives.push((range.0, range.1, t, t));
                }
            }
        }
    }
    for (i, a) in lives.iter().enumerate() {
        for b in &lives[i + 1..] {
            let alive = a.2 <= b.3 && b.2 <= a.3;
            let overlap = a.0 < b.1 && b.0 < a.1;
            assert!(!(alive && overlap), "{a:?} and {b:?} overlap\n{plan}");
        }
    }
}

#[test]
fn softmax_is_one_kernel() {
    let plan = check(
        &softmax(),
        &[],
        expect![[r#"
        max+sub+exp+sum+recip+mul
    "#]],
    );
    assert_eq!(plan.arena_bytes, 0);
}

#[test]
fn rms_norm_and_its_gradient_share_a_pass_and_one_number_per_row() {
    let plan = planned(&rms_norm_with_gradients(), &[]);
    assert_eq!(plan.steps.len(), 2, "{plan}");
    assert_eq!(plan.arena_bytes, 64 * 4, "{plan}");
}

#[test]
fn lora_and_the_base_product_are_one_sum() {
    let plan = check(
        &lora_forward(),
        &[],
        expect![[r#"
        matmul
        matmul+matmul
    "#]],
    );
    let step = &plan.steps[1];
    let Work::Call(LibraryCall::GemmSum { alphas, accumulate }) = &step.work else {
        panic!("{plan}")
    };
    assert_eq!((&alphas[..], *accumulate), (&[1.0, 2.0][..], false));
    let depth = |arg: &Operand| arg.layout.shape.last().unwrap();
    assert_eq!([&step.args[0], &step.args[2]].map(depth), [512, 8]);
    assert!(plan.to_string().contains("alpha=1, 2"), "{plan}");
}

#[test]
fn lora_accumulates_onto_the_base_product_where_a_call_makes_one() {
    let target = Target { max_products: 1, ..Target::CPU };
    let plan = plan(&lora_forward(), &target, &[]).unwrap();
    check_memory(&plan);
    let labels: Vec<&str> = plan.steps.iter().map(|step| &*step.label).collect();
    assert_eq!(labels, ["matmul", "matmul", "matmul+add"]);
    let Work::Call(LibraryCall::Gemm { alpha, accumulate }) = plan.steps[2].work else {
        panic!("{plan}")
    };
    assert_eq!((alpha, accumulate), (2.0, true));
    assert_eq!(plan.steps[0].outs[0].slot, Slot::Output(0));
    assert_eq!(plan.steps[2].outs[0].slot, Slot::Output(0));
}

#[test]
fn a_deep_base_product_accumulates_onto_the_lora_branch_of_a_result_beyond_the_caches() {
    let step_depths = |hidden: usize, target: &Target| -> Vec<usize> {
        let mut g = ComputationGraph::new();
        let (x, w) = (g.input(0, f32(&[64, hidden])), g.input(1, f32(&[hidden, 512])));
        let (a, b) = (g.input(2, f32(&[hidden, 8])), g.input(3, f32(&[8, 512])));
        let base = g.add(Operation::Dot, &[x, w]).unwrap();
        let low = g.add(Operation::Dot, &[x, a]).unwrap();
        let branch = g.add(Operation::Dot, &[low, b]).unwrap();
        let scaled = g.binary_scalar(BinaryOp::Mul, branch, 2.0).unwrap();
        g.outputs = vec![g.binary(BinaryOp::Add, base, scaled).unwrap()];
        let plan = plan(&g, target, &[]).unwrap();
        check_memory(&plan);
        plan.steps.iter().map(|step| step.args[0].layout.shape.last().unwrap()).collect()
    };
    let cached = Target { cache_bytes: usize::MAX, ..Target::CUDA };
    let beyond = Target { cache_bytes: 64 * 512 * 4, ..Target::CUDA };
    // x A, then the branch, or the base product, goes last.
    assert_eq!(step_depths(1024, &cached).last(), Some(&8));
    assert_eq!(step_depths(1024, &beyond), [1024, 8, 1024]);
    // Not deep enough to hide it.
    assert_eq!(step_depths(512, &beyond).last(), Some(&8));
}

/// `x w + s (x a) b`, of 48 rows, and what is added to every row of it.
fn lora_with_bias(bias: &[usize], scaled: bool) -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let (x, w) = (g.input(0, f32(&[48, 256])), g.input(1, f32(&[256, 512])));
    let (a, b) = (g.input(2, f32(&[256, 8])), g.input(3, f32(&[8, 512])));
    let bias = g.input(4, f32(bias));
    let bias = g.broadcast_to(bias, Shape::new(&[48, 512]).unwrap()).unwrap();
    let base = g.add(Operation::Dot, &[x, w]).unwrap();
    let low = g.add(Operation::Dot, &[x, a]).unwrap();
    let branch = g.add(Operation::Dot, &[low, b]).unwrap();
    let branch = g.binary_scalar(BinaryOp::Mul, branch, 2.0).unwrap();
    let sum = g.binary(BinaryOp::Add, base, branch).unwrap();
    let mut y = g.binary(BinaryOp::Add, bias, sum).unwrap();
    if scaled {
        y = g.binary_scalar(BinaryOp::Mul, y, 3.0).unwrap();
    }
    g.outputs = vec![y];
    g
}

#[test]
fn a_bias_is_added_by_the_product_that_starts_from_nothing() {
    let labels = |g: &ComputationGraph, target: &Target| -> Vec<String> {
        let plan = plan(g, target, &[]).unwrap();
        check_memory(&plan);
        plan.steps.iter().map(|step| step.label.clone()).collect()
    };
    let target = Target { adds_bias: true, max_products: 1, ..Target::CPU };
    let g = lora_with_bias(&[512], false);
    assert_eq!(labels(&g, &target), ["matmul+bias", "matmul", "matmul+add"]);
    // It is not scaled with the product.
    let scaled = labels(&lora_with_bias(&[512], true), &target);
    assert_eq!(scaled, ["matmul+bias", "matmul", "matmul+add", "mul"]);
    // A number for each row, or one for every element, is no bias; nor does every target add one.
    let column = lora_with_bias(&[48, 1], false);
    assert_eq!(labels(&column, &target), ["matmul", "matmul", "matmul+add", "add"]);
    let whole = lora_with_bias(&[48, 512], false);
    assert_eq!(labels(&whole, &target), ["matmul", "matmul", "matmul+add", "add"]);
    assert_eq!(labels(&g, &Target::CPU), ["matmul", "matmul+matmul", "add"]);
}

#[test]
fn lora_accumulates_onto_a_quantised_base_product_too() {
    let plan = planned(&quantised_lora_forward(), &[]);
    let labels: Vec<&str> = plan.steps.iter().map(|step| &*step.label).collect();
    assert_eq!(labels, ["quant_gemm", "matmul", "matmul+add"]);
    assert_eq!(plan.steps[2].outs[0].slot, plan.steps[0].outs[0].slot);
}

#[test]
fn an_optimizer_step_is_one_kernel_and_updates_its_state_in_place() {
    let donated = [false, false, false, true, true, true];
    let plan = planned(&lora_step(), &donated);
    let last = plan.steps.last().unwrap();
    assert!(matches!(last.work, Work::Kernel(_)) && last.outs.len() == 3, "{plan}");
    let sources: Vec<OutputSource> = plan.outputs[3..].iter().map(|o| o.source).collect();
    assert_eq!(sources, [3, 4, 5].map(OutputSource::Donated), "{plan}");
}

#[test]
fn nothing_is_donated_unasked() {
    let plan = planned(&lora_step(), &[]);
    let written = |o: &metal_candle_compiler::PlanOutput| o.source == OutputSource::Written;
    assert!(plan.outputs.iter().all(written), "{plan}");
    let inputs = plan.steps.iter().flat_map(|s| &s.outs);
    assert!(inputs.clone().all(|o| !matches!(o.slot, Slot::Input(_))), "{plan}");
}

#[test]
fn cross_entropy_and_its_gradient_are_one_kernel() {
    let plan = planned(&swiglu_with_loss(), &[]);
    // SwiGLU, loss with gradient, the mean, SwiGLU's two gradients.
    assert!(kernels(&plan) <= 5, "{plan}");
    // gate and up are kept, silu(gate) is computed again: of the sigmoid that its gradient needs.
    let exps = plan.steps.iter().filter_map(|s| match &s.work {
        Work::Kernel(k) => Some(k),
        Work::Call(_) => None,
    });
    let exps: Vec<UnaryOp> = exps
        .flat_map(|k| &k.tape)
        .filter_map(|i| match i.op {
            KernelOp::Unary(op @ (UnaryOp::Silu | UnaryOp::Sigmoid), _) => Some(op),
            _ => None,
        })
        .collect();
    assert_eq!(exps, [UnaryOp::Silu, UnaryOp::Sigmoid], "{plan}");
}

#[test]
fn the_gradients_of_gate_and_up_are_one_kernel_in_place() {
    for target in [Target::CPU, Target::CUDA, Target::METAL] {
        let plan = plan(&swiglu_lora_step(), &target, &[]).unwrap();
        check_memory(&plan);
        let of_gate = |step: &&Step| step.label.contains("sigmoid");
        let backward: Vec<&Step> = plan.steps.iter().filter(of_gate).collect();
        let [both] = backward[..] else { panic!("{plan}") };
        // gate, up and the cotangent.
        assert_eq!((both.args.len(), both.outs.len()), (3, 2), "{plan}");
        let is_in_place = |out: &Operand| both.args.iter().any(|arg| arg.slot == out.slot);
        assert!(both.outs.iter().all(is_in_place), "{plan}");
    }
}

#[test]
fn maps_that_are_joined_take_no_more_memory_than_apart() {
    let joined = planned(&swiglu_lora_step(), &[]);
    // Three that are read, and one that is written.
    let narrow = Target { max_operands: 4, ..Target::CPU };
    let apart = plan(&swiglu_lora_step(), &narrow, &[]).unwrap();
    assert_eq!(joined.steps.len() + 1, apart.steps.len(), "{joined}{apart}");
    assert!(joined.peak_bytes() <= apart.peak_bytes(), "{joined}{apart}");
    assert!(joined.bytes() < apart.bytes(), "{joined}{apart}");
}

#[test]
fn a_donated_cache_is_updated_in_place_and_a_kept_one_is_copied() {
    let plan = planned(&cache_update(), &[true]);
    assert_eq!(plan.outputs[1].source, OutputSource::Donated(0), "{plan}");
    assert_eq!(plan.steps.len(), 2, "{plan}");
    let plan = planned(&cache_update(), &[]);
    assert_eq!(plan.outputs[1].source, OutputSource::Written, "{plan}");
    assert_eq!(plan.steps.len(), 3, "{plan}");
}

#[test]
fn a_long_chain_is_cut_into_kernels_that_share_one_buffer() {
    let plan = planned(&chain(10_000), &[]);
    assert_eq!(
        plan.steps.len(),
        10_000usize.div_ceil(Target::CPU.max_tape),
        "{} steps",
        plan.steps.len()
    );
    assert_eq!(plan.arena_bytes, 64);
}

#[test]
fn a_plan_prints_steps_slots_offsets_peak_and_reasons() {
    let text = planned(&rms_norm_with_gradients(), &[]).to_string();
    for part in ["peak", "arena[0..256]", "out0:f32[64, 512]", "not fused with 000: ", "flops"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
}

#[test]
fn products_write_where_a_concatenation_wants_them() {
    let mut g = ComputationGraph::new();
    let [x, y] = [0, 1].map(|i| g.input(i, f32(&[48, 64])));
    let [a, b] = [2, 3].map(|i| g.input(i, f32(&[64, 8])));
    let given = g.input(4, f32(&[48, 5]));
    let [first, second] = [(x, a), (y, b)].map(|(l, r)| g.add(Operation::Dot, &[l, r]).unwrap());
    g.outputs = vec![g.concat(1, &[first, given, second]).unwrap()];
    let plan = planned(&g, &[]);
    let work = |step: &Step| (step.label.clone(), step.outs[0].layout.offset, step.outs[0].slot);
    let slot = Slot::Output(0);
    let works: Vec<_> = plan.steps.iter().map(work).collect();
    let expected = [("matmul", 0), ("matmul", 13), ("copy", 8)];
    assert_eq!(works, expected.map(|(label, at)| (label.to_owned(), at, slot)), "{plan}");

    // Transposed, as the gradients of factors are; one that something else reads is copied.
    let turned = [first, second].map(|part| g.transpose(part).unwrap());
    g.outputs = vec![g.concat(0, &turned).unwrap(), second];
    let plan = planned(&g, &[]);
    assert_eq!(plan.steps.len(), 3, "{plan}");
    assert_eq!(plan.steps[0].outs[0].layout.strides(), [1, 48], "{plan}");
}
