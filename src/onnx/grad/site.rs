//! What a rule sees of the node that it differentiates: inputs and outputs as [`Expr`]s in the precision of the
//! gradient, the cotangents of the outputs, sizes, attributes; and where it gives the cotangents of the inputs.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use super::Effort;
use super::expr::{Expr, Graph};
use super::facts::{Facts, Size};
use super::path::Path;
use crate::error::{Error, Result};
use crate::onnx::graph::Topology;
use crate::onnx::model::Model;
use crate::onnx::proto::NodeProto;
use crate::onnx::proto::tensor_proto::DataType;

/// The state of one reverse sweep.
pub(super) struct Sweep<'g> {
    pub(super) model: &'g Model,
    pub(super) topology: &'g Topology<'g>,
    pub(super) path: &'g Path<'g>,
    pub(super) facts: &'g Facts,
    pub(super) effort: Effort,
    /// The values whose gradients are asked for.
    pub(super) wrt: &'g [&'g str],
    pub(super) graph: Graph,
    pub(super) cotangents: RefCell<HashMap<String, Expr>>,
    /// What stands for values of the forward pass that are computed again, in the segment that the sweep is in.
    pub(super) copies: RefCell<HashMap<String, Expr>>,
    /// Attention weights whose cotangent is without its sum already.
    pub(super) centred: RefCell<HashSet<String>>,
    /// Cotangents of parts of values, until those of the other parts are there.
    pub(super) parts: RefCell<HashMap<String, Vec<Part>>>,
}

/// The cotangent of the places from `start` on along one axis of a value.
pub(super) struct Part {
    pub(super) cotangent: Expr,
    pub(super) axis: usize,
    pub(super) start: usize,
    pub(super) count: usize,
}

impl Sweep<'_> {
    /// Adds to the cotangent of a value.
    pub(super) fn add(&self, value: &str, cotangent: Expr) {
        let mut cotangents = self.cotangents.borrow_mut();
        let sum = match cotangents.get(value) {
            Some(present) => present + cotangent,
            None => cotangent,
        };
        cotangents.insert(value.to_owned(), sum);
    }

    /// Adds the cotangents of a value's parts to its own, when there will be no more of them: side by side if they make
    /// up the whole value, else with zeros around each.
    pub(super) fn settle(&self, value: &str) {
        let Some(mut parts) = self.parts.borrow_mut().remove(value) else { return };
        let Some(sizes) = self.fixed_sizes(value) else { return };
        parts.sort_by_key(|part| (part.axis, part.start));
        let axis = parts[0].axis;
        let mut end = 0;
        let adjoin = parts.iter().all(|part| {
            let follows = part.axis == axis && part.start == end;
            end += part.count;
            follows
        });
        if adjoin && end == sizes[axis] {
            let cotangents: Vec<Expr> = parts.into_iter().map(|part| part.cotangent).collect();
            self.add(value, cotangents[0].join_all(&cotangents[1..], axis as i64));
            return;
        }
        for Part { cotangent, axis, start, count } in parts {
            let mut pads = vec![0; 2 * sizes.len()];
            pads[axis] = start as i64;
            pads[sizes.len() + axis] = (sizes[axis] - start - count) as i64;
            self.add(value, cotangent.op("Pad", &[&self.graph.ints(&pads)]));
        }
    }

    /// A value in the precision that gradients have: f64 for f64, f32 for everything else of floating point.
    pub(super) fn value(&self, name: &str) -> Expr {
        let data_type = self.path.data_type(name).unwrap_or(DataType::Float);
        let copy = self.copies.borrow().get(name).cloned();
        let value = copy.unwrap_or_else(|| self.graph.value(name, data_type));
        match data_type {
            DataType::Float16 | DataType::Bfloat16 => value.cast(DataType::Float),
            _ => value,
        }
    }

    fn sizes(&self, name: &str) -> Option<Vec<Size>> {
        self.facts.sizes(name).map(<[Size]>::to_vec)
    }

    /// The sizes of a value, if no run changes them.
    pub(super) fn fixed_sizes(&self, name: &str) -> Option<Vec<usize>> {
        self.facts.sizes(name)?.iter().map(Size::fixed).collect()
    }
}

/// One node, for its rule.
pub(super) struct Site<'s> {
    pub(super) node: &'s NodeProto,
    pub(super) sweep: &'s Sweep<'s>,
}

impl<'s> Site<'s> {
    pub(super) fn graph(&self) -> &Graph {
        &self.sweep.graph
    }

    pub(super) fn effort(&self) -> Effort {
        self.sweep.effort
    }

    fn input(&self, index: usize) -> &'s str {
        self.node.input.get(index).map_or("", String::as_str)
    }

    fn output(&self, index: usize) -> &'s str {
        self.node.output.get(index).map_or("", String::as_str)
    }

    pub(super) fn inputs(&self) -> usize {
        self.node.input.len()
    }

    pub(super) fn outputs(&self) -> usize {
        self.node.output.len()
    }

    /// Whether an optional input is there.
    pub(super) fn has(&self, index: usize) -> bool {
        !self.input(index).is_empty()
    }

    /// Input `index`, floating-point ones in the precision of the gradient.
    pub(super) fn x(&self, index: usize) -> Expr {
        self.sweep.value(self.input(index))
    }

    /// Output `index`, likewise.
    pub(super) fn y(&self, index: usize) -> Expr {
        self.sweep.value(self.output(index))
    }

    /// The cotangent of the only or first output: the sweep comes here only if there is one.
    pub(super) fn dy(&self) -> Expr {
        self.cotangent(0).unwrap_or_else(|| self.y(0).zeros())
    }

    /// The cotangent of output `index`, if anything depends on it.
    pub(super) fn cotangent(&self, index: usize) -> Option<Expr> {
        self.cotangent_of(self.output(index))
    }

    /// The cotangent of any value that the sweep has passed.
    pub(super) fn cotangent_of(&self, value: &str) -> Option<Expr> {
        self.sweep.cotangents.borrow().get(value).cloned()
    }

    /// The node that makes input `index`.
    pub(super) fn maker(&self, index: usize) -> Option<&'s NodeProto> {
        self.sweep.topology.producer(self.input(index)).map(|(_, node)| node)
    }

    /// The only node that uses output `index`, where no one else wants its cotangent either: it is no output of the graph,
    /// and its gradient is not asked for.
    pub(super) fn only_user(&self, index: usize) -> Option<&'s NodeProto> {
        self.only_user_of(self.output(index))
    }

    /// As [`Site::only_user`] for any value.
    pub(super) fn only_user_of(&self, value: &str) -> Option<&'s NodeProto> {
        match self.sweep.topology.uses(value) {
            [usage] if !self.sweep.topology.is_output(value) && !self.sweep.wrt.contains(&value) => {
                self.sweep.model.graph().node.get(usage.node)
            }
            _ => None,
        }
    }

    /// Whether the gradient needs the cotangent of input `index`.
    pub(super) fn wants(&self, index: usize) -> bool {
        self.has(index) && self.sweep.path.is_live(self.input(index))
    }

    /// Gives the cotangent of input `index`, which has the input's shape. Not computed unless it is wanted.
    pub(super) fn give(&self, index: usize, cotangent: impl FnOnce() -> Expr) {
        if self.wants(index) {
            self.sweep.add(self.input(index), cotangent());
        }
    }

    /// Gives the cotangent of a part of input `index`, whose sizes are fixed. The rest of it gets none from here.
    pub(super) fn give_part(&self, index: usize, part: Part) {
        if self.wants(index) {
            self.sweep.parts.borrow_mut().entry(self.input(index).to_owned()).or_default().push(part);
        }
    }

    /// As [`Site::give`] for a cotangent in the shape of output 0, which input `index` was broadcast to.
    pub(super) fn give_broadcast(&self, index: usize, cotangent: impl FnOnce() -> Expr) -> Result<()> {
        if self.wants(index) {
            let summed = self.unbroadcast(cotangent(), self.output_sizes(0)?, index)?;
            self.sweep.add(self.input(index), summed);
        }
        Ok(())
    }

    /// Sums a value of the sizes `from` over the axes along which input `index` was broadcast to them.
    pub(super) fn unbroadcast(&self, value: Expr, from: Vec<Size>, index: usize) -> Result<Expr> {
        let to = self.sizes(index)?;
        let lead = from.len() - to.len();
        let repeated = |axis: &usize| {
            let axis = *axis;
            axis < lead || to[axis - lead].is_one() && !from[axis].is_one()
        };
        let axes: Vec<i64> = (0..from.len()).filter(repeated).map(|axis| axis as i64).collect();
        let leading: Vec<i64> = (0..lead as i64).collect();
        Ok(if axes == leading { value.sum(&axes, false) } else { value.sum(&axes, true).squeeze(&leading) })
    }

    /// The sizes of input `index`.
    pub(super) fn sizes(&self, index: usize) -> Result<Vec<Size>> {
        self.sweep.sizes(self.input(index)).ok_or_else(|| self.unknown(self.input(index)))
    }

    /// The sizes of output `index`.
    pub(super) fn output_sizes(&self, index: usize) -> Result<Vec<Size>> {
        self.sweep.sizes(self.output(index)).ok_or_else(|| self.unknown(self.output(index)))
    }

    /// The sizes of input `index`, if no run changes them.
    pub(super) fn fixed_sizes(&self, index: usize) -> Option<Vec<usize>> {
        self.sweep.fixed_sizes(self.input(index))
    }

    pub(super) fn rank(&self, index: usize) -> Result<usize> {
        Ok(self.sizes(index)?.len())
    }

    pub(super) fn output_rank(&self, index: usize) -> Result<usize> {
        Ok(self.output_sizes(index)?.len())
    }

    fn unknown(&self, value: &str) -> Error {
        Error::invalid_argument(format!(
            "{}: the run that was observed does not show the sizes of {value:?}",
            self.name()
        ))
    }

    /// The sizes of input `index` as a value, constant where they are fixed.
    pub(super) fn shape(&self, index: usize) -> Expr {
        let fixed: Option<Vec<i64>> = self
            .sweep
            .sizes(self.input(index))
            .and_then(|sizes| sizes.iter().map(|size| Some(size.fixed()? as i64)).collect());
        match fixed {
            Some(sizes) => self.graph().ints(&sizes),
            None => self.graph().value(self.input(index), DataType::Undefined).sizes(),
        }
    }

    /// Zeros in the shape of input `index`.
    pub(super) fn zeros(&self, index: usize) -> Expr {
        self.shape(index).zeros_of(self.x(index).data_type)
    }

    /// An axis counted from the front.
    pub(super) fn axis(&self, axis: i64, rank: usize) -> Result<usize> {
        let counted = if axis < 0 { axis + rank as i64 } else { axis };
        let counted = usize::try_from(counted).ok().filter(|&axis| axis < rank);
        counted.ok_or_else(|| Error::invalid_file(format!("{}: axis {axis} of {rank}", self.name())))
    }

    pub(super) fn int(&self, name: &str, default: i64) -> i64 {
        self.node.attribute_i(name).unwrap_or(default)
    }

    pub(super) fn float(&self, name: &str, default: f32) -> f64 {
        f64::from(self.node.attribute_f(name).unwrap_or(default))
    }

    pub(super) fn text(&self, name: &str, default: &'s str) -> &'s str {
        self.node.attribute_s(name).unwrap_or(default)
    }

    /// A list of integers that older operator sets keep in an attribute and newer ones in input `index`; `None` if it is
    /// left out.
    ///
    /// Errors: [`crate::Status::Unsupported`] if it differs from run to run.
    pub(super) fn ints(&self, name: &str, index: usize) -> Result<Option<Vec<i64>>> {
        if !name.is_empty()
            && let Some(values) = self.node.attribute_ints(name)
        {
            return Ok(Some(values.to_vec()));
        }
        let input = self.input(index);
        if input.is_empty() {
            return Ok(None);
        }
        if let Some(numbers) = self.sweep.facts.numbers(input) {
            return Ok(Some(numbers.to_vec()));
        }
        if let Some(constant) = self.sweep.topology.constant(input) {
            return Ok(Some(self.sweep.model.tensor(constant)?.to_i64()?));
        }
        Err(match self.sweep.facts.varies(input) {
            true => self.unsupported(&format!("its {name} {input:?} differ between the runs that were observed")),
            false => {
                Error::invalid_argument(format!("{}: the run that was observed does not show {input:?}", self.name()))
            }
        })
    }

    /// The integers of input `index`, if they are the same in every run.
    pub(super) fn known_ints(&self, index: usize) -> Option<Vec<i64>> {
        self.ints("", index).ok().flatten()
    }

    /// Input `index` as a constant flag, if it is one.
    pub(super) fn known_flag(&self, index: usize) -> Option<bool> {
        let constant = self.sweep.topology.constant(self.input(index))?;
        Some(*self.sweep.model.tensor(constant).ok()?.read().ok()?.first()? != 0)
    }

    /// Input `index` as floating-point constants, if it is one.
    pub(super) fn constants(&self, index: usize) -> Option<Vec<f32>> {
        let constant = self.sweep.topology.constant(self.input(index))?;
        self.sweep.model.tensor(constant).ok()?.to_f32().ok()
    }

    /// "operator Conv, node "down/conv" (operator set 17)".
    pub(super) fn name(&self) -> String {
        describe(self.node, self.graph().opset())
    }

    pub(super) fn unsupported(&self, why: &str) -> Error {
        Error::unsupported(format!("{}: {why}", self.name()))
    }
}

/// How errors name a node.
pub(super) fn describe(node: &NodeProto, opset: i64) -> String {
    let domain = if node.domain().is_empty() { String::new() } else { format!("{}.", node.domain()) };
    format!("operator {domain}{}, node {:?} (operator set {opset})", node.op_type(), node.name())
}
