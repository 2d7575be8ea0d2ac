//! A word whose embedding was learnt (textual inversion, Gal et al. 2022, arXiv 2208.01618): the row that takes the place of
//! its own in the table of each text encoder. It knows no tokenizer: which token the word is, is asked where it is used.

use crate::error::{Error, Result};
use crate::memory::{collected, copied};

/// The most text encoders of a model.
pub const MAX_TEXT_ENCODERS: usize = 8;

/// The longest row.
pub const MAX_ROW: usize = 1 << 16;

/// A word, and its row for each text encoder of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct LearntToken {
    word: String,
    rows: Vec<Vec<f32>>,
}

impl LearntToken {
    /// A word with a row `[width]` for each text encoder, in the model's order.
    ///
    /// Errors: `InvalidArgument` for no word, no row or more than [`MAX_TEXT_ENCODERS`], a row that is empty or longer than
    /// [`MAX_ROW`], or a number that is not finite.
    pub fn new(word: impl Into<String>, rows: Vec<Vec<f32>>) -> Result<Self> {
        let word = word.into();
        if word.trim().is_empty() || rows.is_empty() || rows.len() > MAX_TEXT_ENCODERS {
            return Err(Error::invalid_argument(format!(
                "a learnt token needs a word and 1 to {MAX_TEXT_ENCODERS} rows; there are {} rows for {word:?}",
                rows.len()
            )));
        }
        for (encoder, row) in rows.iter().enumerate() {
            if row.is_empty() || row.len() > MAX_ROW {
                return Err(Error::invalid_argument(format!(
                    "the learnt row {encoder} of {word:?} has {} numbers, must have 1 to {MAX_ROW}",
                    row.len()
                )));
            }
            if let Some(value) = row.iter().find(|value| !value.is_finite()) {
                return Err(Error::invalid_argument(format!("the learnt row {encoder} of {word:?} holds {value}")));
            }
        }
        Ok(Self { word, rows })
    }

    /// The word.
    pub fn word(&self) -> &str {
        &self.word
    }

    /// A row for each text encoder.
    pub fn rows(&self) -> &[Vec<f32>] {
        &self.rows
    }

    /// `base + strength (row - base)` for one encoder, whose table has rows of `width`; at strength 1 the row itself, bit for
    /// bit. `base` gives the table's row where it is needed.
    ///
    /// Errors: `InvalidArgument`, naming both widths, if the row has another one; those of `base`.
    pub(crate) fn at_strength(
        &self,
        encoder: usize,
        strength: f32,
        width: usize,
        base: impl FnOnce() -> Result<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        let row = &self.rows[encoder];
        if row.len() != width {
            return Err(Error::invalid_argument(format!(
                "the learnt row of {:?} for text encoder {encoder} has {} numbers, the model's rows have {width}",
                self.word,
                row.len()
            )));
        }
        if strength == 1.0 {
            return copied(row);
        }
        collected(row.iter().zip(base()?).map(|(learnt, base)| base + strength * (learnt - base)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_goes_from_the_bases_to_its_own() {
        let token = LearntToken::new("<s1>", vec![vec![1.0, 0.1]]).unwrap();
        let base = || Ok(vec![3.0, 0.7]);
        assert_eq!(token.at_strength(0, 0.0, 2, base).unwrap(), [3.0, 0.7]);
        assert_eq!(token.at_strength(0, 0.5, 2, base).unwrap(), [2.0, 0.7 + 0.5 * (0.1f32 - 0.7)]);
        assert_eq!(token.at_strength(0, 1.0, 2, base).unwrap(), [1.0, 0.1]);
        let error = token.at_strength(0, 1.0, 3, base).unwrap_err();
        assert!(error.message().contains("has 2 numbers, the model's rows have 3"), "{error}");
    }

    #[test]
    fn rows_that_can_be_none_are_refused() {
        for (word, rows) in [
            (" ", vec![vec![1.0]]),
            ("<s1>", vec![]),
            ("<s1>", vec![vec![1.0]; MAX_TEXT_ENCODERS + 1]),
            ("<s1>", vec![vec![1.0], vec![]]),
            ("<s1>", vec![vec![0.0; MAX_ROW + 1]]),
            ("<s1>", vec![vec![1.0, f32::NAN]]),
            ("<s1>", vec![vec![f32::INFINITY]]),
        ] {
            assert!(LearntToken::new(word, rows).is_err());
        }
    }
}
