//! Textual inversion (Gal et al. 2022, arXiv 2208.01618): the embedding of a word is learnt, so that texts with the word make
//! the model draw the subject. No weight changes.
//!
//! The loss is the search's own. Its derivative with respect to the texts comes from [`super::KeyValueGradient`], and goes on
//! through the text encoder by one more ONNX model: the encoder, differentiated with respect to the rows of its table. The
//! rows begin at those of the class noun and are learnt by AdamW in units of their own standard deviation.

use super::descent::{Descent, Pace};
use super::draw::pick;
use super::gradient::{Asked, TextSlope, differentiate};
use super::job::deviation;
use crate::concept::LearntToken;
use crate::diffusion::pipeline::{Pipeline, TextEncoder};
use crate::diffusion::precision;
use crate::diffusion::unet::Conditioning;
use crate::error::{Error, Result, Status};
use crate::memory::{collected, extend, zeroed};
use crate::onnx::Limits;
use crate::onnx::grad::{self, Effort};
use crate::onnx::token_embedding::TokenEmbedding;
use crate::progress::CancelToken;
use crate::runtime::{Runtime, Session, SessionOptions, Tensor};

/// How a token's embedding is learnt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct InvertOptions {
    /// Steps, a batch each, at least 1.
    pub steps: usize,
    /// The largest step size, in standard deviations of the row's numbers where it begins; above 0. It rises over the first
    /// [`super::WARM_UP`] steps and falls to 0 by a half cosine.
    pub rate: f32,
    /// The share of the way from the beginning that each step goes back, times the step size; 0 or above.
    pub decay: f32,
}

impl Default for InvertOptions {
    fn default() -> Self {
        Self { steps: 200, rate: 0.1, decay: 0.01 }
    }
}

impl InvertOptions {
    fn pace(&self) -> Pace {
        Pace { steps: self.steps, rate: self.rate, decay: self.decay }
    }

    /// Errors: [`Status::InvalidArgument`] for no step, or a rate or decay outside its range.
    pub fn check(&self) -> Result<()> {
        self.pace().check("textual inversion")
    }
}

/// What an inversion led to.
#[derive(Clone, Debug, PartialEq)]
pub struct Inverted {
    /// The word with its learnt rows.
    pub token: LearntToken,
    /// The loss of each step.
    pub losses: Vec<f64>,
    /// The mean loss of the held-out batches where the rows began, and with the learnt ones.
    pub held_out: (f64, f64),
}

/// The loss of batch number `.1` with rows `.0`, and its slope with respect to each.
pub(super) type RowLoss<'a> = &'a mut dyn FnMut(&[Vec<f32>], usize) -> Result<(f64, Vec<Vec<f32>>)>;

/// An inversion between two steps: all that the coming ones depend on.
pub(super) struct Inversion {
    word: String,
    /// Where the rows begin.
    start: Vec<Vec<f32>>,
    /// The standard deviation of each row where it begins.
    units: Vec<f32>,
    /// How far the rows are from there, one behind the other, in their units.
    descent: Descent,
}

impl Inversion {
    /// Errors: those of [`InvertOptions::check`]; [`Status::OutOfMemory`].
    pub(super) fn new(word: &str, start: Vec<Vec<f32>>, options: InvertOptions) -> Result<Self> {
        options.check()?;
        let count = start.iter().map(Vec::len).sum();
        let descent = Descent::new("inverted", zeroed(count)?, options.pace())?;
        let units = start.iter().map(|row| deviation(row)).collect();
        Ok(Self { word: word.to_owned(), start, units, descent })
    }

    pub(super) fn losses(&self) -> &[f64] {
        self.descent.losses()
    }

    pub(super) fn is_done(&self) -> bool {
        self.descent.is_done()
    }

    /// What a checkpoint holds of it.
    pub(super) fn descent_mut(&mut self) -> &mut Descent {
        &mut self.descent
    }

    /// The row of each encoder so far.
    ///
    /// Errors: [`Status::OutOfMemory`].
    pub(super) fn rows(&self) -> Result<Vec<Vec<f32>>> {
        let mut moved = self.descent.values().iter();
        let row = |(start, unit): (&Vec<f32>, &f32)| {
            collected(start.iter().zip(moved.by_ref()).map(|(start, moved)| start + unit * moved))
        };
        self.start.iter().zip(&self.units).map(row).collect()
    }

    /// Makes the next step, by a loss and its slope with respect to the rows.
    ///
    /// Errors: those of the loss; [`Status::NotFinite`] naming the step. The inversion is then as before.
    pub(super) fn step(&mut self, loss: RowLoss<'_>) -> Result<()> {
        let number = self.losses().len();
        let place = || format!("step {number} of the textual inversion");
        let (loss, slopes) = loss(&self.rows()?, number).map_err(|error| match error.status() {
            Status::NotFinite => error.at(place()),
            _ => error,
        })?;
        let slopes: Vec<f32> =
            slopes.iter().zip(&self.units).flat_map(|(row, unit)| row.iter().map(move |slope| slope * unit)).collect();
        if !loss.is_finite() || slopes.iter().any(|slope| !slope.is_finite()) {
            let what = format!("the loss is {loss} or its gradient is not finite");
            return Err(Error::new(Status::NotFinite, what).at(place()));
        }
        self.descent.step(loss, |at| slopes.get(at).copied());
        Ok(())
    }

    /// What it led to.
    ///
    /// Errors: those of [`LearntToken::new`].
    pub(super) fn end(&self, held_out: (f64, f64)) -> Result<Inverted> {
        let token = LearntToken::new(self.word.clone(), self.rows()?)?;
        Ok(Inverted { token, losses: self.losses().to_vec(), held_out })
    }
}

/// Texts as functions of the rows of one word in them.
pub struct TokenTexts {
    word: String,
    encoders: Vec<EncoderGradient>,
    /// The chunks of each text in which the word stands.
    texts: Vec<Vec<Place>>,
}

/// A chunk of a text, as one of the encoders sees it.
struct Place {
    encoder: usize,
    chunk: usize,
    /// Token numbers, and a mask where the encoder takes one.
    numbers: Vec<(&'static str, Tensor)>,
    /// Where the word stands.
    at: Vec<usize>,
}

/// A text encoder with the gradient of its encoding with respect to the rows of its token embedding.
struct EncoderGradient {
    session: Session,
    table: TokenEmbedding,
    /// The row from which learning begins.
    start: Vec<f32>,
    /// The encoding, and for the last encoder the pooled one if the UNet takes it.
    values: Vec<String>,
    /// What each of the values is multiplied with.
    along: Vec<String>,
    /// Of the sum of these products.
    cotangent: String,
    gradient: String,
    /// Tokens of a chunk, and columns of the encoding.
    length: usize,
    features: usize,
    pooled_width: usize,
}

/// What an encoder makes of a chunk.
struct Piece {
    hidden: Vec<f32>,
    pooled: Option<Vec<f32>>,
}

impl TokenTexts {
    /// Differentiates the pipeline's text encoders for prompts with a word, which begins at the row of the first token of
    /// `start`, or at its own row if that is no token.
    ///
    /// Errors: [`Status::InvalidArgument`] for a word that is no single token or stands in no prompt;
    /// [`Status::Unsupported`] for an encoder whose token embedding was not found or whose graph has an operator without a
    /// derivative rule; those of the session.
    pub fn open(
        pipeline: &Pipeline,
        prompts: &[String],
        word: &str,
        start: &str,
        effort: Effort,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let mut texts: Vec<Vec<Place>> = prompts.iter().map(|_| Vec::new()).collect();
        let mut encoders = Vec::new();
        let source = pipeline.unet_source();
        let last = pipeline.text_encoders().len().saturating_sub(1);
        for (number, encoder) in pipeline.text_encoders().iter().enumerate() {
            let tokenizer = encoder.tokenizer();
            let token = tokenizer.token(word).ok_or_else(|| {
                Error::invalid_argument(format!("{word:?} is no single token of every tokenizer of this model"))
            })?;
            let mut example = None;
            for (prompt, places) in prompts.iter().zip(&mut texts) {
                for (chunk, ids) in tokenizer.tokenize(prompt)?.chunks().iter().enumerate() {
                    let at = collected((0..ids.len()).filter(|&at| ids[at] == token))?;
                    if !at.is_empty() {
                        places.push(Place { encoder: number, chunk, numbers: encoder.numbers(ids)?, at });
                        example.get_or_insert_with(|| ids.clone());
                    }
                }
            }
            let example = example.ok_or_else(|| Error::invalid_argument(format!("no prompt has the word {word:?}")))?;
            let start = encoder.row(tokenizer.first_token(start).unwrap_or(token), cancel)?;
            let pooled = encoder.pooled().filter(|_| number == last && pipeline.unet().takes_sizes());
            let values = [Some(encoder.hidden()), pooled];
            let values: Vec<&str> = values.into_iter().flatten().collect();
            let options = &source.options;
            let differentiated = EncoderGradient::open(
                &source.runtime,
                encoder,
                &values,
                &example,
                start,
                (&options.session, &options.limits, effort),
                cancel,
            );
            encoders.push(differentiated.map_err(|error| error.at(format_args!("text encoder {number}")))?);
        }
        if encoders.is_empty() {
            return Err(Error::invalid_argument("the model takes no text"));
        }
        Ok(Self { word: word.to_owned(), encoders, texts })
    }

    /// The word.
    pub fn word(&self) -> &str {
        &self.word
    }

    /// The number of prompts.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// The row of each encoder from which learning begins.
    pub fn start(&self) -> Vec<Vec<f32>> {
        self.encoders.iter().map(|encoder| encoder.start.clone()).collect()
    }

    /// The conditioning of entries whose texts are these (`None` for others), with the word's rows replaced.
    ///
    /// Errors: [`Status::InvalidArgument`] for sizes that do not fit; those of the session.
    pub fn encode(
        &self,
        rows: &[Vec<f32>],
        base: &Conditioning,
        texts: &[Option<usize>],
        cancel: &CancelToken,
    ) -> Result<Conditioning> {
        let mut conditioning = pick(base, &collected(0..base.batch)?)?;
        let features: usize = self.encoders.iter().map(|encoder| encoder.features).sum();
        let width = base.tokens * features;
        if texts.len() != base.batch || base.context.len() != base.batch * width {
            return Err(Error::invalid_argument(format!(
                "{} numbers are no texts of {} tokens with {features} features for {} entries",
                base.context.len(),
                base.tokens,
                texts.len()
            )));
        }
        for (text, places) in self.texts.iter().enumerate() {
            let entries: Vec<usize> = (0..texts.len()).filter(|&entry| texts[entry] == Some(text)).collect();
            for place in places.iter().filter(|_| !entries.is_empty()) {
                let encoder = &self.encoders[place.encoder];
                let piece = encoder.encode(place, &rows[place.encoder], cancel)?;
                for &entry in &entries {
                    let own = &mut conditioning.context[entry * width..(entry + 1) * width];
                    for (own, hidden) in self.columns(place, own, features).zip(piece.hidden.chunks(encoder.features)) {
                        own.copy_from_slice(hidden);
                    }
                    if let (Some(all), Some(pooled)) = (&mut conditioning.text_embeds, &piece.pooled)
                        && place.chunk == 0
                    {
                        all[entry * pooled.len()..(entry + 1) * pooled.len()].copy_from_slice(pooled);
                    }
                }
            }
        }
        Ok(conditioning)
    }

    /// The slope of a loss with respect to each encoder's row, from its slope with respect to the texts.
    ///
    /// Errors: [`Status::NotFinite`]; those of the session.
    pub fn slope(&self, rows: &[Vec<f32>], slope: &TextSlope, cancel: &CancelToken) -> Result<Vec<Vec<f32>>> {
        let features: usize = self.encoders.iter().map(|encoder| encoder.features).sum();
        let width = slope.context.len() / self.len().max(1);
        let mut sums = self.encoders.iter().map(|encoder| zeroed(encoder.start.len())).collect::<Result<Vec<_>>>()?;
        for (text, places) in self.texts.iter().enumerate() {
            let mut of_text = collected(slope.context[text * width..(text + 1) * width].iter().copied())?;
            for place in places {
                let encoder = &self.encoders[place.encoder];
                let mut hidden = Vec::new();
                for row in self.columns(place, &mut of_text, features) {
                    extend(&mut hidden, row.iter().copied())?;
                }
                let mut pooled = zeroed(encoder.pooled_width)?;
                if let Some(all) = &slope.pooled
                    && place.chunk == 0
                    && encoder.pooled_width > 0
                {
                    pooled.copy_from_slice(&all[text * encoder.pooled_width..(text + 1) * encoder.pooled_width]);
                }
                let own = encoder.slope(place, &rows[place.encoder], hidden, pooled, cancel)?;
                sums[place.encoder].iter_mut().zip(own).for_each(|(sum, value): (&mut f32, f32)| *sum += value);
            }
        }
        Ok(sums)
    }

    /// The part of a text's encoding that an encoder makes of a chunk, row by row.
    fn columns<'t>(&self, place: &Place, text: &'t mut [f32], features: usize) -> impl Iterator<Item = &'t mut [f32]> {
        let (length, own) = (self.encoders[place.encoder].length, self.encoders[place.encoder].features);
        let before: usize = self.encoders[..place.encoder].iter().map(|encoder| encoder.features).sum();
        let rows = text.chunks_exact_mut(features.max(1)).skip(place.chunk * length).take(length);
        rows.map(move |row| &mut row[before..before + own])
    }
}

impl EncoderGradient {
    fn open(
        runtime: &Runtime,
        encoder: &TextEncoder,
        values: &[&str],
        example: &[u32],
        start: Vec<f32>,
        (session, limits, effort): (&SessionOptions, &Limits, Effort),
        cancel: &CancelToken,
    ) -> Result<Self> {
        let (mut model, table) = encoder.graph(limits)?;
        let product = grad::inner_product(&mut model, values)?;
        let shapes: Vec<Vec<usize>> =
            encoder.run(example, values, cancel)?.iter().map(|answer| answer.shape().to_vec()).collect();
        let (rows, replaced) = rows_at(&[], &[], [example.len(), table.width])?;
        let zeros = shapes.iter().map(|shape| Tensor::from_vec(shape, zeroed::<f32>(shape.iter().product())?));
        let zeros = zeros.collect::<Result<Vec<_>>>()?;
        let numbers = encoder.numbers(example)?;
        let mut given: Vec<(&str, &Tensor)> = numbers.iter().map(|(name, tensor)| (*name, tensor)).collect();
        given.extend([(table.rows.as_str(), &rows), (table.replaced.as_str(), &replaced)]);
        given.extend(product.cotangents.iter().map(String::as_str).zip(&zeros));
        let wrt = [table.rows.as_str()];
        let options = SessionOptions { memory_pattern: false, ..session.clone() };
        let asked = Asked { wrt: &wrt, loss: &product.product, kept: values, spending: effort.into() };
        let gradient = differentiate(runtime, &model, &given, &asked, &options, cancel)?;
        let session = runtime.session(&gradient.model, &options)?;
        let size = |shape: &Vec<usize>| shape.last().copied().unwrap_or_default();
        Ok(Self {
            session,
            table,
            start,
            values: values.iter().map(|value| (*value).to_owned()).collect(),
            along: product.cotangents,
            cotangent: gradient.cotangent,
            gradient: gradient.gradients.into_iter().next().unwrap_or_default(),
            length: example.len(),
            features: shapes.first().map_or(0, size),
            pooled_width: shapes.get(1).map_or(0, size),
        })
    }

    /// The encoding of a chunk with `row` for the word.
    fn encode(&self, place: &Place, row: &[f32], cancel: &CancelToken) -> Result<Piece> {
        let (hidden, pooled) = (zeroed(self.length * self.features)?, zeroed(self.pooled_width)?);
        let wanted: Vec<&str> = self.values.iter().map(String::as_str).collect();
        let answers = self.run(place, row, hidden, pooled, &wanted, cancel)?;
        let mut values = answers.iter().map(precision::to_f32);
        let hidden = values.next().transpose()?.unwrap_or_default();
        Ok(Piece { hidden, pooled: values.next().transpose()? })
    }

    /// The slope with respect to the row of the word, all its places together, from the slopes with respect to the encoding
    /// `[length, features]` and the pooled one.
    fn slope(
        &self,
        place: &Place,
        row: &[f32],
        hidden: Vec<f32>,
        pooled: Vec<f32>,
        cancel: &CancelToken,
    ) -> Result<Vec<f32>> {
        let answers = self.run(place, row, hidden, pooled, &[&self.gradient], cancel)?;
        let slopes = answers.first().map(|answer| answer.as_slice::<f32>()).transpose()?.unwrap_or_default();
        let width = self.table.width;
        let mut sum = zeroed::<f32>(width)?;
        for &at in &place.at {
            sum.iter_mut().zip(&slopes[at * width..(at + 1) * width]).for_each(|(sum, value)| *sum += value);
        }
        match sum.iter().all(|value| value.is_finite()) {
            true => Ok(sum),
            false => Err(Error::new(Status::NotFinite, "the gradient of the token's embedding is not finite")),
        }
    }

    fn run(
        &self,
        place: &Place,
        row: &[f32],
        hidden: Vec<f32>,
        pooled: Vec<f32>,
        wanted: &[&str],
        cancel: &CancelToken,
    ) -> Result<Vec<Tensor>> {
        let (rows, replaced) = rows_at(row, &place.at, [self.length, self.table.width])?;
        let (cotangent, hidden) = (Tensor::scalar(1f32)?, Tensor::from_vec(&[1, self.length, self.features], hidden)?);
        let pooled = Tensor::from_vec(&[1, self.pooled_width], pooled)?;
        let mut given: Vec<(&str, &Tensor)> = place.numbers.iter().map(|(name, tensor)| (*name, tensor)).collect();
        given.extend([(self.table.rows.as_str(), &rows), (self.table.replaced.as_str(), &replaced)]);
        given.extend(self.along.iter().map(String::as_str).zip([&hidden, &pooled]));
        given.push((&self.cotangent, &cotangent));
        self.session.run(&given, wanted, cancel).map_err(|error| error.at("text encoder"))
    }
}

/// `row` at these places of a text, and where that is: `[1, length, width]` both.
fn rows_at(row: &[f32], at: &[usize], [length, width]: [usize; 2]) -> Result<(Tensor, Tensor)> {
    let (mut rows, mut replaced) = (zeroed::<f32>(length * width)?, zeroed::<bool>(length * width)?);
    for &at in at {
        rows[at * width..(at + 1) * width].copy_from_slice(row);
        replaced[at * width..(at + 1) * width].fill(true);
    }
    let shape = [1, length, width];
    Ok((Tensor::from_vec(&shape, rows)?, Tensor::from_vec(&shape, replaced)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOAL: [&[f32]; 2] = [&[1.5, -0.5, 0.25], &[30.0, 10.0]];

    fn start() -> Vec<Vec<f32>> {
        vec![vec![1.0, -1.0, 0.5], vec![10.0, 30.0]]
    }

    /// L = 1/2 |rows - goal|².
    fn quadratic(rows: &[Vec<f32>], _: usize) -> Result<(f64, Vec<Vec<f32>>)> {
        let apart = |(row, goal): (&Vec<f32>, &&[f32])| row.iter().zip(*goal).map(|(a, b)| a - b).collect();
        let slopes: Vec<Vec<f32>> = rows.iter().zip(&GOAL).map(apart).collect();
        Ok((slopes.iter().flatten().map(|apart| f64::from(*apart).powi(2) / 2.0).sum(), slopes))
    }

    #[test]
    fn rows_of_any_size_find_the_minimum() {
        let options = InvertOptions { steps: 200, rate: 0.1, decay: 0.0 };
        let mut inversion = Inversion::new("<s1>", start(), options).unwrap();
        assert_eq!(inversion.rows().unwrap(), start());
        let mut seen = Vec::new();
        while !inversion.is_done() {
            let mut loss = |rows: &[Vec<f32>], number: usize| {
                seen.push(number);
                quadratic(rows, number)
            };
            inversion.step(&mut loss).unwrap();
        }
        assert_eq!(seen, (0..200).collect::<Vec<_>>());
        let inverted = inversion.end((2.0, 1.0)).unwrap();
        assert_eq!((inverted.token.word(), inverted.losses.len(), inverted.held_out), ("<s1>", 200, (2.0, 1.0)));
        for ((row, goal), start) in inverted.token.rows().iter().zip(&GOAL).zip(start()) {
            let unit = deviation(&start);
            assert!(row.iter().zip(*goal).all(|(a, b)| (a - b).abs() < 1e-2 * unit), "{row:?} for {goal:?}");
        }
    }

    #[test]
    fn what_is_out_of_range_or_not_finite_is_refused_and_named() {
        let good = InvertOptions::default();
        for options in [
            InvertOptions { steps: 0, ..good },
            InvertOptions { rate: 0.0, ..good },
            InvertOptions { rate: f32::NAN, ..good },
            InvertOptions { decay: -1.0, ..good },
        ] {
            let error = Inversion::new("<s1>", start(), options).err().unwrap();
            assert!(error.status() == Status::InvalidArgument && error.message().contains("inversion"), "{error}");
        }
        let mut inversion = Inversion::new("<s1>", start(), good).unwrap();
        inversion.step(&mut quadratic).unwrap();
        let before = inversion.rows().unwrap();
        for (loss, slope) in [(f64::NAN, 0.0), (0.0, f32::NAN), (0.0, f32::INFINITY)] {
            let error = inversion.step(&mut |_, _| Ok((loss, vec![vec![slope; 3], vec![0.0; 2]]))).unwrap_err();
            let named = error.to_string().contains("step 1 of the textual inversion");
            assert!(error.status() == Status::NotFinite && named, "{error}");
            assert!(inversion.rows().unwrap() == before && inversion.losses().len() == 1);
        }
    }
}
