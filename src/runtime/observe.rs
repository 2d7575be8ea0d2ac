//! One run of a model in which it tells the sizes of its values: what a gradient is written for.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use super::{Optimization, Runtime, SessionOptions, Tensor};
use crate::error::{Error, Result};
use crate::onnx::build::{self, node};
use crate::onnx::grad::{Observation, Questions};
use crate::onnx::plain::plain;
use crate::onnx::{DataType, Model};
use crate::progress::CancelToken;

/// Runs a model once with the inputs and answers the questions: sizes by `Shape` nodes, integers as further outputs.
/// What follows from the sizes of the inputs is not computed; for the rest, memory and time are those of one run, since
/// nothing but the answers is kept.
///
/// Errors: as [`Runtime::session`] and [`super::Session::run`].
pub fn observe(
    runtime: &Runtime,
    model: &Model,
    questions: &Questions,
    inputs: &[(&str, &Tensor)],
    options: &SessionOptions,
    cancel: &CancelToken,
) -> Result<Observation> {
    let mut asking = plain(model)?.into_owned();
    let (sizes, numbers) = asking.edit(|edit| {
        for (name, tensor) in inputs {
            edit.fix_input(name, tensor.shape());
        }
        edit.graph_mut().output.clear();
        let mut answers = Vec::new();
        let mut ask = |op_type: &str, values: &BTreeSet<String>| {
            let mut names = Vec::with_capacity(values.len());
            for value in values {
                let name = edit.fresh_name(&format!("{value}/asked"));
                answers.push((value.clone(), node(op_type, [value.as_str()], [name.as_str()])));
                edit.graph_mut().output.push(build::value(&name, DataType::Int64, None));
                names.push(name);
            }
            names
        };
        let asked = (ask("Shape", &questions.sizes), ask("Identity", &questions.numbers));
        // ONNX Runtime takes what ends a graph from behind: so each value is asked as soon as it is there, and is gone
        // before the next.
        let made = edit.graph().node.iter().enumerate();
        let made = made.flat_map(|(at, node)| node.output.iter().map(move |value| (value.clone(), at)));
        let made: HashMap<String, usize> = made.collect();
        answers.sort_by_key(|(value, _)| Reverse(made.get(value).copied()));
        edit.graph_mut().node.extend(answers.into_iter().map(|(_, node)| node));
        edit.drop_unused();
        Ok(asked)
    })?;
    // The session is used once: what rewriting the graph and packing weights costs would not come back.
    let once = SessionOptions { optimization: Optimization::Basic, prepacking: false, ..options.clone() };
    let session = runtime.session(&asking, &once)?;
    let used: Vec<&str> = asking.graph().input.iter().map(|input| input.name()).collect();
    let inputs: Vec<(&str, &Tensor)> = inputs.iter().copied().filter(|(name, _)| used.contains(name)).collect();
    let outputs: Vec<&str> = sizes.iter().chain(&numbers).map(String::as_str).collect();
    let answers = session.run(&inputs, &outputs, cancel)?;
    let mut found = Observation::default();
    for (value, answer) in questions.sizes.iter().zip(&answers) {
        let size =
            |&size: &i64| usize::try_from(size).map_err(|_| Error::invalid_file(format!("{value:?} has size {size}")));
        found.sizes.insert(value.clone(), answer.as_slice::<i64>()?.iter().map(size).collect::<Result<_>>()?);
    }
    for (value, answer) in questions.numbers.iter().zip(&answers[sizes.len()..]) {
        found.numbers.insert(value.clone(), answer.as_slice::<i64>()?.to_vec());
    }
    Ok(found)
}
