//! Prompts as token numbers, in chunks of the text encoder's length, and where each word of the prompt went.
//!
//! It reads `tokenizer.json`, or builds CLIP's byte-pair encoding (arXiv 2103.00020; the merges and vocabulary of
//! `vocab.json` and `merges.txt`, lower case, `</w>` at the end of words). It knows no encoders.

use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::diffusion::folder::Folder;
use crate::error::{Error, Result};

/// The longest prompt in bytes.
pub const MAX_PROMPT_BYTES: usize = 1 << 16;
/// The most chunks that a prompt may fill.
pub const MAX_PROMPT_CHUNKS: usize = 32;

const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
const MAX_TOKENS: usize = 4096;

/// Splits words of prompts as CLIP's reference tokenizer does.
const CLIP_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Turns prompts into chunks of token numbers.
pub struct PromptTokenizer {
    inner: Tokenizer,
    begin: Vec<u32>,
    end: Vec<u32>,
    pad: u32,
    length: usize,
}

/// A prompt as token numbers. Row `r` of the text encoding belongs to token `r % length` of chunk `r / length`.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizedPrompt {
    text: String,
    chunks: Vec<Vec<u32>>,
    /// The row of each of the prompt's own tokens and the bytes of the prompt that it stands for.
    places: Vec<(usize, Range<usize>)>,
}

impl PromptTokenizer {
    /// Opens the tokenizer of a folder. `default_length` is the chunk length where the folder states none.
    pub(super) fn open(folder: &Folder, default_length: usize) -> Result<Self> {
        let settings = folder.json("tokenizer_config.json")?.unwrap_or(Value::Null);
        let mut inner = match folder.read("tokenizer.json", MAX_TOKENIZER_BYTES)? {
            Some(bytes) => parse(&bytes).map_err(|e| e.at(folder.name("tokenizer.json")))?,
            None => clip(folder)?,
        };
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::invalid_file(e.to_string()))?;
        let (begin, end) = surroundings(&inner)?;
        let length = match settings.get("model_max_length").and_then(Value::as_u64) {
            Some(length) if (3..=MAX_TOKENS as u64).contains(&length) => length as usize,
            // Files without a bound hold 1e30.
            _ => default_length,
        };
        if begin.len() + end.len() >= length {
            return Err(Error::invalid_file(format!(
                "{}: {} begin and end tokens leave no room in {length} tokens",
                folder.name("tokenizer_config.json"),
                begin.len() + end.len()
            )));
        }
        let named = |settings: &Value| match settings.get("pad_token")? {
            Value::String(token) => Some(token.clone()),
            token => Some(token.get("content")?.as_str()?.to_owned()),
        };
        let pad_token = match named(&settings) {
            Some(token) => Some(token),
            None => folder.json("special_tokens_map.json")?.as_ref().and_then(named),
        };
        let pad = match pad_token {
            Some(token) => inner.token_to_id(&token).ok_or_else(|| {
                Error::invalid_file(format!("{}: pad_token {token:?} is not in the vocabulary", folder.name("")))
            })?,
            None => end.last().copied().unwrap_or(0),
        };
        Ok(Self { inner, begin, end, pad, length })
    }

    /// Tokens of a chunk, begin, end and padding included.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The greatest token number.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The number of the one token that a word becomes; `None` for a word of several tokens or one that is unknown.
    pub fn token(&self, word: &str) -> Option<u32> {
        let encoding = self.inner.encode(word, false).ok()?;
        let ([id], [token]) = (encoding.get_ids(), encoding.get_tokens()) else { return None };
        // Vocabularies mark where words begin or end, and may fold case; an unknown word's token has a text of its own.
        let text = token.trim_start_matches(['\u{120}', '\u{2581}']).trim_end_matches("</w>");
        (text.to_lowercase() == word.trim().to_lowercase()).then_some(*id)
    }

    /// The number of the first token of some words; `None` for words that become none.
    pub fn first_token(&self, words: &str) -> Option<u32> {
        self.inner.encode(words, false).ok()?.get_ids().first().copied()
    }

    /// Splits a prompt into chunks, each framed by the begin and end tokens and padded to [`PromptTokenizer::length`].
    /// A word that does not fit into the rest of a chunk begins the next one, unless it is longer than a chunk. The
    /// empty prompt is one chunk.
    ///
    /// # Errors
    /// [`crate::Status::LimitExceeded`] for more than [`MAX_PROMPT_BYTES`] or [`MAX_PROMPT_CHUNKS`].
    pub fn tokenize(&self, prompt: &str) -> Result<TokenizedPrompt> {
        if prompt.len() > MAX_PROMPT_BYTES {
            return Err(Error::limit_exceeded(format!(
                "the prompt has {} bytes, at most {MAX_PROMPT_BYTES} are taken",
                prompt.len()
            )));
        }
        let encoding = self
            .inner
            .encode(prompt, false)
            .map_err(|e| Error::invalid_argument(format!("the prompt could not be tokenized: {e}")))?;
        let room = self.length - self.begin.len() - self.end.len();
        let mut contents: Vec<Vec<u32>> = vec![Vec::new()];
        let mut places = Vec::new();
        let (ids, words, offsets) = (encoding.get_ids(), encoding.get_word_ids(), encoding.get_offsets());
        let mut at = 0;
        while at < ids.len() {
            let word = words.get(at).copied().flatten();
            let same = |next: &usize| word.is_some() && words.get(*next).copied().flatten() == word;
            let count = 1 + (at + 1..ids.len()).take_while(same).count();
            let used = contents.last().map_or(0, Vec::len);
            if used + count > room && count <= room && used > 0 {
                contents.push(Vec::new());
            }
            for (index, id) in ids.iter().enumerate().skip(at).take(count) {
                if contents.last().map_or(0, Vec::len) == room {
                    contents.push(Vec::new());
                }
                let chunk = contents.len() - 1;
                let (start, end) = offsets.get(index).copied().unwrap_or_default();
                places.push((chunk * self.length + self.begin.len() + contents[chunk].len(), start..end));
                contents[chunk].push(*id);
            }
            at += count;
        }
        if contents.len() > MAX_PROMPT_CHUNKS {
            return Err(Error::limit_exceeded(format!(
                "the prompt fills {} chunks of {} tokens, at most {MAX_PROMPT_CHUNKS} are taken",
                contents.len(),
                self.length
            )));
        }
        let chunks = contents.into_iter().map(|content| self.framed(content)).collect();
        Ok(TokenizedPrompt { text: prompt.to_owned(), chunks, places })
    }

    fn framed(&self, content: Vec<u32>) -> Vec<u32> {
        let mut chunk = self.begin.clone();
        chunk.extend(content);
        chunk.extend(&self.end);
        chunk.resize(self.length, self.pad);
        chunk
    }

    /// A chunk of the empty prompt.
    pub(super) fn empty_chunk(&self) -> Vec<u32> {
        self.framed(Vec::new())
    }

    /// Whether a token is padding, for encoders that take a mask. The end token counts as text even where it pads.
    pub(super) fn mask(&self, chunk: &[u32]) -> Vec<i64> {
        let text = chunk.iter().rposition(|id| *id != self.pad).map_or(0, |last| last + 1);
        let framed = self.begin.len() + self.end.len();
        (0..chunk.len()).map(|index| i64::from(index < text.max(framed))).collect()
    }
}

impl TokenizedPrompt {
    /// The prompt.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Chunks of equal length.
    pub fn chunks(&self) -> &[Vec<u32>] {
        &self.chunks
    }

    /// Tokens of the prompt itself, without begin, end and padding.
    pub fn own_tokens(&self) -> usize {
        self.places.len()
    }

    /// The rows of the text encoding where `words` stands in the prompt, all its occurrences, ascending; empty if it does
    /// not occur. ASCII letters match in either case; an occurrence is not part of a longer word.
    pub fn rows_of(&self, words: &str) -> Vec<usize> {
        let found = occurrences(&self.text, words.trim());
        let covers = |bytes: &Range<usize>| found.iter().any(|f| bytes.start < f.end && f.start < bytes.end);
        self.places.iter().filter(|(_, bytes)| covers(bytes)).map(|(row, _)| *row).collect()
    }
}

/// Byte ranges of `words` in `text` as whole words; ASCII letters match in either case.
pub(crate) fn occurrences(text: &str, words: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let (Some(first), Some(last)) = (words.chars().next(), words.chars().next_back()) else { return found };
    for (start, _) in text.char_indices() {
        let end = start + words.len();
        let Some(part) = text.get(start..end) else { continue };
        let joined = |a: Option<char>, b: char| a.is_some_and(char::is_alphanumeric) && b.is_alphanumeric();
        if part.eq_ignore_ascii_case(words)
            && !joined(text[..start].chars().next_back(), first)
            && !joined(text[end..].chars().next(), last)
        {
            found.push(start..end);
        }
    }
    found
}

fn parse(bytes: &[u8]) -> Result<Tokenizer> {
    Tokenizer::from_bytes(bytes).map_err(|e| Error::invalid_file(format!("not a tokenizer: {e}")))
}

/// Begin and end tokens, found by tokenizing with and without them.
fn surroundings(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    let ids = |special| {
        let encoding = tokenizer.encode("a", special).map_err(|e| Error::invalid_file(e.to_string()))?;
        Ok::<_, Error>(encoding.get_ids().to_vec())
    };
    let (bare, framed) = (ids(false)?, ids(true)?);
    if bare.is_empty() {
        return Err(Error::invalid_file("the tokenizer makes no token of \"a\""));
    }
    match framed.windows(bare.len()).position(|window| window == bare) {
        Some(at) => Ok((framed[..at].to_vec(), framed[at + bare.len()..].to_vec())),
        None => Err(Error::unsupported("the tokenizer changes a text when it adds begin and end tokens")),
    }
}

/// CLIP's tokenizer from `vocab.json` and `merges.txt`.
fn clip(folder: &Folder) -> Result<Tokenizer> {
    let missing = |file: &str| {
        Error::not_found(format!(
            "{} has neither tokenizer.json nor vocab.json and merges.txt: {file} is missing",
            folder.name("")
        ))
    };
    let vocab = folder.json("vocab.json")?.ok_or_else(|| missing("vocab.json"))?;
    let merges = folder.read("merges.txt", MAX_TOKENIZER_BYTES)?.ok_or_else(|| missing("merges.txt"))?;
    let merges = String::from_utf8(merges)
        .map_err(|e| Error::invalid_file(format!("{} is not UTF-8", folder.name("merges.txt"))).caused_by(e))?;
    // The first line states a version.
    let merges: Vec<&str> = merges
        .lines()
        .enumerate()
        .filter(|(n, line)| !(*n == 0 && line.starts_with("#version")))
        .map(|(_, l)| l)
        .filter(|line| !line.trim().is_empty())
        .collect();
    let number = |token: &str| {
        vocab
            .get(token)
            .and_then(Value::as_u64)
            .ok_or_else(|| Error::invalid_file(format!("{} lacks the token {token:?}", folder.name("vocab.json"))))
    };
    let (begin, end) = ("<|startoftext|>", "<|endoftext|>");
    let (begin_id, end_id) = (number(begin)?, number(end)?);
    let added = |id: u64, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": special})
    };
    let mut added_tokens = vec![added(begin_id, begin, true), added(end_id, end, true)];
    if let Some(Value::Object(more)) = folder.json("added_tokens.json")? {
        let mut more: Vec<(u64, &String)> = more.iter().filter_map(|(token, id)| Some((id.as_u64()?, token))).collect();
        more.sort();
        added_tokens.extend(
            more.into_iter()
                .filter(|(id, _)| *id != begin_id && *id != end_id)
                .map(|(id, token)| added(id, token, false)),
        );
    }
    let description = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added_tokens,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
            {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": CLIP_WORDS}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": {"type": "RobertaProcessing", "sep": [end, end_id], "cls": [begin, begin_id],
                           "trim_offsets": false, "add_prefix_space": false},
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": end, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "</w>", "fuse_unk": false, "vocab": vocab, "merges": merges},
    });
    parse(description.to_string().as_bytes()).map_err(|e| e.at(folder.name("vocab.json and merges.txt")))
}

/// The folder of a tokenizer that lies somewhere by itself, e.g. beside a text encoder.
pub fn open_tokenizer(folder: &Path, default_length: usize) -> Result<PromptTokenizer> {
    PromptTokenizer::open(&Folder::open(folder)?, default_length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_of_one_token_is_told_as_a_prompt_would_write_it() {
        let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
            "decoder": null, "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false,
            "vocab": {"<unk>": 0, "f": 1, "o": 2, "x</w>": 3, "o</w>": 4, "fo": 5, "fox</w>": 6},
            "merges": ["f o", "fo x</w>"]}}"#;
        let inner = tokenizers::Tokenizer::from_bytes(json).unwrap();
        let tokenizer = PromptTokenizer { inner, begin: Vec::new(), end: Vec::new(), pad: 0, length: 8 };
        assert_eq!(tokenizer.token("fox"), Some(6));
        assert_eq!(tokenizer.token("Fox"), Some(6));
        for other in ["foo", "fox fox", "q", "", "fox</w>"] {
            assert_eq!(tokenizer.token(other), None, "{other:?}");
        }
    }
}
