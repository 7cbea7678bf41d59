//! The training step: one compiled function, its state donated.

use super::AdamWConfig;
use super::optimizer::{Moments, StepScalars, clip_factor, global_norm};
use crate::error::ErrorKind;
use crate::io::LoraConfig;
use crate::io::data::Batch;
use crate::lazy::one_device;
use crate::models::{Decoder, PackedInput};
use crate::nn::LoRAAdapter;
use crate::{
    Compiled, DType, Device, LazyTensor, Outline, Recording, Result, Timing, compile, grad,
};
use std::sync::Arc;

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepMetrics {
    /// The mean loss before the update.
    pub loss: f32,
    /// The norm of all gradients before clipping.
    pub gradient_norm: f32,
    /// False if a value was not finite: then nothing was updated.
    pub applied: bool,
}

/// How often a [`TrainStep`] has moved: with its tensors, all that it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StepCount {
    /// Steps that were applied: AdamW's one count for all parameters.
    pub updates: usize,
    /// Steps, applied or not: with the seed, what dropout depends on.
    pub steps: usize,
}

/// The batches of one update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepShape {
    /// Rows of a batch.
    pub batch: usize,
    /// Tokens of a row.
    pub seq: usize,
    /// Batches of an update.
    pub accumulated: usize,
    /// Whether a row may hold several documents.
    pub packed: bool,
}

impl StepShape {
    /// Placeholders for what follows the state, as [`TrainStep::arguments`] makes it.
    fn arguments(self, device: &Device) -> Result<Vec<LazyTensor>> {
        let hold = |dims: &[usize], dtype| LazyTensor::placeholder(dims, dtype, device);
        let dims = [self.batch, self.seq];
        let mut args = vec![hold(&[], DType::F32)?; SCALARS - 1];
        args.push(hold(&[], DType::I64)?);
        for _ in 0..self.accumulated {
            args.extend([hold(&dims, DType::U32)?, hold(&dims, DType::I64)?]);
            if self.packed {
                args.extend(vec![hold(&dims, DType::U32)?; 2]);
            }
        }
        if self.accumulated > 1 {
            args.extend(vec![hold(&[], DType::F32)?; self.accumulated]);
        }
        Ok(args)
    }
}

/// An adapter in training: parameters, moments, and the compiled step that moves them.
///
/// The arguments of the step are `[p.., m.., v.., rate, correction1, correction2, seed]`, then every micro-batch
/// (ids and labels, and of packed ones segments and positions), then (of more than one) their shares of the loss.
/// Its results are `[norm, loss, p.., m.., v..]`; the state is updated in place.
pub struct TrainStep {
    adapter: LoRAAdapter,
    state: Vec<LazyTensor>,
    step: Compiled,
    evaluate: Compiled,
    diagnose: Compiled,
    optimizer: AdamWConfig,
    count: StepCount,
    seed: i64,
    device: Device,
}

/// Arguments between the state and the micro-batches.
const SCALARS: usize = 4;

impl TrainStep {
    /// Prepares to train `adapter` on a frozen `decoder`; `seed` is that of the dropout.
    ///
    /// # Errors
    /// Where the adapter is on another device; where it does not fit the decoder (when the step is first traced).
    pub fn new(
        decoder: Arc<Decoder>,
        adapter: LoRAAdapter,
        optimizer: AdamWConfig,
        max_gradient_norm: f64,
        seed: u64,
    ) -> Result<TrainStep> {
        let parameters = adapter.parameters();
        let (n, device) = (parameters.len(), *decoder.device());
        one_device("TrainStep::new", std::iter::once(decoder.weight()).chain(&parameters))?;
        let mut state = Vec::with_capacity(3 * n);
        // The step owns and overwrites its state: the caller's adapter keeps its own values.
        for parameter in &parameters {
            state.push(parameter.to_owned_copy()?);
        }
        for _ in 0..2 {
            for p in &parameters {
                state.push(LazyTensor::zeros(p.dims(), p.dtype(), &device)?.into_owned()?);
            }
        }
        let traced = Traced { decoder: Arc::clone(&decoder), adapter: adapter.clone(), n };
        let step = traced.clone().compiled(optimizer, max_gradient_norm);
        let diagnose = compile(move |args: &[LazyTensor]| {
            let (_, gradients) = traced.gradients(args)?;
            gradients.iter().map(|g| g.sqr()?.sum_all()).collect()
        });
        let shape = adapter.clone();
        let evaluate = compile(move |args: &[LazyTensor]| {
            let (batch, parameters) = args.split_at(args.len() - n);
            Ok(vec![loss(&decoder, batch, &shape.with_parameters(parameters)?)?])
        });
        let count = StepCount::default();
        let seed = seed as i64;
        Ok(TrainStep { adapter, state, step, evaluate, diagnose, optimizer, count, seed, device })
    }

    /// One update on one batch, at this learning rate.
    ///
    /// # Errors
    /// Where an id or a label is out of range, or memory runs out; the state is then lost with the step.
    pub fn run(&mut self, batch: &Batch, rate: f64) -> Result<StepMetrics> {
        self.run_accumulated(std::slice::from_ref(batch), rate)
    }

    /// One update on several batches, one after the other within one plan: as if they were one, in the memory of
    /// one.
    ///
    /// # Errors
    /// As [`TrainStep::run`].
    pub fn run_accumulated(&mut self, batches: &[Batch], rate: f64) -> Result<StepMetrics> {
        let args = self.take_arguments(batches, rate)?;
        let results = self.step.call(args)?;
        self.take_results(results)
    }

    /// [`TrainStep::run`], and the seconds that it took on the device: of each step of its plan, or of all.
    ///
    /// # Errors
    /// As [`TrainStep::run`].
    pub fn profile(
        &mut self,
        batch: &Batch,
        rate: f64,
        timing: Timing,
    ) -> Result<(StepMetrics, Vec<f64>)> {
        let args = self.take_arguments(std::slice::from_ref(batch), rate)?;
        let (results, seconds) = self.step.profile(args, timing)?;
        Ok((self.take_results(results)?, seconds))
    }

    /// The state, which the step takes along, and what changes from step to step.
    fn take_arguments(&mut self, batches: &[Batch], rate: f64) -> Result<Vec<LazyTensor>> {
        let rest = self.arguments(batches, rate)?;
        let mut args = std::mem::take(&mut self.state);
        args.extend(rest);
        self.count.steps += 1;
        Ok(args)
    }

    fn take_results(&mut self, mut results: Vec<LazyTensor>) -> Result<StepMetrics> {
        self.state = results.split_off(2);
        let (gradient_norm, loss) = (scalar(&results[0])?, scalar(&results[1])?);
        let applied = loss.is_finite() && gradient_norm.is_finite();
        self.count.updates += usize::from(applied);
        Ok(StepMetrics { loss, gradient_norm, applied })
    }

    /// The first parameter whose gradient on these batches is not finite, by its name in a PEFT file; `None` if it is
    /// the loss alone.
    ///
    /// # Errors
    /// As [`TrainStep::run`]; the state is kept.
    pub fn diagnose(&self, batches: &[Batch]) -> Result<Option<String>> {
        let mut args = self.state.clone();
        args.extend(self.arguments(batches, 0.0)?);
        let norms = self.diagnose.call(args)?;
        for (name, norm) in self.parameter_names().zip(&norms) {
            if !scalar(norm)?.is_finite() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// The loss on a batch, nothing updated, nothing dropped.
    ///
    /// # Errors
    /// As [`TrainStep::run`]; the state is kept.
    pub fn evaluate(&self, batch: &Batch) -> Result<f32> {
        let mut args = tensors(batch, &self.device)?;
        args.extend(self.parameters().iter().cloned());
        scalar(&self.evaluate.call(args)?[0])
    }

    /// The adapter as it is now.
    ///
    /// # Errors
    /// Never for a state of this step.
    pub fn adapter(&self) -> Result<LoRAAdapter> {
        let copies = self.parameters().iter().map(LazyTensor::to_owned_copy);
        self.adapter.with_parameters(&copies.collect::<Result<Vec<_>>>()?)
    }

    /// What is adapted and how.
    pub fn adapter_config(&self) -> &LoraConfig {
        &self.adapter.config
    }

    /// Updates so far: steps that were applied.
    pub fn updates(&self) -> usize {
        self.count.updates
    }

    /// How often it has moved.
    pub fn count(&self) -> StepCount {
        self.count
    }

    /// Parameters and moments, by name.
    pub fn state(&self) -> impl Iterator<Item = (String, &LazyTensor)> {
        let names = ["parameter", "mean", "square"]
            .into_iter()
            .flat_map(|part| self.parameter_names().map(move |name| format!("{part}.{name}")));
        names.zip(&self.state)
    }

    /// Goes to where another step over the same adapter stood: the steps from there on are the same, bit for bit.
    ///
    /// # Errors
    /// Where `tensors` are not those of [`TrainStep::state`], in its order.
    pub fn restore(&mut self, tensors: Vec<LazyTensor>, count: StepCount) -> Result<()> {
        let fits = tensors.len() == self.state.len()
            && tensors.iter().zip(&self.state).all(|(a, b)| a.dims() == b.dims());
        if !fits {
            let (expected, got) = (self.state.len(), tensors.len());
            return Err(ErrorKind::Parameters { expected, got }.into());
        }
        self.state = tensors.iter().map(LazyTensor::to_owned_copy).collect::<Result<_>>()?;
        self.count = count;
        Ok(())
    }

    /// What a step on batches of this shape would run, and on what; nothing is allocated, and the
    /// decoder's weights may be placeholders.
    ///
    /// # Errors
    /// Where the adapter does not fit the decoder.
    pub fn outline(
        decoder: Arc<Decoder>,
        adapter: &LoRAAdapter,
        optimizer: AdamWConfig,
        max_gradient_norm: f64,
        shape: StepShape,
    ) -> Result<Outline> {
        let device = *decoder.device();
        let hold = |p: &LazyTensor| LazyTensor::placeholder(p.dims(), p.dtype(), &device);
        let parameters = adapter.parameters();
        let n = parameters.len();
        let parameters = parameters.iter().map(hold).collect::<Result<Vec<_>>>()?;
        let adapter = adapter.with_parameters(&parameters)?;
        let mut args = [parameters.clone(), parameters.clone(), parameters].concat();
        args.extend(shape.arguments(&device)?);
        Traced { decoder, adapter, n }.compiled(optimizer, max_gradient_norm).outline(&args)
    }

    /// The plan of a step on batches of this shape, to be printed.
    ///
    /// # Errors
    /// Where the step could not be traced.
    pub fn plan(&self, shape: StepShape) -> Result<metal_candle_compiler::Plan> {
        let mut args = self.state.clone();
        args.extend(shape.arguments(&self.device)?);
        self.step.plan(&args)
    }

    /// What the next step on these batches would compute, and from what. Its results are the norm of the gradients, the
    /// loss, and the state.
    ///
    /// # Errors
    /// Where the step could not be traced.
    pub fn recording(&self, batches: &[Batch], rate: f64) -> Result<Recording> {
        let mut args = self.state.clone();
        args.extend(self.arguments(batches, rate)?);
        self.step.recording(&args)
    }

    /// The scratch memory that its steps hold now: the arenas of the plans that ran.
    pub fn allocated_arena_bytes(&self) -> usize {
        self.step.allocated_arena_bytes()
    }

    fn parameters(&self) -> &[LazyTensor] {
        &self.state[..self.state.len() / 3]
    }

    fn parameter_names(&self) -> impl Iterator<Item = String> {
        let names = self.adapter.layers().flat_map(|(module, _)| {
            ["lora_A", "lora_B"].map(|side| format!("{module}.{side}.weight"))
        });
        names.collect::<Vec<_>>().into_iter()
    }

    /// What follows the state.
    fn arguments(&self, batches: &[Batch], rate: f64) -> Result<Vec<LazyTensor>> {
        let number = |x: f64| LazyTensor::from_vec(vec![x as f32], &[], &self.device);
        let [correction1, correction2] = self.optimizer.corrections(self.count.updates + 1);
        let seed = self.seed.wrapping_add(self.count.steps as i64);
        let mut args = vec![number(rate)?, number(correction1)?, number(correction2)?];
        args.push(LazyTensor::from_vec(vec![seed], &[], &self.device)?);
        for batch in batches {
            args.extend(tensors(batch, &self.device)?);
        }
        if batches.len() > 1 {
            let total: usize = batches.iter().map(|b| b.trained).sum();
            for batch in batches {
                args.push(number(batch.trained as f64 / total.max(1) as f64)?);
            }
        }
        Ok(args)
    }
}

/// What the compiled functions are traced from.
#[derive(Clone)]
struct Traced {
    decoder: Arc<Decoder>,
    adapter: LoRAAdapter,
    /// Parameters.
    n: usize,
}

impl Traced {
    /// The loss, and the gradients of all parameters.
    ///
    /// Each micro-batch goes forward and back before the next begins, so that its activations are gone by then.
    fn gradients(&self, args: &[LazyTensor]) -> Result<(LazyTensor, Vec<LazyTensor>)> {
        let parameters = &args[..self.n];
        let (scalars, batches) = args[3 * self.n..].split_at(SCALARS);
        let seed = &scalars[3];
        // The shares are the only scalars.
        let shares = batches.iter().filter(|x| x.rank() == 0).count();
        let (batches, shares) = batches.split_at(batches.len() - shares);
        let size = batches.len() / shares.len().max(1);
        let adapter = self.adapter.with_parameters(parameters)?.with_dropout(seed);
        let wrt: Vec<&LazyTensor> = parameters.iter().collect();
        let mut sum: Option<(LazyTensor, Vec<LazyTensor>)> = None;
        for (i, batch) in batches.chunks(size).enumerate() {
            let mut loss = loss(&self.decoder, batch, &adapter)?;
            if let Some(share) = shares.get(i) {
                loss = loss.mul(share)?;
            }
            let gradients = grad(&loss, &wrt)?;
            sum = Some(match sum {
                None => (loss, gradients),
                Some((total, sums)) => {
                    let sums = sums.iter().zip(&gradients).map(|(a, b)| a.add(b));
                    (total.add(&loss)?, sums.collect::<Result<_>>()?)
                }
            });
        }
        Ok(sum.expect("metal-candle bug: a step without a batch"))
    }

    /// The whole step, its state donated.
    fn compiled(self, optimizer: AdamWConfig, max_norm: f64) -> Compiled {
        let state = 0..3 * self.n;
        compile(move |args: &[LazyTensor]| self.step(&optimizer, max_norm, args)).donate(state)
    }

    fn step(
        &self,
        optimizer: &AdamWConfig,
        max_norm: f64,
        args: &[LazyTensor],
    ) -> Result<Vec<LazyTensor>> {
        let (loss, gradients) = self.gradients(args)?;
        let norm = global_norm(&gradients)?;
        let clip = clip_factor(&norm, max_norm)?;
        // Not finite minus itself is NaN, and NaN is not 0: one test for both.
        let total = norm.add(&loss)?;
        let apply = total.sub(&total)?.eq(&total.zeros_like()?)?;

        let [rate, correction1, correction2] = [0, 1, 2].map(|i| &args[3 * self.n + i]);
        let scalars = StepScalars { rate, correction1, correction2 };
        let (mut p, mut m, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for (i, gradient) in gradients.iter().enumerate() {
            let state = Moments {
                parameter: args[i].clone(),
                mean: args[self.n + i].clone(),
                square: args[2 * self.n + i].clone(),
            };
            let next = optimizer.update(&state, &gradient.mul(&clip)?, &scalars, &apply)?;
            p.push(next.parameter);
            m.push(next.mean);
            v.push(next.square);
        }
        // The norm first: what it needs is recorded micro-batch by micro-batch.
        Ok([vec![norm, loss], p, m, v].concat())
    }
}

/// Ids and labels, and where the documents lie if it is packed.
fn tensors(batch: &Batch, device: &Device) -> Result<Vec<LazyTensor>> {
    let dims = [batch.batch, batch.seq];
    let ids = |ids: &[u32]| LazyTensor::from_slice(ids, &dims, device);
    let labels = LazyTensor::from_slice(&batch.labels, &dims, device)?;
    let mut all = vec![ids(&batch.ids)?, labels];
    if let Some(documents) = &batch.documents {
        all.extend([ids(&documents.segments)?, ids(&documents.positions)?]);
    }
    Ok(all)
}

/// The mean loss of a batch, given as [`tensors`].
fn loss(decoder: &Decoder, batch: &[LazyTensor], adapter: &LoRAAdapter) -> Result<LazyTensor> {
    let packed = match batch {
        [_, _, segments, positions] => Some(PackedInput { segments, positions }),
        _ => None,
    };
    decoder.loss_packed(&batch[0], &batch[1], packed, Some(adapter))
}

fn scalar(x: &LazyTensor) -> Result<f32> {
    x.to_scalar::<f32>()
}
