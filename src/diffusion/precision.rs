//! Numbers of a model's precision (`float32`, `float16`, `bfloat16`) as `f32`, in which all arithmetic of this room is
//! done.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::runtime::{ElementType, Tensor};

/// These `length` values; `OutOfMemory` where collecting them would end the process.
pub(super) fn collect(length: usize, values: impl Iterator<Item = f32>) -> Result<Vec<f32>> {
    let mut collected = Vec::new();
    collected.try_reserve_exact(length)?;
    collected.extend(values.take(length));
    Ok(collected)
}

/// A copy of the values, widened exactly.
pub(crate) fn to_f32(tensor: &Tensor) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    values.try_reserve_exact(tensor.len())?;
    values.resize(tensor.len(), 0.0);
    match tensor.dtype() {
        ElementType::F32 => values.copy_from_slice(tensor.as_slice::<f32>()?),
        ElementType::F16 => tensor.as_slice::<f16>()?.convert_to_f32_slice(&mut values),
        ElementType::BF16 => tensor.as_slice::<bf16>()?.convert_to_f32_slice(&mut values),
        other => return Err(Error::unsupported(format!("a tensor of {other} where floating-point numbers belong"))),
    }
    Ok(values)
}

/// Writes values into a tensor of as many elements, rounded to nearest.
pub(crate) fn write_f32(values: &[f32], tensor: &mut Tensor) -> Result<()> {
    if values.len() != tensor.len() {
        return Err(Error::invalid_argument(format!("{} values for a tensor of {:?}", values.len(), tensor.shape())));
    }
    match tensor.dtype() {
        ElementType::F32 => tensor.as_mut_slice::<f32>()?.copy_from_slice(values),
        ElementType::F16 => tensor.as_mut_slice::<f16>()?.convert_from_f32_slice(values),
        ElementType::BF16 => tensor.as_mut_slice::<bf16>()?.convert_from_f32_slice(values),
        other => return Err(Error::unsupported(format!("a tensor of {other} where floating-point numbers belong"))),
    }
    Ok(())
}

/// A tensor of that type holding the values.
pub(crate) fn from_f32(dtype: ElementType, shape: &[usize], values: &[f32]) -> Result<Tensor> {
    let mut tensor = Tensor::zeros(dtype, shape)?;
    write_f32(values, &mut tensor)?;
    Ok(tensor)
}
