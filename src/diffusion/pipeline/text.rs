//! Text encoders: prompts to the encodings that a UNet attends to.
//!
//! One encoder for SD1.x and SD2.x, two side by side for SDXL (whose encodings are joined along the features, with the
//! pooled encoding of the second). It knows no images.

use crate::diffusion::folder::Folder;
use crate::diffusion::precision;
use crate::error::{Error, Result};
use crate::onnx::{Limits, Model};
use crate::progress::CancelToken;
use crate::runtime::{Dimension, ElementType, Runtime, Session, SessionOptions, Tensor};

use super::tokenizer::{PromptTokenizer, TokenizedPrompt};

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
pub(super) struct TextEncoder {
    pub(super) tokenizer: PromptTokenizer,
    pub(super) session: Session,
    hidden: String,
    pooled: Option<String>,
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
        let model = Model::open(&path, limits).map_err(|e| e.at(path.display()))?;
        let session = runtime.session(&model, session).map_err(|e| e.at(path.display()))?;
        let known = ["input_ids", "attention_mask"];
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
        let fixed = match session.input("input_ids").map_err(|e| e.at(path.display()))?.dims.as_slice() {
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
        Ok(Self { tokenizer, session, hidden, pooled })
    }

    /// Encodings `[chunks * length, features]` and the pooled one of the first chunk.
    fn encode(&self, chunks: &[Vec<u32>], cancel: &CancelToken) -> Result<Encoded> {
        let length = self.tokenizer.length();
        let mut encoded = Encoded { hidden: Vec::new(), features: 0, pooled: None };
        for chunk in chunks {
            let ids: Vec<i64> = chunk.iter().map(|id| i64::from(*id)).collect();
            let ids = self.integers("input_ids", length, &ids)?;
            let mask = match self.session.input("attention_mask") {
                Ok(_) => Some(self.integers("attention_mask", length, &self.tokenizer.mask(chunk))?),
                Err(_) => None,
            };
            let mut inputs = vec![("input_ids", &ids)];
            inputs.extend(mask.as_ref().map(|mask| ("attention_mask", mask)));
            let mut wanted = vec![self.hidden.as_str()];
            wanted.extend(self.pooled.as_deref());
            let outputs = self.session.run(&inputs, &wanted, cancel).map_err(|e| e.at("text encoder"))?;
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
