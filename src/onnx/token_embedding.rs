//! Where a text encoder looks up the embeddings of its tokens, and how rows of one's own get there (textual inversion, Gal
//! et al. 2022, arXiv 2208.01618).
//!
//! An export looks tokens up by a Gather from a constant table `[vocabulary, width]`, whose indices are the graph's token
//! numbers or a view of them. [`replaceable`] puts a choice behind that Gather: where one input says so, another input's
//! numbers take the place of what was gathered. Elsewhere the gathered numbers pass through as they are. This file knows
//! graphs, but not what the rows are.

use std::collections::BTreeSet;

use super::build::{self, node};
use super::edit::Edit;
use super::graph::Topology;
use super::model::Model;
use super::plain::plain;
use super::proto::NodeProto;
use super::tensor::DataType;
use crate::error::{Error, Result};

/// Names of what [`replaceable`] added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenEmbedding {
    /// Input `[B, L, width]`, f32: rows for tokens of a text of `L` token numbers.
    pub rows: String,
    /// Input `[B, L, width]`, bool: whether a number of `rows` takes the place of what was gathered.
    pub replaced: String,
    /// Output: the rows that the table has for the tokens, `B * L` of `width` numbers, before any is replaced.
    pub gathered: String,
    /// Numbers of a row.
    pub width: usize,
}

/// Lets rows of a text encoder's token embedding be given. `ids` is its input of token numbers, `[B, L]`.
///
/// Where nothing is replaced, the model computes what it did, bit for bit.
///
/// Errors: [`crate::Status::NotFound`] if there is no such input; [`crate::Status::Unsupported`] if not exactly one table is
/// looked up by it, or the element type of its rows is no floating type. The model is then as before.
pub fn replaceable(model: &mut Model, ids: &str) -> Result<TokenEmbedding> {
    let found = match look_up(model, ids) {
        Ok(found) => found,
        // The look-up may stand in a function of the model.
        Err(error) if !model.header().functions.is_empty() => {
            let whole = plain(model)?.into_owned();
            let found = look_up(&whole, ids).map_err(|_| error)?;
            *model = whole;
            found
        }
        Err(error) => return Err(error),
    };
    model.edit(|edit| found.replace(edit, ids))
}

/// The Gather of a token embedding.
struct LookUp {
    gathered: String,
    data_type: DataType,
    width: usize,
}

/// Operators that give their first input's numbers in their order.
fn is_view(node: &NodeProto) -> bool {
    ["Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"].iter().any(|view| node.is(view))
}

fn look_up(model: &Model, ids: &str) -> Result<LookUp> {
    let topology = model.topology();
    if !model.graph().input.iter().any(|input| input.name() == ids) {
        return Err(Error::not_found(format!("the model has no input {ids:?}")));
    }
    let mut found = Vec::new();
    let (mut open, mut seen) = (vec![ids], BTreeSet::from([ids]));
    while let Some(value) = open.pop() {
        for (_, node) in topology.consumers(value) {
            let Some(made) = node.output.first() else { continue };
            if is_view(node) && node.input.first().is_some_and(|input| input == value) && seen.insert(made) {
                open.push(made);
            }
            let picks = node.is("Gather") && node.attribute_i("axis").unwrap_or(0) == 0;
            if picks
                && node.input.get(1).is_some_and(|indices| indices == value)
                && let Some(width) = node.input.first().and_then(|table| table_width(&topology, table))
            {
                found.push((made, width));
            }
        }
    }
    let [(gathered, width)] = found.as_slice() else {
        return Err(Error::unsupported(format!(
            "the token embedding was not found: {} tables of rows are looked up by {ids:?}, expected one",
            found.len()
        )));
    };
    let data_type = topology.element_types().get(gathered.as_str()).copied();
    match data_type.filter(|data_type| data_type.is_float()) {
        Some(data_type) => Ok(LookUp { gathered: (*gathered).clone(), data_type, width: *width }),
        None => Err(Error::unsupported(format!("the token embedding {gathered:?} is not of a floating type"))),
    }
}

/// The length of a row, if the value is a constant table, perhaps stored in another type.
fn table_width(topology: &Topology<'_>, value: &str) -> Option<usize> {
    let mut value = value;
    while let Some((_, node)) = topology.producer(value).filter(|(_, node)| node.is("Cast") || node.is("Identity")) {
        value = node.input.first()?;
    }
    let table = topology.initializer(value).or_else(|| topology.constant(value))?;
    match table.dims.as_slice() {
        &[_, width] => usize::try_from(width).ok().filter(|&width| width > 0),
        _ => None,
    }
}

impl LookUp {
    fn replace(&self, edit: &mut Edit, ids: &str) -> Result<TokenEmbedding> {
        let gathered = self.gathered.as_str();
        let declared = edit.graph().input.iter().find(|input| input.name() == ids).and_then(build::declared_dims);
        let mut dims = declared.filter(|dims| dims.len() == 2).ok_or_else(|| {
            Error::unsupported(format!("the input {ids:?} is not declared as [batch, tokens], so rows can't be given"))
        })?;
        dims.push((self.width as i64).into());
        edit.expose_output(gathered)?;
        let mut fresh = |part: &str| edit.fresh_name(&format!("token_embedding/{part}"));
        let (rows, replaced, chosen) = (fresh("rows"), fresh("replaced"), fresh("chosen"));
        let (shape, shaped, typed, places) = (fresh("shape"), fresh("shaped"), fresh("typed"), fresh("places"));
        edit.redirect(gathered, &chosen);
        let graph = edit.graph_mut();
        graph.input.push(build::value(&rows, DataType::Float, Some(&dims)));
        graph.input.push(build::value(&replaced, DataType::Bool, Some(&dims)));
        // The exporter may have laid the tokens of all texts in one row.
        graph.node.extend([
            node("Shape", [gathered], [shape.as_str()]),
            node("Reshape", [rows.as_str(), &shape], [shaped.as_str()]),
            node("Cast", [shaped.as_str()], [typed.as_str()]).with("to", self.data_type as i64),
            node("Reshape", [replaced.as_str(), &shape], [places.as_str()]),
            node("Where", [places.as_str(), &typed, gathered], [chosen.as_str()]),
        ]);
        Ok(TokenEmbedding { rows, replaced, gathered: self.gathered.clone(), width: self.width })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Limits;
    use super::super::build::{Dim, tensor_f32};
    use super::super::proto::GraphProto;
    use super::*;
    use crate::error::Status;

    /// `y` from token numbers by these nodes, with a table of five rows.
    fn encoder(nodes: Vec<NodeProto>) -> Model {
        let dims = [Dim::from("batch"), Dim::from("tokens")];
        let graph = GraphProto {
            name: Some("encoder".into()),
            input: vec![build::value("input_ids", DataType::Int64, Some(&dims))],
            output: vec![build::value("y", DataType::Float, None)],
            initializer: vec![
                tensor_f32("table", &[5, 3], &[0.5; 15]),
                tensor_f32("other", &[5, 2], &[0.5; 10]),
                build::tensor_i64("flat", &[1], &[-1]),
            ],
            node: nodes,
            ..GraphProto::default()
        };
        Model::new(graph, &[("", 17)], &Limits::default()).unwrap()
    }

    #[test]
    fn the_table_is_found_through_views_of_both_sides() {
        let mut model = encoder(vec![
            node("Reshape", ["input_ids", "flat"], ["row"]),
            node("Cast", ["row"], ["numbers"]).with("to", DataType::Int32 as i64),
            node("Cast", ["table"], ["half"]).with("to", DataType::Float16 as i64),
            node("Gather", ["half", "numbers"], ["looked_up"]),
            node("Cast", ["looked_up"], ["y"]).with("to", DataType::Float as i64),
        ]);
        let found = replaceable(&mut model, "input_ids").unwrap();
        assert_eq!((found.width, found.gathered.as_str()), (3, "looked_up"));
        let inputs: Vec<&str> = model.graph().input.iter().map(|input| input.name()).collect();
        assert_eq!(inputs, ["input_ids", &found.rows, &found.replaced]);
        let user = model.graph().node.iter().find(|node| node.output[0] == "y").unwrap();
        let choice = model.topology().producer(&user.input[0]).unwrap().1.clone();
        assert!(choice.is("Where") && choice.input[2] == "looked_up", "{choice:?}");
    }

    #[test]
    fn what_is_no_single_table_is_refused_and_left_alone() {
        let gather = |table: &str, made: &str| node("Gather", [table, "input_ids"], [made]);
        let none = encoder(vec![node("Cast", ["input_ids"], ["y"]).with("to", DataType::Float as i64)]);
        let two = encoder(vec![gather("table", "a"), gather("other", "b"), node("ReduceSum", ["a"], ["y"])]);
        for mut model in [none, two] {
            let before = model.clone();
            assert_eq!(replaceable(&mut model, "input_ids").unwrap_err().status(), Status::Unsupported);
            assert_eq!(replaceable(&mut model, "ids").unwrap_err().status(), Status::NotFound);
            assert_eq!(model.graph(), before.graph());
        }
    }
}
