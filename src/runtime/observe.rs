//! One run of a model in which it tells the sizes of its values: what a gradient is written for.

use std::collections::BTreeMap;

use super::{Runtime, SessionOptions, Tensor};
use crate::error::{Error, Result};
use crate::onnx::build::{self, Dim, node};
use crate::onnx::grad::{Observation, Questions};
use crate::onnx::{DataType, Model};
use crate::progress::CancelToken;

/// Runs a model once with the inputs and answers the questions: sizes by `Shape` nodes, integers as further outputs.
/// Memory and time are those of one run, since nothing but the answers is kept.
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
    let mut asking = model.clone();
    let (sizes, numbers) = asking.edit(|edit| {
        let given: Vec<String> = edit.graph().input.iter().map(|input| input.name().to_owned()).collect();
        edit.graph_mut().output.clear();
        let mut sizes = BTreeMap::new();
        for value in &questions.sizes {
            let name = edit.fresh_name(&format!("{value}/sizes"));
            let graph = edit.graph_mut();
            graph.node.push(node("Shape", [value.as_str()], [name.as_str()]));
            graph.output.push(build::value(&name, DataType::Int64, Some(&[Dim::Any])));
            sizes.insert(value.clone(), name);
        }
        let mut numbers = BTreeMap::new();
        for value in &questions.numbers {
            // A value that is an input can't be an output as well.
            let name = match given.contains(value) {
                true => edit.fresh_name(&format!("{value}/numbers")),
                false => value.clone(),
            };
            let graph = edit.graph_mut();
            if name != *value {
                graph.node.push(node("Identity", [value.as_str()], [name.as_str()]));
            }
            graph.value_info.retain(|info| info.name() != name);
            graph.output.push(build::value(&name, DataType::Int64, None));
            numbers.insert(value.clone(), name);
        }
        edit.drop_unused();
        Ok((sizes, numbers))
    })?;
    let session = runtime.session(&asking, options)?;
    let used: Vec<&str> = asking.graph().input.iter().map(|input| input.name()).collect();
    let inputs: Vec<(&str, &Tensor)> = inputs.iter().copied().filter(|(name, _)| used.contains(name)).collect();
    let outputs: Vec<&str> = sizes.values().chain(numbers.values()).map(String::as_str).collect();
    let answers = session.run(&inputs, &outputs, cancel)?;
    let mut found = Observation::default();
    for (value, answer) in sizes.keys().zip(&answers) {
        let size =
            |&size: &i64| usize::try_from(size).map_err(|_| Error::invalid_file(format!("{value:?} has size {size}")));
        found.sizes.insert(value.clone(), answer.as_slice::<i64>()?.iter().map(size).collect::<Result<_>>()?);
    }
    for (value, answer) in numbers.keys().zip(&answers[sizes.len()..]) {
        found.numbers.insert(value.clone(), answer.as_slice::<i64>()?.to_vec());
    }
    Ok(found)
}
