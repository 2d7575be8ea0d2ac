//! Small graphs by hand: what no exporter of the integration tests writes, and what must be refused.

use super::super::build::{self, Dim, node, tensor_f32, tensor_i64};
use super::super::limits::Limits;
use super::super::proto::{GraphProto, NodeProto, TensorProto};
use super::*;
use crate::error::Status;

/// Text `[batch, tokens, 2]`, queries `[batch, 3, 4]`, keys and values of four features.
struct Graph {
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    text: [Dim; 3],
}

impl Graph {
    fn new() -> Self {
        Self { nodes: Vec::new(), constants: Vec::new(), text: ["batch".into(), "tokens".into(), 2.into()] }
    }

    fn node(mut self, node: NodeProto) -> Self {
        self.nodes.push(node);
        self
    }

    /// A weight whose entries are all different.
    fn weight(mut self, name: &str, dims: &[usize]) -> Self {
        let values: Vec<f32> = (0..dims.iter().product::<usize>()).map(|at| at as f32).collect();
        self.constants.push(tensor_f32(name, dims, &values));
        self
    }

    fn shape(mut self, name: &str, values: &[i64]) -> Self {
        self.constants.push(tensor_i64(name, &[values.len()], values));
        self
    }

    /// Attention written out, from keys and values `[batch, tokens, 4]`.
    fn attention(self, keys: &str, values: &str) -> Self {
        self.node(node("Transpose", [keys], ["keys_t"]).with("perm", vec![0, 2, 1]))
            .node(node("MatMul", ["queries", "keys_t"], ["scores"]))
            .node(node("Softmax", ["scores"], ["weights"]).named("the softmax"))
            .node(node("MatMul", ["weights", values], ["out"]))
    }

    fn model(self) -> Model {
        let graph = GraphProto {
            name: Some("graph".into()),
            input: vec![
                build::value("text", DataType::Float, Some(&self.text)),
                build::value("queries", DataType::Float, Some(&["batch".into(), 3.into(), 4.into()])),
            ],
            output: vec![build::value("out", DataType::Float, None)],
            node: self.nodes,
            initializer: self.constants,
            ..GraphProto::default()
        };
        Model::new(graph, &[("", 23), ("com.microsoft", 1)], &Limits::default()).unwrap()
    }
}

fn floats(data: &[u8]) -> Vec<f32> {
    data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn plain() -> Graph {
    Graph::new().weight("a", &[2, 4]).weight("b", &[2, 4]).node(node("MatMul", ["text", "a"], ["k"])).node(node(
        "MatMul",
        ["text", "b"],
        ["v"],
    ))
}

fn roles(model: &Model) -> Vec<(Role, String)> {
    find(model, "text").unwrap().into_iter().map(|found| (found.role, found.weight.name)).collect()
}

fn refused(graph: Graph) -> String {
    let error = find(&graph.model(), "text").unwrap_err();
    assert_eq!(error.status(), Status::Unsupported, "{error}");
    error.message().to_owned()
}

#[test]
fn the_structure_tells_keys_from_values_whatever_the_names_say() {
    let mut graph = plain().attention("k", "v");
    graph.nodes[0].name = Some("/down_blocks.0/attn2/to_v/MatMul".into());
    graph.nodes[1].name = Some("/down_blocks.0/attn2/to_k/MatMul".into());
    let model = graph.model();
    assert_eq!(roles(&model), [(Role::Key, "a".into()), (Role::Value, "b".into())]);
    let paths: Vec<String> = find(&model, "text").unwrap().into_iter().map(|found| found.path).collect();
    assert_eq!(paths, ["down_blocks.0.attn2.to_k", "down_blocks.0.attn2.to_v"]);
    assert_eq!(roles(&plain().attention("v", "k").model()), [(Role::Key, "b".into()), (Role::Value, "a".into())]);
}

#[test]
fn a_query_made_of_the_text_is_no_key() {
    // The text asks, and "queries" answer with their own keys; the values come from the text.
    let graph = plain()
        .node(node("Transpose", ["queries"], ["queries_t"]).with("perm", vec![0, 2, 1]))
        .node(node("MatMul", ["k", "queries_t"], ["scores"]))
        .node(node("Softmax", ["scores"], ["weights"]).named("the softmax"))
        .node(node("MatMul", ["weights", "v"], ["out"]));
    assert!(refused(graph).contains("the softmax"));
}

#[test]
fn views_of_the_text_and_of_the_weight_are_looked_through() {
    let mut graph = Graph::new()
        .weight("a", &[4, 2])
        .weight("b", &[2, 4])
        .weight("bias", &[4])
        .shape("rows", &[-1, 2])
        .shape("back", &[0, -1, 4])
        .node(node("Identity", ["text"], ["same"]))
        .node(node("Dropout", ["same"], ["text1"]))
        .node(node("Reshape", ["text1", "rows"], ["flat"]))
        // Weight stored [out, in], transposed by the graph and again by the Gemm.
        .node(node("Transpose", ["a"], ["a1"]).with("perm", vec![1, 0]))
        .node(node("Transpose", ["a1"], ["a2"]))
        .node(node("Gemm", ["flat", "a2", "bias"], ["k_flat"]).with("transB", 1))
        .node(node("Shape", ["text"], ["sizes"]))
        .node(node("Slice", ["sizes", "zero", "two"], ["two_sizes"]))
        .node(node("Concat", ["two_sizes", "four"], ["three_sizes"]).with("axis", 0))
        .node(node("Reshape", ["k_flat", "three_sizes"], ["k"]))
        .node(node("Cast", ["half"], ["b"]).with("to", DataType::Float as i64))
        .node(node("MatMul", ["text1", "b"], ["v"]))
        .shape("zero", &[0])
        .shape("two", &[2])
        .shape("four", &[4]);
    let halves: Vec<u8> = (0..8).flat_map(|at| half::f16::from_f32(at as f32).to_le_bytes()).collect();
    graph.constants.retain(|tensor| tensor.name() != "b");
    graph.constants.push(build::tensor("half", DataType::Float16, &[2, 4], halves));
    let mut model = graph.attention("k", "v").model();
    let found = find(&model, "text").unwrap();
    let (key, value) = (&found[0], &found[1]);
    assert_eq!((key.role, key.rows, key.bias.as_deref()), (Role::Key, Rows::Flat, Some("bias")));
    assert_eq!(floats(&key.read_weight(&model).unwrap()), (0..8).map(|at| at as f32).collect::<Vec<_>>());
    assert_eq!(key.read_bias(&model).unwrap(), Some(vec![0.0, 1.0, 2.0, 3.0]));
    assert_eq!((value.weight.name.as_str(), value.weight.data_type), ("half", DataType::Float16));
    assert_eq!((value.data_type, value.rows), (Some(DataType::Float), Rows::BatchTokens));
    let turned: Vec<u8> =
        [0, 4, 1, 5, 2, 6, 3, 7].iter().flat_map(|&at| half::f16::from(at as u8).to_le_bytes()).collect();
    assert_eq!(value.read_weight(&model).unwrap(), turned);

    let inputs = externalise(&mut model, &found).unwrap();
    assert_eq!(inputs.iter().map(|input| input.name.as_str()).collect::<Vec<_>>(), [&key.path, &value.path]);
    let names: Vec<&str> = model.graph().input.iter().map(|input| input.name()).collect();
    assert_eq!(names, ["text", "queries", "cross_attention.0.to_k", "cross_attention.0.to_v"]);
    let dims = build::declared_dims(&model.graph().input[2]).unwrap();
    assert_eq!(dims, ["batch".into(), "tokens".into(), Dim::Fixed(4)]);
    for gone in ["a", "half", "bias"] {
        assert_eq!(model.initializer(gone).unwrap_err().status(), Status::NotFound);
    }
}

#[test]
fn packed_columns_are_told_apart() {
    // One product of eight columns, head by head: two heads of two features.
    let interleaved = Graph::new()
        .weight("w", &[2, 8])
        .shape("heads", &[0, 0, 2, 2, 2])
        .node(node("MatMul", ["text", "w"], ["kv"]).named("packed"))
        .node(node("Reshape", ["kv", "heads"], ["kv5"]))
        .node(node("MultiHeadAttention", ["queries", "kv5"], ["out"]).with("num_heads", 2).in_domain("com.microsoft"));
    let mut model = interleaved.model();
    let found = find(&model, "text").unwrap();
    let columns: Vec<Vec<usize>> = found.iter().map(|found| found.columns.iter().collect()).collect();
    assert_eq!(columns, [[0, 1, 4, 5], [2, 3, 6, 7]]);
    assert_eq!(floats(&found[1].read_weight(&model).unwrap()), [2.0, 10.0, 3.0, 11.0, 6.0, 14.0, 7.0, 15.0]);
    assert_eq!(externalise(&mut model, &found[..1]).unwrap_err().status(), Status::Unsupported);
    externalise(&mut model, &found).unwrap();
    assert_eq!(model.initializer("w").unwrap_err().status(), Status::NotFound);

    // Keys and values as the two entries of an axis, taken by Gather.
    let stacked = Graph::new()
        .weight("w", &[2, 8])
        .shape("parts", &[0, 0, 2, 4])
        .node(node("MatMul", ["text", "w"], ["kv"]))
        .node(node("Reshape", ["kv", "parts"], ["kv4"]))
        .node(node("Gather", ["kv4", "one"], ["k"]).with("axis", 2))
        .node(node("Gather", ["kv4", "zero"], ["v"]).with("axis", 2));
    let mut stacked = stacked.attention("k", "v");
    stacked.constants.push(tensor_i64("zero", &[], &[0]));
    stacked.constants.push(tensor_i64("one", &[], &[-1]));
    let found = find(&stacked.model(), "text").unwrap();
    let columns: Vec<Columns> = found.iter().map(|found| found.columns).collect();
    assert_eq!(columns[0], Columns { first: 4, blocks: 1, width: 4, stride: 4 });
    assert_eq!(columns[1], Columns { first: 0, blocks: 1, width: 4, stride: 4 });
}

#[test]
fn evenly_spaced_runs_of_columns_are_recognised_and_nothing_else() {
    for columns in [
        Columns::all(7),
        Columns { first: 3, blocks: 4, width: 2, stride: 6 },
        Columns { first: 1, blocks: 5, width: 1, stride: 2 },
    ] {
        assert_eq!(Columns::from_order(&columns.iter().collect::<Vec<_>>()), Some(columns));
    }
    for order in [&[0, 1, 3][..], &[1, 0], &[0, 1, 4, 6], &[]] {
        assert_eq!(Columns::from_order(order), None, "{order:?}");
    }
}

#[test]
fn fused_attention_and_einsum_are_entered() {
    let standard = plain().node(node("Attention", ["queries", "k", "v"], ["out"]).with("q_num_heads", 2));
    assert_eq!(roles(&standard.model()), [(Role::Key, "a".into()), (Role::Value, "b".into())]);
    let einsum = plain()
        .node(node("Einsum", ["queries", "k"], ["scores"]).with("equation", "bid,bjd->bij"))
        .node(node("Softmax", ["scores"], ["weights"]))
        .node(node("Einsum", ["weights", "v"], ["out"]).with("equation", "bij,bjd->bid"));
    assert_eq!(roles(&einsum.model()), [(Role::Key, "a".into()), (Role::Value, "b".into())]);
}

#[test]
fn other_products_of_the_text_are_left_alone() {
    let graph = plain()
        .weight("other", &[2, 4])
        .node(node("MatMul", ["text", "other"], ["extra"]))
        .node(node("ReduceMean", ["extra"], ["mean"]))
        .attention("k", "v")
        .node(node("Add", ["out", "mean"], ["out2"]));
    assert_eq!(roles(&graph.model()), [(Role::Key, "a".into()), (Role::Value, "b".into())]);
}

#[test]
fn refusals_name_the_operator_and_the_node() {
    let quantised = plain()
        .weight("scale", &[1])
        .node(node("DequantizeLinear", ["codes", "scale"], ["c"]).named("the dequantiser"))
        .node(node("MatMul", ["text", "c"], ["v2"]));
    let mut quantised = quantised.attention("k", "v2");
    quantised.constants.push(build::tensor("codes", DataType::Int8, &[2, 4], vec![1; 8]));
    let message = refused(quantised);
    assert!(message.contains("DequantizeLinear") && message.contains("the dequantiser"), "{message}");

    let changed = Graph::new()
        .weight("first", &[2, 2])
        .weight("a", &[2, 4])
        .weight("b", &[2, 4])
        .node(node("MatMul", ["text", "first"], ["text1"]).named("the projection"))
        .node(node("MatMul", ["text1", "a"], ["k"]))
        .node(node("MatMul", ["text1", "b"], ["v"]))
        .attention("k", "v");
    assert!(refused(changed).contains("MatMul (node \"the projection\")"));

    let one_sided =
        Graph::new().weight("a", &[2, 4]).node(node("MatMul", ["text", "a"], ["k"])).attention("k", "queries");
    assert!(refused(one_sided).contains("Softmax (node \"the softmax\")"));

    let none = Graph::new().node(node("Identity", ["queries"], ["out"]));
    assert!(refused(none).contains("text, queries"));
    let error = find(&plain().attention("k", "v").model(), "prompt").unwrap_err();
    assert_eq!(error.status(), Status::NotFound);
    assert!(error.message().contains("\"prompt\"") && error.message().contains("text, queries"), "{error}");
}

#[test]
fn rows_that_can_not_be_followed_are_found_but_get_no_input() {
    let graph = Graph::new()
        .weight("a", &[2, 4])
        .weight("b", &[2, 4])
        .node(node("Transpose", ["text"], ["turned"]).with("perm", vec![1, 0, 2]))
        .node(node("MatMul", ["turned", "a"], ["k1"]))
        .node(node("MatMul", ["turned", "b"], ["v1"]))
        .node(node("Transpose", ["k1"], ["k"]).with("perm", vec![1, 0, 2]))
        .node(node("Transpose", ["v1"], ["v"]).with("perm", vec![1, 0, 2]))
        .attention("k", "v");
    let mut model = graph.model();
    let before = model.to_bytes().unwrap();
    let found = find(&model, "text").unwrap();
    assert_eq!(found[0].rows, Rows::Other);
    assert_eq!(externalise(&mut model, &found).unwrap_err().status(), Status::Unsupported);
    assert_eq!(model.to_bytes().unwrap(), before);
}

#[test]
fn module_paths_have_one_form() {
    let attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn2";
    let path = format!("{attention}.to_k");
    let torchscript = node("MatMul", [], []).named(format!("/unet/{}/MatMul", path.replace('.', "/")));
    let scopes = format!("['', 'unet.down_blocks.1', 'unet.{path}', 'linear_8']");
    let namespace = format!(": m.Call/unet.{attention}: m.Attention/unet.{path}: torch.Linear/linear_8: aten.linear");
    for (key, value) in [("", String::new()), ("pkg.torch.onnx.name_scopes", scopes), ("namespace", namespace)] {
        let mut product = torchscript.clone();
        if !key.is_empty() {
            product = node("MatMul", [], []).named("node_linear_8");
            let entry = super::super::proto::StringStringEntryProto { key: Some(key.into()), value: Some(value) };
            product.metadata_props.push(entry);
        }
        let mut graph = plain().attention("k", "v");
        (product.input, product.output) = (graph.nodes[0].input.clone(), graph.nodes[0].output.clone());
        graph.nodes[0] = product;
        let paths: Vec<String> = find(&graph.model(), "text").unwrap().into_iter().map(|found| found.path).collect();
        // The values' product has no name: its module is that of the keys' attention.
        assert_eq!(paths, [path.clone(), format!("{attention}.to_v")], "{key}");
    }
}

/// Attention with a step between the scores and the Softmax, and its result behind an Identity.
fn scored(step: NodeProto) -> Model {
    let mut graph = plain().weight("steps", &[4]);
    graph.constants.push(tensor_f32("scale", &[], &[0.5]));
    let attention = graph
        .node(node("Transpose", ["k"], ["keys_t"]).with("perm", vec![0, 2, 1]))
        .node(node("MatMul", ["queries", "keys_t"], ["products"]))
        .node(step)
        .node(node("Softmax", ["scores"], ["weights"]))
        .node(node("MatMul", ["weights", "v"], ["result"]))
        .node(node("Identity", ["result"], ["out"]));
    attention.model()
}

#[test]
fn attention_with_a_constant_scale_is_fused_and_no_other() {
    for (step, scale) in [
        (node("Mul", ["products", "scale"], ["scores"]), 0.5),
        (node("Mul", ["scale", "products"], ["scores"]), 0.5),
        (node("Div", ["products", "scale"], ["scores"]), 2.0),
    ] {
        let mut model = scored(step);
        assert_eq!(fuse(&mut model).unwrap(), 1);
        let nodes = &model.graph().node;
        assert!(!nodes.iter().any(|node| node.is("Softmax")));
        let fused = nodes.iter().find(|node| node.op_type() == "MultiHeadAttention").unwrap();
        assert_eq!((fused.attribute_f("scale"), fused.attribute_i("num_heads")), (Some(scale), Some(1)));
    }
    for step in [
        // A mask, a scale for each key, a divided scale.
        node("Add", ["products", "scale"], ["scores"]),
        node("Mul", ["products", "steps"], ["scores"]),
        node("Div", ["scale", "products"], ["scores"]),
    ] {
        let mut model = scored(step);
        let before = model.to_bytes().unwrap();
        assert_eq!(fuse(&mut model).unwrap(), 0);
        assert_eq!(model.to_bytes().unwrap(), before);
    }
    // The weights are seen by somebody else, too.
    let mut model = scored(node("Mul", ["products", "scale"], ["scores"]));
    model.edit(|edit| edit.expose_output("weights")).unwrap();
    assert_eq!(fuse(&mut model).unwrap(), 0);
}
