//! How much memory ONNX Runtime takes for values that follow from constants alone, which it computes while it creates a
//! session: a model of 152 bytes can ask for any amount. An abstract run over the graph, in which a value is its shape
//! and, if it is small, its numbers; nothing of the size of a tensor is ever allocated here.
//!
//! Shapes are followed as far as exporters use constants to make them. Where an operator's size hangs on a constant that
//! this run can't follow, the model is refused rather than trusted.

use std::collections::HashMap;
use std::rc::Rc;

use super::limits::Limits;
use super::proto::tensor_proto::DataType;
use super::proto::tensor_shape_proto::dimension;
use super::proto::{AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use super::proto::{SparseTensorProto, type_proto};
use super::tensor::{self, TensorView};
use super::walk::{self, Place};
use crate::error::{Error, Result};

/// Refuses a model whose constant values would take more than its limits allow. The model must have been checked.
pub(super) fn check(header: &ModelProto, graph: &GraphProto, limits: &Limits) -> Result<()> {
    let mut constants = 0u64;
    walk::each_tensor(header, graph, &mut |tensor, _| {
        constants = constants.saturating_add(tensor::stored_bytes(tensor)?);
        Ok(())
    })?;
    let functions = header.functions.iter().map(|function| (key(function), function)).collect();
    let budget = limits.folded_bytes.max(constants.saturating_mul(limits.folded_expansion));
    let mut run = Run { functions, budget, folded: 0 };
    run.graph(graph, None, Place::root("graph", graph.name()))
}

/// Numbers of values with at most this many elements are followed.
const FOLLOWED: u64 = 4_096;

/// Shapes of at most this many dimensions are followed: no operator of ONNX Runtime takes more.
const FOLLOWED_RANK: usize = 32;

/// What is known of a value.
#[derive(Clone)]
struct Value {
    /// Its sizes.
    shape: Option<Rc<[u64]>>,
    /// Its numbers, row-major; always with a shape.
    numbers: Option<Rc<[f64]>>,
    /// Whether it follows from constants alone.
    constant: bool,
    /// At most how many elements it has, if it is constant.
    elements: u64,
    /// Bytes of an element.
    width: u64,
    /// Whether its numbers are whole.
    whole: bool,
}

impl Value {
    const UNKNOWN: Self =
        Self { shape: None, numbers: None, constant: false, elements: u64::MAX, width: 8, whole: false };

    fn shaped(shape: Vec<u64>, like: &Self) -> Self {
        let elements = product(&shape);
        let shape = (shape.len() <= FOLLOWED_RANK).then(|| shape.into());
        Self { shape, numbers: None, elements, ..like.clone() }
    }

    fn numbered(shape: Vec<u64>, numbers: Vec<f64>, like: &Self) -> Self {
        let shaped = Self::shaped(shape, like);
        let followed = shaped.shape.is_some() && numbers.len() as u64 <= FOLLOWED;
        Self { numbers: followed.then(|| numbers.into()), ..shaped }
    }

    fn of_tensor(tensor: &TensorProto) -> Self {
        let data_type = DataType::try_from(tensor.data_type()).unwrap_or(DataType::Undefined);
        let shape: Vec<u64> = tensor.dims.iter().map(|&dim| u64::try_from(dim).unwrap_or(u64::MAX)).collect();
        let elements = product(&shape);
        let whole = !data_type.is_float();
        let mut numbers = None;
        if elements <= FOLLOWED
            && !tensor::is_external(tensor)
            && let Ok(view) = TensorView::new(tensor, None)
        {
            numbers = match whole {
                true => view.to_i64().ok().map(|values| values.iter().map(|&value| value as f64).collect()),
                false => view.to_f32().ok().map(|values| values.iter().map(|&value| f64::from(value)).collect()),
            };
        }
        // A text takes the memory of its object besides its characters.
        let width = data_type.bits().map_or(64, |bits| bits.div_ceil(8));
        Self { shape: Some(shape.into()), numbers, constant: true, elements, width, whole }
    }

    fn of_numbers(shape: Vec<u64>, numbers: Vec<f64>, width: u64, whole: bool) -> Self {
        Self::numbered(shape, numbers, &Self { constant: true, elements: 0, width, whole, ..Self::UNKNOWN })
    }

    fn of_sparse(sparse: &SparseTensorProto) -> Self {
        let values = sparse.values.as_ref().map_or(Self::UNKNOWN, Self::of_tensor);
        let shape = sparse.dims.iter().map(|&dim| u64::try_from(dim).unwrap_or(u64::MAX)).collect();
        Self { constant: true, ..Self::shaped(shape, &values) }
    }

    fn declared(info: &ValueInfoProto) -> Self {
        let tensor = match info.r#type.as_ref().and_then(|declared| declared.value.as_ref()) {
            Some(type_proto::Value::TensorType(tensor)) => tensor,
            _ => return Self::UNKNOWN,
        };
        let size = |dim: &super::proto::tensor_shape_proto::Dimension| match dim.value {
            Some(dimension::Value::DimValue(size)) => u64::try_from(size).ok(),
            _ => None,
        };
        let shape = tensor.shape.as_ref().and_then(|shape| shape.dim.iter().map(size).collect::<Option<Rc<[u64]>>>());
        let data_type = DataType::try_from(tensor.elem_type()).unwrap_or(DataType::Undefined);
        let width = data_type.bits().map_or(8, |bits| bits.div_ceil(8));
        Self { shape, width, whole: !data_type.is_float(), ..Self::UNKNOWN }
    }
}

fn product(sizes: &[u64]) -> u64 {
    if sizes.contains(&0) { 0 } else { sizes.iter().fold(1, |product, &size| product.saturating_mul(size)) }
}

fn key(function: &FunctionProto) -> [&str; 3] {
    [domain(function.domain()), function.name(), function.overload()]
}

fn domain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

/// The values that nodes see, and the call whose attributes they may refer to.
struct Scope<'o, 'a> {
    outer: Option<&'o Scope<'o, 'a>>,
    values: HashMap<&'a str, Value>,
    call: Option<&'o Call<'o, 'a>>,
}

struct Call<'o, 'a> {
    node: &'a NodeProto,
    function: &'a FunctionProto,
    outer: Option<&'o Call<'o, 'a>>,
}

impl<'a> Scope<'_, 'a> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name).or_else(|| self.outer?.get(name))
    }

    /// A node's attribute; inside a function it may stand for one of the call's.
    fn attribute(&self, node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
        resolve(node.attribute(name)?, self.call)
    }
}

fn resolve<'a>(attribute: &'a AttributeProto, call: Option<&Call<'_, 'a>>) -> Option<&'a AttributeProto> {
    let reference = attribute.ref_attr_name();
    if reference.is_empty() {
        return Some(attribute);
    }
    let call = call?;
    match call.node.attribute(reference) {
        Some(given) => resolve(given, call.outer),
        None => call.function.attribute_proto.iter().find(|default| default.name() == reference),
    }
}

struct Run<'a> {
    functions: HashMap<[&'a str; 3], &'a FunctionProto>,
    budget: u64,
    folded: u64,
}

impl<'a> Run<'a> {
    fn graph(&mut self, graph: &'a GraphProto, outer: Option<&Scope<'_, 'a>>, place: Place<'_>) -> Result<()> {
        let call = outer.and_then(|outer| outer.call);
        let mut scope = Scope { outer, values: HashMap::with_capacity(graph.node.len()), call };
        for info in &graph.input {
            scope.values.insert(info.name(), Value::declared(info));
        }
        for tensor in &graph.initializer {
            // The default of an input is not constant.
            scope.values.entry(tensor.name()).or_insert_with(|| Value::of_tensor(tensor));
        }
        for sparse in &graph.sparse_initializer {
            let value = Value::of_sparse(sparse);
            let name = sparse.values.as_ref().map_or("", |values| values.name());
            self.charge(&value, place.inside("sparse initializer", name))?;
            scope.values.insert(name, value);
        }
        self.nodes(&graph.node, &mut scope, place)
    }

    fn nodes(&mut self, nodes: &'a [NodeProto], scope: &mut Scope<'_, 'a>, place: Place<'_>) -> Result<()> {
        for node in nodes {
            let place = place.of_node(node);
            let outputs = self.node(node, scope, place)?;
            for (name, value) in node.output.iter().zip(outputs) {
                scope.values.insert(name, value);
            }
        }
        Ok(())
    }

    fn charge(&mut self, value: &Value, place: Place<'_>) -> Result<()> {
        if value.constant {
            self.folded = self.folded.saturating_add(value.elements.saturating_mul(value.width));
        }
        if self.folded <= self.budget {
            return Ok(());
        }
        Err(Error::limit_exceeded(format!(
            "{place}: values that follow from constants alone would take {} bytes or more, at most {} are allowed",
            self.folded, self.budget
        )))
    }

    /// What a node makes, after what that takes is charged.
    fn node(&mut self, node: &'a NodeProto, scope: &Scope<'_, 'a>, place: Place<'_>) -> Result<Vec<Value>> {
        for attribute in &node.attribute {
            for graph in attribute.g.iter().chain(&attribute.graphs) {
                self.graph(graph, Some(scope), place)?;
            }
        }
        let given = |name: &String| match name.is_empty() {
            true => None,
            false => Some(scope.get(name).cloned().unwrap_or(Value::UNKNOWN)),
        };
        let inputs: Vec<Option<Value>> = node.input.iter().map(given).collect();
        let key = [domain(node.domain()), node.op_type(), node.overload()];
        if let Some(&function) = self.functions.get(&key) {
            let call = Call { node, function, outer: scope.call };
            let mut body = Scope { outer: None, values: HashMap::new(), call: Some(&call) };
            for (name, value) in function.input.iter().zip(inputs) {
                body.values.insert(name, value.unwrap_or(Value::UNKNOWN));
            }
            self.nodes(&function.node, &mut body, place)?;
            let made = |name: &String| body.values.get(name.as_str()).cloned().unwrap_or(Value::UNKNOWN);
            return Ok(function.output.iter().map(made).collect());
        }
        let controls = node.attribute.iter().any(|attribute| attribute.g.is_some() || !attribute.graphs.is_empty());
        if controls {
            return Ok(vec![Value::UNKNOWN; node.output.len()]);
        }
        let operator = Operator { node, scope, inputs: &inputs };
        let mut outputs = operator.outputs(place)?;
        outputs.resize(node.output.len(), Value::UNKNOWN);
        let own = matches!(node.op_type(), "Constant" | "Identity" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten");
        // A constant is charged as what it is, and these only rename it.
        if !own {
            outputs.iter().try_for_each(|output| self.charge(output, place))?;
        }
        Ok(outputs)
    }
}

/// One application of a standard operator.
struct Operator<'r, 'a> {
    node: &'a NodeProto,
    scope: &'r Scope<'r, 'a>,
    inputs: &'r [Option<Value>],
}

impl<'a> Operator<'_, 'a> {
    fn input(&self, index: usize) -> Option<&Value> {
        self.inputs.get(index)?.as_ref()
    }

    /// The numbers of an input as sizes; what is negative or no number counts as 0.
    fn sizes(&self, index: usize) -> Option<Vec<u64>> {
        Some(self.input(index)?.numbers.as_ref()?.iter().map(|&number| number as u64).collect())
    }

    fn shape(&self, index: usize) -> Option<&[u64]> {
        self.input(index)?.shape.as_deref()
    }

    fn attribute(&self, name: &str) -> Option<&'a AttributeProto> {
        self.scope.attribute(self.node, name)
    }

    fn int(&self, name: &str) -> Option<i64> {
        self.attribute(name)?.i
    }

    fn outputs(&self, place: Place<'_>) -> Result<Vec<Value>> {
        let random = self.node.op_type().starts_with("Random");
        let constant = random || self.inputs.iter().flatten().all(|input| input.constant);
        let first = self.input(0).cloned().unwrap_or(Value::UNKNOWN);
        let like = Value { constant, numbers: None, ..first };
        if let Some(mut output) = self.output(&like) {
            output.constant = constant;
            let equal_parts = matches!(self.node.op_type(), "Split") && self.node.output.len() > 1;
            // The parts of a split are no larger together than the whole.
            return Ok(vec![output; if equal_parts { 1 } else { self.node.output.len() }]);
        }
        if !constant {
            return Ok(Vec::new());
        }
        if self.grows() {
            return Err(Error::limit_exceeded(format!(
                "{place}: how much the operator {} makes of constants can't be told before it runs",
                self.node.op_type()
            )));
        }
        // Operators that broadcast make at most the product of what they are given, all others at most the sum.
        let join = if self.broadcasts() { u64::saturating_mul } else { u64::saturating_add };
        let elements = self.inputs.iter().flatten().map(|input| input.elements).fold(1, join);
        let width = self.inputs.iter().flatten().map(|input| input.width).fold(8, u64::max);
        let output = Value { constant, elements, width, ..Value::UNKNOWN };
        Ok(vec![output; self.node.output.len()])
    }

    /// Whether the operator can make more than it is given.
    fn grows(&self) -> bool {
        matches!(
            self.node.op_type(),
            "ConstantOfShape"
                | "Expand"
                | "Tile"
                | "Range"
                | "OneHot"
                | "Pad"
                | "Resize"
                | "Upsample"
                | "EyeLike"
                | "CenterCropPad"
                | "Col2Im"
                | "MaxUnpool"
                | "Einsum"
                | "MatMul"
                | "Gemm"
                | "Gather"
                | "GatherND"
                | "HannWindow"
                | "HammingWindow"
                | "BlackmanWindow"
                | "MelWeightMatrix"
                | "DFT"
                | "STFT"
                | "Multinomial"
                | "RandomNormal"
                | "RandomUniform"
                | "ConvTranspose"
                | "Conv"
        )
    }

    fn broadcasts(&self) -> bool {
        matches!(
            self.node.op_type(),
            "Add"
                | "Sub"
                | "Mul"
                | "Div"
                | "Mod"
                | "Pow"
                | "Where"
                | "Equal"
                | "Greater"
                | "GreaterOrEqual"
                | "Less"
                | "LessOrEqual"
                | "And"
                | "Or"
                | "Xor"
                | "Sum"
                | "Max"
                | "Min"
                | "Mean"
                | "PRelu"
                | "BitShift"
                | "BitwiseAnd"
                | "BitwiseOr"
                | "BitwiseXor"
        )
    }

    /// The output if its size can be told.
    fn output(&self, like: &Value) -> Option<Value> {
        use std::ops::{Add, Div, Mul, Sub};
        if !matches!(self.node.domain(), "" | "ai.onnx") {
            return None;
        }
        let bool_of = |condition: bool| f64::from(u8::from(condition));
        match self.node.op_type() {
            "Constant" => self.constant(),
            "Identity" => Some(Value { numbers: self.input(0)?.numbers.clone(), ..like.clone() }),
            "Cast" => {
                let data_type = DataType::try_from(i32::try_from(self.int("to")?).ok()?).ok()?;
                let whole = !data_type.is_float();
                let width = data_type.bits().map_or(64, |bits| bits.div_ceil(8));
                let convert = |&number: &f64| if whole { number.trunc() } else { number };
                let numbers = self.input(0)?.numbers.as_ref().map(|numbers| numbers.iter().map(convert).collect());
                Some(Value { numbers, width, whole, ..like.clone() })
            }
            "Shape" => {
                let shape = self.shape(0)?;
                let rank = shape.len() as i64;
                let clamp = |index: i64| (if index < 0 { index + rank } else { index }).clamp(0, rank) as usize;
                let (start, end) = (clamp(self.int("start").unwrap_or(0)), clamp(self.int("end").unwrap_or(rank)));
                let sizes: Vec<f64> = shape.get(start..end.max(start))?.iter().map(|&size| size as f64).collect();
                Some(Value::of_numbers(vec![sizes.len() as u64], sizes, 8, true))
            }
            "Size" => Some(Value::of_numbers(vec![], vec![product(self.shape(0)?) as f64], 8, true)),
            "ConstantOfShape" => {
                let fill = self.attribute("value").and_then(|value| value.t.as_ref()).map(Value::of_tensor);
                let fill = fill.unwrap_or_else(|| Value::of_numbers(vec![1], vec![0.0], 4, false));
                let shape = self.sizes(0)?;
                let number = fill.numbers.as_ref().and_then(|numbers| numbers.first().copied());
                Some(match (number, product(&shape)) {
                    (Some(number), count) if count <= FOLLOWED => {
                        Value::numbered(shape, vec![number; count as usize], &fill)
                    }
                    _ => Value::shaped(shape, &fill),
                })
            }
            "RandomNormal" | "RandomUniform" => {
                let shape = self.attribute("shape")?.ints.iter().map(|&size| size as u64).collect();
                Some(Value::shaped(shape, &Value { width: 8, ..Value::UNKNOWN }))
            }
            "EyeLike" | "RandomNormalLike" | "RandomUniformLike" => {
                Some(Value::shaped(self.shape(0)?.to_vec(), &Value { width: 8, ..like.clone() }))
            }
            "Range" => {
                let number = |index| Some(*self.input(index)?.numbers.as_ref()?.first()?);
                let (start, limit, delta): (f64, f64, f64) = (number(0)?, number(1)?, number(2)?);
                let count = ((limit - start) / delta).ceil().max(0.0);
                // A step of zero makes no count: NaN or infinity becomes the largest.
                let count = if count.is_finite() { count as u64 } else { u64::MAX };
                Some(match count {
                    0..=FOLLOWED => {
                        let numbers = (0..count).map(|index| start + index as f64 * delta).collect();
                        Value::numbered(vec![count], numbers, like)
                    }
                    _ => Value::shaped(vec![count], like),
                })
            }
            "Expand" => {
                let target = self.sizes(1)?;
                let Some(shape) = self.shape(0) else {
                    return Some(self.enlarged(like, product(&target) as f64));
                };
                let shape = broadcast(shape, &target)?;
                Some(self.repeated(shape, like))
            }
            "Tile" => {
                let repeats = self.sizes(1)?;
                let Some(shape) = self.shape(0) else {
                    return Some(self.enlarged(like, product(&repeats) as f64));
                };
                let shape = shape.iter().zip(&repeats).map(|(size, repeat)| size.saturating_mul(*repeat)).collect();
                Some(self.repeated(shape, like))
            }
            "Pad" => {
                let pads = match self.attribute("pads") {
                    Some(pads) => pads.ints.iter().map(|&pad| pad.max(0) as u64).collect(),
                    None => self.sizes(1)?,
                };
                let mut shape = self.shape(0)?.to_vec();
                let axes: Vec<usize> = match self.input(3) {
                    Some(axes) => axes.numbers.as_ref()?.iter().map(|&axis| wrap(axis as i64, shape.len())).collect(),
                    None => (0..shape.len()).collect(),
                };
                for (index, axis) in axes.iter().enumerate() {
                    let pad = pads.get(index)?.saturating_add(*pads.get(index + axes.len())?);
                    let size = shape.get_mut(*axis)?;
                    *size = size.saturating_add(pad);
                }
                Some(Value::shaped(shape, like))
            }
            "Resize" | "Upsample" => {
                if let Some(sizes) = self.sizes(3).filter(|sizes| !sizes.is_empty()) {
                    let given = self.shape(0)?;
                    // Sizes may be of some axes only; the others stay.
                    let others = if sizes.len() < given.len() { product(given) } else { 1 };
                    return Some(Value::shaped(vec![product(&sizes).saturating_mul(others)], like).without_shape());
                }
                let scales = match self.attribute("scales") {
                    Some(scales) => scales.floats.iter().map(|&scale| f64::from(scale)).collect(),
                    None => {
                        let at = if self.inputs.len() > 2 { 2 } else { 1 };
                        self.input(at)?.numbers.as_ref()?.to_vec()
                    }
                };
                Some(self.enlarged(like, scales.iter().map(|scale| scale.max(1.0)).product()))
            }
            "OneHot" => {
                let depth = *self.input(1)?.numbers.as_ref()?.first()?;
                let values = self.input(2)?;
                Some(self.enlarged(&Value { width: values.width, ..like.clone() }, depth))
            }
            "HannWindow" | "HammingWindow" | "BlackmanWindow" => {
                Some(Value::shaped(vec![*self.sizes(0)?.first()?], &Value { width: 8, ..like.clone() }))
            }
            "Multinomial" => Some(self.enlarged(like, self.int("sample_size").unwrap_or(1).max(1) as f64)),
            "Gather" => self.gather(like),
            "Concat" => self.concat(like),
            "Slice" => self.slice(like),
            "Reshape" => {
                let wanted = self.input(1)?.numbers.as_ref()?;
                let given = self.shape(0);
                let mut shape = Vec::with_capacity(wanted.len());
                let keep_zero = self.int("allowzero").unwrap_or(0) != 0;
                for (index, &size) in wanted.iter().enumerate() {
                    shape.push(match size as i64 {
                        0 if !keep_zero => *given?.get(index)?,
                        -1 => u64::MAX,
                        size => u64::try_from(size).ok()?,
                    });
                }
                if let Some(open) = shape.iter().position(|&size| size == u64::MAX) {
                    shape[open] = 1;
                    shape[open] = product(given?).checked_div(product(&shape))?;
                }
                Some(self.reshaped(shape, like))
            }
            "Flatten" => {
                let shape = self.shape(0)?;
                let axis = wrap(self.int("axis").unwrap_or(1), shape.len());
                let (rows, columns) = shape.split_at_checked(axis)?;
                Some(self.reshaped(vec![product(rows), product(columns)], like))
            }
            "Unsqueeze" => {
                let mut axes = self.axes()?;
                let mut shape = self.shape(0)?.to_vec();
                let rank = shape.len() + axes.len();
                axes.iter_mut().for_each(|axis| *axis = wrap(*axis, rank) as i64);
                axes.sort_unstable();
                for axis in axes {
                    let axis = usize::try_from(axis).ok().filter(|&axis| axis <= shape.len())?;
                    shape.insert(axis, 1);
                }
                Some(self.reshaped(shape, like))
            }
            "Squeeze" => {
                let shape = self.shape(0)?;
                let axes: Option<Vec<usize>> =
                    self.axes().map(|axes| axes.iter().map(|&axis| wrap(axis, shape.len())).collect());
                let stays = |(index, size): &(usize, &u64)| match &axes {
                    Some(axes) => !axes.contains(index),
                    None => **size != 1,
                };
                let shape = shape.iter().enumerate().filter(stays).map(|(_, size)| *size).collect();
                Some(self.reshaped(shape, like))
            }
            "Transpose" => {
                let shape = self.shape(0)?;
                let order: Vec<usize> = match self.attribute("perm") {
                    Some(order) => order.ints.iter().map(|&axis| wrap(axis, shape.len())).collect(),
                    None => (0..shape.len()).rev().collect(),
                };
                let shape: Vec<u64> = order.iter().map(|&axis| shape.get(axis).copied()).collect::<Option<_>>()?;
                Some(if shape.len() < 2 { self.reshaped(shape, like) } else { Value::shaped(shape, like) })
            }
            "Where" => {
                let (condition, a, b) = (self.input(0)?, self.input(1)?, self.input(2)?);
                let like = Value { width: a.width.max(b.width), whole: a.whole, ..like.clone() };
                let both = zip(a, b, &like, |a, _| a)?;
                let shape = broadcast(condition.shape.as_deref()?, both.shape.as_deref()?)?;
                let picked =
                    |index: usize| Some(if at(condition, index)? != 0.0 { at(a, index)? } else { at(b, index)? });
                Some(numbered_if(shape, &like, picked))
            }
            "Add" => zip(self.input(0)?, self.input(1)?, like, f64::add),
            "Sub" => zip(self.input(0)?, self.input(1)?, like, f64::sub),
            "Mul" => zip(self.input(0)?, self.input(1)?, like, f64::mul),
            "Div" if like.whole => zip(self.input(0)?, self.input(1)?, like, |a, b| (a / b).trunc()),
            "Div" => zip(self.input(0)?, self.input(1)?, like, f64::div),
            "Mod" => zip(self.input(0)?, self.input(1)?, like, f64::rem_euclid),
            "Pow" => zip(self.input(0)?, self.input(1)?, like, f64::powf),
            "Max" | "Min" if self.inputs.len() == 2 => {
                let larger = self.node.op_type() == "Max";
                zip(self.input(0)?, self.input(1)?, like, if larger { f64::max } else { f64::min })
            }
            "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "And" | "Or" | "Xor" => {
                let like = Value { width: 1, whole: true, ..like.clone() };
                let test: fn(f64, f64) -> bool = match self.node.op_type() {
                    "Equal" => |a, b| a == b,
                    "Greater" => |a, b| a > b,
                    "GreaterOrEqual" => |a, b| a >= b,
                    "Less" => |a, b| a < b,
                    "LessOrEqual" => |a, b| a <= b,
                    "And" => |a, b| a != 0.0 && b != 0.0,
                    "Or" => |a, b| a != 0.0 || b != 0.0,
                    _ => |a, b| (a != 0.0) != (b != 0.0),
                };
                zip(self.input(0)?, self.input(1)?, &like, |a, b| bool_of(test(a, b)))
            }
            "Neg" => self.mapped(like, |a| -a),
            "Abs" => self.mapped(like, f64::abs),
            "Floor" => self.mapped(like, f64::floor),
            "Ceil" => self.mapped(like, f64::ceil),
            "Round" => self.mapped(like, f64::round_ties_even),
            "Sqrt" => self.mapped(like, f64::sqrt),
            "Reciprocal" => self.mapped(like, f64::recip),
            "Not" => self.mapped(like, |a| bool_of(a == 0.0)),
            "Exp" | "Log" | "Sin" | "Cos" | "Erf" | "Sigmoid" | "Tanh" | "Relu" | "Softmax" | "Gelu" | "Clip"
            | "CumSum" | "Trilu" | "ScatterND" | "ScatterElements" | "LeakyRelu" | "Softplus" | "Sign" => {
                Some(Value::shaped(self.shape(0)?.to_vec(), like))
            }
            "Sum" | "PRelu" | "BitShift" | "BitwiseAnd" | "BitwiseOr" | "BitwiseXor" | "Max" | "Min" | "Mean" => {
                let mut shape: Vec<u64> = Vec::new();
                for index in 0..self.inputs.len() {
                    shape = broadcast(&shape, self.shape(index)?)?;
                }
                Some(Value::shaped(shape, like))
            }
            "ReduceProd" | "ReduceSum" | "ReduceMax" | "ReduceMin" if like.shape.as_ref()?.len() < 2 => {
                let numbers = self.input(0)?.numbers.as_ref()?.iter().copied();
                let number = match self.node.op_type() {
                    "ReduceProd" => numbers.product(),
                    "ReduceSum" => numbers.sum(),
                    "ReduceMax" => numbers.fold(f64::NEG_INFINITY, f64::max),
                    _ => numbers.fold(f64::INFINITY, f64::min),
                };
                let keeps = self.int("keepdims").unwrap_or(1) != 0 && like.shape.as_ref()?.len() == 1;
                Some(Value::numbered(if keeps { vec![1] } else { vec![] }, vec![number], like))
            }
            "MatMul" => {
                let (a, b) = (self.shape(0)?, self.shape(1)?);
                let (Some((_, a_outer)), Some((b_last, b_rest))) = (a.split_last(), b.split_last()) else {
                    return None;
                };
                let Some((_, b_outer)) = b_rest.split_last() else {
                    return Some(Value::shaped(a_outer.to_vec(), like));
                };
                let (rows, a_batch) =
                    a_outer.split_last().map_or((None, a_outer), |(rows, batch)| (Some(*rows), batch));
                let mut shape = broadcast(a_batch, b_outer)?;
                shape.extend(rows);
                shape.push(*b_last);
                Some(Value::shaped(shape, like))
            }
            "Gemm" => {
                let (a, b) = (self.shape(0)?, self.shape(1)?);
                let side = |shape: &[u64], transposed: bool| shape.get(usize::from(transposed)).copied();
                let rows = side(a, self.int("transA").unwrap_or(0) != 0)?;
                let columns = side(b, self.int("transB").unwrap_or(0) == 0)?;
                Some(Value::shaped(vec![rows, columns], like))
            }
            // Of one or two inputs, so that nothing larger than these and the output lies in between.
            "Einsum" if self.inputs.len() <= 2 => {
                let equation = std::str::from_utf8(self.attribute("equation")?.s.as_deref()?).ok()?;
                let equation: String = equation.split_whitespace().collect();
                let (inputs, output) = equation.split_once("->").filter(|_| !equation.contains('.'))?;
                let mut sizes = HashMap::new();
                for (index, labels) in inputs.split(',').enumerate() {
                    let shape = self.shape(index).filter(|shape| shape.len() == labels.chars().count())?;
                    for (label, &size) in labels.chars().zip(shape) {
                        let known = sizes.entry(label).or_insert(size);
                        *known = size.max(*known);
                    }
                }
                let shape = output.chars().map(|label| sizes.get(&label).copied()).collect::<Option<Vec<u64>>>()?;
                Some(Value::shaped(shape, like))
            }
            _ => None,
        }
    }

    fn constant(&self) -> Option<Value> {
        for name in ["value", "value_int", "value_ints", "value_float", "value_floats", "sparse_value"] {
            let Some(attribute) = self.attribute(name) else { continue };
            let ints = |ints: &[i64]| ints.iter().map(|&int| int as f64).collect::<Vec<f64>>();
            let floats = |floats: &[f32]| floats.iter().map(|&float| f64::from(float)).collect::<Vec<f64>>();
            let length = attribute.ints.len().max(attribute.floats.len()) as u64;
            return Some(match name {
                "value" => Value::of_tensor(attribute.t.as_ref()?),
                "value_int" => Value::of_numbers(vec![], vec![attribute.i? as f64], 8, true),
                "value_ints" => Value::of_numbers(vec![length], ints(&attribute.ints), 8, true),
                "value_float" => Value::of_numbers(vec![], vec![f64::from(attribute.f?)], 4, false),
                "value_floats" => Value::of_numbers(vec![length], floats(&attribute.floats), 4, false),
                _ => Value::of_sparse(attribute.sparse_tensor.as_ref()?),
            });
        }
        None
    }

    fn axes(&self) -> Option<Vec<i64>> {
        match self.attribute("axes") {
            Some(axes) => Some(axes.ints.clone()),
            None => Some(self.input(1)?.numbers.as_ref()?.iter().map(|&axis| axis as i64).collect()),
        }
    }

    /// A value with `factor` times the elements of the first input and a shape that is not followed.
    fn enlarged(&self, like: &Value, factor: f64) -> Value {
        let elements = (like.elements as f64 * factor.max(0.0)).ceil() as u64;
        Value { shape: None, numbers: None, elements, ..like.clone() }
    }

    /// The first input with its numbers in another shape.
    fn reshaped(&self, shape: Vec<u64>, like: &Value) -> Value {
        match self.input(0).and_then(|input| input.numbers.clone()) {
            Some(numbers) if product(&shape) == numbers.len() as u64 => {
                Value { numbers: Some(numbers), ..Value::shaped(shape, like) }
            }
            _ => Value::shaped(shape, like),
        }
    }

    /// The first input repeated to a larger shape; numbers are followed if it is one number.
    fn repeated(&self, shape: Vec<u64>, like: &Value) -> Value {
        let numbers = self.input(0).and_then(|input| input.numbers.as_ref());
        match numbers.filter(|_| product(&shape) <= FOLLOWED).map(|numbers| &numbers[..]) {
            Some(&[number]) => {
                let count = product(&shape) as usize;
                Value::numbered(shape, vec![number; count], like)
            }
            Some(numbers) if numbers.len() as u64 == product(&shape) => self.reshaped(shape, like),
            _ => Value::shaped(shape, like),
        }
    }

    fn mapped(&self, like: &Value, map: impl Fn(f64) -> f64) -> Option<Value> {
        let numbers = self.input(0)?.numbers.as_ref();
        let numbers = numbers.map(|numbers| numbers.iter().map(|&number| map(number)).collect());
        Some(Value { numbers, ..Value::shaped(self.shape(0)?.to_vec(), like) })
    }

    fn gather(&self, like: &Value) -> Option<Value> {
        let (data, indices) = (self.shape(0)?, self.shape(1)?);
        let axis = wrap(self.int("axis").unwrap_or(0), data.len());
        let size = *data.get(axis)?;
        let shape = [&data[..axis], indices, &data[axis + 1..]].concat();
        let numbers = self.input(0)?.numbers.as_ref().zip(self.input(1)?.numbers.as_ref());
        if let ([_], Some((numbers, indices))) = (data, numbers) {
            let pick = |&index: &f64| numbers.get(wrap(index as i64, size as usize)).copied();
            let picked: Vec<f64> = indices.iter().map(pick).collect::<Option<_>>()?;
            return Some(Value::numbered(shape, picked, like));
        }
        Some(Value::shaped(shape, like))
    }

    fn concat(&self, like: &Value) -> Option<Value> {
        let mut shape = self.shape(0)?.to_vec();
        let axis = wrap(self.int("axis")?, shape.len());
        let mut sum = 0u64;
        let mut numbers = Some(Vec::new());
        for index in 0..self.inputs.len() {
            sum = sum.saturating_add(*self.shape(index)?.get(axis)?);
            match &self.input(index)?.numbers {
                Some(more) if sum <= FOLLOWED => {
                    numbers.iter_mut().for_each(|numbers| numbers.extend_from_slice(more));
                }
                _ => numbers = None,
            }
        }
        *shape.get_mut(axis)? = sum;
        Some(match numbers.filter(|_| shape.len() == 1) {
            Some(numbers) => Value::numbered(shape, numbers, like),
            None => Value::shaped(shape, like),
        })
    }

    fn slice(&self, like: &Value) -> Option<Value> {
        // Where it can't be followed, a slice is at least no larger than the whole.
        Some(self.followed_slice(like).unwrap_or_else(|| like.clone().without_shape()))
    }

    fn followed_slice(&self, like: &Value) -> Option<Value> {
        let list = |name: &str, index: usize| match self.attribute(name) {
            Some(attribute) => Some(attribute.ints.clone()),
            None => Some(self.input(index)?.numbers.as_ref()?.iter().map(|&number| number as i64).collect()),
        };
        let (starts, ends) = (list("starts", 1)?, list("ends", 2)?);
        let axes = match self.attribute("axes").is_some() || self.input(3).is_some() {
            true => list("axes", 3)?,
            false => (0..starts.len() as i64).collect(),
        };
        let steps = if self.input(4).is_some() { list("steps", 4)? } else { vec![1; starts.len()] };
        let mut shape = self.shape(0)?.to_vec();
        let mut range = 0..0;
        for (index, &axis) in axes.iter().enumerate() {
            let size = shape.get_mut(wrap(axis, like.shape.as_ref()?.len()))?;
            if *steps.get(index)? != 1 {
                return None;
            }
            let count = i64::try_from(*size).ok()?;
            let clamp = |at: i64| (if at < 0 { at.saturating_add(count) } else { at }).clamp(0, count) as usize;
            let start = clamp(*starts.get(index)?);
            range = start..clamp(*ends.get(index)?).max(start);
            *size = range.len() as u64;
        }
        match self.input(0)?.numbers.as_ref() {
            Some(numbers) if shape.len() == 1 && axes.len() == 1 => {
                Some(Value::numbered(shape, numbers.get(range)?.to_vec(), like))
            }
            _ => Some(Value::shaped(shape, like)),
        }
    }
}

impl Value {
    fn without_shape(self) -> Self {
        Self { shape: None, numbers: None, ..self }
    }
}

fn wrap(axis: i64, rank: usize) -> usize {
    let axis = if axis < 0 { axis.saturating_add(rank as i64) } else { axis };
    usize::try_from(axis).unwrap_or(usize::MAX)
}

/// The shape of two broadcast together, by NumPy's rule.
fn broadcast(a: &[u64], b: &[u64]) -> Option<Vec<u64>> {
    let rank = a.len().max(b.len());
    let size = |shape: &[u64], axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |index| shape[index]);
    let join = |axis| match (size(a, axis), size(b, axis)) {
        (1, size) | (size, 1) => Some(size),
        (a, b) if a == b => Some(a),
        _ => None,
    };
    (0..rank).map(join).collect()
}

/// The number at an index of a value that is one number or as long as the result.
fn at(value: &Value, index: usize) -> Option<f64> {
    match value.numbers.as_deref()? {
        [number] => Some(*number),
        numbers => numbers.get(index).copied(),
    }
}

fn numbered_if(shape: Vec<u64>, like: &Value, number: impl Fn(usize) -> Option<f64>) -> Value {
    let count = product(&shape);
    let numbers: Option<Vec<f64>> = if count <= FOLLOWED { (0..count as usize).map(number).collect() } else { None };
    match numbers {
        Some(numbers) => Value::numbered(shape, numbers, like),
        None => Value::shaped(shape, like),
    }
}

fn zip(a: &Value, b: &Value, like: &Value, join: impl Fn(f64, f64) -> f64) -> Option<Value> {
    let shape = broadcast(a.shape.as_deref()?, b.shape.as_deref()?)?;
    let count = product(&shape);
    let fits = |value: &Value| {
        value.numbers.as_ref().is_some_and(|numbers| numbers.len() == 1 || numbers.len() as u64 == count)
    };
    if !fits(a) || !fits(b) {
        return Some(Value::shaped(shape, like));
    }
    Some(numbered_if(shape, like, |index| Some(join(at(a, index)?, at(b, index)?))))
}

#[cfg(test)]
mod tests {
    use super::super::build::{node, tensor_f32, tensor_i64, value};
    use super::super::model::Model;
    use super::*;
    use crate::error::Status;

    fn status(nodes: Vec<NodeProto>, initializers: Vec<TensorProto>) -> Option<Status> {
        let output = nodes.last().unwrap().output[0].clone();
        let graph = GraphProto {
            name: Some("bomb".into()),
            input: vec![value("x", DataType::Float, Some(&["batch".into(), 4.into()]))],
            output: vec![value(&output, DataType::Float, None)],
            initializer: initializers,
            node: nodes,
            ..GraphProto::default()
        };
        Model::new(graph, &[("", 17)], &Limits::default()).err().map(|error| error.status())
    }

    #[test]
    fn sizes_made_of_constants_are_bounded() {
        let shape = |sizes: &[i64]| tensor_i64("shape", &[sizes.len()], sizes);
        let of_shape = || node("ConstantOfShape", ["shape"], ["y"]);
        let limit = Some(Status::LimitExceeded);
        assert_eq!(status(vec![of_shape()], vec![shape(&[1000, 1000])]), None);
        assert_eq!(status(vec![of_shape()], vec![shape(&[71_750_000])]), limit);
        assert_eq!(status(vec![of_shape()], vec![shape(&[i64::MAX, i64::MAX])]), limit);
        let one = || tensor_f32("one", &[1], &[1.0]);
        let expand = node("Expand", ["one", "shape"], ["y"]);
        assert_eq!(status(vec![expand], vec![one(), shape(&[1 << 40])]), limit);
        let tile = node("Tile", ["one", "shape"], ["y"]);
        assert_eq!(status(vec![tile], vec![one(), shape(&[1 << 30])]), limit);
        let range = node("Range", ["shape", "zero", "shape"], ["y"]);
        assert_eq!(status(vec![range], vec![shape(&[-1]), tensor_i64("zero", &[], &[-1 << 40])]), limit);
        let outer = |equation: &str| node("Einsum", ["row", "row"], ["y"]).with("equation", equation);
        let row = |size: usize| tensor_f32("row", &[size], &vec![1.0; size]);
        assert_eq!(status(vec![outer("i,j->ij")], vec![row(1 << 15)]), limit);
        assert_eq!(status(vec![outer("i, j -> ij")], vec![row(1 << 6)]), None);
        assert_eq!(status(vec![outer("i,i->i")], vec![row(1 << 15)]), None);
        for untold in ["i,j", "...i,j->...ij", "ij,j->ij"] {
            assert_eq!(status(vec![outer(untold)], vec![row(4)]), limit, "{untold}");
        }
        let random = node("RandomNormal", [], ["y"]).with("shape", [1 << 20, 1 << 10]);
        assert_eq!(status(vec![random], vec![]), limit);
    }

    #[test]
    fn a_size_is_followed_through_arithmetic_and_inner_shapes() {
        let limit = Some(Status::LimitExceeded);
        let shape = || tensor_i64("n", &[1], &[70_000]);
        let product = node("Mul", ["n", "n"], ["nn"]);
        let of_product = node("ConstantOfShape", ["nn"], ["y"]);
        assert_eq!(status(vec![product.clone(), of_product.clone()], vec![shape()]), limit);
        // The shape of a value that depends on an input can be constant, too.
        let nodes = vec![
            node("Slice", ["x", "a", "b"], ["first"]),
            node("Expand", ["one", "n"], ["row"]),
            node("Shape", ["row"], ["shape"]),
            node("ConstantOfShape", ["shape"], ["y"]),
        ];
        let many = |n: i64| {
            vec![
                tensor_i64("n", &[1], &[n]),
                tensor_i64("a", &[1], &[0]),
                tensor_i64("b", &[1], &[1]),
                tensor_f32("one", &[], &[1.0]),
            ]
        };
        assert_eq!(status(nodes.clone(), many(1 << 34)), limit);
        assert_eq!(status(nodes, many(1 << 4)), None);
        // Two vectors broadcast to a matrix.
        let nodes = vec![
            node("ConstantOfShape", ["n"], ["row"]),
            node("Unsqueeze", ["row", "axis"], ["column"]),
            node("Add", ["row", "column"], ["y"]),
        ];
        assert_eq!(status(nodes, vec![shape(), tensor_i64("axis", &[1], &[1])]), limit);
        // What can't be followed is refused, unless it hangs on an input.
        let nodes = |start: &'static str| {
            vec![
                node("NonZero", [start], ["where"]),
                node("ReduceMax", ["where"], ["n2"]).with("keepdims", 1),
                node("Reshape", ["n2", "flat"], ["n"]),
                node("ConstantOfShape", ["n"], ["y"]),
            ]
        };
        let flat = || tensor_i64("flat", &[1], &[-1]);
        assert_eq!(status(nodes("c"), vec![flat(), tensor_f32("c", &[2], &[1.0, 0.0])]), limit);
        assert_eq!(status(nodes("x"), vec![flat()]), None);
    }

    #[test]
    fn functions_that_multiply_are_counted_and_followed() {
        let function = |index: usize| FunctionProto {
            name: Some(format!("f{index}")),
            domain: Some("local".into()),
            input: vec!["a".into()],
            output: vec!["b".into()],
            node: match index {
                0 => vec![node("Neg", ["a"], ["b"])],
                _ => {
                    let call = |from: &str, to: &str| node(&format!("f{}", index - 1), [from], [to]).in_domain("local");
                    let mut calls: Vec<NodeProto> =
                        (0..99).map(|step| call(if step == 0 { "a" } else { "t" }, "t")).collect();
                    for (step, call) in calls.iter_mut().enumerate() {
                        call.input = vec![if step == 0 { "a".into() } else { format!("t{step}") }];
                        call.output = vec![if step == 98 { "b".into() } else { format!("t{}", step + 1) }];
                    }
                    calls
                }
            },
            ..FunctionProto::default()
        };
        let graph = GraphProto {
            name: Some("bomb".into()),
            input: vec![value("x", DataType::Float, Some(&[1.into()]))],
            output: vec![value("y", DataType::Float, None)],
            node: vec![node("f8", ["x"], ["y"]).in_domain("local")],
            ..GraphProto::default()
        };
        let plain = Model::new(GraphProto::default(), &[("", 17), ("local", 1)], &Limits::default()).unwrap();
        let header = ModelProto { functions: (0..9).map(function).collect(), ..plain.header().clone() };
        let error = super::super::check::model(&header, &graph, &Limits::default(), &mut |_, _| Ok(())).unwrap_err();
        assert_eq!(error.status(), Status::LimitExceeded, "{error}");
        let mut own = function(0);
        own.node = vec![node("f0", ["a"], ["b"]).in_domain("local")];
        let header = ModelProto { functions: vec![own], ..header };
        let error = super::super::check::model(&header, &graph, &Limits::default(), &mut |_, _| Ok(())).unwrap_err();
        assert!(error.message().contains("calls itself"), "{error}");
    }
}
