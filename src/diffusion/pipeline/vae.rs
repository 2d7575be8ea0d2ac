//! The variational autoencoder between latents and images, and images as 8-bit RGB.

use std::path::Path;

use image::codecs::png::PngEncoder;
use image::{ExtendedColorType, ImageDecoder, ImageEncoder};
use serde_json::{Map, Value};

use crate::diffusion::fields::Fields;
use crate::diffusion::folder::Folder;
use crate::diffusion::precision;
use crate::error::{Error, Result, Status};
use crate::memory::copied;
use crate::onnx::{Limits, Model};
use crate::os;
use crate::progress::CancelToken;
use crate::runtime::{Runtime, Session, SessionOptions};

/// The range of the numbers that latents are scaled by.
const SMALLEST: f64 = 1e-6;
const LARGEST: f64 = 1e6;

/// Pictures of one size, 8-bit RGB, row by row from the top: `[count, height, width, 3]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// How many.
    pub count: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `count * height * width * 3` bytes.
    pub rgb: Vec<u8>,
}

impl Images {
    /// From planes `[count, 3, height, width]` with values in `[-1, 1]`; others are clamped.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] unless there are three channels and as many values as the shape says.
    pub fn from_planes(planes: &[f32], shape: [usize; 4]) -> Result<Self> {
        let [count, channels, height, width] = shape;
        let size = shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
        if channels != 3 || size != Some(planes.len()) {
            return Err(Error::invalid_argument(format!(
                "{} values of shape {shape:?} are no RGB images [count, 3, height, width]",
                planes.len()
            )));
        }
        let mut rgb = Vec::new();
        rgb.try_reserve_exact(planes.len())?;
        let area = height * width;
        for image in planes.chunks_exact((3 * area).max(1)) {
            for pixel in 0..area {
                for channel in 0..3 {
                    let value = (f64::from(image[channel * area + pixel]) / 2.0 + 0.5).clamp(0.0, 1.0);
                    rgb.push((value * 255.0).round_ties_even() as u8);
                }
            }
        }
        Ok(Self { count, height, width, rgb })
    }

    /// Reads a PNG, JPEG or WebP file as one picture of `width` x `height` pixels: turned upright as its EXIF data says,
    /// cropped around its centre to the wanted proportions, and scaled by bicubic filtering. Transparent places become
    /// white.
    ///
    /// # Errors
    /// [`Status::InvalidArgument`] for a size of 0 or above 16,384; [`Status::NotFound`] and [`Status::Io`];
    /// [`Status::InvalidFile`] for what is no such picture; [`Status::LimitExceeded`] for one of more than 2^28 pixels.
    pub fn read(path: impl AsRef<Path>, width: usize, height: usize) -> Result<Self> {
        let path = path.as_ref();
        Self::decode(path, width, height).map_err(|error| error.at(path.display()))
    }

    fn decode(path: &Path, width: usize, height: usize) -> Result<Self> {
        const MOST: u32 = 1 << 14;
        let side = |side: usize| u32::try_from(side).ok().filter(|side| (1..=MOST).contains(side));
        let (Some(columns), Some(rows)) = (side(width), side(height)) else {
            return Err(Error::invalid_argument(format!(
                "a picture of {width} x {height} pixels: sides are 1..={MOST}"
            )));
        };
        let unreadable = |error: image::ImageError| match error {
            image::ImageError::IoError(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Error::not_found("there is no such file").caused_by(error)
            }
            image::ImageError::IoError(error) => Error::io("read the picture", error),
            image::ImageError::Limits(error) => Error::limit_exceeded(format!("the picture is too large: {error}")),
            error => Error::invalid_file(format!("no PNG, JPEG or WebP picture: {error}")).caused_by(error),
        };
        let mut reader = image::ImageReader::open(path)
            .and_then(image::ImageReader::with_guessed_format)
            .map_err(|error| unreadable(image::ImageError::IoError(error)))?;
        let mut limits = image::Limits::default();
        limits.max_alloc = Some(1 << 30);
        reader.limits(limits);
        let mut decoder = reader.into_decoder().map_err(unreadable)?;
        let (columns_there, rows_there) = decoder.dimensions();
        if u64::from(columns_there) * u64::from(rows_there) > 1 << 28 {
            return Err(Error::limit_exceeded(format!("a picture of {columns_there} x {rows_there} pixels")));
        }
        let orientation = decoder.orientation().map_err(unreadable)?;
        let mut picture = image::DynamicImage::from_decoder(decoder).map_err(unreadable)?;
        picture.apply_orientation(orientation);
        let mut ground = image::RgbaImage::from_pixel(picture.width(), picture.height(), image::Rgba([255; 4]));
        image::imageops::overlay(&mut ground, &picture.to_rgba8(), 0, 0);
        let filter = image::imageops::FilterType::CatmullRom;
        let rgb = image::DynamicImage::ImageRgba8(ground).resize_to_fill(columns, rows, filter).to_rgb8().into_raw();
        Ok(Self { count: 1, height, width, rgb })
    }

    /// Writes one picture as a PNG file: to a temporary file beside it, then renamed.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] if there is no such picture or the number of bytes is not that of the sizes;
    /// [`crate::Status::NotFound`] or [`crate::Status::Io`].
    pub fn write_png(&self, index: usize, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let size = self.height.checked_mul(self.width).and_then(|area| area.checked_mul(3));
        let picture = size.filter(|&size| size > 0 && index < self.count).and_then(|size| {
            let start = index.checked_mul(size)?;
            self.rgb.get(start..start.checked_add(size)?)
        });
        let picture = picture.ok_or_else(|| {
            Error::invalid_argument(format!(
                "there is no picture {index} in {} of {} x {} pixels with {} bytes",
                self.count,
                self.width,
                self.height,
                self.rgb.len()
            ))
        })?;
        let sides = u32::try_from(self.width).ok().zip(u32::try_from(self.height).ok());
        let (width, height) = sides.ok_or_else(|| Error::limit_exceeded("a PNG file's sides are 32-bit numbers"))?;
        let mut encoded = Vec::new();
        PngEncoder::new(&mut encoded)
            .write_image(picture, width, height, ExtendedColorType::Rgb8)
            .map_err(|error| Error::new(Status::Io, format!("{}: encoding", path.display())).caused_by(error))?;
        if path.file_name().is_none() {
            return Err(Error::invalid_argument(format!("{path:?} names no file")));
        }
        os::replace_file(path, &encoded).map_err(|error| Error::io(path.display(), error))
    }

    /// Planes `[count, 3, height, width]` with values in `[-1, 1]`.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] if the number of bytes is not that of the sizes.
    pub fn to_planes(&self) -> Result<Vec<f32>> {
        self.check()?;
        let mut planes = Vec::new();
        planes.try_reserve_exact(self.rgb.len())?;
        for image in self.rgb.chunks_exact(3 * self.height * self.width) {
            for channel in 0..3 {
                planes.extend(image.iter().skip(channel).step_by(3).map(|byte| f32::from(*byte) / 127.5 - 1.0));
            }
        }
        Ok(planes)
    }

    /// One of them by itself. The number of bytes must be that of the sizes.
    pub(crate) fn picture(&self, at: usize) -> Result<Self> {
        let size = 3 * self.height * self.width;
        let rgb = copied(&self.rgb[at * size..(at + 1) * size])?;
        Ok(Self { count: 1, height: self.height, width: self.width, rgb })
    }

    /// Fails unless the number of bytes is that of the sizes, and not zero.
    pub(crate) fn check(&self) -> Result<()> {
        let size = [self.count, self.height, self.width, 3].iter().try_fold(1_usize, |p, size| p.checked_mul(*size));
        if size != Some(self.rgb.len()) || self.rgb.is_empty() {
            return Err(Error::invalid_argument(format!(
                "{} bytes are not {} RGB images of {} x {} pixels",
                self.rgb.len(),
                self.count,
                self.width,
                self.height
            )));
        }
        Ok(())
    }
}

/// One half of the autoencoder.
pub(super) struct Vae {
    pub(super) session: Session,
    /// From the autoencoder's latents to the UNet's, for every channel or one for all.
    normalization: Vec<Normalization>,
    /// Pixels of a latent's side.
    pub(super) factor: usize,
}

/// The UNet's latent is the autoencoder's minus `offset`, times `factor`.
#[derive(Clone, Copy)]
struct Normalization {
    offset: f64,
    factor: f64,
}

impl Normalization {
    /// From `scaling_factor` and either `shift_factor` or, by channel, `latents_mean` and `latents_std`, as diffusers'
    /// pipelines use them.
    fn from_config(config: &Value) -> Result<Vec<Self>> {
        let empty = Map::new();
        let fields = Fields(config.as_object().unwrap_or(&empty));
        let scaling = fields.number("scaling_factor", 0.18215, SMALLEST, LARGEST)?;
        match (fields.numbers("latents_mean")?, fields.numbers("latents_std")?) {
            (Some(means), Some(deviations)) if means.len() == deviations.len() && !means.is_empty() => {
                if let Some(wrong) = deviations.iter().find(|deviation| !(SMALLEST..=LARGEST).contains(*deviation)) {
                    let range = format!("[{SMALLEST}, {LARGEST}]");
                    return Err(Error::invalid_file(format!("latents_std holds {wrong}, must be numbers in {range}")));
                }
                let channels = means.into_iter().zip(deviations);
                Ok(channels.map(|(offset, deviation)| Self { offset, factor: scaling / deviation }).collect())
            }
            (Some(means), Some(deviations)) => Err(Error::invalid_file(format!(
                "latents_mean has {} entries, latents_std {}; both must have one a channel",
                means.len(),
                deviations.len()
            ))),
            _ => Ok(vec![Self { offset: fields.number("shift_factor", 0.0, -LARGEST, LARGEST)?, factor: scaling }]),
        }
    }
}

impl Vae {
    /// The session that runs it.
    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// Opens `folder/model.onnx`; the figures are in `folder/config.json`, or in `vae/config.json` of the pipeline.
    pub(super) fn open(
        runtime: &Runtime,
        pipeline: &Folder,
        folder: &Folder,
        session: &SessionOptions,
        limits: &Limits,
    ) -> Result<Self> {
        let path = folder.path("model.onnx");
        let model = Model::open(&path, limits).map_err(|e| e.at(path.display()))?;
        let session = runtime.session(&model, session).map_err(|e| e.at(path.display()))?;
        if session.inputs().len() != 1 {
            let names: Vec<&str> = session.inputs().map(|port| port.name.as_str()).collect();
            return Err(Error::unsupported(format!("{} has the inputs {}", path.display(), names.join(", "))));
        }
        let config = match folder.json("config.json")? {
            Some(config) => config,
            None => match pipeline.inner("vae")? {
                Some(vae) => vae.json("config.json")?.unwrap_or(Value::Null),
                None => Value::Null,
            },
        };
        let normalization =
            Normalization::from_config(&config).map_err(|error| error.at(folder.name("config.json")))?;
        let levels = config.get("block_out_channels").and_then(Value::as_array).map_or(4, Vec::len);
        if !(1..=8).contains(&levels) {
            return Err(Error::invalid_file(format!(
                "{}: block_out_channels has {levels} entries, must have 1..=8",
                folder.name("config.json")
            )));
        }
        Ok(Self { session, normalization, factor: 1 << (levels - 1) })
    }

    /// Every value of latents `[B, C, h, w]` changed by its channel's normalization.
    fn normalized(
        &self,
        latents: &[f32],
        [_, channels, height, width]: [usize; 4],
        change: impl Fn(f64, Normalization) -> f64,
    ) -> Result<Vec<f32>> {
        let known = self.normalization.len();
        if known != 1 && known != channels {
            return Err(Error::unsupported(format!(
                "latents_mean has {known} entries, the latents have {channels} channels"
            )));
        }
        let planes = latents.chunks_exact((height * width).max(1)).zip((0..channels).cycle());
        let values = planes.flat_map(|(plane, channel)| {
            let normalization = self.normalization[channel % known];
            plane.iter().map(move |value| (*value, normalization))
        });
        let values = values.map(|(value, normalization)| change(f64::from(value), normalization) as f32);
        precision::collect(latents.len(), values)
    }

    /// Planes `[1, 3, H, W]` of latents `[1, C, h, w]`.
    pub(super) fn decode(
        &self,
        latent: &[f32],
        shape: [usize; 4],
        cancel: &CancelToken,
    ) -> Result<(Vec<f32>, [usize; 4])> {
        let run = || self.run(&self.normalized(latent, shape, |value, n| value / n.factor + n.offset)?, shape, cancel);
        run().map_err(|error| error.at("VAE decoder"))
    }

    /// Latents `[B, C, h, w]` of planes `[B, 3, H, W]`: the mean of the posterior, scaled.
    pub(super) fn encode(
        &self,
        planes: &[f32],
        shape: [usize; 4],
        channels: usize,
        cancel: &CancelToken,
    ) -> Result<(Vec<f32>, [usize; 4])> {
        let (values, mut given) = self.run(planes, shape, cancel).map_err(|e| e.at("VAE encoder"))?;
        // Either the posterior's mean and log-variance, one after the other, or a latent.
        if given[1] != channels && given[1] != 2 * channels {
            return Err(Error::unsupported(format!(
                "the VAE encoder gives {given:?}, the UNet takes {channels} channels"
            )));
        }
        let area = given[2] * given[3];
        let means = values.chunks_exact((given[1] * area).max(1)).flat_map(|image| &image[..channels * area]);
        let means = precision::collect(values.len() / given[1] * channels, means.copied())?;
        given[1] = channels;
        let latents = self.normalized(&means, given, |value, n| (value - n.offset) * n.factor);
        Ok((latents.map_err(|error| error.at("VAE encoder"))?, given))
    }

    fn run(&self, values: &[f32], shape: [usize; 4], cancel: &CancelToken) -> Result<(Vec<f32>, [usize; 4])> {
        let Some(port) = self.session.inputs().next() else {
            return Err(Error::unsupported("it has no input"));
        };
        port.check(port.dtype, &shape)?;
        let tensor = precision::from_f32(port.dtype, &shape, values)?;
        let outputs = self.session.run(&[(&port.name, &tensor)], &[], cancel)?;
        let Some(output) = outputs.first() else { return Err(Error::unsupported("it has no output")) };
        let [batch, channels, height, width] = *output.shape() else {
            return Err(Error::unsupported(format!("it gives {:?}", output.shape())));
        };
        Ok((precision::to_f32(output)?, [batch, channels, height, width]))
    }
}
