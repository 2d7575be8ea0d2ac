//! Models small enough to be known by heart, written with the crate's own messages.
#![allow(dead_code)]

use macula::onnx::{Limits, Model, proto};
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

pub fn product_model() -> Model {
    model(product())
}

pub fn model(bytes: Vec<u8>) -> Model {
    Model::from_bytes(bytes.into(), None, &Limits::default()).unwrap()
}

/// `y = conv(relu(conv(x)))` over 16 channels with 3 x 3 kernels, for `x: [1, 16, 12, 12]`, and the bytes of its
/// weights if they lie in an external file of the given name.
pub fn convolutions(external: Option<&str>) -> (Vec<u8>, Vec<u8>) {
    let count = 16 * 16 * 9;
    let mut file = Vec::new();
    let weights = ["w0", "w1"].map(|name| {
        let seed = name.len() + usize::from(name.as_bytes()[1]);
        let data: Vec<u8> =
            (0..count).flat_map(|i| (((i * 31 + seed * 7) % 97) as f32 / 970.0 - 0.05).to_le_bytes()).collect();
        let mut tensor = proto::TensorProto {
            name: Some(name.into()),
            data_type: Some(1),
            dims: vec![16, 16, 3, 3],
            ..Default::default()
        };
        match external {
            None => tensor.raw_data = Some(data.into()),
            Some(location) => {
                let entry = |key: &str, value: String| proto::StringStringEntryProto {
                    key: Some(key.into()),
                    value: Some(value),
                };
                tensor.external_data = vec![
                    entry("location", location.into()),
                    entry("offset", file.len().to_string()),
                    entry("length", data.len().to_string()),
                ];
                tensor.data_location = Some(proto::tensor_proto::DataLocation::External as i32);
                file.extend(data);
            }
        }
        tensor
    });
    let pads = proto::AttributeProto {
        name: Some("pads".into()),
        r#type: Some(proto::attribute_proto::AttributeType::Ints as i32),
        ints: vec![1; 4],
        ..Default::default()
    };
    let mut nodes =
        vec![node("Conv", &["x", "w0"], &["a"]), node("Relu", &["a"], &["b"]), node("Conv", &["b", "w1"], &["y"])];
    nodes[0].attribute.push(pads.clone());
    nodes[2].attribute.push(pads);
    let shape = ["1", "16", "12", "12"];
    let graph = proto::GraphProto {
        name: Some("convolutions".into()),
        node: nodes,
        input: vec![value("x", &shape)],
        output: vec![value("y", &shape)],
        initializer: weights.into(),
        ..Default::default()
    };
    let opset = proto::OperatorSetIdProto { version: Some(17), ..Default::default() };
    let model =
        proto::ModelProto { ir_version: Some(8), opset_import: vec![opset], graph: Some(graph), ..Default::default() };
    (model.encode_to_vec(), file)
}

/// `size` x `size` input `x`, multiplied `length` times by one weight and squashed by `Tanh` each time.
pub fn chain(size: usize, length: usize) -> Vec<u8> {
    let data: Vec<u8> =
        (0..size * size).flat_map(|i| ((i as f32 * 0.7).sin() / (size as f32).sqrt()).to_le_bytes()).collect();
    let weight = proto::TensorProto {
        name: Some("w".into()),
        data_type: Some(1),
        dims: vec![size as i64; 2],
        raw_data: Some(data.into()),
        ..Default::default()
    };
    let mut nodes = Vec::new();
    let mut last = "x".to_owned();
    for i in 0..length {
        let (product, next) = (format!("p{i}"), if i + 1 == length { "y".into() } else { format!("t{i}") });
        nodes.push(node("MatMul", &[&last, "w"], &[&product]));
        nodes.push(node("Tanh", &[&product], &[&next]));
        last = next;
    }
    let shape = [size.to_string(), size.to_string()];
    let shape = [shape[0].as_str(), shape[1].as_str()];
    let graph = proto::GraphProto {
        name: Some("chain".into()),
        node: nodes,
        input: vec![value("x", &shape)],
        output: vec![value("y", &shape)],
        initializer: vec![weight],
        ..Default::default()
    };
    let opset = proto::OperatorSetIdProto { version: Some(17), ..Default::default() };
    proto::ModelProto { ir_version: Some(8), opset_import: vec![opset], graph: Some(graph), ..Default::default() }
        .encode_to_vec()
}

/// Reshapes `x: [n]` to `[2, 2]`, which works for 4 numbers only.
pub fn broken_reshape() -> Vec<u8> {
    let shape = proto::TensorProto {
        name: Some("shape".into()),
        data_type: Some(7),
        dims: vec![2],
        int64_data: vec![2, 2],
        ..Default::default()
    };
    let graph = proto::GraphProto {
        name: Some("reshape".into()),
        node: vec![node("Reshape", &["x", "shape"], &["y"])],
        input: vec![value("x", &["n"])],
        output: vec![value("y", &["2", "2"])],
        initializer: vec![shape],
        ..Default::default()
    };
    let opset = proto::OperatorSetIdProto { version: Some(17), ..Default::default() };
    proto::ModelProto { ir_version: Some(8), opset_import: vec![opset], graph: Some(graph), ..Default::default() }
        .encode_to_vec()
}
