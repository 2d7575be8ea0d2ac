//! Which module of the model a projection is: what exporters leave of diffusers' names, brought into one form.

use std::collections::HashMap;

use super::super::proto::NodeProto;
use super::search::{Found, Search, TO_ATTENTION, is_one_of};
use super::{Projection, Role};

/// Whether a projection's path is one of self-attention.
pub fn is_of_self(path: &str) -> bool {
    path.contains("attn1.") || path.starts_with("self_attention.")
}

impl Search<'_> {
    /// Gives every projection its module's path; where the export tells none, `unnamed` and a number.
    pub(super) fn name(&self, found: &mut [Found], unnamed: &str) {
        let mut attentions: Vec<usize> = found.iter().map(|one| one.projection.attention).collect();
        attentions.sort_unstable();
        attentions.dedup();
        let mut modules: HashMap<usize, String> = HashMap::new();
        for one in found.iter_mut() {
            let own = one.nodes.iter().find_map(|&node| module_of(self.node(node)));
            let own = own.or_else(|| module_of_constant(&one.projection.weight.name));
            if let Some(path) = own.as_deref().and_then(|path| layer_path(path, one.projection.role)) {
                if let Some((attention, _)) = path.rsplit_once('.') {
                    modules.insert(one.projection.attention, attention.to_owned());
                }
                one.projection.path = path;
            }
        }
        for one in found.iter_mut().filter(|one| one.projection.path.is_empty()) {
            let Projection { attention, role, .. } = one.projection;
            let around = || {
                let nodes = one.nodes.iter().chain(&one.around).map(|&node| self.node(node));
                nodes.filter_map(module_of).find_map(|path| attention_path(&path))
            };
            let module = modules.get(&attention).cloned().or_else(around).or_else(|| self.module_after(attention));
            let number = attentions.binary_search(&attention).unwrap_or_default();
            let module = module.unwrap_or_else(|| format!("{unnamed}.{number}"));
            one.projection.path = format!("{module}.{}", role.module());
        }
        // A module that runs twice in one graph gives its projections the same path.
        let mut order: Vec<usize> = (0..found.len()).collect();
        order.sort_by_key(|&index| found[index].projection.attention);
        let mut seen: HashMap<String, usize> = HashMap::new();
        for index in order {
            let path = &mut found[index].projection.path;
            let count = seen.entry(path.clone()).or_insert(0);
            *count += 1;
            if *count > 1 {
                path.push_str(&format!("#{count}"));
            }
        }
    }

    /// The module of an attention by the layer that its result enters, `to_out.0`, or by that layer's constants.
    fn module_after(&self, attention: usize) -> Option<String> {
        let mut open = vec![(self.node(attention).output.first()?.as_str(), 0)];
        while let Some((value, depth)) = open.pop() {
            for (_, node) in self.topology.consumers(value).filter(|_| depth < 12) {
                let constants = node.input.iter().filter_map(|input| module_of_constant(input));
                if let Some(path) = module_of(node).into_iter().chain(constants).find_map(|path| attention_path(&path))
                {
                    return Some(path);
                }
                if is_one_of(node, &TO_ATTENTION) || is_one_of(node, &["MatMul", "Gemm", "Einsum"]) {
                    open.extend(node.output.iter().map(|value| (value.as_str(), depth + 1)));
                }
            }
        }
        None
    }
}

/// The module that a node was exported from, with dots, as the exporter recorded it.
fn module_of(node: &NodeProto) -> Option<String> {
    let metadata = |key: &str| node.metadata_props.iter().find(|entry| entry.key() == key).map(|entry| entry.value());
    // ['', 'down_blocks.0', ..., 'down_blocks.0. ... .attn2.to_k', 'linear_8']: the last entry is the operation.
    if let Some(scopes) = metadata("pkg.torch.onnx.name_scopes") {
        let entries: Vec<&str> = scopes.split('\'').skip(1).step_by(2).collect();
        if let [.., module, _] = entries[..]
            && !module.is_empty()
        {
            return Some(normalized(module));
        }
    }
    // ": Model/down_blocks.0: Block/ ... /down_blocks.0. ... .to_k: Linear/linear_8: aten.linear.default"
    if let Some(namespace) = metadata("namespace") {
        let entries: Vec<&str> = namespace.split('/').filter_map(|entry| Some(entry.split_once(": ")?.0)).collect();
        if let [.., module, _] = entries[..]
            && !module.is_empty()
        {
            return Some(normalized(module));
        }
    }
    // "/down_blocks.0/attentions.0/transformer_blocks.0/attn2/to_k/MatMul"
    let (scope, _) = node.name().rsplit_once('/')?;
    let path = scope.split('/').filter(|part| !part.is_empty()).collect::<Vec<_>>().join(".");
    (!path.is_empty()).then(|| normalized(&path))
}

/// The module that a constant belongs to, if it kept its name: `<module>.weight`.
fn module_of_constant(name: &str) -> Option<String> {
    let module = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias"))?;
    Some(normalized(module))
}

/// A path without what wraps the UNet.
fn normalized(path: &str) -> String {
    let parts: Vec<&str> = path.split('.').collect();
    let root = parts.iter().position(|part| matches!(*part, "down_blocks" | "mid_block" | "up_blocks"));
    parts[root.unwrap_or(0)..].join(".")
}

/// The path of a projection whose product belongs to the module `path`: that of the layer, or of its part if it is
/// packed. `None` if the module can't be a projection's.
fn layer_path(path: &str, role: Role) -> Option<String> {
    let (parent, layer) = path.rsplit_once('.')?;
    match layer {
        "to_k" | "to_v" | "to_kv" | "to_qkv" => Some(format!("{parent}.{}", role.module())),
        _ => attention_path(path).map(|attention| format!("{attention}.{}", role.module())),
    }
}

/// The part of a path down to the attention module; `None` if there is none in it.
fn attention_path(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split('.').collect();
    let last = parts.iter().rposition(|part| part.starts_with("attn") && !part.starts_with("attns"))?;
    Some(parts[..=last].join("."))
}
