//! The one file of limits: what a model may ask of this library before anything is allocated, opened or handed to
//! ONNX Runtime for it. Each default is far above the largest diffusion model in use and far below what hurts a host.

use std::path::PathBuf;

/// What a model may ask for. Everything above it is refused with [`crate::Status::LimitExceeded`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of the model file itself, external data not counted. Default 2 GiB - 1, Protocol Buffers' own bound.
    pub file_bytes: u64,
    /// Bytes of one tensor. Default 16 GiB.
    pub tensor_bytes: u64,
    /// Bytes of all tensors together, external data counted. Default 128 GiB.
    pub total_tensor_bytes: u64,
    /// Number of external files. Default 16,384: exporters may write one a tensor.
    pub external_files: usize,
    /// Bytes of an external location. Default 1,024.
    pub location_bytes: usize,
    /// Number of nodes after every model-local function is expanded, subgraphs counted. Default 500,000; SDXL's UNet
    /// has 12,000.
    pub nodes: usize,
    /// Number of tensors, anywhere in the model. Default 500,000.
    pub tensors: usize,
    /// Inputs or outputs of one node, graph or function. Default 65,536.
    pub values_per_node: usize,
    /// Depth of messages inside messages. Default (and maximum) 100, the decoder's own bound.
    pub message_depth: usize,
    /// Depth of subgraphs inside subgraphs and of functions that call functions. Default 16.
    pub subgraph_depth: usize,
    /// Dimensions of a tensor. Default 8.
    pub rank: usize,
    /// Bytes of a value's, node's or operator's name. Default 4,096.
    pub name_bytes: usize,
    /// Bytes that decoded messages may take beyond the file, without the contents of tensors and texts: a floor, to
    /// which [`Limits::expansion`] times the file's size is added. Default 32 MiB.
    pub structure_bytes: u64,
    /// How many times the size of the file (tensors not counted) decoded messages may take. Default 16; large real
    /// models take 2 to 10.
    pub expansion: u64,
    /// Bytes that all values which follow from constants alone may take, because ONNX Runtime computes them while it
    /// creates a session: the budget for shapes. Default 32 MiB.
    pub folded_bytes: u64,
    /// How many times the bytes of the model's own constants those values may take, if that is more than
    /// [`Limits::folded_bytes`]. Default 8: f16 weights that are cast and transposed take 4.
    pub folded_expansion: u64,
    /// Folders, besides the model's own, in which external data may lie. Default none.
    pub extra_roots: Vec<PathBuf>,
    /// Whether external data may be a file that has several hard links. Default no: such a link can lead out of the
    /// model's folder with no trace in its path (`onnx.checker` refuses them, too).
    pub hard_links: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            file_bytes: (1 << 31) - 1,
            tensor_bytes: 16 << 30,
            total_tensor_bytes: 128 << 30,
            external_files: 16_384,
            location_bytes: 1_024,
            nodes: 500_000,
            tensors: 500_000,
            values_per_node: 65_536,
            message_depth: 100,
            subgraph_depth: 16,
            rank: 8,
            name_bytes: 4_096,
            structure_bytes: 32 << 20,
            expansion: 16,
            folded_bytes: 32 << 20,
            folded_expansion: 8,
            extra_roots: Vec::new(),
            hard_links: false,
        }
    }
}
