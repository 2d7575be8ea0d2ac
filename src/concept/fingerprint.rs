//! Which base model a concept was found on.
//!
//! It knows weights as rows of numbers, not where they come from.

use std::fmt;
use std::str::FromStr;

use half::f16;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// SHA-256 of a base model's cross-attention K and V weights.
///
/// Hashed are the weights only, each rounded to float16 (to nearest, ties to even; beyond range to infinity), as
/// little-endian bytes, laid out `[out, in]` row by row, projection after projection in the byte-wise order of their
/// diffusers module paths (`sorted(paths)` in Python). So float32 and float16 copies, transposed or not, of PyTorch and
/// ONNX, agree; a bfloat16 copy has its own fingerprint, since it lost other bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for Fingerprint {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = Error;

    /// Reads the 64 hexadecimal digits that [`fmt::Display`] writes.
    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::invalid_argument(format!("a fingerprint has 64 hexadecimal digits, not {text:?}"));
        let mut bytes = [0; 32];
        if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

/// Hashes weights in the order of [`Fingerprint`].
#[derive(Default)]
pub(super) struct Hasher(Sha256);

impl Hasher {
    /// Adds the next `weights` weights; `round` fills a block with those from an index on.
    pub fn update(&mut self, weights: usize, round: impl Fn(usize, &mut [f16])) {
        const BLOCK: usize = 1 << 14;
        let mut block = [f16::ZERO; BLOCK];
        for start in (0..weights).step_by(BLOCK) {
            let block = &mut block[..BLOCK.min(weights - start)];
            round(start, block);
            if cfg!(target_endian = "big") {
                block.iter_mut().for_each(|weight| *weight = f16::from_bits(weight.to_bits().swap_bytes()));
            }
            self.0.update(bytemuck::cast_slice::<f16, u8>(block));
        }
    }

    pub fn finish(self) -> Fingerprint {
        Fingerprint(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_form_comes_back() {
        let mut hasher = Hasher::default();
        hasher.update(2, |start, block| {
            assert_eq!(start, 0);
            block.copy_from_slice(&[f16::from_f32(1.0), f16::from_f32(-2.5)]);
        });
        let fingerprint = hasher.finish();
        // Python: hashlib.sha256(np.array([1, -2.5], "<f2").tobytes()).hexdigest()
        assert_eq!(fingerprint.to_string(), "0f702c29c88833a1a5f7a6466482f40033d17838a4e396e06af33f058def189a");
        assert_eq!(fingerprint.to_string().parse::<Fingerprint>().unwrap(), fingerprint);
        for wrong in ["", "0x", &"g".repeat(64), &"0".repeat(63), &"é".repeat(32)] {
            assert!(wrong.parse::<Fingerprint>().is_err());
        }
    }
}
