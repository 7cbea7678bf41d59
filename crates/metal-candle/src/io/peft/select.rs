//! Which modules an adapter is for, by PEFT's rules.

use fancy_regex::Regex;

use super::{LoraConfig, OneOrMany, Problem, TargetModules};

/// The output projection, which `all-linear` leaves out.
const LM_HEAD: &str = "lm_head";

/// A module that gets an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Its full name in the base, such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Rank of its A and B.
    pub rank: usize,
    /// Factor of the adapter's output.
    pub scale: f64,
}

impl LoraConfig {
    /// Which of the base's `linear` modules (full names, the output projection included) get an
    /// adapter, in the order given.
    ///
    /// # Errors
    /// [`Problem::NoTarget`]; [`Problem::Regex`]; as [`LoraConfig::check`].
    pub fn targets<'a>(
        &self,
        linear: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<Target>, Problem> {
        self.check()?;
        let selector = Selector::new(self)?;
        let mut modules = 0;
        let mut targets = Vec::new();
        for module in linear {
            modules += 1;
            if selector.selects(module)? {
                targets.push(selector.target(self, module)?);
            }
        }
        if targets.is_empty() {
            let targets = format!("{:?}", self.target_modules);
            return Err(Problem::NoTarget { targets, modules });
        }
        Ok(targets)
    }
}

/// A regular expression, and the option it came from for messages about it.
struct Pattern {
    option: &'static str,
    regex: Regex,
}

impl Pattern {
    /// `wrapped` is what stands for Python's `fullmatch` or `match`.
    fn new(option: &'static str, pattern: &str, wrapped: String) -> Result<Self, Problem> {
        match Regex::new(&wrapped) {
            Ok(regex) => Ok(Self { option, regex }),
            Err(cause) => {
                let (pattern, cause) = (pattern.to_owned(), Box::new(cause));
                Err(Problem::Regex { option, pattern, cause })
            }
        }
    }

    fn full(option: &'static str, pattern: &str) -> Result<Self, Problem> {
        Self::new(option, pattern, format!("^(?:{pattern})$"))
    }

    /// The name or its end after a dot, as PEFT looks up `rank_pattern` and `alpha_pattern`.
    fn ending(option: &'static str, pattern: &str) -> Result<Self, Problem> {
        Self::new(option, pattern, format!("^(?:.*\\.)?(?:{pattern})$"))
    }

    fn is_match(&self, module: &str) -> Result<bool, Problem> {
        self.regex.is_match(module).map_err(|cause| self.failed(cause))
    }

    /// The number in the first group, of the match at the start.
    fn number(&self, module: &str) -> Result<Option<usize>, Problem> {
        let captures = self.regex.captures(module).map_err(|cause| self.failed(cause))?;
        let group = captures.and_then(|captures| captures.get(1));
        Ok(group.and_then(|group| group.as_str().parse().ok()))
    }

    fn failed(&self, cause: fancy_regex::Error) -> Problem {
        let pattern = self.regex.as_str().to_owned();
        Problem::Regex { option: self.option, pattern, cause: Box::new(cause) }
    }
}

enum Names<'a> {
    List(&'a [String]),
    Regex(Pattern),
    AllLinear,
}

/// The layers to which suffixes are restricted.
struct Layers {
    wanted: Vec<usize>,
    names: LayerNames,
}

/// What finds a module's layer in its name: `layers_pattern`, or PEFT's own.
pub(super) struct LayerNames(Vec<Pattern>);

impl LayerNames {
    /// # Errors
    /// [`Problem::Regex`]
    pub(super) fn new(config: &LoraConfig) -> Result<Self, Problem> {
        const OPTION: &str = "layers_pattern";
        let named = match &config.layers_pattern {
            None => &[][..],
            Some(OneOrMany::One(name)) if name.is_empty() => &[],
            Some(OneOrMany::One(name)) => std::slice::from_ref(name),
            Some(OneOrMany::Many(names)) => names,
        };
        // Lazy, so that the first number is the layer: later ones may count experts.
        let mut patterns = named
            .iter()
            .map(|name| Pattern::new(OPTION, name, format!("^(?:|.*?\\.)(?:{name})\\.(\\d+)\\.")))
            .collect::<Result<Vec<_>, _>>()?;
        if patterns.is_empty() {
            patterns.push(Pattern::new(OPTION, "", r"^.*?\.[^.]*\.(\d+)\.".to_owned())?);
        }
        Ok(Self(patterns))
    }

    /// The layer that a module is in.
    ///
    /// # Errors
    /// [`Problem::Regex`]
    pub(super) fn layer_of(&self, module: &str) -> Result<Option<usize>, Problem> {
        for pattern in &self.0 {
            if let Some(layer) = pattern.number(module)? {
                return Ok(Some(layer));
            }
        }
        Ok(None)
    }
}

/// A config with its regular expressions compiled.
struct Selector<'a> {
    targets: Names<'a>,
    excluded: Names<'a>,
    layers: Option<Layers>,
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f64)>,
}

impl<'a> Selector<'a> {
    fn new(config: &'a LoraConfig) -> Result<Self, Problem> {
        let targets = match &config.target_modules {
            TargetModules::Names(names) => Names::List(names),
            TargetModules::Regex(regex) => Names::Regex(Pattern::full("target_modules", regex)?),
            TargetModules::AllLinear => Names::AllLinear,
        };
        let excluded = match &config.exclude_modules {
            None => Names::List(&[]),
            Some(OneOrMany::Many(names)) => Names::List(names),
            Some(OneOrMany::One(regex)) => Names::Regex(Pattern::full("exclude_modules", regex)?),
        };
        let ranks = config.rank_pattern.iter();
        let alphas = config.alpha_pattern.iter();
        Ok(Self {
            targets,
            excluded,
            layers: layers(config)?,
            ranks: ranks
                .map(|(pattern, &rank)| Ok((Pattern::ending("rank_pattern", pattern)?, rank)))
                .collect::<Result<_, Problem>>()?,
            alphas: alphas
                .map(|(pattern, &alpha)| Ok((Pattern::ending("alpha_pattern", pattern)?, alpha)))
                .collect::<Result<_, Problem>>()?,
        })
    }

    fn selects(&self, module: &str) -> Result<bool, Problem> {
        let excluded = match &self.excluded {
            Names::List(names) => {
                names.iter().any(|name| module == name || ends_with(module, name))
            }
            Names::Regex(regex) => regex.is_match(module)?,
            Names::AllLinear => false,
        };
        if excluded {
            return Ok(false);
        }
        match &self.targets {
            Names::Regex(regex) => regex.is_match(module),
            Names::AllLinear => Ok(!is_output(module)),
            // A full name is meant as it stands; the layers restrict suffixes only.
            Names::List(names) if names.iter().any(|name| name == module) => Ok(true),
            Names::List(names) => {
                Ok(names.iter().any(|name| ends_with(module, name)) && self.in_layers(module)?)
            }
        }
    }

    fn in_layers(&self, module: &str) -> Result<bool, Problem> {
        let Some(Layers { wanted, names }) = &self.layers else { return Ok(true) };
        Ok(names.layer_of(module)?.is_some_and(|layer| wanted.contains(&layer)))
    }

    fn target(&self, config: &LoraConfig, module: &str) -> Result<Target, Problem> {
        let rank = lookup(&self.ranks, module)?.unwrap_or(config.r);
        let alpha = lookup(&self.alphas, module)?.unwrap_or(config.lora_alpha);
        let divisor = if config.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        Ok(Target { module: module.to_owned(), rank, scale: alpha / divisor })
    }
}

/// An empty list restricts nothing, as in PEFT.
fn layers(config: &LoraConfig) -> Result<Option<Layers>, Problem> {
    let wanted = match &config.layers_to_transform {
        None => return Ok(None),
        Some(OneOrMany::One(layer)) => vec![*layer],
        Some(OneOrMany::Many(layers)) if layers.is_empty() => return Ok(None),
        Some(OneOrMany::Many(layers)) => layers.clone(),
    };
    Ok(Some(Layers { wanted, names: LayerNames::new(config)? }))
}

fn lookup<T: Copy>(patterns: &[(Pattern, T)], module: &str) -> Result<Option<T>, Problem> {
    for (pattern, value) in patterns {
        if pattern.is_match(module)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// Whether a module is the output projection.
pub(super) fn is_output(module: &str) -> bool {
    module == LM_HEAD || ends_with(module, LM_HEAD)
}

/// `q_proj` of `model.layers.3.self_attn.q_proj`.
pub(super) fn last_part(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// Whether the name ends with `.` and `suffix`.
fn ends_with(module: &str, suffix: &str) -> bool {
    module.strip_suffix(suffix).is_some_and(|rest| rest.ends_with('.'))
}
