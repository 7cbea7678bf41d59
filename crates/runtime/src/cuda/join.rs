//! Which kernels are launched as one: those that need not wait for each other, and before them a kernel so small that every
//! block of theirs makes its results for itself.

use super::command::{Draft, Wish, Work};
use crate::hazards::{Room, Span, Touched, side_by_side};
use crate::places::{Place, operand};
use crate::verify::writes_all;
use metal_candle_compiler::render::{self, Ahead, Binding, Dialect, Limits, Source};
use metal_candle_compiler::{Plan, Slot, Work as StepWork};
use smallvec::SmallVec;

/// How often the kernels of one launch fill the device at most: what is larger than that takes its own time.
const FULL: usize = 4;
/// A kernel whose blocks share more keeps others from running beside them.
const SHARED_BYTES: usize = 16 << 10;
/// What a kernel ahead of others may read and write: by itself, and in all of their blocks.
const AHEAD_BYTES: usize = 32 << 10;
const AHEAD_IN_ALL_BYTES: usize = 16 << 20;
/// What each block keeps of it.
const KEPT_BYTES: usize = 16 << 10;

/// What the steps of a plan ask for, with some of it joined, in an order that its hazards allow.
pub(super) fn join(mut wishes: Vec<Wish>, plan: &Plan, limits: &Limits) -> Vec<Draft> {
    let written: Vec<Span> = wishes.iter().flat_map(|w| w.touched.writes.clone()).collect();
    wishes.iter_mut().for_each(|wish| wait_for_writers(wish, plan, &written));
    let room = |wish: &Wish| (wish.touched.clone(), room(&wish.work));
    let rooms: Vec<(Touched, Option<Room>)> = wishes.iter().map(room).collect();
    let most_threads = FULL * limits.resident_threads;
    // The rest of the parameters is for a kernel ahead.
    let groups = side_by_side(&rooms, most_threads, limits.max_operands / 2);
    let mut wishes: Vec<Option<Wish>> = wishes.into_iter().map(Some).collect();
    let mut take =
        |at: usize| -> Wish { wishes[at].take().expect("metal-candle bug: in two groups") };
    let mut groups = groups.into_iter().map(|g| g.into_iter().map(&mut take).collect::<Vec<_>>());
    let mut joined = Vec::new();
    let mut next: Option<Vec<Wish>> = groups.next();
    while let Some(mut members) = next {
        next = groups.next();
        let mut source = one(&members, None);
        if let (1, Some(readers)) = (members.len(), next.as_mut()) {
            let ahead = ahead(&members[0], readers, plan);
            source = ahead.and_then(|ahead| one(readers, Some(&ahead)));
            if source.is_some() {
                members.append(readers);
                next = groups.next();
            }
        }
        match source {
            Some(source) => joined.push(merged(&members, source)),
            None => joined.extend(members.into_iter().map(alone)),
        }
    }
    joined
}

/// A kernel that asks for something first, before others have ended, waits for them if the run writes that.
fn wait_for_writers(wish: &mut Wish, plan: &Plan, written: &[Span]) {
    let Work::Kernel(source) = &mut wish.work else { return };
    let Some(first) = source.asks_first else { return };
    let asked = Touched::new(plan, &plan.steps[wish.step], &[first]).reads;
    if written.iter().any(|span| asked.iter().any(|asked| asked.meets(span))) {
        *source = Dialect::CUDA.waiting(source);
    }
}

/// What a kernel wants of a launch that it shares; none where it must be alone.
fn room(work: &Work) -> Option<Room> {
    let Work::Kernel(Source { launch, bindings, .. }) = work else { return None };
    let room =
        Room { block: launch.block, threads: launch.grid * launch.block, operands: bindings.len() };
    (launch.shared_bytes <= SHARED_BYTES).then_some(room)
}

/// The kernels of a group as one.
fn one(members: &[Wish], ahead: Option<&Ahead<'_>>) -> Option<Source> {
    let sources: Option<Vec<&Source>> = members.iter().map(|m| m.work.kernel()).collect();
    render::beside(&sources?, ahead, Dialect::CUDA)
}

fn merged(members: &[Wish], source: Source) -> Draft {
    Draft {
        steps: members.iter().map(|member| member.step).collect(),
        places: members.iter().flat_map(|member| member.places.iter().copied()).collect(),
        work: Work::Kernel(source),
    }
}

fn alone(Wish { step, places, work, .. }: Wish) -> Draft {
    Draft { steps: SmallVec::from_elem(step, 1), places, work }
}

/// How every block of `readers` can run `first` for itself, if that is less than a launch.
fn ahead<'a>(first: &'a Wish, readers: &[Wish], plan: &Plan) -> Option<Ahead<'a>> {
    let source = first.work.kernel().filter(|source| !source.is_call)?;
    let step = &plan.steps[first.step];
    let (mut blocks, bytes) = (0, step.bytes as usize);
    for reader in readers {
        let launch = reader.work.kernel()?.launch;
        blocks += launch.grid;
        // What a late block still reads must stay.
        if launch.block != source.launch.block || reader.touched.overwrites(&first.touched) {
            return None;
        }
    }
    if first.touched.updates_in_place()
        || bytes > AHEAD_BYTES
        || bytes * blocks > AHEAD_IN_ALL_BYTES
    {
        return None;
    }
    let StepWork::Kernel(kernel) = &step.work else { return None };
    let mut outputs = Vec::new();
    for (n, binding) in first.bindings.iter().enumerate() {
        if let Binding::Out(out) = binding {
            let operand = operand(step, *binding)?;
            let bytes = len_bytes(plan, operand.slot);
            // What others put beside a part is in the first block's memory only.
            if !writes_all(kernel, *out as usize, bytes / operand.dtype.size_bytes()) {
                return None;
            }
            outputs.push((n, bytes));
        }
    }
    let places = readers.iter().flat_map(|reader| &reader.places).enumerate();
    let made = |(reader, place): (usize, &Place)| {
        let output = outputs.iter().find(|(n, _)| first.places[*n] == *place)?;
        Some((reader, output.0))
    };
    let made: Vec<(usize, usize)> = places.filter_map(made).collect();
    let kept: usize = outputs.iter().map(|(_, bytes)| bytes).sum();
    // All that is read of it, each reader knows where.
    let by_readers: usize = readers.iter().map(|reader| reads(reader, first)).sum();
    let suits = kept <= KEPT_BYTES && by_readers == made.len() && by_readers > 0;
    suits.then_some(Ahead { source, outputs, readers: made })
}

/// How many operands of `reader` meet what `first` writes.
fn reads(reader: &Wish, first: &Wish) -> usize {
    let writes = &first.touched.writes;
    reader.touched.reads.iter().filter(|span| writes.iter().any(|w| w.meets(span))).count()
}

fn len_bytes(plan: &Plan, slot: Slot) -> usize {
    match slot {
        Slot::Arena { len_bytes, .. } => len_bytes,
        Slot::Input(i) => plan.inputs[i as usize].ty.size_bytes(),
        Slot::Output(i) => plan.outputs[i as usize].ty.size_bytes(),
    }
}
