//! An adapter of a base's last layers only: less to train, and no gradient flows below them.

use super::select::{LM_HEAD, ends_with};
use super::{LoraConfig, OneOrMany, Problem, TargetModules};
use std::collections::BTreeSet;

impl LoraConfig {
    /// The same for the last `count` layers only of a base that has these `linear` modules (full
    /// names), as mlx-lm's `num_layers`.
    ///
    /// The layers go into `layers_to_transform`. PEFT allows that beside a list of names only, so
    /// `all-linear` becomes the names that it stands for.
    ///
    /// # Errors
    /// [`Problem::LastLayers`] where there are fewer layers, or `count` is 0; [`Problem::Option`]
    /// where `target_modules` are a regular expression.
    pub fn for_last_layers<'a>(
        self,
        count: usize,
        linear: impl IntoIterator<Item = &'a str>,
    ) -> Result<LoraConfig, Problem> {
        let in_layers: Vec<(usize, &str)> =
            linear.into_iter().filter_map(|name| Some((layer_of(name)?, name))).collect();
        let layers: BTreeSet<usize> = in_layers.iter().map(|(layer, _)| *layer).collect();
        if count == 0 || count > layers.len() {
            return Err(Problem::LastLayers { count, layers: layers.len() });
        }
        let target_modules = match self.target_modules {
            TargetModules::AllLinear => {
                let names = in_layers.iter().map(|(_, name)| *name);
                let names = names.filter(|name| !ends_with(name, LM_HEAD)).map(last_part);
                let names: BTreeSet<&str> = names.collect();
                TargetModules::Names(names.into_iter().map(str::to_owned).collect())
            }
            other => other,
        };
        let others = layers.len() - count;
        let last = layers.into_iter().skip(others).collect();
        let layers_to_transform = Some(OneOrMany::Many(last));
        let config = LoraConfig { target_modules, layers_to_transform, ..self };
        config.check()?;
        Ok(config)
    }
}

/// `model.layers.3.self_attn.q_proj` is in layer 3: the first number counts, later ones may be of experts.
fn layer_of(module: &str) -> Option<usize> {
    module.split('.').find_map(|part| part.parse().ok())
}

/// `q_proj` of `model.layers.3.self_attn.q_proj`.
fn last_part(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}
