//! Flags out of a file: every flag of every command, by clap's own description of them.

mod mlx;

use anyhow::{Context, Result, bail};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::{Map, Value};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// All flags of a call.
pub(crate) struct Flags {
    pub(crate) matches: ArgMatches,
    /// What is to be known of the file.
    pub(crate) notes: Vec<String>,
}

/// One setting of a file, as a flag.
struct Setting {
    /// As the file spells it.
    key: String,
    /// Without the dashes before it.
    flag: String,
    value: Value,
}

/// The flags, those of the file that `--config` names among them; the command line wins.
///
/// Errors of the command line itself end the program as clap does it.
///
/// # Errors
/// Where the file cannot be read, or has a key or value that is no flag's.
pub(crate) fn flags(mut command: Command, args: Vec<OsString>) -> Result<Flags> {
    // Whatever is wrong with the command line is said below, when all flags are there.
    let loose = command.clone().ignore_errors(true).try_get_matches_from(&args);
    command.build();
    let Some((given, file)) = loose.as_ref().ok().and_then(config) else {
        return Ok(Flags { matches: command.get_matches_from(args), notes: Vec::new() });
    };
    let mut invoked = &command;
    let mut at = loose.as_ref().ok();
    while let Some((name, matches)) = at.and_then(ArgMatches::subcommand) {
        invoked = invoked.find_subcommand(name).context("metal-candle bug: no such command")?;
        at = Some(matches);
    }
    let mut notes = Vec::new();
    let settings = mlx::flags(read(&file)?, &mut notes);
    let settings = settings.with_context(|| format!("{}", file.display()))?;
    let mut written: Vec<OsString> = Vec::new();
    let mut from_file = Vec::new();
    for setting in settings {
        let arg = argument(invoked, &setting);
        let arg = arg.with_context(|| format!("{}", file.display()))?;
        if let Some(arg) = arg.filter(|arg| !is_given(invoked, given, arg)) {
            let spelt = spell(arg, &setting);
            written.extend(spelt.with_context(|| format!("{}", file.display()))?);
            from_file.push(format!("--{}", setting.flag));
        }
    }
    let mut all = args;
    let end = all.iter().position(|arg| arg == "--").unwrap_or(all.len());
    all.splice(end..end, written);
    let matches = command.try_get_matches_from_mut(all);
    let matches = matches.map_err(|error| explain(error, &file, &from_file))?;
    let notes = notes.into_iter().map(|note| format!("{}: {note}", file.display())).collect();
    Ok(Flags { matches, notes })
}

/// The flags of the command that was called, and the file that they name.
fn config(matches: &ArgMatches) -> Option<(&ArgMatches, PathBuf)> {
    let mut at = matches;
    while let Some((_, next)) = at.subcommand() {
        at = next;
    }
    let file = at.try_get_one::<PathBuf>("config").ok().flatten()?;
    Some((at, file.clone()))
}

fn read(path: &Path) -> Result<Map<String, Value>> {
    let at = || format!("{}", path.display());
    let text = std::fs::read_to_string(path).with_context(at)?;
    let value: Value = match path.extension().and_then(|e| e.to_str()) {
        Some("toml") => match toml::from_str(&text) {
            Ok(value) => value,
            Err(error) => {
                let before = &text[..error.span().map_or(0, |span| span.start)];
                let line = before.matches('\n').count() + 1;
                let what = error.message().replace('\n', " ");
                bail!("{}:{line}: {what}", path.display())
            }
        },
        // JSON is YAML, too.
        Some("yaml" | "yml" | "json") => match serde_saphyr::from_str(&text) {
            Ok(value) => value,
            // Its full message shows the lines around; one line says where.
            Err(error) => {
                let text = error.without_snippet().to_string();
                bail!("{}: {}", path.display(), text.lines().next().unwrap_or_default())
            }
        },
        _ => bail!("{}: expected a name that ends in .toml, .yaml, .yml or .json", path.display()),
    };
    match value {
        Value::Object(map) => Ok(map),
        Value::Null => Ok(Map::new()),
        _ => bail!("{}: expected keys and values", path.display()),
    }
}

/// The flag of this name; `None` where mlx-lm has one that changes nothing here.
fn argument<'c>(command: &'c Command, setting: &Setting) -> Result<Option<&'c Arg>> {
    let Setting { key, flag, .. } = setting;
    let has_name = |arg: &&Arg| arg.get_long() == Some(flag);
    let found = command.get_arguments().find(has_name).filter(|_| flag != "config");
    if found.is_some() || mlx::is_moot(setting)? {
        return Ok(found);
    }
    // Clap knows best which flag was meant.
    let probe = [command.get_name().to_owned(), format!("--{flag}")];
    let probed = command.clone().try_get_matches_from(probe);
    let meant = probed.err().and_then(|error| match error.get(ContextKind::SuggestedArg) {
        Some(ContextValue::String(flag)) => Some(format!("; did you mean {flag}?")),
        _ => None,
    });
    let (name, meant) = (command.get_bin_name().unwrap_or_default(), meant.unwrap_or_default());
    bail!("unknown key {key:?}: `{name}` has no flag --{flag}{meant}")
}

/// Whether the command line says it already, or something that excludes it.
fn is_given(command: &Command, given: &ArgMatches, arg: &Arg) -> bool {
    let is_given = |arg: &Arg| {
        let id = arg.get_id().as_str();
        let known = given.try_contains_id(id).is_ok();
        known && given.value_source(id) == Some(ValueSource::CommandLine)
    };
    let excludes = |other: &&Arg| {
        let conflicts = |a: &Arg, b: &Arg| {
            command.get_arg_conflicts_with(a).iter().any(|c| c.get_id() == b.get_id())
        };
        // Of `--packing` and `--no-packing` the later one counts, and the file's come last.
        let negates = |a: &Arg, b: &Arg| {
            let positive = a.get_long().and_then(|long| long.strip_prefix("no-"));
            positive.is_some() && positive == b.get_long()
        };
        let either = |rule: &dyn Fn(&Arg, &Arg) -> bool| rule(arg, other) || rule(other, arg);
        either(&conflicts) || either(&negates)
    };
    is_given(arg) || command.get_arguments().filter(excludes).any(is_given)
}

/// The flag as it is written on a command line.
fn spell(arg: &Arg, setting: &Setting) -> Result<Vec<OsString>> {
    let Setting { key, flag, value } = setting;
    let written = |value: &Value| match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(_) | Value::Bool(_) => Ok(value.to_string()),
        other => bail!("{key}: expected a text, a number or a list of them, got {other}"),
    };
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return match value {
            Value::Bool(true) => Ok(vec![format!("--{flag}").into()]),
            Value::Bool(false) => Ok(Vec::new()),
            other => bail!("{key}: expected true or false, got {other}"),
        };
    }
    let values = match value {
        Value::Array(values) => values.iter().map(written).collect::<Result<Vec<_>>>()?,
        value => vec![written(value)?],
    };
    let values = match (arg.get_value_delimiter(), arg.get_action()) {
        (Some(comma), _) => vec![values.join(&comma.to_string())],
        (None, ArgAction::Append) => values,
        (None, _) if values.len() == 1 => values,
        (None, _) => bail!("{key}: expected one value, got {}", values.len()),
    };
    Ok(values.into_iter().map(|value| format!("--{flag}={value}").into()).collect())
}

/// Says which file a flag came from that clap refuses; other errors are clap's to print.
fn explain(error: clap::Error, file: &Path, from_file: &[String]) -> anyhow::Error {
    let named = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(arg)) => arg.split([' ', '=']).next().unwrap_or_default(),
        _ => "",
    };
    let values = matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue);
    if !values || !from_file.iter().any(|flag| flag == named) {
        error.exit();
    }
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    let values = lines.find(|line| line.starts_with('[')).map(|line| format!(" {line}"));
    anyhow::anyhow!("{}: {first}{}", file.display(), values.unwrap_or_default())
}
