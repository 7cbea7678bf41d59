//! One graph is of one device; what is asked of a device that is not here is an error that says so.

#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use metal_candle::generate::{DecodeShape, Generator};
use metal_candle::io::LoraConfig;
use metal_candle::models::{BaseWeights, Decoder, load_decoder, load_outline};
use metal_candle::nn::{ApplyAdapter, LoRAAdapter};
use metal_candle::train::{AdamWConfig, TrainStep, Trainer, TrainingConfig};
use metal_candle::{
    DType, Device, Error, ErrorKind, InputSource, LazyTensor, Result, compile, grad,
};
use std::sync::Arc;

/// No machine has so many.
const AWAY: Device = Device::Cuda(4321);

fn here(dims: &[usize]) -> LazyTensor {
    LazyTensor::ones(dims, DType::F32, &Device::Cpu).unwrap()
}

fn away(dims: &[usize]) -> LazyTensor {
    LazyTensor::ones(dims, DType::F32, &AWAY).unwrap()
}

/// The error names both devices and what was done, at a line of this file.
#[track_caller]
fn is_mixture<T>(op: &str, result: Result<T>) {
    let Err(error) = result else { panic!("{op} of two devices") };
    let ErrorKind::DeviceMismatch { lhs, rhs, .. } = error.kind() else {
        panic!("{op}: {error}");
    };
    assert!([[Device::Cpu, AWAY], [AWAY, Device::Cpu]].contains(&[*lhs, *rhs]), "{error}");
    let message = error.to_string();
    for part in [op, "cpu", "cuda:4321", "to_device"] {
        assert!(message.contains(part), "{part} is not in {message}");
    }
    assert!(error.location().file().ends_with("devices.rs"), "{op}: {message}");
}

#[test]
fn an_operation_on_tensors_of_two_devices_is_an_error() {
    let (x, y) = (here(&[2, 2]), away(&[2, 2]));
    is_mixture("add", x.add(&y));
    is_mixture("mul", y.mul(&x.narrow(0, 0, 1).unwrap()));
    is_mixture("matmul", x.matmul(&y));
    is_mixture("cat", LazyTensor::cat(&[&x, &y], 0));
    is_mixture("rms_norm", x.rms_norm(&away(&[2]), 1e-5));
    let condition = LazyTensor::ones(&[2, 2], DType::U8, &AWAY).unwrap();
    is_mixture("", condition.where_cond(&x, &x));
    let loss = x.sqr().unwrap().sum_all().unwrap();
    is_mixture("grad", grad(&loss, &[&y]));
}

#[test]
fn roots_of_two_devices_are_no_one_plan() {
    let (x, y) = (here(&[2]).exp().unwrap(), away(&[2]).exp().unwrap());
    is_mixture("plan", LazyTensor::plan(&[&x, &y]));
    is_mixture("cached_plan", LazyTensor::cached_plan(&[&x, &y]));
    is_mixture("eval", LazyTensor::eval_all(&[&y, &x]));
}

#[test]
fn a_compiled_function_is_of_one_device() {
    let add = compile(|x: &[LazyTensor]| Ok(vec![x[0].add(&x[1])?]));
    is_mixture("compiled", add.call(vec![here(&[2]), away(&[2])]));
    is_mixture("compiled", add.plan(&[away(&[2]), here(&[2])]));
    let held = away(&[2]);
    let captures = compile(move |x: &[LazyTensor]| Ok(vec![x[0].add(&held)?]));
    is_mixture("add", captures.call(vec![here(&[2])]));
    let held = away(&[2]);
    let returns = compile(move |_: &[LazyTensor]| Ok(vec![held.clone()]));
    is_mixture("compiled", returns.call(vec![here(&[2])]));
    // The same types again, on another device: another plan.
    let double = compile(|x: &[LazyTensor]| Ok(vec![x[0].add(&x[0])?]));
    assert_eq!(double.call(vec![here(&[2])]).unwrap()[0].to_vec1::<f32>().unwrap(), [2.0, 2.0]);
    assert_eq!(double.plan(&[here(&[2])]).unwrap().target, "cpu");
    assert_ne!(double.plan(&[away(&[2])]).unwrap().target, "cpu");
}

#[track_caller]
fn is_missing<T>(result: Result<T>) {
    let Err(error) = result else { panic!("a device that is not here") };
    let message = error.to_string();
    assert!(message.contains("cuda:4321"), "{message}");
    let told = message.contains("--features cuda") || message.contains("this machine has");
    assert!(told && error.location().file().ends_with("devices.rs"), "{message}");
}

#[test]
fn a_device_that_is_not_here_says_what_to_do() {
    is_missing(LazyTensor::from_vec(vec![1f32; 1 << 16], &[1 << 16], &AWAY));
    is_missing(here(&[3]).to_device(&AWAY));
    is_missing(away(&[3]).exp().unwrap().eval());
    let llama = testbed::file("data/models/llama");
    let error = load_decoder(&llama, BaseWeights::AsStored, &AWAY).unwrap_err().to_string();
    assert!(error.contains("cuda:4321"), "{error}");
}

#[test]
fn a_tensor_goes_to_a_device_and_comes_back() {
    let x = LazyTensor::arange(0, 6, DType::F32, &Device::Cpu).unwrap();
    let x = x.reshape(&[2, 3]).unwrap().named("x");
    let there = x.to_device(testbed::device()).unwrap();
    assert_eq!((there.device(), there.name()), (testbed::device(), Some("x")));
    let back = there.affine(2.0, 1.0).unwrap().to_device(&Device::Cpu).unwrap();
    assert_eq!(back.device(), &Device::Cpu);
    assert_eq!(back.to_vec2::<f32>().unwrap(), [[1.0, 3.0, 5.0], [7.0, 9.0, 11.0]]);
    let type_only = LazyTensor::placeholder(&[2], DType::BF16, &Device::Cpu).unwrap();
    let type_only = type_only.to_device(&AWAY).unwrap();
    assert_eq!((type_only.device(), type_only.dims()), (&AWAY, &[2][..]));
}

fn outline() -> Decoder {
    load_outline(&testbed::file("data/models/llama"), BaseWeights::AsStored, &AWAY).unwrap()
}

#[test]
fn a_model_is_planned_for_a_device_that_is_not_here() {
    let decoder = Arc::new(outline());
    assert_eq!(decoder.device(), &AWAY);
    for (batch, tokens) in [(1, 1), (1, 32), (2, 1)] {
        let shape = DecodeShape { batch, tokens, capacity: 32 };
        let step = Generator::outline(Arc::clone(&decoder), shape).unwrap();
        assert_ne!(step.plan.target, "cpu");
    }
    let lora = LoRAAdapter::new(LoraConfig::default(), decoder.modules(), 0, &AWAY).unwrap();
    let config = TrainingConfig { max_seq_length: 16, ..TrainingConfig::default() };
    let update = Trainer::outline(Arc::clone(&decoder), &lora, &config, None).unwrap();
    assert_ne!(update.plan.target, "cpu");
    assert!(update.inputs.iter().any(|input| matches!(input, InputSource::Captured(_))));
}

#[test]
fn an_adapter_is_where_its_model_is() {
    let mut decoder = outline();
    let lora = |device| LoRAAdapter::new(LoraConfig::default(), outline().modules(), 0, device);
    let says = |error: Error| {
        let message = error.to_string();
        assert!(message.contains("cuda:4321") && message.contains("cpu"), "{message}");
    };
    says(decoder.apply_adapter(lora(&Device::Cpu).unwrap()).unwrap_err());
    decoder.apply_adapter(lora(&AWAY).unwrap()).unwrap();
    let (decoder, lora) = (Arc::new(decoder), lora(&Device::Cpu).unwrap());
    let step = TrainStep::new(decoder, lora, AdamWConfig::default(), 1.0, 0);
    says(step.map(drop).unwrap_err());
}
