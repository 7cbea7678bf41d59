//! The training step: one compiled function, its state donated.

use super::AdamWConfig;
use super::ranks::Ranks;
use super::submit::Submitted;
use super::traced::{Traced, loss};
use crate::error::ErrorKind;
use crate::io::LoraConfig;
use crate::io::data::Batch;
use crate::lazy::one_device;
use crate::models::Decoder;
use crate::nn::LoRAAdapter;
use crate::{
    Compiled, DType, Device, LazyTensor, Outline, Plan, Recording, Result, Workspace, World,
    compile,
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
        let pair = || hold(&[2], DType::F32);
        let mut args = vec![hold(&[], DType::F32)?, pair()?, pair()?, hold(&[], DType::I64)?];
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
/// The arguments of the step are `[p.., m.., v.., applied, rate, corrections, corrections, seed]`, then every micro-batch
/// (ids and labels, and of packed ones segments and positions), then (of more than one) their shares of the loss.
/// Its results are `[corrections, norm, loss, p.., m.., v.., applied]`; the state is updated in place.
///
/// How often the state was updated decides AdamW's corrections. A step may be [submitted](TrainStep::submit) before it is
/// known whether the one before was applied: that one leaves it in the state, and the step takes those of the two pairs of
/// corrections that belong to it.
///
/// Among several ranks, there is one scalar more, whether this one was asked to stop, and a result, how many were; the
/// shares are of all ranks' loss. The gradients, the loss and that number are summed over the ranks in one exchange,
/// after the last micro-batch: from there on all ranks compute the same.
pub struct TrainStep {
    pub(super) traced: Traced,
    pub(super) state: Vec<LazyTensor>,
    pub(super) step: Compiled,
    evaluate: Compiled,
    diagnose: Compiled,
    optimizer: AdamWConfig,
    max_gradient_norm: f64,
    pub(super) count: StepCount,
    /// Submitted, and not finished.
    pub(super) submitted: Option<Submitted>,
    seed: i64,
    device: Device,
    ranks: Option<Ranks>,
    prepacks: bool,
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
        let mut state = Vec::with_capacity(3 * n + 1);
        // The step owns and overwrites its state: the caller's adapter keeps its own values.
        for parameter in &parameters {
            state.push(parameter.to_owned_copy()?);
        }
        for _ in 0..2 {
            for p in &parameters {
                state.push(LazyTensor::zeros(p.dims(), p.dtype(), &device)?.into_owned()?);
            }
        }
        state.push(LazyTensor::ones(&[], DType::U8, &device)?.into_owned()?);
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
            submitted: None,
            seed,
            device,
            ranks: None,
            prepacks: false,
        })
    }

    /// On the CPU, lays out the frozen matrices once, as the products of all steps take them: [`Compiled::prepacking`] says what that
    /// takes. The numbers stay the same, bit for bit.
    #[must_use]
    pub fn prepacking(mut self) -> TrainStep {
        (self.step, self.evaluate) = (self.step.prepacking(), self.evaluate.prepacking());
        self.prepacks = true;
        self
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
        let step = if self.prepacks { step.prepacking() } else { step };
        self.step = step.within(Arc::clone(&world));
        self.diagnose = self.traced.clone().norms().within(Arc::clone(&world));
        self.ranks = Some(Ranks::new(world));
        Ok(self)
    }

    pub(super) fn ranks(&self) -> Option<&Ranks> {
        self.ranks.as_ref()
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

    /// Updates so far: finished steps that were applied.
    pub fn updates(&self) -> usize {
        self.count.updates
    }

    /// How often it has moved. What was [submitted](TrainStep::submit) counts among the steps, and once it is finished
    /// among the updates.
    pub fn count(&self) -> StepCount {
        self.count
    }

    /// Parameters and moments after the last step, by name.
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
        // Whether the last step was applied is in the count.
        let expected = self.state.len().saturating_sub(1);
        let fits = tensors.len() == expected
            && tensors.iter().zip(&self.state).all(|(a, b)| a.dims() == b.dims());
        if !fits {
            let got = tensors.len();
            return Err(ErrorKind::Parameters { expected, got }.into());
        }
        let copies = tensors.iter().map(LazyTensor::to_owned_copy).collect::<Result<Vec<_>>>()?;
        self.submitted = None;
        self.state.splice(..copies.len(), copies);
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
        args.push(LazyTensor::placeholder(&[], DType::U8, &device)?);
        args.extend(shape.arguments(&device, false)?);
        let traced = Traced { decoder, adapter, n, in_world: false };
        traced.compiled(optimizer, max_gradient_norm).outline(&args)
    }

    /// The plan of a step on batches of this shape, to be printed.
    ///
    /// # Errors
    /// Where the step could not be traced.
    pub fn plan(&self, shape: StepShape) -> Result<Plan> {
        Ok(self.own_outline(shape)?.plan)
    }

    /// [`TrainStep::plan`], and what its runs hold on the device beside it.
    ///
    /// # Errors
    /// Where the step could not be traced, or the device cannot run it.
    pub fn plan_with_workspaces(&self, shape: StepShape) -> Result<(Plan, Vec<Workspace>)> {
        let outline = self.own_outline(shape)?;
        let mut workspaces = self.device.workspaces(&outline.plan)?;
        workspaces.extend(self.prepacks.then(|| outline.prepacked(&self.device)));
        Ok((outline.plan, workspaces))
    }

    fn own_outline(&self, shape: StepShape) -> Result<Outline> {
        let mut args = self.state.clone();
        args.extend(shape.arguments(&self.device, self.traced.in_world)?);
        self.step.outline(&args)
    }

    /// What the next step on these batches would compute, and from what. Its results are AdamW's corrections, the norm of
    /// the gradients, the loss, and the state.
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
        // None where the state was lost with a step.
        &self.state[..self.state.len() / 3]
    }

    fn parameter_names(&self) -> impl Iterator<Item = String> {
        let names = self.traced.adapter.layers().flat_map(|(module, _)| {
            ["lora_A", "lora_B"].map(|side| format!("{module}.{side}.weight"))
        });
        names.collect::<Vec<_>>().into_iter()
    }

    /// What follows the state.
    pub(super) fn arguments(
        &self,
        batches: &[Batch],
        rate: f64,
        stop: bool,
    ) -> Result<Vec<LazyTensor>> {
        let total: usize = batches.iter().map(|b| b.trained).sum();
        let deal =
            |ranks: &Ranks| batches.iter().map(|b| ranks.deal(b)).collect::<Result<Vec<_>>>();
        let own = self.ranks.as_ref().map(deal).transpose()?;
        let batches = own.as_deref().unwrap_or(batches);
        let number = |x: f64| LazyTensor::from_vec(vec![x as f32], &[], &self.device);
        let pair = |updates: usize| {
            let pair = self.optimizer.corrections(updates).map(|x| x as f32);
            LazyTensor::from_slice(&pair, &[2], &self.device)
        };
        // A step that is not finished may count as one more.
        let updates = self.count.updates + 1;
        let if_applied = updates + usize::from(self.submitted.is_some());
        let seed = self.seed.wrapping_add(self.draws());
        let mut args = vec![number(rate)?, pair(updates)?, pair(if_applied)?];
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

pub(super) fn scalar(x: &LazyTensor) -> Result<f32> {
    x.to_scalar::<f32>()
}
