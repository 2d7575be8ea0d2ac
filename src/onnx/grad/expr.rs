//! Values of a gradient while it is written. An [`Expr`] names a value of the graph; operators and methods on it append
//! the node that computes the result, so that a rule reads like its formula. Knows no rule.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops;
use std::rc::Rc;

use half::{bf16, f16};

use crate::onnx::build::{self, Names, node};
use crate::onnx::proto::tensor_proto::DataType;
use crate::onnx::proto::{NodeProto, TensorProto};

/// The nodes and constants that a gradient adds to its graph.
pub(super) struct Emitter {
    pub(super) names: Names,
    pub(super) nodes: Vec<NodeProto>,
    pub(super) initializers: Vec<TensorProto>,
    /// The forward node whose rule runs: new names start with its name.
    pub(super) scope: String,
    constants: HashMap<(DataType, Vec<usize>, Vec<u8>), Rc<str>>,
    /// Values that are wanted again: by operator and input, for those that every rule would write alike.
    shared: HashMap<(&'static str, DataType, Rc<str>), Rc<str>>,
    opset: i64,
}

/// Shared by all values of one gradient.
#[derive(Clone)]
pub(super) struct Graph(Rc<RefCell<Emitter>>);

impl Graph {
    pub(super) fn new(names: Names, opset: i64) -> Self {
        Self(Rc::new(RefCell::new(Emitter {
            names,
            nodes: Vec::new(),
            initializers: Vec::new(),
            scope: String::new(),
            constants: HashMap::new(),
            shared: HashMap::new(),
            opset,
        })))
    }

    /// What was added. The graph can't be used any more.
    pub(super) fn take(&self) -> (Vec<NodeProto>, Vec<TensorProto>, Names) {
        let mut emitter = self.0.borrow_mut();
        let Emitter { nodes, initializers, names, .. } = &mut *emitter;
        (std::mem::take(nodes), std::mem::take(initializers), std::mem::take(names))
    }

    pub(super) fn enter(&self, scope: &str) {
        self.0.borrow_mut().scope = format!("{scope}/grad");
    }

    /// The version of the standard operator set.
    pub(super) fn opset(&self) -> i64 {
        self.0.borrow().opset
    }

    /// A name that no value has.
    pub(super) fn fresh(&self, wish: &str) -> String {
        self.0.borrow_mut().names.fresh(wish)
    }

    /// How many nodes were added.
    pub(super) fn len(&self) -> usize {
        self.0.borrow().nodes.len()
    }

    /// Appends a node like another that takes `inputs`; returns the names of what it makes.
    pub(super) fn repeat(&self, like: &NodeProto, inputs: Vec<String>) -> Vec<String> {
        let mut emitter = self.0.borrow_mut();
        let fresh = |value: &String, names: &mut Names| match value.is_empty() {
            true => String::new(),
            false => names.fresh(&format!("{value}/again")),
        };
        let output: Vec<String> = like.output.iter().map(|value| fresh(value, &mut emitter.names)).collect();
        let name = emitter.names.fresh(&format!("{}/again", like.name()));
        emitter.nodes.push(NodeProto { input: inputs, output: output.clone(), ..like.clone() }.named(name));
        output
    }

    /// A value of the graph.
    pub(super) fn value(&self, name: &str, data_type: DataType) -> Expr {
        Expr { graph: self.clone(), name: name.into(), data_type }
    }

    /// Appends a node with one output; `finish` adds its attributes.
    pub(super) fn node(
        &self,
        op_type: &str,
        inputs: &[&Expr],
        data_type: DataType,
        finish: impl FnOnce(NodeProto) -> NodeProto,
    ) -> Expr {
        self.nodes(op_type, inputs, &[Some(data_type)], finish).swap_remove(0)
    }

    /// Appends a node with the outputs that have a type; one that is left out comes back as the empty name.
    pub(super) fn nodes(
        &self,
        op_type: &str,
        inputs: &[&Expr],
        outputs: &[Option<DataType>],
        finish: impl FnOnce(NodeProto) -> NodeProto,
    ) -> Vec<Expr> {
        let mut emitter = self.0.borrow_mut();
        let wish = format!("{}/{op_type}", emitter.scope);
        let outputs: Vec<Expr> = outputs
            .iter()
            .map(|data_type| match data_type {
                Some(data_type) => {
                    Expr { graph: self.clone(), name: emitter.names.fresh(&wish).into(), data_type: *data_type }
                }
                None => Expr { graph: self.clone(), name: "".into(), data_type: DataType::Undefined },
            })
            .collect();
        let built = node(op_type, inputs.iter().map(|input| &*input.name), outputs.iter().map(|output| &*output.name));
        let name = outputs[0].name.to_string();
        emitter.nodes.push(finish(built).named(name));
        outputs
    }

    /// A constant tensor of a floating-point type, or of i64.
    pub(super) fn numbers(&self, data_type: DataType, dims: &[usize], values: &[f64]) -> Expr {
        let bytes: Vec<u8> = match data_type {
            DataType::Double => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            DataType::Float16 => values.iter().flat_map(|&value| f16::from_f64(value).to_le_bytes()).collect(),
            DataType::Bfloat16 => values.iter().flat_map(|&value| bf16::from_f64(value).to_le_bytes()).collect(),
            DataType::Int64 => values.iter().flat_map(|&value| (value as i64).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect(),
        };
        self.constant(data_type, dims, bytes)
    }

    /// A constant one-dimensional tensor of integers: axes, sizes, starts.
    pub(super) fn ints(&self, values: &[i64]) -> Expr {
        self.constant(DataType::Int64, &[values.len()], values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    /// A constant integer without axes.
    pub(super) fn int(&self, value: i64) -> Expr {
        self.constant(DataType::Int64, &[], value.to_le_bytes().to_vec())
    }

    fn constant(&self, data_type: DataType, dims: &[usize], bytes: Vec<u8>) -> Expr {
        let mut emitter = self.0.borrow_mut();
        let key = (data_type, dims.to_vec(), bytes);
        let name = match emitter.constants.get(&key) {
            Some(name) => name.clone(),
            None => {
                let name: Rc<str> = emitter.names.fresh("grad/constant").into();
                emitter.initializers.push(build::tensor(&name, data_type, dims, key.2.clone()));
                emitter.constants.insert(key, name.clone());
                name
            }
        };
        Expr { graph: self.clone(), name, data_type }
    }
}

/// A value of the graph, with its element type.
#[derive(Clone)]
pub(super) struct Expr {
    graph: Graph,
    pub(super) name: Rc<str>,
    pub(super) data_type: DataType,
}

/// Element-wise operators of one input, each a method.
macro_rules! unary {
    ($($method:ident = $op_type:literal),* $(,)?) => {$(
        pub(super) fn $method(&self) -> Expr {
            self.op($op_type, &[])
        }
    )*};
}

impl Expr {
    unary! {
        exp = "Exp", log = "Log", sqrt = "Sqrt", sin = "Sin", cos = "Cos", tanh = "Tanh", sigmoid = "Sigmoid",
        erf = "Erf", abs = "Abs", sign = "Sign", reciprocal = "Reciprocal",
    }

    pub(super) fn graph(&self) -> &Graph {
        &self.graph
    }

    /// A node without attributes of this value and others, of this value's type.
    pub(super) fn op(&self, op_type: &str, others: &[&Expr]) -> Expr {
        self.op_with(op_type, others, |node| node)
    }

    /// As [`Expr::op`], with attributes.
    pub(super) fn op_with(&self, op_type: &str, others: &[&Expr], finish: impl FnOnce(NodeProto) -> NodeProto) -> Expr {
        let inputs: Vec<&Expr> = std::iter::once(self).chain(others.iter().copied()).collect();
        self.graph.node(op_type, &inputs, self.data_type, finish)
    }

    /// A number of this value's type.
    pub(super) fn number(&self, value: f64) -> Expr {
        self.graph.numbers(self.data_type, &[], &[value])
    }

    pub(super) fn matmul(&self, other: &Expr) -> Expr {
        self.op("MatMul", &[other])
    }

    /// This to a fixed power.
    pub(super) fn power(&self, exponent: f64) -> Expr {
        match exponent {
            1.0 => self.clone(),
            2.0 => self * self,
            _ => self.op("Pow", &[&self.number(exponent)]),
        }
    }

    /// Where this is less than another, as booleans.
    pub(super) fn less(&self, other: &Expr) -> Expr {
        self.graph.node("Less", &[self, other], DataType::Bool, |node| node)
    }

    /// Where this equals another, as booleans.
    pub(super) fn equals(&self, other: &Expr) -> Expr {
        self.graph.node("Equal", &[self, other], DataType::Bool, |node| node)
    }

    /// `chosen` where this boolean holds, `other` elsewhere.
    pub(super) fn choose(&self, chosen: &Expr, other: &Expr) -> Expr {
        self.graph.node("Where", &[self, chosen, other], chosen.data_type, |node| node)
    }

    /// Sums along axes, which stay with size 1 if `keep`. No axes: the value itself.
    pub(super) fn sum(&self, axes: &[i64], keep: bool) -> Expr {
        if axes.is_empty() {
            return self.clone();
        }
        self.op_with("ReduceSum", &[&self.graph.ints(axes)], |node| node.with("keepdims", i64::from(keep)))
    }

    /// Means along axes, which stay with size 1.
    pub(super) fn mean(&self, axes: &[i64]) -> Expr {
        match self.graph.opset() >= 18 {
            true => self.op("ReduceMean", &[&self.graph.ints(axes)]),
            false => self.op_with("ReduceMean", &[], |node| node.with("axes", axes)),
        }
    }

    pub(super) fn reshape(&self, shape: &Expr) -> Expr {
        self.op("Reshape", &[shape])
    }

    /// Into a shape of numbers; 0 keeps the size at its place, -1 takes what is left.
    pub(super) fn reshape_to(&self, shape: &[i64]) -> Expr {
        self.reshape(&self.graph.ints(shape))
    }

    pub(super) fn expand(&self, shape: &Expr) -> Expr {
        self.op("Expand", &[shape])
    }

    pub(super) fn squeeze(&self, axes: &[i64]) -> Expr {
        if axes.is_empty() { self.clone() } else { self.op("Squeeze", &[&self.graph.ints(axes)]) }
    }

    pub(super) fn unsqueeze(&self, axes: &[i64]) -> Expr {
        if axes.is_empty() { self.clone() } else { self.op("Unsqueeze", &[&self.graph.ints(axes)]) }
    }

    /// Axis `i` of the result is axis `order[i]` of this.
    pub(super) fn transpose(&self, order: &[usize]) -> Expr {
        if order.iter().enumerate().all(|(to, &from)| to == from) {
            return self.clone();
        }
        let order: Vec<i64> = order.iter().map(|&axis| axis as i64).collect();
        self.op_with("Transpose", &[], |node| node.with("perm", order))
    }

    /// With the last two of `rank` axes exchanged.
    pub(super) fn transpose_last(&self, rank: usize) -> Expr {
        let mut order: Vec<usize> = (0..rank).collect();
        order.swap(rank - 2, rank - 1);
        self.transpose(&order)
    }

    /// `[start, end)` along one axis.
    pub(super) fn slice(&self, axis: i64, start: i64, end: i64) -> Expr {
        let int = |value| self.graph.ints(&[value]);
        self.op("Slice", &[&int(start), &int(end), &int(axis), &int(1)])
    }

    /// This and others, one behind the other along an axis.
    pub(super) fn join(&self, others: &[&Expr], axis: i64) -> Expr {
        self.op_with("Concat", others, |node| node.with("axis", axis))
    }

    /// As [`Expr::join`]; without others the value itself.
    pub(super) fn join_all(&self, others: &[Expr], axis: i64) -> Expr {
        if others.is_empty() { self.clone() } else { self.join(&others.iter().collect::<Vec<_>>(), axis) }
    }

    /// Backwards along axes.
    pub(super) fn flip(&self, axes: &[i64]) -> Expr {
        let of = |value| self.graph.ints(&vec![value; axes.len()]);
        self.op("Slice", &[&of(-1), &of(i64::MIN + 1), &self.graph.ints(axes), &of(-1)])
    }

    /// In another element type; itself if it has it.
    pub(super) fn cast(&self, data_type: DataType) -> Expr {
        if data_type == self.data_type {
            return self.clone();
        }
        self.shared("Cast", data_type, |value| {
            value.graph.node("Cast", &[value], data_type, |node| node.with("to", data_type as i64))
        })
    }

    /// The sizes of this value, `[rank]` of i64.
    pub(super) fn sizes(&self) -> Expr {
        self.shared("Shape", DataType::Int64, |value| value.graph.node("Shape", &[value], DataType::Int64, |node| node))
    }

    /// A value of this shape that is zero everywhere.
    pub(super) fn zeros(&self) -> Expr {
        self.sizes().zeros_of(self.data_type)
    }

    /// Zeros in the shape that this is.
    pub(super) fn zeros_of(&self, data_type: DataType) -> Expr {
        filled(self, data_type, 0)
    }

    /// Ones in the shape that this is.
    pub(super) fn ones_of(&self, data_type: DataType) -> Expr {
        filled(self, data_type, 1)
    }

    fn shared(&self, what: &'static str, data_type: DataType, make: impl FnOnce(&Self) -> Expr) -> Expr {
        let key = (what, data_type, self.name.clone());
        let known = self.graph.0.borrow().shared.get(&key).cloned();
        if let Some(name) = known {
            return Expr { graph: self.graph.clone(), name, data_type };
        }
        let made = make(self);
        self.graph.0.borrow_mut().shared.insert(key, made.name.clone());
        made
    }
}

fn filled(sizes: &Expr, data_type: DataType, number: u8) -> Expr {
    let bytes = match data_type {
        DataType::Double => f64::from(number).to_le_bytes().to_vec(),
        DataType::Float16 => f16::from(number).to_le_bytes().to_vec(),
        DataType::Bfloat16 => bf16::from(number).to_le_bytes().to_vec(),
        DataType::Int64 => i64::from(number).to_le_bytes().to_vec(),
        _ => f32::from(number).to_le_bytes().to_vec(),
    };
    let value = build::tensor("value", data_type, &[1], bytes);
    sizes.graph.node("ConstantOfShape", &[sizes], data_type, |node| node.with("value", value))
}

macro_rules! arithmetic {
    ($($symbol:ident $method:ident $op_type:literal),*) => {$(
        impl ops::$symbol<&Expr> for &Expr {
            type Output = Expr;
            fn $method(self, other: &Expr) -> Expr {
                self.op($op_type, &[other])
            }
        }
        impl ops::$symbol<Expr> for &Expr {
            type Output = Expr;
            fn $method(self, other: Expr) -> Expr {
                self.op($op_type, &[&other])
            }
        }
        impl ops::$symbol<&Expr> for Expr {
            type Output = Expr;
            fn $method(self, other: &Expr) -> Expr {
                self.op($op_type, &[other])
            }
        }
        impl ops::$symbol<Expr> for Expr {
            type Output = Expr;
            fn $method(self, other: Expr) -> Expr {
                self.op($op_type, &[&other])
            }
        }
        impl ops::$symbol<f64> for &Expr {
            type Output = Expr;
            fn $method(self, other: f64) -> Expr {
                self.op($op_type, &[&self.number(other)])
            }
        }
        impl ops::$symbol<f64> for Expr {
            type Output = Expr;
            fn $method(self, other: f64) -> Expr {
                self.op($op_type, &[&self.number(other)])
            }
        }
        impl ops::$symbol<&Expr> for f64 {
            type Output = Expr;
            fn $method(self, other: &Expr) -> Expr {
                other.number(self).op($op_type, &[other])
            }
        }
        impl ops::$symbol<Expr> for f64 {
            type Output = Expr;
            fn $method(self, other: Expr) -> Expr {
                other.number(self).op($op_type, &[&other])
            }
        }
    )*};
}

arithmetic!(Add add "Add", Sub sub "Sub", Mul mul "Mul", Div div "Div");

impl ops::Neg for &Expr {
    type Output = Expr;
    fn neg(self) -> Expr {
        self.op("Neg", &[])
    }
}

impl ops::Neg for Expr {
    type Output = Expr;
    fn neg(self) -> Expr {
        self.op("Neg", &[])
    }
}
