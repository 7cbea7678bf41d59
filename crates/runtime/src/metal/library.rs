//! Compiled kernels, by their text.

use crate::{Error, Result};
use metal_candle_compiler::render::Source;
use rayon::prelude::*;
use rustc_hash::FxHashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the device's compiler made of texts. Each text is compiled once, whichever plans it is in, and kept for as long as
/// the device is.
pub(super) struct Library<P> {
    by_text: Mutex<FxHashMap<String, P>>,
}

/// A kernel, and the step of the plan that it belongs to.
pub(super) struct Wanted<'a> {
    pub(super) step: usize,
    pub(super) label: &'a str,
    pub(super) source: &'a Source,
}

impl<P> Default for Library<P> {
    fn default() -> Library<P> {
        Library { by_text: Mutex::default() }
    }
}

impl<P: Clone + Send> Library<P> {
    /// The compiled kernels, in their order. New texts go through `compile`, several at once.
    ///
    /// # Errors
    /// [`Error::Compile`] with what `compile` says, and the step.
    pub(super) fn get(
        &self,
        wanted: &[Wanted<'_>],
        compile: impl Fn(&Source) -> std::result::Result<P, String> + Sync,
    ) -> Result<Vec<P>> {
        let mut new: FxHashMap<&str, &Wanted<'_>> = FxHashMap::default();
        {
            let by_text = self.lock();
            for kernel in wanted.iter().filter(|w| !by_text.contains_key(&w.source.text)) {
                new.entry(&kernel.source.text).or_insert(kernel);
            }
        }
        // Not under the lock: other plans compile meanwhile, if need be the same kernel.
        let compiled: Vec<(String, P)> = new
            .into_par_iter()
            .map(|(text, kernel)| {
                let compiled = compile(kernel.source).map_err(|log| kernel.failed(log))?;
                Ok((text.to_owned(), compiled))
            })
            .collect::<Result<_>>()?;
        let mut by_text = self.lock();
        by_text.extend(compiled);
        Ok(wanted.iter().map(|kernel| by_text[&kernel.source.text].clone()).collect())
    }

    fn lock(&self) -> MutexGuard<'_, FxHashMap<String, P>> {
        self.by_text.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wanted<'_> {
    fn failed(&self, log: String) -> Error {
        let Wanted { step, label, source } = self;
        Error::Compile { kernel: format!("{} of step {step} ({label})", source.name), log }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use metal_candle_compiler::kernel::Kernel;
    use metal_candle_compiler::render::{Dialect, Limits, render};
    use metal_candle_compiler::{Plan, Work, plan};
    use metal_candle_graph::{Composite, ComputationGraph, DType, Operation, Shape, TensorType};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Softmax of each of `n` inputs.
    fn planned(n: u32, dims: &[usize]) -> Plan {
        let mut g = ComputationGraph::new();
        let softmax = Operation::Composite(Composite::Softmax { dim: 1 });
        for i in 0..n {
            let x = g.input(i, TensorType::new(DType::F32, Shape::new(dims).unwrap()));
            let y = g.add(softmax, &[x]).unwrap();
            g.outputs.push(y);
        }
        plan(&g, Device::Metal(0).target(), &[]).unwrap()
    }

    fn sources(plan: &Plan) -> Vec<Source> {
        let render =
            |kernel: &Kernel| render(kernel, Dialect::METAL, &Limits::metal(8), "fused").unwrap();
        let kernels = plan.steps.iter().map(|step| match &step.work {
            Work::Kernel(kernel) => render(kernel),
            Work::Call(_) => panic!("{} is a call", step.label),
        });
        kernels.collect()
    }

    /// Metal-candle 1.x compiled its shader at every call.
    #[test]
    fn a_shader_is_compiled_once_and_not_at_every_call() {
        let library = Library::default();
        let compilations = AtomicUsize::new(0);
        let get = |plan: &Plan| {
            let sources = sources(plan);
            let wanted: Vec<Wanted<'_>> =
                sources.iter().map(|source| Wanted { step: 0, label: "softmax", source }).collect();
            let compile = |source: &Source| {
                compilations.fetch_add(1, Ordering::Relaxed);
                Ok(source.text.len())
            };
            let got = library.get(&wanted, compile).unwrap();
            let want: Vec<usize> = sources.iter().map(|s| s.text.len()).collect();
            assert_eq!(got, want);
            compilations.load(Ordering::Relaxed)
        };
        // Two alike in one plan, again, another plan of the same kernel, another kernel.
        assert_eq!(get(&planned(2, &[8, 64])), 1);
        assert_eq!(get(&planned(2, &[8, 64])), 1);
        assert_eq!(get(&planned(1, &[8, 64])), 1);
        assert_eq!(get(&planned(1, &[8, 128])), 2);
    }

    #[test]
    fn a_shader_that_fails_to_compile_is_an_error_with_its_log_and_step() {
        let plan = planned(1, &[8, 64]);
        let sources = sources(&plan);
        let wanted = [Wanted { step: 7, label: "softmax", source: &sources[0] }];
        let library = Library::<()>::default();
        let error = library.get(&wanted, |_| Err("3:1: error: unknown type".into())).unwrap_err();
        let text = error.to_string();
        for part in ["fused", "step 7 (softmax)", "3:1: error: unknown type"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        // It is not kept: the next one is asked again.
        assert!(library.get(&wanted, |_| Ok(())).is_ok());
    }
}
