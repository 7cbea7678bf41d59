//! Gradients of what was recorded.

use crate::Result;
use crate::error::{AtCaller, ErrorKind};
use crate::lazy::{LazyTensor, one_device, trace};
use metal_candle_graph::autodiff::{Trainable, gradients};

/// The gradients of a scalar `loss` with respect to `wrt`, recorded but not computed: evaluate them together with
/// the loss, as one plan.
///
/// # Errors
/// Where the loss is no float of one element, where it was evaluated already, and where a trainable does not reach the loss through
/// differentiable operations: then the error names it ([`LazyTensor::named`]), the operation and the path.
///
/// ```
/// use metal_candle::{DType, Device, LazyTensor, grad};
/// let w = LazyTensor::full(3.0, &[2], DType::F32, &Device::Cpu)?.to_owned_copy()?;
/// let g = grad(&w.sqr()?.sum_all()?, &[&w])?;
/// assert_eq!(g[0].to_vec1::<f32>()?, [6.0, 6.0]);
/// # Ok::<(), metal_candle::Error>(())
/// ```
#[track_caller]
pub fn grad(loss: &LazyTensor, wrt: &[&LazyTensor]) -> Result<Vec<LazyTensor>> {
    // A value has let go of what it was made of; only its gradient by itself is left.
    if loss.is_evaluated()
        && let Some((i, x)) = wrt.iter().enumerate().find(|(_, x)| !x.is_same(loss))
    {
        return Err(ErrorKind::EvaluatedLoss { name: name(i, x) }.into());
    }
    let device = one_device("grad", std::iter::once(loss).chain(wrt.iter().copied()))?;
    let mut trace = trace(&[loss], true);
    let trainables: Vec<Trainable> = wrt
        .iter()
        .enumerate()
        .map(|(i, x)| Trainable { node: trace.id_or_input(x), name: name(i, x) })
        .collect();
    let root = trace.graph.outputs[0];
    let mut graph = std::mem::take(&mut trace.graph);
    let wanted = gradients(&mut graph, root, &trainables).at_caller()?;
    graph.outputs = wanted;
    Ok(lift(&graph, trace.handles, device.unwrap_or_default()))
}

/// What errors call the trainable number `i`.
fn name(i: usize, x: &LazyTensor) -> String {
    x.name().map_or_else(|| format!("#{i}"), str::to_string)
}

/// The value of `f` at `args` and its gradients with respect to all of them.
///
/// # Errors
/// Those of `f`, and as [`grad`].
#[track_caller]
pub fn value_and_grad(
    f: impl FnOnce(&[LazyTensor]) -> Result<LazyTensor>,
    args: &[LazyTensor],
) -> Result<(LazyTensor, Vec<LazyTensor>)> {
    let loss = f(args)?;
    let gradients = grad(&loss, &args.iter().collect::<Vec<_>>())?;
    Ok((loss, gradients))
}

/// The outputs of a graph as handles; its first nodes are those that `handles` recorded.
fn lift(
    graph: &metal_candle_graph::ComputationGraph,
    handles: Vec<LazyTensor>,
    device: crate::Device,
) -> Vec<LazyTensor> {
    let live = graph.live();
    let mut lifted: Vec<Option<LazyTensor>> = handles.into_iter().map(Some).collect();
    for id in graph.ids().skip(lifted.len()) {
        let node = &graph[id];
        let handle = live[id.index()].then(|| {
            let input = |i: &metal_candle_graph::NodeId| {
                lifted[i.index()].clone().expect("metal-candle bug: an input comes after its user")
            };
            let inputs = node.inputs.iter().map(input).collect();
            LazyTensor::from_parts(node.op, inputs, node.ty, device)
        });
        lifted.push(handle);
    }
    let output = |id: &metal_candle_graph::NodeId| {
        lifted[id.index()].clone().expect("metal-candle bug: an output is not live")
    };
    graph.outputs.iter().map(output).collect()
}
