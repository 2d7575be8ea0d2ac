//! Tensors
//!
//! A `macula_tensor` describes memory; it never owns it. The memory is dense, in row-major order, in the machine's byte
//! order, and aligned to its element type.

use std::ffi::c_void;

use half::{bf16, f16};

use super::argument::{reference, slice};
use crate::error::{Error, Result};
use crate::runtime::{ElementType, Tensor};

/// An element type: one of `MACULA_DTYPE_*`.
pub type macula_dtype = i32;

/// 32-bit IEEE floating point.
pub const MACULA_DTYPE_F32: macula_dtype = 1;

/// 16-bit IEEE floating point.
pub const MACULA_DTYPE_F16: macula_dtype = 10;

/// 16-bit brain floating point: the upper half of a 32-bit one.
pub const MACULA_DTYPE_BF16: macula_dtype = 16;

/// 64-bit signed integer.
pub const MACULA_DTYPE_I64: macula_dtype = 7;

/// Where a tensor's memory lies: one of `MACULA_DEVICE_*`.
pub type macula_device = i32;

/// Memory of the host, which the CPU reads and writes.
pub const MACULA_DEVICE_CPU: macula_device = 0;

/// Greatest number of dimensions of a tensor.
pub const MACULA_MAX_RANK: usize = 8;

/// A view of an array of numbers.
///
/// `byte_len` says again what `dtype` and `shape` say: a call is refused with `INVALID_ARGUMENT` unless it equals
/// element size times the product of the dimensions. So a forgotten dimension cannot become a wild read.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_tensor {
    /// First element; not NULL unless a dimension is 0. Read only where the function says that it reads.
    pub data: *mut c_void,
    /// Size of the memory in bytes.
    pub byte_len: u64,
    /// Dimensions, outermost first, each >= 0; those from `rank` on are ignored.
    pub shape: [i64; 8],
    /// Number of dimensions, 0 (a single number) to `MACULA_MAX_RANK`.
    pub rank: u32,
    /// Element type, one of `MACULA_DTYPE_*`.
    pub dtype: macula_dtype,
    /// Where the memory lies: `MACULA_DEVICE_CPU`.
    pub device: macula_device,
    /// Which device of that kind; 0 for the CPU.
    pub device_id: i32,
}

/// The first `rank` of a C array of dimensions.
pub(super) fn dimensions(shape: &[i64; MACULA_MAX_RANK], rank: u32, name: &str) -> Result<Vec<usize>> {
    let dimensions = usize::try_from(rank).ok().and_then(|rank| shape.get(..rank));
    let dimensions = dimensions.ok_or_else(|| {
        Error::invalid_argument(format!("{name}: the rank is {rank}, but at most {MACULA_MAX_RANK} is possible"))
    })?;
    let converted: Result<Vec<usize>, _> = dimensions.iter().map(|&dimension| usize::try_from(dimension)).collect();
    converted.map_err(|_| Error::invalid_argument(format!("{name}: {dimensions:?} has a negative dimension")))
}

impl macula_tensor {
    /// No tensor.
    pub(super) fn none() -> Self {
        Self { data: std::ptr::null_mut(), byte_len: 0, ..Self::view::<u8>(&[], &[], 0) }
    }

    /// A view of host memory that belongs to somebody else.
    pub(super) fn view<T>(data: &[T], shape: &[usize], dtype: macula_dtype) -> Self {
        let mut dimensions = [0; MACULA_MAX_RANK];
        for (to, &from) in dimensions.iter_mut().zip(shape) {
            *to = from as i64;
        }
        Self {
            data: data.as_ptr().cast_mut().cast(),
            byte_len: size_of_val(data) as u64,
            shape: dimensions,
            rank: shape.len() as u32,
            dtype,
            device: MACULA_DEVICE_CPU,
            device_id: 0,
        }
    }

    /// The element type and the dimensions, once they and `byte_len` agree and the memory is the host's.
    fn check(&self, name: &str) -> Result<(ElementType, Vec<usize>)> {
        let dtype = match self.dtype {
            MACULA_DTYPE_F32 => ElementType::F32,
            MACULA_DTYPE_F16 => ElementType::F16,
            MACULA_DTYPE_BF16 => ElementType::BF16,
            MACULA_DTYPE_I64 => ElementType::I64,
            other => return Err(Error::invalid_argument(format!("{name}.dtype is {other}, not a MACULA_DTYPE_*"))),
        };
        if self.device != MACULA_DEVICE_CPU {
            return Err(Error::unsupported(format!("{name} lies on device {}, not in host memory", self.device)));
        }
        let shape = dimensions(&self.shape, self.rank, name)?;
        let bytes = shape.iter().try_fold(dtype.size() as u64, |product, &dimension| {
            product.checked_mul(dimension as u64).filter(|&bytes| bytes <= isize::MAX as u64)
        });
        if bytes != Some(self.byte_len) {
            let expected = bytes.map_or_else(|| "more than memory".to_owned(), |bytes| bytes.to_string());
            return Err(Error::invalid_argument(format!(
                "{name}.byte_len is {}, but {dtype} {shape:?} takes {expected}",
                self.byte_len
            )));
        }
        Ok((dtype, shape))
    }

    /// A copy of the numbers.
    ///
    /// # Safety
    /// `data` leads to `byte_len` bytes that nobody writes during the call.
    pub(super) unsafe fn read(&self, name: &str) -> Result<Tensor> {
        let (dtype, shape) = self.check(name)?;
        let bytes = self.byte_len as usize;
        let data = format!("{name}.data");
        // SAFETY: as promised by the caller; any bytes are numbers of these types.
        unsafe {
            match dtype {
                ElementType::F16 => Tensor::from_slice(&shape, slice(self.data.cast::<f16>(), bytes / 2, &data)?),
                ElementType::BF16 => Tensor::from_slice(&shape, slice(self.data.cast::<bf16>(), bytes / 2, &data)?),
                ElementType::I64 => Tensor::from_slice(&shape, slice(self.data.cast::<i64>(), bytes / 8, &data)?),
                _ => Tensor::from_slice(&shape, slice(self.data.cast::<f32>(), bytes / 4, &data)?),
            }
        }
    }

    /// Where numbers go: 32-bit floating point of exactly this shape.
    ///
    /// # Safety
    /// `data` leads to `byte_len` bytes that nobody else uses during the call.
    pub(super) unsafe fn f32_mut<'a>(&self, shape: &[usize], name: &str) -> Result<&'a mut [f32]> {
        let (dtype, given) = self.check(name)?;
        if dtype != ElementType::F32 || given != shape {
            return Err(Error::invalid_argument(format!("{name} is {dtype} {given:?}, but must be F32 {shape:?}")));
        }
        if self.byte_len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as promised by the caller.
        unsafe {
            reference(self.data.cast::<f32>(), name)?;
            Ok(std::slice::from_raw_parts_mut(self.data.cast::<f32>(), self.byte_len as usize / 4))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(shape: &[i64], byte_len: u64) -> macula_tensor {
        let mut dimensions = [0; MACULA_MAX_RANK];
        dimensions[..shape.len()].copy_from_slice(shape);
        let mut tensor = macula_tensor::view::<f32>(&[], &[], MACULA_DTYPE_F32);
        (tensor.shape, tensor.rank, tensor.byte_len) = (dimensions, shape.len() as u32, byte_len);
        tensor
    }

    #[test]
    fn byte_len_must_equal_the_checked_product() {
        assert_eq!(tensor(&[2, 3], 24).check("sample").unwrap().1, [2, 3]);
        assert_eq!(tensor(&[], 4).check("sample").unwrap().1, [0; 0]);
        assert_eq!(tensor(&[0, i64::MAX], 0).check("sample").unwrap().1.len(), 2);
        for (shape, byte_len) in [
            (&[2, 3][..], 23),
            (&[2, 3], 6),
            (&[-1, 3], 0),
            (&[1 << 32, 1 << 32], 0),
            (&[1 << 62, 4], 0),
            (&[i64::MAX, 2], 18_446_744_073_709_551_608),
        ] {
            assert!(tensor(shape, byte_len).check("sample").is_err(), "{shape:?} {byte_len}");
        }
        let mut deep = tensor(&[1], 4);
        deep.rank = 9;
        assert!(deep.check("sample").is_err());
        deep.rank = u32::MAX;
        assert!(deep.check("sample").is_err());
    }
}
