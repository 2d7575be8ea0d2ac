//! Typed, owned buffers on the host or on a device: what goes into sessions and comes out. Knows no sessions.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use half::{bf16, f16};
use ort::sys;

use super::api::{Api, call};
use crate::error::{Error, Result};
use crate::memory::copied;

/// The type of a tensor's elements. The numbers are ONNX's.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// 32-bit IEEE 754.
    F32 = 1,
    /// Unsigned 8-bit integer.
    U8 = 2,
    /// Signed 8-bit integer.
    I8 = 3,
    /// Signed 32-bit integer.
    I32 = 6,
    /// Signed 64-bit integer.
    I64 = 7,
    /// One byte, 0 or 1.
    Bool = 9,
    /// 16-bit IEEE 754.
    F16 = 10,
    /// 64-bit IEEE 754.
    F64 = 11,
    /// The upper half of a 32-bit IEEE 754 number.
    BF16 = 16,
}

impl ElementType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::F16 | Self::BF16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// The type of ONNX's number (`TensorProto.DataType`), if tensors can have it.
    pub fn from_onnx(number: i32) -> Option<Self> {
        [Self::F32, Self::U8, Self::I8, Self::I32, Self::I64, Self::Bool, Self::F16, Self::F64, Self::BF16]
            .into_iter()
            .find(|kind| *kind as i32 == number)
    }

    fn to_sys(self) -> sys::ONNXTensorElementDataType {
        use sys::ONNXTensorElementDataType as T;
        match self {
            Self::F32 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
            Self::U8 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
            Self::I8 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
            Self::I32 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
            Self::I64 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
            Self::Bool => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL,
            Self::F16 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
            Self::F64 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE,
            Self::BF16 => T::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::U8 => "uint8",
            Self::I8 => "int8",
            Self::I32 => "int32",
            Self::I64 => "int64",
            Self::Bool => "bool",
            Self::F16 => "float16",
            Self::F64 => "float64",
            Self::BF16 => "bfloat16",
        })
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that a tensor's elements can be.
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// Its element type.
    const TYPE: ElementType;
}

macro_rules! element {
    ($($rust:ty => $kind:ident),* $(,)?) => {$(
        impl sealed::Sealed for $rust {}
        impl Element for $rust {
            const TYPE: ElementType = ElementType::$kind;
        }
    )*};
}
element!(f32 => F32, u8 => U8, i8 => I8, i32 => I32, i64 => I64, bool => Bool, f16 => F16, f64 => F64, bf16 => BF16);

/// Where memory lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Device {
    /// The memory of the CPU.
    #[default]
    Host,
    /// The memory of the CUDA device with this number.
    Cuda(i32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Cuda(id) => write!(f, "cuda:{id}"),
        }
    }
}

/// A typed, dense, row-major array. Cloning shares the memory; shared memory is read-only.
#[derive(Clone)]
pub struct Tensor {
    element_type: ElementType,
    shape: Vec<usize>,
    storage: Arc<Storage>,
}

struct Storage {
    /// Readable by the host only if `device` is [`Device::Host`]. Aligned to its elements; dangling if there are none.
    data: NonNull<u8>,
    device: Device,
    /// What frees the memory.
    owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: the memory is owned, and is written only through a unique reference.
unsafe impl Send for Storage {}
// SAFETY: as above.
unsafe impl Sync for Storage {}

impl Tensor {
    /// A tensor that takes the vector's memory. The product of `shape` must be the vector's length.
    pub fn from_vec<T: Element>(shape: &[usize], mut data: Vec<T>) -> Result<Self> {
        let needed = elements(shape, T::TYPE)?;
        if needed != data.len() {
            return Err(Error::invalid_argument(format!(
                "a tensor of shape {shape:?} holds {needed} elements; {} were given",
                data.len()
            )));
        }
        let pointer = NonNull::new(data.as_mut_ptr()).unwrap_or(NonNull::dangling()).cast();
        Ok(Self::from_owner(T::TYPE, shape, pointer, Device::Host, Box::new(data)))
    }

    /// A copy of a slice. The product of `shape` must be the slice's length.
    pub fn from_slice<T: Element>(shape: &[usize], data: &[T]) -> Result<Self> {
        let mut copy = Vec::new();
        copy.try_reserve_exact(data.len())?;
        copy.extend_from_slice(data);
        Self::from_vec(shape, copy)
    }

    /// A tensor of zeros (`false`) on the host.
    pub fn zeros(element_type: ElementType, shape: &[usize]) -> Result<Self> {
        fn zeros<T: Element>(shape: &[usize]) -> Result<Tensor> {
            let count = elements(shape, T::TYPE)?;
            let mut data: Vec<T> = Vec::new();
            data.try_reserve_exact(count)?;
            data.resize(count, T::default());
            Tensor::from_vec(shape, data)
        }
        match element_type {
            ElementType::F32 => zeros::<f32>(shape),
            ElementType::U8 => zeros::<u8>(shape),
            ElementType::I8 => zeros::<i8>(shape),
            ElementType::I32 => zeros::<i32>(shape),
            ElementType::I64 => zeros::<i64>(shape),
            ElementType::Bool => zeros::<bool>(shape),
            ElementType::F16 => zeros::<f16>(shape),
            ElementType::F64 => zeros::<f64>(shape),
            ElementType::BF16 => zeros::<bf16>(shape),
        }
    }

    /// A tensor of one element with an empty shape.
    pub fn scalar<T: Element>(value: T) -> Result<Self> {
        Self::from_vec(&[], vec![value])
    }

    fn from_owner(
        element_type: ElementType,
        shape: &[usize],
        data: NonNull<u8>,
        device: Device,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Self {
        Self { element_type, shape: shape.to_vec(), storage: Arc::new(Storage { data, device, owner }) }
    }

    /// The type of its elements.
    pub fn dtype(&self) -> ElementType {
        self.element_type
    }

    /// Its dimensions, outermost first. Empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How many elements it has.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of its elements.
    pub fn byte_len(&self) -> usize {
        self.len() * self.element_type.size()
    }

    /// Where its memory lies.
    pub fn device(&self) -> Device {
        self.storage.device
    }

    /// The elements. Fails if `T` is another type or the memory is a device's.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.readable::<T>()?;
        // SAFETY: type, device and (for bool) values were checked; the memory holds `len` elements, lives as long as
        // `self`, and nobody writes it while a reference exists.
        Ok(unsafe { std::slice::from_raw_parts(self.storage.data.as_ptr().cast(), self.len()) })
    }

    /// The elements, to be written. Fails as [`Tensor::as_slice`] does, and if the memory is shared with a clone.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T]> {
        self.readable::<T>()?;
        if !self.is_unique() {
            return Err(Error::invalid_argument("the tensor's memory is shared and can't be written"));
        }
        // SAFETY: as in `as_slice`; the only reference to the storage is borrowed mutably.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.storage.data.as_ptr().cast(), self.len()) })
    }

    /// The elements as bytes in the machine's order. Fails if the memory is a device's.
    pub fn as_bytes(&self) -> Result<&[u8]> {
        self.on_host()?;
        // SAFETY: host memory of `byte_len` bytes; every element type has no padding.
        Ok(unsafe { std::slice::from_raw_parts(self.storage.data.as_ptr(), self.byte_len()) })
    }

    /// The elements in a vector of their own, without a copy where the tensor is the only owner of a vector.
    pub fn into_vec<T: Element>(self) -> Result<Vec<T>> {
        self.readable::<T>()?;
        let count = self.len();
        match Arc::try_unwrap(self.storage) {
            Ok(storage) => match storage.owner.downcast::<Vec<T>>() {
                Ok(data) => Ok(*data),
                Err(owner) => {
                    // SAFETY: as in `as_slice`; `owner` keeps the memory until after the copy.
                    let data = unsafe { std::slice::from_raw_parts(storage.data.as_ptr().cast::<T>(), count) };
                    let copy = copied(data);
                    drop(owner);
                    copy
                }
            },
            // SAFETY: as in `as_slice`.
            Err(shared) => copied(unsafe { std::slice::from_raw_parts(shared.data.as_ptr().cast::<T>(), count) }),
        }
    }

    /// The same memory under another shape of as many elements.
    pub fn reshaped(mut self, shape: &[usize]) -> Result<Self> {
        let count = elements(shape, self.element_type)?;
        if count != self.len() {
            return Err(Error::invalid_argument(format!(
                "a tensor of shape {:?} can't be seen as {shape:?}: {} elements against {count}",
                self.shape,
                self.len()
            )));
        }
        self.shape = shape.to_vec();
        Ok(self)
    }

    /// Whether no clone shares the memory.
    pub(super) fn is_unique(&self) -> bool {
        Arc::strong_count(&self.storage) == 1
    }

    fn on_host(&self) -> Result<()> {
        match self.storage.device {
            Device::Host => Ok(()),
            device => Err(Error::invalid_argument(format!("the tensor lies on {device}, not on the host"))),
        }
    }

    fn readable<T: Element>(&self) -> Result<()> {
        if T::TYPE != self.element_type {
            return Err(Error::invalid_argument(format!(
                "the tensor holds {} elements; {} was asked for",
                self.element_type,
                T::TYPE
            )));
        }
        if T::TYPE == ElementType::Bool && self.as_bytes()?.iter().any(|&byte| byte > 1) {
            return Err(Error::invalid_argument("the bool tensor holds a byte that is neither 0 nor 1"));
        }
        self.on_host()
    }

    /// ONNX Runtime's view of this memory. It must not outlive the tensor's storage.
    pub(super) fn to_value(&self, api: Api) -> Result<Value> {
        let shape: Vec<i64> = self.shape.iter().map(|&size| size as i64).collect();
        let mut value = std::ptr::null_mut();
        let info = MemoryInfo::new(api, self.storage.device)?;
        // SAFETY: the memory holds `byte_len` bytes (ONNX Runtime checks it against shape and type); `Value`'s users
        // keep the tensor; ONNX Runtime does not write inputs.
        unsafe {
            call!(
                api,
                CreateTensorWithDataAsOrtValue(
                    info.pointer.as_ptr(),
                    self.storage.data.as_ptr().cast(),
                    self.byte_len(),
                    shape.as_ptr(),
                    shape.len(),
                    self.element_type.to_sys(),
                    &mut value,
                )
            )?;
        }
        Value::new(api, value)
    }

    /// A tensor over memory that ONNX Runtime gave. `keep` is what must outlive that memory.
    pub(super) fn from_value(value: Value, keep: Option<Arc<dyn Any + Send + Sync>>) -> Result<Self> {
        let api = value.api;
        let (element_type, shape) = value.type_and_shape()?;
        let element_type = ElementType::from_onnx(element_type).ok_or_else(|| {
            Error::unsupported(format!("an output has element type {element_type} of ONNX, which is not handled"))
        })?;
        elements(&shape, element_type)?;
        let device = value.device()?;
        let mut data: *mut c_void = std::ptr::null_mut();
        // SAFETY: the value is a tensor, as `type_and_shape` found.
        unsafe { call!(api, GetTensorMutableData(value.pointer.as_ptr(), &mut data)) }?;
        // An empty tensor may have no memory; slices still need an aligned address.
        let data = NonNull::new(data.cast()).unwrap_or(NonNull::<u64>::dangling().cast());
        Ok(Self::from_owner(element_type, &shape, data, device, Box::new((value, keep))))
    }
}

/// The product of the dimensions, if its bytes fit in memory's address space.
fn elements(shape: &[usize], element_type: ElementType) -> Result<usize> {
    let bytes = shape.iter().try_fold(element_type.size(), |product, &size| product.checked_mul(size));
    // A zero hides an overflow of the other dimensions; ONNX Runtime wants each of them to fit in an i64.
    let each_fits = shape.iter().all(|&size| i64::try_from(size).is_ok());
    match bytes {
        Some(bytes) if bytes <= isize::MAX as usize && each_fits => Ok(bytes / element_type.size()),
        _ => Err(Error::new(
            crate::error::Status::LimitExceeded,
            format!("a tensor of shape {shape:?} and type {element_type} does not fit in memory"),
        )),
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({}{:?} on {})", self.element_type, self.shape, self.storage.device)
    }
}

/// An `OrtValue` that is ours to release.
pub(super) struct Value {
    pub(super) api: Api,
    pub(super) pointer: NonNull<sys::OrtValue>,
}

// SAFETY: an `OrtValue` is bound to no thread; it is only read once it was made.
unsafe impl Send for Value {}
// SAFETY: as above.
unsafe impl Sync for Value {}

impl Value {
    pub(super) fn new(api: Api, pointer: *mut sys::OrtValue) -> Result<Self> {
        let pointer = NonNull::new(pointer).ok_or_else(|| {
            Error::new(crate::error::Status::RuntimeFailed, "ONNX Runtime gave no value where one was due")
        })?;
        Ok(Self { api, pointer })
    }

    fn type_and_shape(&self) -> Result<(i32, Vec<usize>)> {
        let api = self.api;
        let mut is_tensor = 0;
        // SAFETY: the value is live, the out pointer valid.
        unsafe { call!(api, IsTensor(self.pointer.as_ptr(), &mut is_tensor)) }?;
        if is_tensor == 0 {
            return Err(Error::unsupported("an output is no dense tensor"));
        }
        let mut info = std::ptr::null_mut();
        // SAFETY: as above; the info is released below, after it was read.
        unsafe { call!(api, GetTensorTypeAndShape(self.pointer.as_ptr(), &mut info)) }?;
        // SAFETY: `info` was just made.
        let read = unsafe { tensor_info(api, info) };
        // SAFETY: it is ours and not used any more.
        unsafe { ((*api.0).ReleaseTensorTypeAndShapeInfo)(info) };
        let (element_type, dims, _) = read?;
        let shape = dims.iter().map(|&size| usize::try_from(size)).collect::<Result<Vec<_>, _>>();
        let shape = shape.map_err(|_| Error::unsupported(format!("an output has the open shape {dims:?}")))?;
        Ok((element_type, shape))
    }

    fn device(&self) -> Result<Device> {
        let api = self.api;
        let mut info = std::ptr::null();
        let (mut name, mut id) = (std::ptr::null(), 0);
        // SAFETY: the value is a live tensor; its memory info lives as long as it does.
        let name = unsafe {
            call!(api, GetTensorMemoryInfo(self.pointer.as_ptr(), &mut info))?;
            call!(api, MemoryInfoGetName(info, &mut name))?;
            call!(api, MemoryInfoGetId(info, &mut id))?;
            super::api::text(name)
        };
        Ok(if name == "Cuda" { Device::Cuda(id) } else { Device::Host })
    }
}

impl Drop for Value {
    fn drop(&mut self) {
        // SAFETY: ours, released once.
        unsafe { ((*self.api.0).ReleaseValue)(self.pointer.as_ptr()) }
    }
}

/// Element type, dimensions (-1 where open) and their symbols (empty where there is none) of a tensor's type.
///
/// # Safety
/// `info` is valid.
pub(super) unsafe fn tensor_info(
    api: Api,
    info: *const sys::OrtTensorTypeAndShapeInfo,
) -> Result<(i32, Vec<i64>, Vec<String>)> {
    let mut element_type = 0_i32;
    let mut rank = 0;
    // SAFETY: `info` is valid; the type is read as a number because a later library may know more types.
    unsafe {
        call!(api, GetTensorElementType(info, (&raw mut element_type).cast()))?;
        call!(api, GetDimensionsCount(info, &mut rank))?;
    }
    let mut dims = vec![0_i64; rank];
    let mut symbols = vec![std::ptr::null(); rank];
    // SAFETY: both arrays have `rank` entries; symbols live as long as `info`.
    let symbols = unsafe {
        call!(api, GetDimensions(info, dims.as_mut_ptr(), rank))?;
        call!(api, GetSymbolicDimensions(info, symbols.as_mut_ptr(), rank))?;
        symbols.into_iter().map(|symbol| super::api::text(symbol)).collect()
    };
    Ok((element_type, dims, symbols))
}

/// A description of a kind of memory.
pub(super) struct MemoryInfo {
    api: Api,
    pub(super) pointer: NonNull<sys::OrtMemoryInfo>,
}

// SAFETY: a constant description.
unsafe impl Send for MemoryInfo {}
// SAFETY: as above.
unsafe impl Sync for MemoryInfo {}

impl MemoryInfo {
    pub(super) fn new(api: Api, device: Device) -> Result<Self> {
        let (name, id) = match device {
            Device::Host => (c"Cpu", 0),
            Device::Cuda(id) => (c"Cuda", id),
        };
        let mut info = std::ptr::null_mut();
        let kind = sys::OrtAllocatorType::OrtDeviceAllocator;
        let memory = sys::OrtMemType::OrtMemTypeDefault;
        // SAFETY: the name is constant, the out pointer valid.
        unsafe { call!(api, CreateMemoryInfo(name.as_ptr(), kind, id, memory, &mut info)) }?;
        let pointer = NonNull::new(info).ok_or_else(|| {
            Error::new(
                crate::error::Status::RuntimeFailed,
                format!("ONNX Runtime does not know the memory of {device}"),
            )
        })?;
        Ok(Self { api, pointer })
    }
}

impl Drop for MemoryInfo {
    fn drop(&mut self) {
        // SAFETY: ours, released once.
        unsafe { ((*self.api.0).ReleaseMemoryInfo)(self.pointer.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn shape_and_length_must_agree_and_must_not_overflow() {
        let error = Tensor::from_vec(&[2, 3], vec![0_f32; 5]).unwrap_err();
        assert!(error.message().contains("[2, 3]") && error.message().contains('5'), "{error}");
        for shape in [[usize::MAX, 2], [1 << 62, 2], [usize::MAX, 0]] {
            assert_eq!(Tensor::zeros(ElementType::F32, &shape).unwrap_err().status(), Status::LimitExceeded);
        }
        assert!(Tensor::from_vec::<f32>(&[0, 7], vec![]).unwrap().as_slice::<f32>().unwrap().is_empty());
    }

    #[test]
    fn shared_memory_is_read_only_and_a_vector_comes_back_uncopied() {
        let data = vec![1_i64, 2, 3];
        let address = data.as_ptr();
        let mut tensor = Tensor::from_vec(&[3], data).unwrap();
        let clone = tensor.clone();
        assert_eq!(tensor.as_mut_slice::<i64>().unwrap_err().status(), Status::InvalidArgument);
        drop(clone);
        tensor.as_mut_slice::<i64>().unwrap()[0] = 9;
        let back = tensor.reshaped(&[3, 1]).unwrap().into_vec::<i64>().unwrap();
        assert_eq!((back.as_slice(), back.as_ptr()), (&[9, 2, 3][..], address));
    }

    #[test]
    fn another_type_is_refused() {
        let tensor = Tensor::scalar(1.0_f32).unwrap();
        assert!(tensor.as_slice::<f64>().unwrap_err().message().contains("float64"));
    }
}
