//! What is known of a model's values from runs of it: their sizes, and the numbers of small integer values such as axes
//! and bounds. A gradient is written for these facts. With one run they are all fixed; with several runs at different
//! batch sizes or picture sizes, what differs between them stays open in the gradient.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::path::Path;
use super::rules;
use crate::error::{Error, Result};
use crate::onnx::graph::Topology;
use crate::onnx::model::Model;
use crate::onnx::plain::plain;
use crate::onnx::proto::tensor_proto::DataType;

/// What has to be observed in runs of a model before it can be differentiated.
#[derive(Clone, Debug, Default)]
pub struct Questions {
    /// Values whose sizes are wanted.
    pub sizes: BTreeSet<String>,
    /// Values of type int64, at most some dozens of numbers each, that are wanted themselves.
    pub numbers: BTreeSet<String>,
}

/// The answers of one run.
#[derive(Clone, Debug, Default)]
pub struct Observation {
    /// The sizes of each value.
    pub sizes: BTreeMap<String, Vec<usize>>,
    /// The numbers of each integer value.
    pub numbers: BTreeMap<String, Vec<i64>>,
}

/// A size as every run showed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Size(Vec<usize>);

impl Size {
    /// A size that no run can change.
    pub(super) fn always(size: usize) -> Self {
        Self(vec![size])
    }

    /// The size, if it is the same in every run.
    pub(super) fn fixed(&self) -> Option<usize> {
        let first = *self.0.first()?;
        self.0.iter().all(|&size| size == first).then_some(first)
    }

    pub(super) fn is_one(&self) -> bool {
        self.fixed() == Some(1)
    }

    /// The size in one of the runs.
    pub(super) fn in_run(&self, run: usize) -> usize {
        self.0.get(run).or(self.0.first()).copied().unwrap_or(0)
    }

    /// The size in each run.
    pub(super) fn seen(&self) -> &[usize] {
        &self.0
    }
}

/// The facts that a gradient is written for.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    sizes: HashMap<String, Vec<Size>>,
    numbers: HashMap<String, Vec<i64>>,
    varying: BTreeSet<String>,
}

impl Facts {
    /// Joins the observations of one or more runs.
    ///
    /// Errors: [`crate::Status::InvalidArgument`] without a run, if a run lacks a value that another has, or if the rank
    /// of a value differs.
    pub fn new(runs: &[Observation]) -> Result<Self> {
        let Some((first, others)) = runs.split_first() else {
            return Err(Error::invalid_argument("facts need at least one run of the model"));
        };
        let missing = |name: &str| Error::invalid_argument(format!("one run shows {name:?}, another does not"));
        let mut facts = Self::default();
        for (name, sizes) in &first.sizes {
            let mut seen: Vec<Size> = sizes.iter().map(|&size| Size(vec![size])).collect();
            for run in others {
                let sizes = run.sizes.get(name).ok_or_else(|| missing(name))?;
                if sizes.len() != seen.len() {
                    return Err(Error::invalid_argument(format!(
                        "{name:?} has {} axes in one run and {} in another",
                        seen.len(),
                        sizes.len()
                    )));
                }
                seen.iter_mut().zip(sizes).for_each(|(seen, &size)| seen.0.push(size));
            }
            facts.sizes.insert(name.clone(), seen);
        }
        for (name, numbers) in &first.numbers {
            let mut same = true;
            for run in others {
                same &= run.numbers.get(name).ok_or_else(|| missing(name))? == numbers;
            }
            if same {
                facts.numbers.insert(name.clone(), numbers.clone());
            } else {
                facts.varying.insert(name.clone());
            }
        }
        Ok(facts)
    }

    pub(super) fn sizes(&self, value: &str) -> Option<&[Size]> {
        self.sizes.get(value).map(Vec::as_slice)
    }

    /// Every value whose sizes are known.
    pub(super) fn all_sizes(&self) -> impl Iterator<Item = (&str, &[Size])> {
        self.sizes.iter().map(|(value, sizes)| (value.as_str(), sizes.as_slice()))
    }

    pub(super) fn numbers(&self, value: &str) -> Option<&[i64]> {
        self.numbers.get(value).map(Vec::as_slice)
    }

    pub(super) fn varies(&self, value: &str) -> bool {
        self.varying.contains(value)
    }
}

/// What must be observed before the gradient of `output` with respect to `wrt` can be written: in runs of the
/// [`plain`] model.
///
/// Errors: as [`super::vjp`].
pub fn questions(model: &Model, wrt: &[&str], output: &str) -> Result<Questions> {
    let model = &*plain(model)?;
    let topology = Topology::new(model.graph());
    let path = Path::new(model, &topology, wrt, output)?;
    let mut asked = Questions::default();
    let mut add = |value: &str| {
        if !value.is_empty() && path.data_type(value).is_some() {
            asked.sizes.insert(value.to_owned());
        }
    };
    add(output);
    wrt.iter().for_each(|value| add(value));
    for (node, on) in model.graph().node.iter().zip(path.nodes()) {
        // Of convolutions that no gradient passes, too: how they are computed best depends on their sizes.
        if *on || node.is("Conv") {
            node.input.iter().chain(&node.output).for_each(|value| add(value));
        }
        if *on {
            let read = rules::reads(node).iter().filter_map(|&index| node.input.get(index));
            asked.numbers.extend(read.filter(|value| path.data_type(value) == Some(DataType::Int64)).cloned());
        }
    }
    Ok(asked)
}
