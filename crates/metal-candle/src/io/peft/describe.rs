//! From a set of modules back to the options that choose it, for adapters whose files list no more.

use std::collections::{BTreeMap, BTreeSet};

use indexmap::IndexMap;

use super::select::last_part;
use super::{LoraConfig, LoraPair, OneOrMany, TargetModules};

impl LoraConfig {
    /// A config that chooses exactly these modules in any base that has them, each with the rank of
    /// its pair and the scale that `scale` gives for that rank.
    pub(crate) fn describing(
        modules: &BTreeMap<String, LoraPair>,
        scale: impl Fn(usize) -> f64,
    ) -> LoraConfig {
        let (target_modules, layers_to_transform) = targets(modules.keys().map(String::as_str));
        let r = commonest_rank(modules);
        let others: Vec<_> = modules.iter().filter(|(_, pair)| pair.rank != r).collect();
        let alpha = |rank: usize| scale(rank) * rank as f64;
        let patterns = others.iter().map(|(name, pair)| (regex(name), pair.rank)).collect();
        let alphas = others.iter().filter(|(_, pair)| alpha(pair.rank) != alpha(r));
        let alphas: IndexMap<_, _> =
            alphas.map(|(name, pair)| (regex(name), alpha(pair.rank))).collect();
        LoraConfig {
            r,
            lora_alpha: alpha(r),
            target_modules,
            layers_to_transform,
            rank_pattern: patterns,
            alpha_pattern: alphas,
            ..LoraConfig::default()
        }
    }
}

/// A module's name as a pattern that matches nothing else.
fn regex(name: &str) -> String {
    name.replace('.', r"\.")
}

/// The smallest of the ranks that most modules have.
fn commonest_rank(modules: &BTreeMap<String, LoraPair>) -> usize {
    let mut count: BTreeMap<usize, usize> = BTreeMap::new();
    for pair in modules.values() {
        *count.entry(pair.rank).or_default() += 1;
    }
    let most = count.values().max().copied().unwrap_or(0);
    count.into_iter().find(|(_, n)| *n == most).map_or(1, |(rank, _)| rank)
}

/// The same short names in every layer and a list of layers, where the modules allow it; otherwise
/// their full names. The list is given even where it may be all layers: only the base would know.
fn targets<'m>(
    modules: impl Iterator<Item = &'m str>,
) -> (TargetModules, Option<OneOrMany<usize>>) {
    let names: Vec<&str> = modules.collect();
    let full = || TargetModules::Names(names.iter().map(ToString::to_string).collect());
    let mut layers: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    for name in &names {
        match in_layer(name) {
            Some((layer, module)) => layers.entry(layer).or_default().insert(module),
            None => return (full(), None),
        };
    }
    let mut sets = layers.values();
    let Some(first) = sets.next() else { return (full(), None) };
    let short: BTreeSet<String> = first.iter().map(|module| last_part(module).to_owned()).collect();
    if sets.any(|set| set != first) || short.len() != first.len() {
        return (full(), None);
    }
    let layers = OneOrMany::Many(layers.into_keys().collect());
    (TargetModules::Names(short.into_iter().collect()), Some(layers))
}

/// `model.layers.3.self_attn.q_proj` is `self_attn.q_proj` of layer 3.
fn in_layer(name: &str) -> Option<(usize, &str)> {
    let (layer, module) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, module))
}
