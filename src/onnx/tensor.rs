//! A tensor of a model, wherever its data lies: raw bytes, typed fields or an external file. Data is read only when
//! asked for, and raw bytes are shared, never copied. Must not know graphs or nodes.

use bytes::Bytes;
use half::{bf16, f16};

use super::external::ExternalData;
use super::proto::TensorProto;
use super::proto::tensor_proto::DataLocation;
pub use super::proto::tensor_proto::DataType;
use crate::error::{Error, Result};

impl DataType {
    /// Bits of one element, packed as in raw data; `None` for strings and types that are not handled (6-bit floats).
    pub fn bits(self) -> Option<u64> {
        Some(match self {
            Self::Undefined | Self::String | Self::Float6e2m3 | Self::Float6e3m2 => return None,
            Self::Uint2 | Self::Int2 => 2,
            Self::Uint4 | Self::Int4 | Self::Float4e2m1 => 4,
            Self::Bool
            | Self::Uint8
            | Self::Int8
            | Self::Float8e4m3fn
            | Self::Float8e4m3fnuz
            | Self::Float8e5m2
            | Self::Float8e5m2fnuz
            | Self::Float8e8m0 => 8,
            Self::Float16 | Self::Bfloat16 | Self::Uint16 | Self::Int16 => 16,
            Self::Float | Self::Int32 | Self::Uint32 => 32,
            Self::Double | Self::Int64 | Self::Uint64 | Self::Complex64 => 64,
            Self::Complex128 => 128,
        })
    }

    /// Whether it is one of the floating types that weights and activations come in: f16, bf16, f32, f64.
    pub fn is_float(self) -> bool {
        matches!(self, Self::Float | Self::Float16 | Self::Bfloat16 | Self::Double)
    }
}

/// The number of elements of a shape, or `None` if a dimension is negative or the product does not fit 64 bits.
pub fn checked_elements(dims: &[i64]) -> Option<u64> {
    let mut elements = 1u64;
    let mut empty = false;
    for &dim in dims {
        match u64::try_from(dim).ok()? {
            0 => empty = true,
            dim => elements = elements.checked_mul(dim)?,
        }
    }
    Some(if empty { 0 } else { elements })
}

/// The number of bytes that a tensor of this type and shape takes, packed as in raw data, or `None` if a dimension is
/// negative, a size does not fit 64 bits, or the type has no fixed size. The product of the non-zero dimensions must
/// fit, too, so that no order of multiplication overflows later.
pub fn checked_bytes(data_type: DataType, dims: &[i64]) -> Option<u64> {
    let bits = checked_elements(dims)?.checked_mul(data_type.bits()?)?;
    // A tensor of fewer than eight bits an element is padded to whole bytes.
    Some(bits.div_ceil(8))
}

/// A tensor of a model whose type, shape and data were found to agree.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    proto: &'a TensorProto,
    data_type: DataType,
    dims: Vec<usize>,
    bytes: usize,
    external: Option<ExternalData>,
}

impl<'a> TensorView<'a> {
    /// Views a tensor; `external` is its checked external data if its location says so.
    pub(super) fn new(proto: &'a TensorProto, external: Option<ExternalData>) -> Result<Self> {
        let name = proto.name();
        let data_type = data_type_of(proto)?;
        let bytes = stored_bytes(proto)?;
        if let Some(external) = &external
            && external.length != bytes
        {
            return Err(Error::invalid_file(format!(
                "tensor {name:?}: external data holds {} bytes, its type and shape need {bytes}",
                external.length
            )));
        }
        let dims = proto.dims.iter().map(|&dim| usize::try_from(dim)).collect::<Result<Vec<_>, _>>();
        let (Ok(dims), Ok(bytes)) = (dims, usize::try_from(bytes)) else {
            return Err(Error::limit_exceeded(format!("tensor {name:?}: its size does not fit this machine")));
        };
        Ok(Self { proto, data_type, dims, bytes, external })
    }

    /// The tensor's name.
    pub fn name(&self) -> &'a str {
        self.proto.name()
    }

    /// The type of its elements.
    pub fn data_type(&self) -> DataType {
        self.data_type
    }

    /// Its shape.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// The number of bytes of its data as [`TensorView::read`] gives it; for strings 0.
    pub fn byte_len(&self) -> usize {
        self.bytes
    }

    /// Where its data lies if that is an external file.
    pub fn external(&self) -> Option<&ExternalData> {
        self.external.as_ref()
    }

    /// Its elements as little-endian bytes, row-major. Raw data is shared, typed fields are converted, an external
    /// file is read into memory.
    ///
    /// Errors: an external file that can't be read or is not the one that was checked when the model was opened; a
    /// tensor of strings.
    pub fn read(&self) -> Result<Bytes> {
        if let Some(external) = &self.external {
            let mut data = Vec::new();
            data.try_reserve_exact(self.bytes)?;
            data.resize(self.bytes, 0);
            external.read_into(&mut data).map_err(|error| error.at(format_args!("tensor {:?}", self.name())))?;
            return Ok(data.into());
        }
        if let Some(raw) = self.raw() {
            return Ok(raw.clone());
        }
        let mut data = Vec::new();
        data.try_reserve_exact(self.bytes)?;
        write_typed_fields(self.proto, self.data_type, &mut data)?;
        Ok(data.into())
    }

    /// As [`TensorView::read`] into `target`, whose length must be [`TensorView::byte_len`].
    pub fn read_into(&self, target: &mut [u8]) -> Result<()> {
        if target.len() != self.bytes {
            return Err(Error::invalid_argument(format!(
                "tensor {:?} has {} bytes, the target {}",
                self.name(),
                self.bytes,
                target.len()
            )));
        }
        match &self.external {
            Some(external) => {
                external.read_into(target).map_err(|error| error.at(format_args!("tensor {:?}", self.name())))
            }
            None => {
                target.copy_from_slice(&self.read()?);
                Ok(())
            }
        }
    }

    /// Its elements as f32, from f16, bf16, f32 or f64.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        if !self.data_type.is_float() {
            return Err(self.wrong_type("a floating type"));
        }
        let data = self.read()?;
        let mut values = Vec::new();
        values.try_reserve_exact(self.elements())?;
        match self.data_type {
            DataType::Float => values.extend(elements(&data, f32::from_le_bytes)),
            DataType::Float16 => values.extend(elements(&data, |b| f16::from_le_bytes(b).to_f32())),
            DataType::Bfloat16 => values.extend(elements(&data, |b| bf16::from_le_bytes(b).to_f32())),
            _ => values.extend(elements(&data, |b| f64::from_le_bytes(b) as f32)),
        }
        Ok(values)
    }

    /// Its elements as i64, from any integer type of at least eight bits or bool.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        use DataType as T;
        if !matches!(
            self.data_type,
            T::Bool | T::Uint8 | T::Int8 | T::Uint16 | T::Int16 | T::Uint32 | T::Int32 | T::Int64 | T::Uint64
        ) {
            return Err(self.wrong_type("an integer type"));
        }
        let data = self.read()?;
        let mut values: Vec<i64> = Vec::new();
        values.try_reserve_exact(self.elements())?;
        match self.data_type {
            T::Bool | T::Uint8 => values.extend(data.iter().map(|&b| i64::from(b))),
            T::Int8 => values.extend(data.iter().map(|&b| i64::from(b as i8))),
            T::Uint16 => values.extend(elements(&data, |b| i64::from(u16::from_le_bytes(b)))),
            T::Int16 => values.extend(elements(&data, |b| i64::from(i16::from_le_bytes(b)))),
            T::Uint32 => values.extend(elements(&data, |b| i64::from(u32::from_le_bytes(b)))),
            T::Int32 => values.extend(elements(&data, |b| i64::from(i32::from_le_bytes(b)))),
            T::Uint64 => {
                for value in elements(&data, u64::from_le_bytes) {
                    values.push(i64::try_from(value).map_err(|_| self.wrong_type("values below 2^63"))?);
                }
            }
            _ => values.extend(elements(&data, i64::from_le_bytes)),
        }
        Ok(values)
    }

    fn raw(&self) -> Option<&'a Bytes> {
        self.proto.raw_data.as_ref().filter(|_| self.external.is_none())
    }

    fn wrong_type(&self, expected: &str) -> Error {
        Error::invalid_argument(format!(
            "tensor {:?} holds {}, expected {expected}",
            self.name(),
            self.data_type.as_str_name()
        ))
    }
}

fn elements<const N: usize, T>(data: &[u8], convert: impl Fn([u8; N]) -> T) -> impl Iterator<Item = T> {
    data.as_chunks::<N>().0.iter().map(move |&bytes| convert(bytes))
}

/// Whether a tensor says that its data lies in an external file.
pub(super) fn is_external(proto: &TensorProto) -> bool {
    proto.data_location == Some(DataLocation::External as i32)
}

pub(super) fn data_type_of(proto: &TensorProto) -> Result<DataType> {
    match proto.data_type.map(DataType::try_from) {
        Some(Ok(data_type)) if data_type != DataType::Undefined => Ok(data_type),
        _ => Err(Error::invalid_file(format!(
            "tensor {:?}: data_type is {:?}, expected a known element type",
            proto.name(),
            proto.data_type.unwrap_or_default()
        ))),
    }
}

/// The bytes of a tensor's data, once its type, shape and fields were found to agree: exactly one field holds data,
/// and it holds as many elements as the shape says. Strings count as 0 bytes.
pub(super) fn stored_bytes(proto: &TensorProto) -> Result<u64> {
    let name = proto.name();
    let invalid = |what: String| Err(Error::invalid_file(format!("tensor {name:?}: {what}")));
    let data_type = data_type_of(proto)?;
    if data_type != DataType::String && data_type.bits().is_none() {
        return Err(Error::unsupported(format!("tensor {name:?}: elements of type {}", data_type.as_str_name())));
    }
    if proto.segment.is_some() {
        return Err(Error::unsupported(format!("tensor {name:?}: stored in segments")));
    }
    if let Some(location) = proto.data_location
        && DataLocation::try_from(location).is_err()
    {
        return invalid(format!("data_location is {location}, expected DEFAULT (0) or EXTERNAL (1)"));
    }
    let Some(elements) = checked_elements(&proto.dims) else {
        return invalid(format!("shape {:?} is negative or too large", proto.dims));
    };
    let fields: [(&str, u64); 7] = [
        ("raw_data", proto.raw_data.as_ref().map_or(0, |raw| raw.len() as u64)),
        ("float_data", proto.float_data.len() as u64),
        ("int32_data", proto.int32_data.len() as u64),
        ("int64_data", proto.int64_data.len() as u64),
        ("double_data", proto.double_data.len() as u64),
        ("uint64_data", proto.uint64_data.len() as u64),
        ("string_data", proto.string_data.len() as u64),
    ];
    let mut used = fields.iter().filter(|(_, count)| *count > 0);
    let (field, count) = *used.next().unwrap_or(&("no field", 0));
    if let Some((other, _)) = used.next() {
        return invalid(format!("both {field} and {other} hold data, expected one of them"));
    }
    if data_type == DataType::String {
        if is_external(proto) {
            return invalid("strings can't be external".into());
        }
        if count != elements || (count > 0 && field != "string_data") {
            return invalid(format!("{field} holds {count} strings, its shape {:?} needs {elements}", proto.dims));
        }
        return Ok(0);
    }
    let Some(bytes) = checked_bytes(data_type, &proto.dims) else {
        return invalid(format!("the bytes of shape {:?} do not fit 64 bits", proto.dims));
    };
    if is_external(proto) {
        if count > 0 {
            return invalid(format!("data_location is EXTERNAL but {field} holds data"));
        }
        return Ok(bytes);
    }
    if field == "raw_data" || count == 0 {
        if count != bytes {
            return invalid(format!("{field} holds {count} bytes, type and shape {:?} need {bytes}", proto.dims));
        }
        return Ok(bytes);
    }
    let (expected_field, expected_count) = typed_field(data_type, elements, bytes);
    if field != expected_field || count != expected_count {
        return invalid(format!(
            "{field} holds {count} entries, expected {expected_count} in {expected_field} (or raw_data) for {} of \
             shape {:?}",
            data_type.as_str_name(),
            proto.dims
        ));
    }
    Ok(bytes)
}

/// Moves the elements of typed fields to raw data.
pub(super) fn gather_raw(proto: &mut TensorProto) -> Result<()> {
    let data_type = data_type_of(proto)?;
    if is_external(proto) || proto.raw_data.is_some() || data_type == DataType::String {
        return Ok(());
    }
    let mut data = Vec::new();
    data.try_reserve_exact(usize::try_from(stored_bytes(proto)?).unwrap_or(usize::MAX))?;
    write_typed_fields(proto, data_type, &mut data)?;
    proto.float_data = Vec::new();
    proto.int32_data = Vec::new();
    proto.int64_data = Vec::new();
    proto.double_data = Vec::new();
    proto.uint64_data = Vec::new();
    proto.raw_data = Some(data.into());
    Ok(())
}

/// The typed field that holds a type's elements if raw data does not, and how many entries it has.
fn typed_field(data_type: DataType, elements: u64, bytes: u64) -> (&'static str, u64) {
    use DataType as T;
    match data_type {
        T::Float => ("float_data", elements),
        T::Complex64 => ("float_data", elements.saturating_mul(2)),
        T::Double => ("double_data", elements),
        T::Complex128 => ("double_data", elements.saturating_mul(2)),
        T::Int64 => ("int64_data", elements),
        T::Uint32 | T::Uint64 => ("uint64_data", elements),
        // Elements of fewer than eight bits are packed into bytes, one byte an entry.
        T::Uint4 | T::Int4 | T::Uint2 | T::Int2 | T::Float4e2m1 => ("int32_data", bytes),
        _ => ("int32_data", elements),
    }
}

fn write_typed_fields(proto: &TensorProto, data_type: DataType, out: &mut Vec<u8>) -> Result<()> {
    use DataType as T;
    let name = proto.name();
    let out_of_range = |value: i64| {
        Error::invalid_file(format!("tensor {name:?}: {value} is out of range for {}", data_type.as_str_name()))
    };
    match data_type {
        T::Float | T::Complex64 => proto.float_data.iter().for_each(|v| out.extend(v.to_le_bytes())),
        T::Double | T::Complex128 => proto.double_data.iter().for_each(|v| out.extend(v.to_le_bytes())),
        T::Int64 => proto.int64_data.iter().for_each(|v| out.extend(v.to_le_bytes())),
        T::Uint64 => proto.uint64_data.iter().for_each(|v| out.extend(v.to_le_bytes())),
        T::Uint32 => {
            for &value in &proto.uint64_data {
                let value = u32::try_from(value).map_err(|_| out_of_range(value as i64))?;
                out.extend(value.to_le_bytes());
            }
        }
        T::Int32 => proto.int32_data.iter().for_each(|v| out.extend(v.to_le_bytes())),
        T::Int16 => {
            for &value in &proto.int32_data {
                out.extend(i16::try_from(value).map_err(|_| out_of_range(value.into()))?.to_le_bytes());
            }
        }
        // Halves travel as their bit patterns.
        T::Uint16 | T::Float16 | T::Bfloat16 => {
            for &value in &proto.int32_data {
                out.extend(u16::try_from(value).map_err(|_| out_of_range(value.into()))?.to_le_bytes());
            }
        }
        T::Int8 => {
            for &value in &proto.int32_data {
                out.extend(i8::try_from(value).map_err(|_| out_of_range(value.into()))?.to_le_bytes());
            }
        }
        T::String | T::Undefined => {
            return Err(Error::invalid_argument(format!("tensor {name:?} holds strings, not numbers")));
        }
        _ => {
            for &value in &proto.int32_data {
                out.push(u8::try_from(value).map_err(|_| out_of_range(value.into()))?);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::build;
    use super::*;
    use crate::error::Status;
    use proptest::prelude::*;

    fn data_types() -> impl Strategy<Value = DataType> {
        (0..=28i32).prop_filter_map("a type", |number| DataType::try_from(number).ok())
    }

    /// Sizes near every border: small, around 2^31, 2^32 and 2^62, negative.
    fn dims() -> impl Strategy<Value = Vec<i64>> {
        let dim =
            prop_oneof![0..9i64, -2..2i64, Just(1 << 31), Just(1 << 32), Just(i64::MAX), Just(1 << 62), any::<i64>()];
        prop::collection::vec(dim, 0..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn checked_bytes_is_exact_arithmetic(data_type in data_types(), dims in dims()) {
            // In 128 bits, with the non-zero sizes multiplied first; more than 2^128 is more than 2^64.
            let mut elements = Some(1u128);
            for &dim in dims.iter().filter(|&&dim| dim != 0) {
                let dim = u128::try_from(dim).ok();
                elements = elements.zip(dim).and_then(|(elements, dim)| elements.checked_mul(dim));
            }
            let elements = elements.filter(|&elements| elements < 1 << 64);
            let elements = elements.map(|elements| if dims.contains(&0) { 0 } else { elements });
            prop_assert_eq!(checked_elements(&dims).map(u128::from), elements);
            let bits = elements.zip(data_type.bits()).map(|(elements, bits)| elements * u128::from(bits));
            let bytes = bits.filter(|&bits| bits < 1 << 64).map(|bits| bits.div_ceil(8));
            prop_assert_eq!(checked_bytes(data_type, &dims).map(u128::from), bytes);
        }
    }

    #[test]
    fn floating_types_convert_to_f32_by_their_formats() {
        // 1.0, -2.0, the smallest subnormal, infinity.
        let view = |data_type, data: &[u8], count| {
            let tensor = build::tensor("t", data_type, &[count], data.to_vec());
            TensorView::new(&tensor, None).unwrap().to_f32().unwrap()
        };
        let half = [0x00, 0x3c, 0x00, 0xc0, 0x01, 0x00, 0x00, 0x7c];
        assert_eq!(view(DataType::Float16, &half, 4), [1.0, -2.0, 2f32.powi(-24), f32::INFINITY]);
        let brain = [0x80, 0x3f, 0x00, 0xc0, 0x01, 0x00, 0x80, 0x7f];
        assert_eq!(view(DataType::Bfloat16, &brain, 4), [1.0, -2.0, 2f32.powi(-133), f32::INFINITY]);
        assert_eq!(view(DataType::Double, &0.1f64.to_le_bytes(), 1), [0.1f32]);
        let ints = build::tensor("t", DataType::Int8, &[2], vec![0xff, 0x7f]);
        assert_eq!(TensorView::new(&ints, None).unwrap().to_i64().unwrap(), [-1, 127]);
        let large = build::tensor("t", DataType::Uint64, &[1], vec![0xff; 8]);
        assert_eq!(TensorView::new(&large, None).unwrap().to_i64().unwrap_err().status(), Status::InvalidArgument);
    }

    #[test]
    fn raw_data_is_shared_and_fields_that_disagree_are_refused() {
        let tensor = build::tensor_f32("t", &[2], &[1.0, 2.0]);
        let read = TensorView::new(&tensor, None).unwrap().read().unwrap();
        assert_eq!(read.as_ptr(), tensor.raw_data.as_ref().unwrap().as_ptr());
        let mut both = tensor.clone();
        both.float_data = vec![1.0, 2.0];
        let mut wrong_field = tensor.clone();
        wrong_field.raw_data = None;
        wrong_field.int64_data = vec![1, 2];
        let mut too_few = tensor.clone();
        too_few.dims = vec![3];
        let mut unknown = tensor.clone();
        unknown.data_type = Some(77);
        let mut out_of_range = tensor.clone();
        out_of_range.data_type = Some(DataType::Uint8 as i32);
        out_of_range.raw_data = None;
        out_of_range.int32_data = vec![0, 256];
        for broken in [both, wrong_field, too_few, unknown, out_of_range] {
            let outcome = TensorView::new(&broken, None).and_then(|view| view.read());
            assert_eq!(outcome.unwrap_err().status(), Status::InvalidFile, "{broken:?}");
        }
        let mut typed = tensor.clone();
        typed.raw_data = None;
        typed.float_data = vec![1.0, 2.0];
        assert_eq!(TensorView::new(&typed, None).unwrap().read().unwrap(), read);
        gather_raw(&mut typed).unwrap();
        assert_eq!(typed, tensor);
    }
}
