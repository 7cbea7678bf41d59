//! What all commands agree on: how much is said, and in which colours.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where help lists the flags of every command.
pub(crate) const EVERYWHERE: &str = "Options of every command";

/// Flags of every command.
#[derive(clap::Args, Clone, Copy)]
pub(crate) struct UiArgs {
    /// Print results and errors, nothing else
    #[arg(short, long, global = true, help_heading = EVERYWHERE)]
    quiet: bool,
    /// When to use colours; auto is on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "WHEN")]
    #[arg(help_heading = EVERYWHERE)]
    color: Color,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Color {
    Auto,
    Always,
    Never,
}

static UI: OnceLock<UiArgs> = OnceLock::new();
static SILENCED: AtomicBool = AtomicBool::new(false);

/// To be called once, before anything is said.
pub(crate) fn init(args: UiArgs) {
    UI.get_or_init(|| args);
}

/// As if told to be quiet: another process speaks for this one.
pub(crate) fn silence() {
    SILENCED.store(true, Ordering::Relaxed);
}

pub(crate) fn is_quiet() -> bool {
    SILENCED.load(Ordering::Relaxed) || UI.get().is_some_and(|ui| ui.quiet)
}

/// Whether standard output is coloured (<https://no-color.org>).
pub(crate) fn stdout_has_color() -> bool {
    match UI.get().map_or(Color::Auto, |ui| ui.color) {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => {
            let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
            std::io::stdout().is_terminal() && !no_color
        }
    }
}

/// Something to know that is no result, on standard error.
macro_rules! note {
    ($($arg:tt)*) => {
        if !crate::ui::is_quiet() {
            eprintln!($($arg)*);
        }
    };
}
pub(crate) use note;

/// A bar on a terminal, nothing elsewhere. `template` is indicatif's.
pub(crate) fn progress(len: u64, template: &str) -> ProgressBar {
    if is_quiet() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(template);
    ProgressBar::new(len).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
