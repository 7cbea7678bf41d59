//! A plan made ready to run on the CPU, and one run of it.

use super::kernel::Program;
use super::prepacked::{Held, Prepacked};
use super::results::Results;
use super::view::{Arg, Out};
use crate::arena::Arena;
use crate::buffer::{Buffer, Memory};
use crate::element::Data;
use crate::executable::{Backend, Clock, Timing, message};
use crate::inputs::Inputs;
use crate::run_memories::RunMemories;
use crate::team::Team;
use crate::{Error, Result, Workspace, World};
use candle_core::StorageRef;
use metal_candle_compiler::{LibraryCall, Operand, Plan, Slot, Step, Target, Work};
use smallvec::SmallVec;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

/// Memories of runs that are kept while nothing runs.
const IDLE_MEMORIES: usize = 4;

/// A fused kernel is spread over threads from this many element operations on: some microseconds of one, many times what
/// it takes to give a part to a thread that looks for work.
const PARALLEL_KERNEL_WORK: u64 = 1 << 16;

/// The same for a library call, whose operations are dearer.
const PARALLEL_CALL_WORK: u64 = 1 << 14;

/// A plan is helped from this much work on, in the same measure: whoever helps may be asleep as it begins, which costs some
/// microseconds, and looks for the next one after it has ended.
const SHARED_WORK: u64 = 1 << 17;

/// What the CPU keeps of a plan: its kernels compiled, its memory from run to run.
pub(crate) struct CpuExecutable {
    steps: Vec<Prepared>,
    results: Results,
    parallel: bool,
    memories: RunMemories<RunMemory>,
    /// Where it sums over ranks, if it does.
    world: Option<Arc<World>>,
    inputs: Arc<Inputs>,
    /// Inputs that are held and live in a Candle storage, by the storage.
    shared: Vec<(usize, u32)>,
    /// What the panels take that the steps have.
    prepacked: Option<Workspace>,
}

/// What is fixed about a step.
struct Prepared {
    /// `None` for a library call.
    program: Option<Program>,
    args: SmallVec<[Place; 4]>,
    outs: SmallVec<[Place; 2]>,
    /// By argument, its panels, if they were packed before; empty if none were.
    prepacked: Vec<Option<Arc<Held>>>,
    /// Element operations, of a call an estimate.
    work: u64,
    parallel: bool,
}

/// Where a buffer starts: so many bytes into one of the run's allocations.
#[derive(Clone, Copy)]
struct Place {
    base: u32,
    offset_bytes: usize,
}

/// The memory of one run: the arena, and tables in which every run fills in what changes.
struct RunMemory {
    /// Where the arena, the inputs and the outputs start, in this order. The arena and what is held stay.
    bases: Vec<*mut u8>,
    _arena: Arena,
    /// Those that the steps write, by number.
    outputs: Vec<(u32, Data)>,
    /// Inputs that live in a Candle storage, by the storage.
    shared: Vec<(usize, u32)>,
    /// The memory of the empty vector of storage guards.
    guards: Vec<[usize; 2]>,
}

// SAFETY: the pointers are to the arena, to what the executable holds, and leftovers of earlier runs, which a run replaces
// before it reads the table.
unsafe impl Send for RunMemory {}

impl RunMemory {
    fn new(plan: &Plan, inputs: &Inputs) -> Result<RunMemory> {
        let arena = Arena::new(plan.arena_bytes, Target::CPU.align_bytes)?;
        assert_eq!(arena.len_bytes(), plan.arena_bytes, "metal-candle bug: arena size");
        let mut bases = vec![std::ptr::null_mut(); 1 + plan.inputs.len() + plan.outputs.len()];
        bases[0] = arena.as_ptr();
        for (input, buffer) in inputs.held() {
            bases[1 + input] = start(buffer, input).unwrap_or_default();
        }
        Ok(RunMemory {
            bases,
            _arena: arena,
            outputs: Vec::new(),
            shared: Vec::new(),
            guards: Vec::new(),
        })
    }
}

/// Where the elements of an input are read; nowhere yet, if they live in a Candle storage.
fn start(buffer: &Buffer, input: usize) -> Option<*mut u8> {
    match buffer.memory() {
        Memory::Owned(data) => Some(data.as_ptr().cast_mut()),
        Memory::Mapped(mapped) => Some(mapped.as_ptr().cast_mut()),
        Memory::Shared(_) => None,
        Memory::Device(_) => panic!("metal-candle bug: input {input} is on a device"),
    }
}

/// The storage that an input lives in, if it is Candle's, and the input.
fn shared(buffer: &Buffer, input: usize) -> Option<(usize, u32)> {
    match buffer.memory() {
        Memory::Shared(storage) => Some((storage.key(), input as u32)),
        Memory::Owned(_) | Memory::Mapped(_) | Memory::Device(_) => None,
    }
}

impl CpuExecutable {
    /// # Errors
    /// [`Error::OutOfMemory`] for the arena.
    pub(crate) fn new(
        plan: &Plan,
        world: Option<Arc<World>>,
        inputs: Arc<Inputs>,
    ) -> Result<CpuExecutable> {
        let steps: Vec<Prepared> = plan.steps.iter().map(|s| Prepared::new(plan, s)).collect();
        let make = || RunMemory::new(plan, &inputs);
        Ok(CpuExecutable {
            results: Results::new(plan, &inputs),
            parallel: steps.iter().map(Prepared::shared_work).sum::<u64>() >= SHARED_WORK,
            steps,
            memories: RunMemories::new(IDLE_MEMORIES, plan.arena_bytes, make)?,
            world,
            shared: inputs.held().filter_map(|(i, buffer)| shared(buffer, i)).collect(),
            inputs,
            prepacked: None,
        })
    }

    /// Binds the memory of this run and walks the steps. Whatever happens in them, nothing touches that memory
    /// after this returns: a team has done its tasks before a panic is passed on.
    fn run_steps(
        &self,
        plan: &Plan,
        memory: &mut RunMemory,
        given: &mut [Buffer],
        team: Option<&Team>,
        clock: Option<&mut Clock>,
    ) -> Result<()> {
        let RunMemory { bases, outputs, shared, guards, .. } = memory;
        shared.clone_from(&self.shared);
        for (buffer, of) in given.iter_mut().zip(self.inputs.given()) {
            let i = of.input as usize;
            let written = if of.donated { buffer.donated_mut() } else { None };
            bases[1 + i] = match written {
                Some(data) => data.as_mut_ptr(),
                None => start(buffer, i).unwrap_or_else(|| {
                    shared.extend(self::shared(buffer, i));
                    std::ptr::null_mut()
                }),
            };
        }
        for (output, data) in outputs {
            bases[1 + plan.inputs.len() + *output as usize] = data.as_mut_ptr();
        }
        let mut held: Vec<StorageRef<'_>> = recycled(std::mem::take(guards));
        let input = |i| self.inputs.get(i, given);
        lock_shared(plan, input, shared, bases, &mut held)?;
        let outcome = self.walk(plan, bases, team, clock);
        held.clear();
        *guards = recycled(held);
        outcome
    }

    fn walk(
        &self,
        plan: &Plan,
        bases: &[*mut u8],
        team: Option<&Team>,
        mut clock: Option<&mut Clock>,
    ) -> Result<()> {
        let mut at = 0;
        let team = team.filter(|_| self.parallel);
        let timing = clock.as_ref().map(|clock| clock.timing);
        let whole = timing.map(|_| Instant::now());
        if let (Some(Timing::Steps), Some(clock)) = (timing, clock.as_deref_mut()) {
            clock.seconds.reserve(self.steps.len());
        }
        let mut walk = || {
            for (index, (prepared, step)) in self.steps.iter().zip(&plan.steps).enumerate() {
                at = index;
                let start = (timing == Some(Timing::Steps)).then(Instant::now);
                // SAFETY: `verify` has seen every operand of the plan within its slot, and the outputs of a step
                // apart from what else it touches; `bases` holds the slots' memory: inputs of the plan's types,
                // those that are written ours alone, the others locked or immutable; fresh outputs; an arena of
                // the plan's size. Steps run one after the other.
                unsafe { prepared.run(step, bases, team.is_some(), self.world.as_deref()) }?;
                if let (Some(clock), Some(start)) = (clock.as_deref_mut(), start) {
                    clock.seconds.push(start.elapsed().as_secs_f64());
                }
            }
            Ok(())
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| match team {
            Some(team) => team.walk(walk),
            None => walk(),
        }));
        if let (Some(clock), Some(whole), Some(Timing::Whole)) = (clock, whole, timing) {
            clock.seconds.push(whole.elapsed().as_secs_f64());
        }
        match outcome {
            Ok(done) => done,
            Err(panic) => Err(Error::KernelPanic {
                step: at,
                label: plan.steps[at].label.clone(),
                message: message(&*panic),
            }),
        }
    }
}

impl Backend for CpuExecutable {
    fn holds_inputs(&self) -> bool {
        true
    }

    fn run(
        &self,
        plan: &Plan,
        mut given: Vec<Buffer>,
        team: Option<&Team>,
        clock: Option<&mut Clock>,
    ) -> Result<Vec<Buffer>> {
        let memory = self.memories.take(|| RunMemory::new(plan, &self.inputs))?;
        let mut lease = Lease { executable: self, memory: Some(memory) };
        let memory = lease.memory.as_mut().expect("metal-candle bug: an ended lease");
        self.results.allocate(plan, &mut memory.outputs)?;
        self.run_steps(plan, memory, &mut given, team, clock)?;
        Ok(self.results.collect(plan, &self.inputs, &mut memory.outputs, given))
    }

    fn keep_spares(&mut self) {
        self.results.keep_spares();
    }

    fn spare_bytes(&self) -> usize {
        self.results.spare_bytes()
    }

    fn prepack(&mut self, plan: &Plan) -> Result<()> {
        let prepacked = Prepacked::new(plan, &self.inputs)?;
        for (i, (prepared, step)) in self.steps.iter_mut().zip(&plan.steps).enumerate() {
            let of: Vec<_> = (0..step.args.len()).map(|arg| prepacked.of(i, arg)).collect();
            prepared.prepacked = if of.iter().any(Option::is_some) { of } else { Vec::new() };
        }
        self.prepacked = Some(prepacked.workspace());
        Ok(())
    }

    fn workspaces(&self) -> Vec<Workspace> {
        super::workspaces().into_iter().chain(self.prepacked).collect()
    }

    fn allocated_arena_bytes(&self) -> usize {
        self.memories.allocated_arena_bytes()
    }
}

/// Locks the storages of the inputs that came from Candle, each once and in one order everywhere, so that no two
/// runs and no writer wait for each other in a circle.
fn lock_shared<'a>(
    plan: &Plan,
    input: impl Fn(usize) -> &'a Buffer,
    shared: &mut [(usize, u32)],
    bases: &mut [*mut u8],
    held: &mut Vec<StorageRef<'a>>,
) -> Result<()> {
    shared.sort_unstable();
    let mut last = None;
    for (key, index) in shared.iter() {
        let index = *index as usize;
        let Memory::Shared(storage) = input(index).memory() else {
            unreachable!("metal-candle bug: input {index} has moved")
        };
        if last != Some(*key) {
            held.push(storage.lock());
            last = Some(*key);
        }
        let locked = held.last().expect("metal-candle bug: no storage is locked");
        let address = storage.address(locked).ok_or_else(|| Error::InputType {
            index,
            expected: plan.inputs[index].ty,
            got: storage.dtype(),
            len: 0,
        })?;
        bases[1 + index] = address.cast_mut();
    }
    Ok(())
}

/// A memory that goes back to its executable, however the run ends.
struct Lease<'a> {
    executable: &'a CpuExecutable,
    memory: Option<RunMemory>,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let Some(mut memory) = self.memory.take() else { return };
        memory.outputs.clear();
        self.executable.memories.give_back(memory);
    }
}

impl Prepared {
    fn new(plan: &Plan, step: &Step) -> Prepared {
        let place = |operand: &Operand| match operand.slot {
            Slot::Arena { offset_bytes, .. } => Place { base: 0, offset_bytes },
            Slot::Input(i) => Place { base: 1 + i, offset_bytes: 0 },
            Slot::Output(i) => Place { base: 1 + plan.inputs.len() as u32 + i, offset_bytes: 0 },
        };
        let program = match &step.work {
            Work::Kernel(kernel) => Some(Program::new(kernel, updates_in_place(step))),
            Work::Call(_) => None,
        };
        let (work, least) = match &program {
            Some(program) => (program.work() as u64, PARALLEL_KERNEL_WORK),
            None => ((step.flops / 8).max(step.bytes / 4), PARALLEL_CALL_WORK),
        };
        Prepared {
            program,
            args: step.args.iter().map(place).collect(),
            outs: step.outs.iter().map(place).collect(),
            prepacked: Vec::new(),
            work,
            parallel: work >= least,
        }
    }

    /// What it gives several threads to do.
    fn shared_work(&self) -> u64 {
        if self.parallel { self.work } else { 0 }
    }

    /// # Safety
    /// The step has been verified, and `bases` holds memory for every slot of its plan, which nobody else touches
    /// as the step writes, or writes as it reads.
    unsafe fn run(
        &self,
        step: &Step,
        bases: &[*mut u8],
        threads: bool,
        world: Option<&World>,
    ) -> Result<()> {
        let at = |place: &Place| bases[place.base as usize].wrapping_add(place.offset_bytes);
        let parallel = threads && self.parallel;
        match &step.work {
            Work::Kernel(_) => {
                let program = self.program.as_ref().expect("metal-candle bug: no program");
                let args: SmallVec<[*const u8; 16]> =
                    self.args.iter().map(|p| at(p).cast_const()).collect();
                let outs: SmallVec<[*mut u8; 8]> = self.outs.iter().map(at).collect();
                // SAFETY: the caller's promise.
                unsafe { program.run(&args, &outs, parallel) };
                Ok(())
            }
            Work::Call(LibraryCall::AllReduce) if world.is_some() => {
                let (at, out) = (at(&self.outs[0]), &step.outs[0]);
                let len = out.layout.shape.len() * out.dtype.size_bytes();
                // SAFETY: the caller's promise; the output is dense, and the step before has written it.
                let bytes = unsafe { std::slice::from_raw_parts_mut(at, len) };
                world.map_or(Ok(()), |world| world.sum(bytes, out.dtype))
            }
            Work::Call(call) => {
                let args = self.args.iter().zip(&step.args);
                let outs = self.outs.iter().zip(&step.outs);
                // SAFETY: the caller's promise; a call's outputs share memory with nothing.
                let mut args: SmallVec<[Arg; 8]> =
                    args.map(|(place, o)| unsafe { Arg::new(at(place), o) }).collect();
                for (arg, held) in args.iter_mut().zip(&self.prepacked) {
                    *arg = arg.keeping(held.as_deref().map(Held::kept));
                }
                // SAFETY: as above.
                let mut outs: SmallVec<[Out; 4]> =
                    outs.map(|(place, o)| unsafe { Out::new(at(place), o) }).collect();
                Ok(super::call(call, &args, &mut outs, parallel)?)
            }
        }
    }
}

/// Whether an output lies in the memory of an argument.
fn updates_in_place(step: &Step) -> bool {
    let overlap = |a: Slot, b: Slot| match (a, b) {
        (
            Slot::Arena { offset_bytes: a, len_bytes: a_len },
            Slot::Arena { offset_bytes: b, len_bytes: b_len },
        ) => a < b + b_len && b < a + a_len,
        _ => a == b,
    };
    step.outs.iter().any(|out| step.args.iter().any(|arg| overlap(out.slot, arg.slot)))
}

/// The memory of a vector that is empty, for elements of another type or lifetime.
fn recycled<A, B>(empty: Vec<A>) -> Vec<B> {
    assert!(empty.is_empty(), "metal-candle bug: recycling what is in use");
    // Collecting in place keeps the allocation, if the types are of one size.
    empty.into_iter().map(|_| unreachable!()).collect()
}
