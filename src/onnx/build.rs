//! Small constructors for what a graph is made of: nodes with attributes, constant tensors, declared values, names
//! that are not taken. Must not know any particular operator.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use super::proto::attribute_proto::AttributeType;
use super::proto::tensor_proto::DataType;
use super::proto::tensor_shape_proto::{Dimension, dimension};
use super::proto::{
    AttributeProto, GraphProto, NodeProto, TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, type_proto,
};

/// A node of the standard operator set without attributes. An optional input or output that is left out is `""`.
///
/// ```
/// use macula::onnx::build::node;
/// let node = node("Gemm", ["x", "w"], ["y"]).with("transB", 1).with("alpha", 0.5).named("projection");
/// assert_eq!(node.attribute_i("transB"), Some(1));
/// ```
pub fn node<'n>(
    op_type: &str,
    inputs: impl IntoIterator<Item = &'n str>,
    outputs: impl IntoIterator<Item = &'n str>,
) -> NodeProto {
    NodeProto {
        op_type: Some(op_type.into()),
        input: inputs.into_iter().map(str::to_owned).collect(),
        output: outputs.into_iter().map(str::to_owned).collect(),
        ..NodeProto::default()
    }
}

impl NodeProto {
    /// The node with one more attribute.
    pub fn with(mut self, name: &str, value: impl Into<Attribute>) -> Self {
        let mut attribute = value.into().0;
        attribute.name = Some(name.into());
        self.attribute.push(attribute);
        self
    }

    /// The node with a name.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The node as an operator of another domain, e.g. `"com.microsoft"`.
    pub fn in_domain(mut self, domain: &str) -> Self {
        self.domain = Some(domain.into());
        self
    }
}

/// The value of a node's attribute: made from an integer, float, text, tensor, graph, or list of integers or floats.
pub struct Attribute(AttributeProto);

impl Attribute {
    fn new(kind: AttributeType, proto: AttributeProto) -> Self {
        Self(AttributeProto { r#type: Some(kind as i32), ..proto })
    }
}

macro_rules! attribute_from {
    ($($source:ty, $kind:ident, $field:ident, |$value:ident| $field_value:expr;)*) => {$(
        impl From<$source> for Attribute {
            fn from($value: $source) -> Self {
                Self::new(AttributeType::$kind, AttributeProto { $field: $field_value, ..AttributeProto::default() })
            }
        }
    )*};
}

attribute_from! {
    i64, Int, i, |value| Some(value);
    i32, Int, i, |value| Some(value.into());
    f32, Float, f, |value| Some(value);
    &str, String, s, |value| Some(Bytes::copy_from_slice(value.as_bytes()));
    TensorProto, Tensor, t, |value| Some(value);
    GraphProto, Graph, g, |value| Some(value);
    Vec<i64>, Ints, ints, |value| value;
    &[i64], Ints, ints, |value| value.to_vec();
    Vec<f32>, Floats, floats, |value| value;
    &[f32], Floats, floats, |value| value.to_vec();
}

impl<const N: usize> From<[i64; N]> for Attribute {
    fn from(value: [i64; N]) -> Self {
        value.as_slice().into()
    }
}

/// A tensor from its little-endian bytes, row-major, which are shared. Whether bytes and shape agree is found by
/// [`super::Model::check`].
pub fn tensor(name: &str, data_type: DataType, dims: &[usize], data: impl Into<Bytes>) -> TensorProto {
    TensorProto {
        name: Some(name.into()),
        data_type: Some(data_type as i32),
        dims: dims.iter().map(|&dim| dim as i64).collect(),
        raw_data: Some(data.into()),
        ..TensorProto::default()
    }
}

/// A tensor of f32.
pub fn tensor_f32(name: &str, dims: &[usize], values: &[f32]) -> TensorProto {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    tensor(name, DataType::Float, dims, data)
}

/// A tensor of i64.
pub fn tensor_i64(name: &str, dims: &[usize], values: &[i64]) -> TensorProto {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    tensor(name, DataType::Int64, dims, data)
}

/// A size of a declared shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dim {
    /// A fixed size.
    Fixed(i64),
    /// A size with a name; the same name means the same size.
    Named(String),
    /// Any size.
    Any,
}

impl From<i64> for Dim {
    fn from(size: i64) -> Self {
        Self::Fixed(size)
    }
}

impl From<&str> for Dim {
    fn from(name: &str) -> Self {
        Self::Named(name.into())
    }
}

/// A declared tensor value: the form of graph inputs and outputs. Without `dims` even its rank is open.
pub fn value(name: &str, data_type: DataType, dims: Option<&[Dim]>) -> ValueInfoProto {
    let dimension = |dim: &Dim| Dimension {
        value: match dim {
            Dim::Fixed(size) => Some(dimension::Value::DimValue(*size)),
            Dim::Named(name) => Some(dimension::Value::DimParam(name.clone())),
            Dim::Any => None,
        },
        ..Dimension::default()
    };
    let tensor = type_proto::Tensor {
        elem_type: Some(data_type as i32),
        shape: dims.map(|dims| TensorShapeProto { dim: dims.iter().map(dimension).collect() }),
    };
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() }),
        ..ValueInfoProto::default()
    }
}

/// The shape that a tensor value is declared with; `None` if it is no tensor or its rank is open.
pub fn declared_dims(info: &ValueInfoProto) -> Option<Vec<Dim>> {
    let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_ref()?.value.as_ref() else { return None };
    let dim = |dim: &Dimension| match &dim.value {
        Some(dimension::Value::DimValue(size)) => Dim::Fixed(*size),
        Some(dimension::Value::DimParam(name)) => Dim::Named(name.clone()),
        None => Dim::Any,
    };
    Some(tensor.shape.as_ref()?.dim.iter().map(dim).collect())
}

/// The names of a graph's values and nodes, and new ones that clash with none of them.
#[derive(Clone, Debug, Default)]
pub struct Names {
    taken: HashSet<String>,
    /// The next number to try behind a wish.
    next: HashMap<String, u64>,
}

impl Names {
    /// The names in a graph, subgraphs included.
    pub fn of(graph: &GraphProto) -> Self {
        let mut names = Self::default();
        names.add(graph);
        names
    }

    fn add(&mut self, graph: &GraphProto) {
        let values = graph.input.iter().chain(&graph.output).chain(&graph.value_info).map(|info| info.name());
        self.taken.extend(values.map(str::to_owned));
        let sparse = graph.sparse_initializer.iter().filter_map(|sparse| sparse.values.as_ref());
        self.taken.extend(graph.initializer.iter().chain(sparse).map(|tensor| tensor.name().to_owned()));
        for node in &graph.node {
            self.taken.insert(node.name().to_owned());
            self.taken.extend(node.input.iter().chain(&node.output).cloned());
            for attribute in &node.attribute {
                attribute.g.iter().chain(&attribute.graphs).for_each(|graph| self.add(graph));
            }
        }
    }

    /// Whether a name is taken.
    pub fn contains(&self, name: &str) -> bool {
        self.taken.contains(name)
    }

    /// Takes `wish` if it is free, else `wish` with the lowest number that makes it so.
    pub fn fresh(&mut self, wish: &str) -> String {
        let mut name = wish.to_owned();
        if name.is_empty() || self.taken.contains(&name) {
            // Numbers are never given back, so the search goes on where the last one ended.
            let next = self.next.entry(wish.to_owned()).or_insert(1);
            while name.is_empty() || self.taken.contains(&name) {
                name = format!("{wish}_{next}");
                *next += 1;
            }
        }
        self.taken.insert(name.clone());
        name
    }
}
