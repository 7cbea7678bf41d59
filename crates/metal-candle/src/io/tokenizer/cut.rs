//! Texts that are cut where they are longer than a model reads.

use tokenizers::normalizers::{Lowercase, Sequence};
use tokenizers::{NormalizerWrapper, TruncationParams};

use super::{Problem, Tokenizer, in_file};
use crate::io::Result;

/// The ids of a text, and whether it was cut.
pub(crate) struct CutText {
    pub(crate) ids: Vec<u32>,
    pub(crate) is_cut: bool,
}

impl Tokenizer {
    /// The same tokenizer, which keeps so many tokens of a text, those that it adds included: the text is cut at its
    /// end, and what stands after it follows the cut.
    ///
    /// # Errors
    /// [`Problem::Truncation`] where nothing of a text would be left.
    pub(crate) fn cut_at(mut self, max_tokens: usize) -> Result<Tokenizer> {
        let added = self.encode("", true)?.len();
        if added >= max_tokens {
            let problem = Problem::Truncation { limit: max_tokens, added };
            return Err(in_file(&self.path)(problem));
        }
        let truncation = TruncationParams { max_length: max_tokens, ..TruncationParams::default() };
        if let Err(cause) = self.inner.with_truncation(Some(truncation)) {
            return Err(in_file(&self.path)(Problem::Library { cause }));
        }
        Ok(self)
    }

    /// The same tokenizer, which takes texts in lower case.
    ///
    /// # Errors
    /// [`Problem::Library`].
    pub(crate) fn in_lower_case(mut self) -> Result<Tokenizer> {
        let own = self.inner.get_normalizer().cloned();
        let normalizers = [NormalizerWrapper::from(Lowercase)].into_iter().chain(own).collect();
        if let Err(cause) = self.inner.with_normalizer(Some(Sequence::new(normalizers))) {
            return Err(in_file(&self.path)(Problem::Library { cause }));
        }
        Ok(self)
    }

    /// The ids of texts, with the special tokens that the model wants around each.
    ///
    /// # Errors
    /// [`Problem::Library`].
    pub(crate) fn encode_cut(&self, texts: Vec<String>) -> Result<Vec<CutText>> {
        let encodings = self.inner.encode_batch_fast(texts, true).map_err(self.library())?;
        let cut = encodings.into_iter().map(|encoding| CutText {
            is_cut: !encoding.get_overflowing().is_empty(),
            ids: encoding.get_ids().to_vec(),
        });
        Ok(cut.collect())
    }
}
