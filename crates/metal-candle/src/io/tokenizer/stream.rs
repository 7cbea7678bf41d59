//! Text from ids as they come, never half a character.

use super::Tokenizer;
use crate::io::Result;

/// Decodes ids one by one. A character that spans several tokens comes out with its last one, so
/// what was pushed, once [finished](Self::finish), is exactly what [`Tokenizer::decode`] gives.
///
/// ```no_run
/// # fn main() -> Result<(), metal_candle::io::Error> {
/// # let tokenizer = metal_candle::io::Tokenizer::from_file("tokenizer.json")?;
/// let mut stream = tokenizer.stream();
/// for id in [9, 10, 11] {
///     print!("{}", stream.push(id)?);
/// }
/// print!("{}", stream.finish()?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    /// The ids since the one before the last that gave text.
    ids: Vec<u32>,
    /// How many of `ids` have been given out.
    given: usize,
}

impl<'t> TextStream<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), given: 0 }
    }

    /// The text that `id` completes; empty in the middle of a character and for special tokens.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        // A tail of U+FFFD is taken for a character whose last byte is yet to come.
        if text.is_empty() || text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Ok(text)
    }

    /// The rest: text that ended in the middle of a character shows it as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    /// What the ids not given out add to those that were.
    ///
    /// Decoders look at their neighbours (a leading space is dropped, pieces are joined), so the
    /// new ids are decoded after the last ones that gave text, and only the difference counts.
    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.given], true)?;
        let text = self.tokenizer.decode(&self.ids, true)?;
        Ok(text.get(before.len()..).unwrap_or_default().to_owned())
    }
}
