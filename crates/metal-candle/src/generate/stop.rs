//! Stop strings in a text that comes in pieces.

/// Looks for stop strings. What may begin one is held back until it is settled.
#[derive(Debug)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text settled.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Settled {
    /// This much can be given out.
    Text(String),
    /// A stop string came after this text.
    Stopped(String),
}

impl StopStrings {
    pub(super) fn new(stops: Vec<String>) -> StopStrings {
        StopStrings { stops, held: String::new() }
    }

    /// Takes the next piece. Of several stop strings the one counts that begins first.
    pub(super) fn push(&mut self, text: &str) -> Settled {
        self.held += text;
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = found {
            self.held.truncate(at);
            return Settled::Stopped(std::mem::take(&mut self.held));
        }
        let begun = self.held.char_indices().map(|(at, _)| at).find(|at| {
            let tail = &self.held[*at..];
            self.stops.iter().any(|stop| stop.starts_with(tail))
        });
        let rest = self.held.split_off(begun.unwrap_or(self.held.len()));
        Settled::Text(std::mem::replace(&mut self.held, rest))
    }

    /// What was held back: nothing comes any more that could make a stop string of it.
    pub(super) fn rest(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::{Settled, StopStrings};

    /// What each piece settles; a stop ends the list.
    fn settled(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut matcher = StopStrings::new(stops);
        let mut out = Vec::new();
        for piece in pieces {
            match matcher.push(piece) {
                Settled::Text(text) => out.push(text),
                Settled::Stopped(text) => {
                    out.push(text);
                    return (out, true);
                }
            }
        }
        out.push(matcher.rest());
        (out, false)
    }

    #[test]
    fn a_stop_string_split_over_pieces_is_never_given_out() {
        assert_eq!(
            settled(&["STOP"], &["a S", "TO", "P b"]),
            (vec!["a ".into(), "".into(), "".into()], true)
        );
        assert_eq!(settled(&["ü"], &["xüy"]), (vec!["x".into()], true));
    }

    #[test]
    fn what_only_began_a_stop_string_comes_out_later() {
        assert_eq!(
            settled(&["STOP"], &["ST", "AY", "S"]),
            (vec!["".into(), "STAY".into(), "".into(), "S".into()], false)
        );
        // The second A begins anew where the first failed.
        assert_eq!(settled(&["AAB"], &["AA", "AB", "c"]), (vec!["".into(), "A".into()], true));
    }

    #[test]
    fn the_stop_string_that_begins_first_counts() {
        assert_eq!(settled(&["cd", "b"], &["abcd"]), (vec!["a".into()], true));
        assert_eq!(settled(&[], &["ab", ""]), (vec!["ab".into(), "".into(), "".into()], false));
    }
}
