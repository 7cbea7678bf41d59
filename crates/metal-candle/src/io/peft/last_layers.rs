//! An adapter of a base's last layers only: less to train, and no gradient flows below them.

use super::select::{LayerNames, is_output, last_part};
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
    /// where `target_modules` are a regular expression; [`Problem::Regex`] of `layers_pattern`.
    pub fn for_last_layers<'a>(
        self,
        count: usize,
        linear: impl IntoIterator<Item = &'a str>,
    ) -> Result<LoraConfig, Problem> {
        let layer_names = LayerNames::new(&self)?;
        let (mut layers, mut modules) = (BTreeSet::new(), BTreeSet::new());
        for name in linear {
            if let Some(layer) = layer_names.layer_of(name)? {
                layers.insert(layer);
                modules.extend((!is_output(name)).then(|| last_part(name)));
            }
        }
        if count == 0 || count > layers.len() {
            return Err(Problem::LastLayers { count, layers: layers.len() });
        }
        let target_modules = match self.target_modules {
            TargetModules::AllLinear => {
                TargetModules::Names(modules.into_iter().map(str::to_owned).collect())
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
