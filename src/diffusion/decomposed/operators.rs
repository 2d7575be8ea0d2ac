//! Orthonormal coordinates of pictures: blocks of 2 x 2 split into what is constant in them and what is not.
//!
//! `down` gives the coordinates of the projection onto block-constant pictures, `up` is its adjoint:
//!
//! ```text
//! down(x) = (sum of the 4 pixels of a block) / 2        up(y) = y / 2 at the 4 pixels
//! down(up(y)) = y,   P = up . down is the orthogonal projector (each block's mean)
//! ```
//!
//! White noise keeps its deviation, and a constant picture doubles. The orthogonal complement of a block has three
//! coordinates, the other rows of the symmetric Hadamard matrix over 2; so `decompose` is a rotation of the whole picture
//! (the Haar transform), and any number of levels of it too. Everything is computed block by block in `f64` and rounded
//! to `f32`.

use std::borrow::Cow;

use super::super::precision;
use crate::error::{Error, Result};

/// Planes (`batch * channels`), rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Pictures of one channel.
    pub planes: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Size {
    /// The number of values.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] for none, and for more than memory could hold.
    pub fn elements(self) -> Result<usize> {
        let len = self.planes.checked_mul(self.height).and_then(|rows| rows.checked_mul(self.width));
        len.filter(|len| *len > 0 && *len <= isize::MAX as usize / 8)
            .ok_or_else(|| Error::invalid_argument(format!("a state of {self:?} is empty or too large")))
    }

    /// The size after `levels` times `down`.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] unless both sides are multiples of `2^levels`.
    pub fn halved(self, levels: usize) -> Result<Self> {
        let divides = |side: usize| levels < usize::BITS as usize && side > 0 && side.is_multiple_of(1 << levels);
        if divides(self.height) && divides(self.width) {
            Ok(Self { height: self.height >> levels, width: self.width >> levels, ..self })
        } else {
            Err(Error::invalid_argument(format!(
                "a state of {} x {} cannot be halved {levels} times: both sides must be multiples of 2^{levels}",
                self.height, self.width
            )))
        }
    }

    fn check(self, values: &[f32]) -> Result<()> {
        let len = self.elements()?;
        if values.len() == len {
            Ok(())
        } else {
            Err(Error::invalid_argument(format!("{} values for a state of {self:?}, which has {len}", values.len())))
        }
    }
}

/// The three rows of the Hadamard matrix that are not constant, as signs of a block's pixels in reading order.
const HIGH: [[f64; 4]; 3] = [[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]];

/// Coordinates of the projection onto pictures that are constant in blocks of 2 x 2.
///
/// # Errors
/// [`crate::Status::InvalidArgument`] for odd sides and values of another number; [`crate::Status::OutOfMemory`].
pub fn down(x: &[f32], size: Size) -> Result<Vec<f32>> {
    size.check(x)?;
    let low = size.halved(1)?;
    precision::collect(low.elements()?, blocks(x, size).map(|block| (block.iter().sum::<f64>() / 2.0) as f32))
}

/// The block-constant picture of twice the `size` with these coordinates: the adjoint of [`down`].
///
/// # Errors
/// As [`down`].
pub fn up(y: &[f32], size: Size) -> Result<Vec<f32>> {
    size.check(y)?;
    let wide = Size { height: size.height * 2, width: size.width * 2, ..size };
    let row = |row: usize| row / (2 * size.height) * size.height + row % (2 * size.height) / 2;
    let rows = size.planes * wide.height;
    let pixel = move |at: usize| row(at / wide.width) * size.width + at % wide.width / 2;
    precision::collect(wide.elements()?, (0..rows * wide.width).map(|at| y[pixel(at)] / 2.0))
}

/// The coordinates of `x` in the orthonormal basis of its components: for each level from the finest on, the complement's
/// three coordinates of every block; then the coordinates of what is left after `levels` times [`down`].
///
/// # Errors
/// As [`down`]; sides must be multiples of `2^levels`.
pub fn decompose(x: &[f32], size: Size, levels: usize) -> Result<Cow<'_, [f32]>> {
    size.check(x)?;
    size.halved(levels)?;
    let mut components = Vec::new();
    components.try_reserve_exact(if levels == 0 { 0 } else { x.len() })?;
    let mut low = Cow::Borrowed(x);
    for level in 0..levels {
        let size = size.halved(level)?;
        for block in blocks(&low, size) {
            components.extend(HIGH.map(|signs| (dot(signs, block) / 2.0) as f32));
        }
        low = Cow::Owned(down(&low, size)?);
    }
    if levels == 0 {
        return Ok(low);
    }
    components.extend_from_slice(&low);
    Ok(Cow::Owned(components))
}

/// The inverse of [`decompose`]; `size` is that of the picture.
///
/// # Errors
/// As [`decompose`].
pub fn assemble(components: Vec<f32>, size: Size, levels: usize) -> Result<Vec<f32>> {
    size.check(&components)?;
    let lowest = size.halved(levels)?.elements()?;
    let mut high = components.len() - lowest;
    if levels == 0 {
        return Ok(components);
    }
    let mut low = precision::collect(lowest, components[high..].iter().copied())?;
    for level in (0..levels).rev() {
        let half = size.halved(level + 1)?;
        high -= 3 * low.len();
        low = join(&low, &components[high..], half)?;
    }
    Ok(low)
}

/// A picture of twice the `size` from block-constant coordinates and the three others of each block.
fn join(low: &[f32], high: &[f32], size: Size) -> Result<Vec<f32>> {
    let wide = size.width * 2;
    let mut joined = Vec::new();
    joined.try_reserve_exact(low.len() * 4)?;
    joined.resize(low.len() * 4, 0.0);
    for (index, (low, high)) in low.iter().zip(high.chunks_exact(3)).enumerate() {
        let corner = index / size.width * 2 * wide + index % size.width * 2;
        for (pixel, at) in [corner, corner + 1, corner + wide, corner + wide + 1].into_iter().enumerate() {
            let others: f64 = HIGH.iter().zip(high).map(|(signs, value)| signs[pixel] * f64::from(*value)).sum();
            joined[at] = ((f64::from(*low) + others) / 2.0) as f32;
        }
    }
    Ok(joined)
}

/// The pixels of each 2 x 2 block in reading order. Rows of all planes follow each other, and each plane has an even
/// number of them.
fn blocks(x: &[f32], size: Size) -> impl Iterator<Item = [f64; 4]> {
    x.chunks_exact(2 * size.width).flat_map(move |rows| {
        let (upper, lower) = rows.split_at(size.width);
        upper.chunks_exact(2).zip(lower.chunks_exact(2)).map(|(a, b)| [a[0], a[1], b[0], b[1]].map(f64::from))
    })
}

fn dot(signs: [f64; 4], block: [f64; 4]) -> f64 {
    signs.iter().zip(block).map(|(sign, value)| sign * value).sum()
}
