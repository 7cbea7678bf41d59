//! The training step: one compiled function, its state donated.

use super::AdamWConfig;
use super::ranks::Ranks;
use super::traced::{SCALARS, Traced, loss};
use crate::error::ErrorKind;
use crate::io::LoraConfig;
use crate::io::data::Batch;
use crate::lazy::one_device;
use crate::models::Decoder;
use crate::nn::LoRAAdapter;
use crate::{
    Compiled, DType, Device, LazyTensor, Outline, Recording, Result, Timing, World, compile,
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
    /// Rows of a batch, of one rank.
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
    fn arguments(self, device: &Device, in_world: bool) -> Result<Vec<LazyTensor>> {
        let hold = |dims: &[usize], dtype| LazyTensor::placeholder(dims, dtype, device);
        let dims = [self.batch, self.seq];
        let mut args = vec![hold(&[], DType::F32)?; SCALARS - 1];
        args.push(hold(&[], DType::I64)?);
        args.extend(in_world.then(|| hold(&[], DType::F32)).transpose()?);
        for _ in 0..self.accumulated {
            args.extend([hold(&dims, DType::U32)?, hold(&dims, DType::I64)?]);
            if self.packed {
                args.extend(vec![hold(&dims, DType::U32)?; 2]);
            }
        }
        if self.accumulated > 1 || in_world {
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
///
/// Among several ranks, there is a sixth scalar, whether this one was asked to stop, and a result, how many were; the
/// shares are of all ranks' loss. The gradients, the loss and that number are summed over the ranks in one exchange,
/// after the last micro-batch: from there on all ranks compute the same.
pub struct TrainStep {
    traced: Traced,
    state: Vec<LazyTensor>,
    step: Compiled,
    evaluate: Compiled,
    diagnose: Compiled,
    optimizer: AdamWConfig,
    max_gradient_norm: f64,
    count: StepCount,
    seed: i64,
    device: Device,
    ranks: Option<Ranks>,
}

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
        // Its memory is let go with the caller's handles.
        let adapter = adapter.with_parameters(&placeholders(&parameters)?)?;
        let traced =
            Traced { decoder: Arc::clone(&decoder), adapter: adapter.clone(), n, in_world: false };
        let step = traced.clone().compiled(optimizer, max_gradient_norm);
        let diagnose = traced.clone().norms();
        let shape = adapter;
        let evaluate = compile(move |args: &[LazyTensor]| {
            let (batch, parameters) = args.split_at(args.len() - n);
            Ok(vec![loss(&decoder, batch, &shape.with_parameters(parameters)?)?])
        });
        let count = StepCount::default();
        let seed = seed as i64;
        Ok(TrainStep {
            traced,
            state,
            step,
            evaluate,
            diagnose,
            optimizer,
            max_gradient_norm,
            count,
            seed,
            device,
            ranks: None,
        })
    }

    /// Trains together with the other ranks of a world: each is given the same batches and takes the rows of its own
    /// from them, `rank`, `rank + size` and so on. The updates are those of one process, but for rounding and the masks
    /// of a dropout.
    ///
    /// # Errors
    /// Where the world computes on another device.
    pub fn within(mut self, world: Arc<World>) -> Result<TrainStep> {
        let (lhs, rhs) = (self.device, *world.device());
        if lhs != rhs {
            return Err(ErrorKind::DeviceMismatch { op: "TrainStep::within", lhs, rhs }.into());
        }
        self.traced.in_world = true;
        let step = self.traced.clone().compiled(self.optimizer, self.max_gradient_norm);
        self.step = step.within(Arc::clone(&world));
        self.diagnose = self.traced.clone().norms().within(Arc::clone(&world));
        self.ranks = Some(Ranks::new(world));
        Ok(self)
    }

    pub(super) fn ranks(&self) -> Option<&Ranks> {
        self.ranks.as_ref()
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
        Ok(self.run_or_stop(batches, rate, false)?.0)
    }

    /// [`TrainStep::run_accumulated`], and whether any rank was asked to stop, as this one is by `stop`.
    pub(super) fn run_or_stop(
        &mut self,
        batches: &[Batch],
        rate: f64,
        stop: bool,
    ) -> Result<(StepMetrics, bool)> {
        let args = self.take_arguments(batches, rate, stop)?;
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
        let args = self.take_arguments(std::slice::from_ref(batch), rate, false)?;
        let (results, seconds) = self.step.profile(args, timing)?;
        Ok((self.take_results(results)?.0, seconds))
    }

    /// The state, which the step takes along, and what changes from step to step.
    fn take_arguments(
        &mut self,
        batches: &[Batch],
        rate: f64,
        stop: bool,
    ) -> Result<Vec<LazyTensor>> {
        let rest = self.arguments(batches, rate, stop)?;
        let mut args = std::mem::take(&mut self.state);
        args.extend(rest);
        self.count.steps += 1;
        Ok(args)
    }

    fn take_results(&mut self, mut results: Vec<LazyTensor>) -> Result<(StepMetrics, bool)> {
        self.state = results.split_off(2 + usize::from(self.traced.in_world));
        let (gradient_norm, loss) = (scalar(&results[0])?, scalar(&results[1])?);
        let applied = loss.is_finite() && gradient_norm.is_finite();
        self.count.updates += usize::from(applied);
        let stopped = results.get(2).map(scalar).transpose()?.is_some_and(|asked| asked > 0.0);
        Ok((StepMetrics { loss, gradient_norm, applied }, stopped))
    }

    /// The first parameter whose gradient on these batches is not finite, by its name in a PEFT file; `None` if it is
    /// the loss alone.
    ///
    /// # Errors
    /// As [`TrainStep::run`]; the state is kept.
    pub fn diagnose(&self, batches: &[Batch]) -> Result<Option<String>> {
        let mut args = self.state.clone();
        args.extend(self.arguments(batches, 0.0, false)?);
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
        self.traced.adapter.with_parameters(&copies.collect::<Result<Vec<_>>>()?)
    }

    /// What is adapted and how.
    pub fn adapter_config(&self) -> &LoraConfig {
        &self.traced.adapter.config
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
        let parameters = placeholders(&adapter.parameters())?;
        let n = parameters.len();
        let adapter = adapter.with_parameters(&parameters)?;
        let mut args = [parameters.clone(), parameters.clone(), parameters].concat();
        args.extend(shape.arguments(&device, false)?);
        let traced = Traced { decoder, adapter, n, in_world: false };
        traced.compiled(optimizer, max_gradient_norm).outline(&args)
    }

    /// The plan of a step on batches of this shape, to be printed.
    ///
    /// # Errors
    /// Where the step could not be traced.
    pub fn plan(&self, shape: StepShape) -> Result<metal_candle_compiler::Plan> {
        let mut args = self.state.clone();
        args.extend(shape.arguments(&self.device, self.traced.in_world)?);
        self.step.plan(&args)
    }

    /// What the next step on these batches would compute, and from what. Its results are the norm of the gradients, the
    /// loss, and the state.
    ///
    /// # Errors
    /// Where the step could not be traced.
    pub fn recording(&self, batches: &[Batch], rate: f64) -> Result<Recording> {
        let mut args = self.state.clone();
        args.extend(self.arguments(batches, rate, false)?);
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
        let names = self.traced.adapter.layers().flat_map(|(module, _)| {
            ["lora_A", "lora_B"].map(|side| format!("{module}.{side}.weight"))
        });
        names.collect::<Vec<_>>().into_iter()
    }

    /// What follows the state.
    fn arguments(&self, batches: &[Batch], rate: f64, stop: bool) -> Result<Vec<LazyTensor>> {
        let total: usize = batches.iter().map(|b| b.trained).sum();
        let deal =
            |ranks: &Ranks| batches.iter().map(|b| ranks.deal(b)).collect::<Result<Vec<_>>>();
        let own = self.ranks.as_ref().map(deal).transpose()?;
        let batches = own.as_deref().unwrap_or(batches);
        let number = |x: f64| LazyTensor::from_vec(vec![x as f32], &[], &self.device);
        let [correction1, correction2] = self.optimizer.corrections(self.count.updates + 1);
        let seed = self.seed.wrapping_add(self.draws());
        let mut args = vec![number(rate)?, number(correction1)?, number(correction2)?];
        args.push(LazyTensor::from_vec(vec![seed], &[], &self.device)?);
        if self.traced.in_world {
            args.push(number(f64::from(u8::from(stop)))?);
        }
        for batch in batches {
            args.extend(tensors(batch, &self.device)?);
        }
        if batches.len() > 1 || self.traced.in_world {
            for batch in batches {
                args.push(number(batch.trained as f64 / total.max(1) as f64)?);
            }
        }
        Ok(args)
    }

    /// Numbers the draws of a dropout: another one for each step and rank.
    fn draws(&self) -> i64 {
        let world = self.ranks.as_ref().map(Ranks::world);
        let (rank, size) = world.map_or((0, 1), |world| (world.rank(), world.size()));
        (self.count.steps * size + rank) as i64
    }
}

fn placeholders(like: &[LazyTensor]) -> Result<Vec<LazyTensor>> {
    like.iter().map(|x| LazyTensor::placeholder(x.dims(), x.dtype(), x.device())).collect()
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

fn scalar(x: &LazyTensor) -> Result<f32> {
    x.to_scalar::<f32>()
}
