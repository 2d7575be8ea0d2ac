//! How much memory a serialised model will take once it is decoded, found by walking its bytes without decoding them.
//!
//! A message of two bytes decodes to hundreds, so a small file can ask for gigabytes. This walk allocates nothing,
//! skips tensor data, and stops as soon as a limit is passed. Knows the shape of ONNX's messages (`proto`) and nothing
//! of what they mean.

use std::mem::size_of;

use super::limits::Limits;
use super::proto::*;
use crate::error::{Error, Result};

/// A message type, as far as what it holds differs.
#[derive(Clone, Copy)]
enum Message {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    SparseTensor,
    ValueInfo,
    Type,
    TensorType,
    BoxedType,
    Shape,
    Dimension,
    Function,
    Training,
    Annotation,
    DeviceConfiguration,
    NodeDevice,
    Sharding,
    ShardedDim,
    SimpleShardedDim,
    IntLists,
    /// A message of numbers and texts only.
    Texts,
}

/// What a field decodes to.
enum Field {
    /// A message stored in the one around it.
    Inline(Message),
    /// A message in a box of this many bytes.
    Boxed(Message, usize),
    /// A list of messages of this many bytes each.
    List(Message, usize),
    /// A text of its own.
    Text,
    /// A list of texts.
    Texts,
    /// A list of byte strings, which share the file's memory.
    Bytes,
    /// A list of numbers of this many bytes each.
    Numbers(usize),
    /// The bytes of a tensor, which share the file's memory and are no structure.
    Data,
    /// A number, or nothing that is kept.
    Plain,
}

impl Message {
    fn field(self, tag: u64) -> Field {
        use Field::*;
        use Message as M;
        fn list<T>(message: Message) -> Field {
            List(message, size_of::<T>())
        }
        let texts = || list::<StringStringEntryProto>(M::Texts);
        match (self, tag) {
            (M::Model, 2 | 3 | 4 | 6) => Text,
            (M::Model, 7) => Inline(M::Graph),
            (M::Model, 8) => list::<OperatorSetIdProto>(M::Texts),
            (M::Model, 14) => texts(),
            (M::Model, 20) => list::<TrainingInfoProto>(M::Training),
            (M::Model, 25) => list::<FunctionProto>(M::Function),
            (M::Model, 26) => list::<DeviceConfigurationProto>(M::DeviceConfiguration),
            (M::Graph, 1) => list::<NodeProto>(M::Node),
            (M::Graph, 2 | 10) => Text,
            (M::Graph, 5) => list::<TensorProto>(M::Tensor),
            (M::Graph, 15) => list::<SparseTensorProto>(M::SparseTensor),
            (M::Graph, 11..=13) => list::<ValueInfoProto>(M::ValueInfo),
            (M::Graph, 14) => list::<TensorAnnotation>(M::Annotation),
            (M::Graph, 16) => texts(),
            (M::Node, 1 | 2) => Texts,
            (M::Node, 3 | 4 | 6 | 7 | 8) => Text,
            (M::Node, 5) => list::<AttributeProto>(M::Attribute),
            (M::Node, 9) => texts(),
            (M::Node, 10) => list::<NodeDeviceConfigurationProto>(M::NodeDevice),
            (M::Attribute, 1 | 13 | 21) => Text,
            (M::Attribute, 5) => Inline(M::Tensor),
            (M::Attribute, 6) => Inline(M::Graph),
            (M::Attribute, 22) => Inline(M::SparseTensor),
            (M::Attribute, 14) => Inline(M::Type),
            (M::Attribute, 7) => Numbers(size_of::<f32>()),
            (M::Attribute, 8) => Numbers(size_of::<i64>()),
            (M::Attribute, 9) => Bytes,
            (M::Attribute, 10) => list::<TensorProto>(M::Tensor),
            (M::Attribute, 11) => list::<GraphProto>(M::Graph),
            (M::Attribute, 23) => list::<SparseTensorProto>(M::SparseTensor),
            (M::Attribute, 15) => list::<TypeProto>(M::Type),
            (M::Tensor, 1 | 7 | 10 | 11) => Numbers(size_of::<i64>()),
            (M::Tensor, 4 | 5) => Numbers(size_of::<i32>()),
            (M::Tensor, 6) => Bytes,
            (M::Tensor, 8 | 12) => Text,
            (M::Tensor, 9) => Data,
            (M::Tensor, 13 | 16) => texts(),
            (M::SparseTensor, 1 | 2) => Inline(M::Tensor),
            (M::SparseTensor, 3) => Numbers(size_of::<i64>()),
            (M::ValueInfo, 1 | 3) => Text,
            (M::ValueInfo, 2) => Inline(M::Type),
            (M::ValueInfo, 4) => texts(),
            (M::Type, 1 | 8) => Inline(M::TensorType),
            (M::Type, 4) => Boxed(M::BoxedType, size_of::<type_proto::Sequence>()),
            (M::Type, 5) => Boxed(M::BoxedType, size_of::<type_proto::Map>()),
            (M::Type, 9) => Boxed(M::BoxedType, size_of::<type_proto::Optional>()),
            (M::Type, 6) => Text,
            (M::Type, 7) => Inline(M::Texts),
            (M::TensorType, 2) => Inline(M::Shape),
            // The element type of a sequence or optional has tag 1, the value type of a map 2.
            (M::BoxedType, 1 | 2) => Boxed(M::Type, size_of::<TypeProto>()),
            (M::Shape, 1) => list::<tensor_shape_proto::Dimension>(M::Dimension),
            (M::Dimension, 2 | 3) => Text,
            (M::Function, 1 | 8 | 10 | 13) => Text,
            (M::Function, 4..=6) => Texts,
            (M::Function, 7) => list::<NodeProto>(M::Node),
            (M::Function, 9) => list::<OperatorSetIdProto>(M::Texts),
            (M::Function, 11) => list::<AttributeProto>(M::Attribute),
            (M::Function, 12) => list::<ValueInfoProto>(M::ValueInfo),
            (M::Function, 14) => texts(),
            (M::Training, 1 | 2) => Inline(M::Graph),
            (M::Training, 3 | 4) => texts(),
            (M::Annotation, 1) => Text,
            (M::Annotation, 2) => texts(),
            (M::DeviceConfiguration, 1) => Text,
            (M::DeviceConfiguration, 3) => Texts,
            (M::NodeDevice, 1) => Text,
            (M::NodeDevice, 2) => list::<ShardingSpecProto>(M::Sharding),
            (M::Sharding, 1) => Text,
            (M::Sharding, 2) => Numbers(size_of::<i64>()),
            (M::Sharding, 3) => list::<IntIntListEntryProto>(M::IntLists),
            (M::Sharding, 4) => list::<ShardedDimProto>(M::ShardedDim),
            (M::ShardedDim, 2) => list::<SimpleShardedDimProto>(M::SimpleShardedDim),
            (M::SimpleShardedDim, 2) => Text,
            (M::IntLists, 2) => Numbers(size_of::<i64>()),
            (M::Texts, 1 | 2) => Text,
            _ => Plain,
        }
    }
}

/// Refuses a serialised model that would decode to more memory than the limits allow, nests too deep, or is cut off.
pub(super) fn check(model: &[u8], limits: &Limits) -> Result<()> {
    let mut walk = Walk { limits, decoded: 0, data: 0, file: model.len() as u64 };
    walk.message(Message::Model, model, 1)
}

struct Walk<'l> {
    limits: &'l Limits,
    /// Bytes that the messages so far decode to.
    decoded: u64,
    /// Bytes of tensor data so far.
    data: u64,
    file: u64,
}

/// Fields of ONNX's messages have tags up to 26.
const TAGS: usize = 32;

impl Walk<'_> {
    fn message(&mut self, message: Message, mut bytes: &[u8], depth: usize) -> Result<()> {
        if depth > self.limits.message_depth {
            return Err(Error::limit_exceeded(format!(
                "messages are nested deeper than {} levels",
                self.limits.message_depth
            )));
        }
        let mut lengths = [0u64; TAGS];
        while !bytes.is_empty() {
            let key = varint(&mut bytes)?;
            let (tag, wire_type) = (key >> 3, key & 7);
            let content = match wire_type {
                0 => {
                    varint(&mut bytes)?;
                    None
                }
                1 => take(&mut bytes, 8).map(|_| None)?,
                5 => take(&mut bytes, 4).map(|_| None)?,
                2 => {
                    let length = varint(&mut bytes)?;
                    Some(take(&mut bytes, length)?)
                }
                _ => return Err(damaged("a field of unknown wire type")),
            };
            let field = message.field(tag);
            let length = lengths.get_mut(tag as usize);
            match (field, content) {
                (Field::Numbers(size), None) => self.take_more(length, size)?,
                // A packed number takes at least one byte; capacity may be twice what is used.
                (Field::Numbers(size), Some(content)) => self.take(2 * size as u64 * content.len() as u64)?,
                (Field::Inline(inner), Some(content)) => self.message(inner, content, depth + 1)?,
                (Field::Boxed(inner, size), Some(content)) => {
                    self.take(size as u64)?;
                    self.message(inner, content, depth + 1)?;
                }
                (Field::List(inner, size), Some(content)) => {
                    self.take_more(length, size)?;
                    self.message(inner, content, depth + 1)?;
                }
                (Field::Text, Some(content)) => self.take(text_bytes(content))?,
                (Field::Texts, Some(content)) => {
                    self.take_more(length, size_of::<String>())?;
                    self.take(text_bytes(content))?;
                }
                (Field::Bytes, Some(_)) => self.take_more(length, size_of::<bytes::Bytes>())?,
                (Field::Data, Some(content)) => self.data += content.len() as u64,
                _ => {}
            }
        }
        Ok(())
    }

    /// One more element of a list whose capacity doubles as it grows.
    fn take_more(&mut self, length: Option<&mut u64>, size: usize) -> Result<()> {
        let Some(length) = length else { return Ok(()) };
        // What `Vec` does.
        let first_capacity = if size <= 1024 { 4 } else { 1 };
        let capacity_before = match *length {
            0 => 0,
            length => length.next_power_of_two().max(first_capacity),
        };
        *length += 1;
        let capacity = length.next_power_of_two().max(first_capacity);
        self.take((capacity - capacity_before) * size as u64)
    }

    fn take(&mut self, bytes: u64) -> Result<()> {
        self.decoded = self.decoded.saturating_add(bytes);
        // What is yet to come counts as structure until it is seen to be data: the verdict is only final at the end,
        // but the walk ends early where no rest of the file could change it.
        let structure = self.file - self.data.min(self.file);
        let allowed = self.limits.structure_bytes.saturating_add(structure.saturating_mul(self.limits.expansion));
        if self.decoded > allowed {
            return Err(Error::limit_exceeded(format!(
                "{} bytes of model structure would decode to more than {allowed} bytes",
                structure
            )));
        }
        Ok(())
    }
}

/// A short text still takes the allocator's smallest block.
fn text_bytes(content: &[u8]) -> u64 {
    const SMALLEST_BLOCK: u64 = 32;
    if content.is_empty() { 0 } else { SMALLEST_BLOCK.max(content.len() as u64) }
}

fn varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut value = 0u64;
    for (index, &byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte < 0x80 {
            *bytes = &bytes[index + 1..];
            return Ok(value);
        }
    }
    Err(damaged("a number that does not end"))
}

fn take<'b>(bytes: &mut &'b [u8], length: u64) -> Result<&'b [u8]> {
    let split = usize::try_from(length).ok().and_then(|length| bytes.split_at_checked(length));
    let Some((content, rest)) = split else {
        return Err(damaged("a field that is longer than what is left"));
    };
    *bytes = rest;
    Ok(content)
}

fn damaged(what: &str) -> Error {
    Error::invalid_file(format!("not an ONNX model, or a damaged one: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    fn field(tag: u8, content: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        prost::encoding::encode_varint(u64::from(tag) << 3 | 2, &mut out);
        prost::encoding::encode_varint(content.len() as u64, &mut out);
        out.extend(content);
        out
    }

    fn status(model: &[u8]) -> Option<Status> {
        check(model, &Limits::default()).err().map(|error| error.status())
    }

    #[test]
    fn many_empty_messages_are_refused_before_they_are_decoded() {
        for tag in [1, 5, 11, 12, 13, 14, 15] {
            let graph = field(tag, &[]).repeat(2_000_000);
            assert_eq!(status(&field(7, &graph)), Some(Status::LimitExceeded), "field {tag} of a graph");
        }
        let node = field(5, &[]).repeat(2_000_000);
        assert_eq!(status(&field(7, &field(1, &node))), Some(Status::LimitExceeded));
        let names = field(1, &[]).repeat(2_000_000);
        assert_eq!(status(&field(7, &field(1, &names))), None, "24 bytes a name are no bomb");
    }

    #[test]
    fn nesting_is_bounded_and_damage_is_found() {
        let mut graph = Vec::new();
        for _ in 0..60 {
            graph = field(1, &field(5, &field(6, &graph)));
        }
        assert_eq!(status(&field(7, &graph)), Some(Status::LimitExceeded));
        for bytes in [&[0x3a, 5][..], &[0x3a], &[0xff; 12], &[0x0b], &[7 << 3 | 2, 2, 0x0a, 9]] {
            assert_eq!(status(bytes), Some(Status::InvalidFile), "{bytes:?}");
        }
    }

    #[test]
    fn tensor_data_is_no_structure() {
        let tensor = field(9, &vec![0; 30 << 20]);
        assert_eq!(status(&field(7, &field(5, &tensor))), None);
        // Behind much data, the same bomb is still one.
        let mut graph = field(5, &tensor);
        graph.extend(field(1, &[]).repeat(2_000_000));
        assert_eq!(status(&field(7, &graph)), Some(Status::LimitExceeded));
    }
}
