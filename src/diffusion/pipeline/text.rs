//! Text encoders: prompts to the encodings that a UNet attends to.
//!
//! One encoder for SD1.x and SD2.x, two side by side for SDXL (whose encodings are joined along the features, with the
//! pooled encoding of the second). It knows no images.
//!
//! A token's row of an encoder's table can be replaced by a learnt one (textual inversion): the table itself is never
//! written, and where no token of a text is replaced, its encoding is the untouched one, bit for bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::diffusion::folder::Folder;
use crate::diffusion::precision;
use crate::error::{Error, Result};
use crate::memory::{copied, zeroed};
use crate::onnx::token_embedding::{self, TokenEmbedding};
use crate::onnx::{Limits, Model};
use crate::progress::CancelToken;
use crate::runtime::{Dimension, ElementType, Runtime, Session, SessionOptions, Tensor};

use super::tokenizer::{PromptTokenizer, TokenizedPrompt};

/// Usual names of a text encoder's inputs.
const IDS: &str = "input_ids";
const MASK: &str = "attention_mask";

/// CLIP's chunk length.
const CLIP_LENGTH: usize = 77;

/// A prompt's encoding.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// `[tokens, features]`: chunk after chunk.
    pub context: Vec<f32>,
    /// Rows of [`Embedding::context`].
    pub tokens: usize,
    /// Columns of [`Embedding::context`].
    pub features: usize,
    /// The pooled encoding of the first chunk, where the last encoder makes one.
    pub pooled: Option<Vec<f32>>,
    /// The prompt as the first tokenizer sees it: tells at which rows its words stand.
    pub prompt: TokenizedPrompt,
}

/// A tokenizer and its encoder.
pub struct TextEncoder {
    pub(super) tokenizer: PromptTokenizer,
    pub(super) session: Session,
    path: PathBuf,
    hidden: String,
    pooled: Option<String>,
    /// Where rows are given; or why that can't be.
    table: std::result::Result<TokenEmbedding, String>,
    /// Rows in place of the table's, by token.
    replaced: BTreeMap<u32, Vec<f32>>,
}

/// A text encoder that opens its file, with the inputs of [`token_embedding::replaceable`] where it can have them.
///
/// Errors: those of [`Model::open`].
fn open_model(path: &Path, limits: &Limits) -> Result<(Model, std::result::Result<TokenEmbedding, String>)> {
    let mut model = Model::open(path, limits)?;
    let table = token_embedding::replaceable(&mut model, IDS).map_err(|error| error.message().to_owned());
    Ok((model, table))
}

impl TextEncoder {
    /// Opens `encoder/model.onnx` with the tokenizer of another folder. `penultimate` asks for the hidden states before
    /// the last layer, as SDXL does.
    pub(super) fn open(
        runtime: &Runtime,
        encoder: &Folder,
        tokenizer: &Folder,
        penultimate: bool,
        session: &SessionOptions,
        limits: &Limits,
    ) -> Result<Self> {
        let path = encoder.path("model.onnx");
        let (model, table) = open_model(&path, limits).map_err(|e| e.at(path.display()))?;
        let session = runtime.session(&model, session).map_err(|e| e.at(path.display()))?;
        let mut known = vec![IDS, MASK];
        known.extend(table.iter().flat_map(|table| [table.rows.as_str(), table.replaced.as_str()]));
        if let Some(other) = session.inputs().map(|port| &port.name).find(|name| !known.contains(&name.as_str())) {
            return Err(Error::unsupported(format!(
                "{}: the text encoder has an input {other:?}; handled are input_ids and attention_mask",
                path.display()
            )));
        }
        let config = encoder.json("config.json")?;
        let configured = config
            .as_ref()
            .and_then(|config| config.get("max_position_embeddings")?.as_u64())
            .and_then(|length| usize::try_from(length).ok())
            .filter(|length| (3..=4096).contains(length));
        let fixed = match session.input(IDS).map_err(|e| e.at(path.display()))?.dims.as_slice() {
            &[_, Dimension::Fixed(length)] => Some(length),
            &[_, _] => None,
            dims => {
                return Err(Error::unsupported(format!(
                    "{}: input_ids has {} dimensions, expected [B, tokens]",
                    path.display(),
                    dims.len()
                )));
            }
        };
        let tokenizer = PromptTokenizer::open(tokenizer, fixed.or(configured).unwrap_or(CLIP_LENGTH))?;
        if let Some(fixed) = fixed.filter(|fixed| *fixed != tokenizer.length()) {
            return Err(Error::unsupported(format!(
                "{}: the text encoder takes {fixed} tokens, its tokenizer makes {}",
                path.display(),
                tokenizer.length()
            )));
        }
        let outputs: Vec<&str> = session.outputs().map(|port| port.name.as_str()).collect();
        let has = |name: &str| outputs.contains(&name);
        let hidden = if penultimate {
            let number = |name: &str| name.strip_prefix("hidden_states.")?.parse::<usize>().ok();
            let layers = outputs.iter().filter_map(|name| number(name)).max().ok_or_else(|| {
                Error::unsupported(format!(
                    "{}: a pipeline with two text encoders needs their hidden_states.N outputs; this one has {}",
                    path.display(),
                    outputs.join(", ")
                ))
            })?;
            format!("hidden_states.{}", layers.saturating_sub(1))
        } else {
            "last_hidden_state".to_owned()
        };
        if !has(&hidden) {
            return Err(Error::unsupported(format!(
                "{}: the text encoder has no output {hidden:?}, only {}",
                path.display(),
                outputs.join(", ")
            )));
        }
        // Of a plain CLIP text model, `pooler_output` is no projection; SDXL wants the projected `text_embeds`.
        let pooled = has("text_embeds").then(|| "text_embeds".to_owned());
        drop(outputs);
        Ok(Self { tokenizer, session, path, hidden, pooled, table, replaced: BTreeMap::new() })
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &PromptTokenizer {
        &self.tokenizer
    }

    /// The row of the table for a token, untouched.
    ///
    /// Errors: [`crate::Status::Unsupported`] if the table was not found in the graph; those of the session.
    pub fn row(&self, token: u32, cancel: &CancelToken) -> Result<Vec<f32>> {
        let table = self.table()?;
        let mut ids = self.tokenizer.empty_chunk();
        ids[0] = token;
        let answers = self.run(&ids, &[&table.gathered], cancel)?;
        let gathered = answers.first().map(precision::to_f32).transpose()?.unwrap_or_default();
        match gathered.get(..table.width) {
            Some(row) => copied(row),
            None => Err(Error::unsupported(format!("the token embedding gives {} numbers", gathered.len()))),
        }
    }

    /// Numbers of a row of the table.
    ///
    /// Errors: [`crate::Status::Unsupported`] if the table was not found in the graph.
    pub fn row_width(&self) -> Result<usize> {
        Ok(self.table()?.width)
    }

    /// Rows in place of the table's, by token; each of the table's width. Those before are forgotten.
    pub(super) fn replace_rows(&mut self, rows: BTreeMap<u32, Vec<f32>>) {
        self.replaced = rows;
    }

    /// The rows that take the place of the table's, by token.
    pub(super) fn replaced_rows(&self) -> &BTreeMap<u32, Vec<f32>> {
        &self.replaced
    }

    fn table(&self) -> Result<&TokenEmbedding> {
        self.table.as_ref().map_err(|why| Error::unsupported(why.clone()).at(self.path.display()))
    }

    /// Runs the encoder on a chunk.
    pub(crate) fn run(&self, chunk: &[u32], wanted: &[&str], cancel: &CancelToken) -> Result<Vec<Tensor>> {
        let inputs = self.inputs(chunk, &self.replaced)?;
        let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (*name, tensor)).collect();
        self.session.run(&inputs, wanted, cancel).map_err(|e| e.at("text encoder"))
    }

    /// Its graph once more, for whoever differentiates it, with the names of its inputs for rows.
    ///
    /// Errors: those of [`Model::open`]; [`crate::Status::Unsupported`] if the token embedding was not found.
    pub(crate) fn graph(&self, limits: &Limits) -> Result<(Model, TokenEmbedding)> {
        let (model, table) = open_model(&self.path, limits).map_err(|e| e.at(self.path.display()))?;
        let table = table.map_err(|why| Error::unsupported(why).at(self.path.display()))?;
        Ok((model, table))
    }

    /// The output that is the encoding.
    pub(crate) fn hidden(&self) -> &str {
        &self.hidden
    }

    /// The output that is the pooled encoding, if the encoder makes one.
    pub(crate) fn pooled(&self) -> Option<&str> {
        self.pooled.as_deref()
    }

    /// What the graph is given for a chunk, with rows in place of the table's.
    fn inputs(&self, chunk: &[u32], rows: &BTreeMap<u32, Vec<f32>>) -> Result<Vec<(&str, Tensor)>> {
        let length = self.tokenizer.length();
        let mut inputs = self.numbers(chunk)?;
        if let Ok(TokenEmbedding { rows: given, replaced, width, .. }) = &self.table {
            let (mut numbers, mut places) = (zeroed::<f32>(length * width)?, zeroed::<bool>(length * width)?);
            for (at, token) in chunk.iter().enumerate() {
                if let Some(row) = rows.get(token) {
                    let at = at * width..(at + 1) * width;
                    numbers[at.clone()].copy_from_slice(row);
                    places[at].fill(true);
                }
            }
            let shape = [1, length, *width];
            inputs.push((given, Tensor::from_vec(&shape, numbers)?));
            inputs.push((replaced, Tensor::from_vec(&shape, places)?));
        }
        Ok(inputs)
    }

    /// Encodings `[chunks * length, features]` and the pooled one of the first chunk.
    fn encode(&self, chunks: &[Vec<u32>], cancel: &CancelToken) -> Result<Encoded> {
        let length = self.tokenizer.length();
        let mut encoded = Encoded { hidden: Vec::new(), features: 0, pooled: None };
        for chunk in chunks {
            let mut wanted = vec![self.hidden.as_str()];
            wanted.extend(self.pooled.as_deref());
            let outputs = self.run(chunk, &wanted, cancel)?;
            let [hidden, pooled @ ..] = outputs.as_slice() else {
                return Err(Error::unsupported("the text encoder gave nothing"));
            };
            let [1, rows, features] = *hidden.shape() else {
                return Err(Error::unsupported(format!("the text encoder gives {:?}", hidden.shape())));
            };
            if rows != length {
                return Err(Error::unsupported(format!("the text encoder gives {rows} rows for {length} tokens")));
            }
            encoded.features = features;
            encoded.hidden.try_reserve(hidden.len())?;
            encoded.hidden.extend(precision::to_f32(hidden)?);
            if encoded.pooled.is_none() {
                encoded.pooled = pooled.first().map(precision::to_f32).transpose()?;
            }
        }
        Ok(encoded)
    }

    /// Token numbers of a chunk, and its mask for an encoder that takes one.
    pub(crate) fn numbers(&self, chunk: &[u32]) -> Result<Vec<(&'static str, Tensor)>> {
        let length = self.tokenizer.length();
        let ids: Vec<i64> = chunk.iter().map(|id| i64::from(*id)).collect();
        let mut inputs = vec![(IDS, self.integers(IDS, length, &ids)?)];
        if self.session.input(MASK).is_ok() {
            inputs.push((MASK, self.integers(MASK, length, &self.tokenizer.mask(chunk))?));
        }
        Ok(inputs)
    }

    fn integers(&self, name: &str, length: usize, values: &[i64]) -> Result<Tensor> {
        match self.session.input(name)?.dtype {
            ElementType::I64 => Tensor::from_slice(&[1, length], values),
            ElementType::I32 => {
                let narrow: Vec<i32> = values.iter().map(|value| *value as i32).collect();
                Tensor::from_vec(&[1, length], narrow)
            }
            other => Err(Error::unsupported(format!("{name} of the text encoder holds {other}"))),
        }
    }
}

struct Encoded {
    hidden: Vec<f32>,
    features: usize,
    pooled: Option<Vec<f32>>,
}

/// Encodes a prompt with all encoders, in at least `least_chunks` chunks (the rest encodes the empty prompt).
pub(super) fn encode(
    encoders: &[TextEncoder],
    prompt: &str,
    least_chunks: usize,
    cancel: &CancelToken,
) -> Result<Embedding> {
    let mut tokenized = Vec::with_capacity(encoders.len());
    for encoder in encoders {
        tokenized.push(encoder.tokenizer.tokenize(prompt)?);
    }
    let chunks = tokenized.iter().map(|tokens| tokens.chunks().len()).max().unwrap_or(0).max(least_chunks);
    let mut parts = Vec::with_capacity(encoders.len());
    for (encoder, tokens) in encoders.iter().zip(&tokenized) {
        let mut all = tokens.chunks().to_vec();
        all.resize(chunks, encoder.tokenizer.empty_chunk());
        parts.push(encoder.encode(&all, cancel)?);
    }
    let Some(prompt) = tokenized.into_iter().next() else {
        return Err(Error::invalid_argument("this pipeline has no text encoder"));
    };
    let features: usize = parts.iter().map(|part| part.features).sum();
    let rows: Vec<usize> = parts.iter().map(|part| part.hidden.len() / part.features.max(1)).collect();
    let tokens = rows.first().copied().unwrap_or(0);
    if rows.iter().any(|other| *other != tokens) {
        return Err(Error::unsupported(format!("the text encoders make {rows:?} rows of one prompt")));
    }
    let mut context = Vec::new();
    context.try_reserve_exact(tokens.saturating_mul(features))?;
    for row in 0..tokens {
        for part in &parts {
            context.extend_from_slice(&part.hidden[row * part.features..(row + 1) * part.features]);
        }
    }
    let pooled = parts.pop().and_then(|part| part.pooled);
    Ok(Embedding { context, tokens, features, pooled, prompt })
}
