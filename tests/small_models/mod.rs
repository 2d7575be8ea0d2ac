//! Models small enough to be known by heart, written with the crate's own messages.
#![allow(dead_code)]

use macula::onnx::proto;
use prost::Message;

pub fn value(name: &str, dims: &[&str]) -> proto::ValueInfoProto {
    use proto::{tensor_shape_proto, type_proto};
    let dim = dims
        .iter()
        .map(|dim| tensor_shape_proto::Dimension {
            value: Some(match dim.parse() {
                Ok(size) => tensor_shape_proto::dimension::Value::DimValue(size),
                Err(_) => tensor_shape_proto::dimension::Value::DimParam((*dim).into()),
            }),
            ..Default::default()
        })
        .collect();
    let tensor = type_proto::Tensor { elem_type: Some(1), shape: Some(proto::TensorShapeProto { dim }) };
    proto::ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(proto::TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..Default::default() }),
        ..Default::default()
    }
}

pub fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> proto::NodeProto {
    proto::NodeProto {
        op_type: Some(op.into()),
        input: inputs.iter().map(|name| (*name).into()).collect(),
        output: outputs.iter().map(|name| (*name).into()).collect(),
        ..Default::default()
    }
}

/// `y = x w`, `z = relu(y)` for `x: [batch, 4]`, `w: [4, 4]`.
pub fn product() -> Vec<u8> {
    let graph = proto::GraphProto {
        name: Some("product".into()),
        node: vec![node("MatMul", &["x", "w"], &["y"]), node("Relu", &["y"], &["z"])],
        input: vec![value("x", &["batch", "4"]), value("w", &["4", "4"])],
        output: vec![value("y", &["batch", "4"]), value("z", &["batch", "4"])],
        ..Default::default()
    };
    let opset = proto::OperatorSetIdProto { version: Some(17), ..Default::default() };
    proto::ModelProto { ir_version: Some(8), opset_import: vec![opset], graph: Some(graph), ..Default::default() }
        .encode_to_vec()
}
