//! Tensors
//!
//! A `macula_tensor` describes memory; it never owns it. The memory is dense, in row-major order, in the machine's byte
//! order, and aligned to its element type.

use std::ffi::c_void;

use super::argument::slice;
use crate::error::{Error, Result};

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
