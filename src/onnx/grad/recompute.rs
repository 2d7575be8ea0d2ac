//! Values of the forward pass that the backward pass computes again instead of keeping them: gradient checkpointing (Chen et
//! al. 2016, arXiv 1604.06174), with borders where they are cheap.
//!
//! A first sweep shows which node's rule reads which values. [`Forward::plan`] cuts the forward nodes into segments where
//! few bytes cross. The segments before the last border are computed again when the second sweep comes to them
//! ([`Segment::enter`]), from what crosses their borders; that, and what is read behind the last border, is kept.

use std::collections::{HashMap, HashSet};

use super::expr::Expr;
use super::facts::{Facts, Size};
use super::path::Path;
use super::site::Sweep;
use crate::onnx::graph::{Topology, captured};
use crate::onnx::proto::NodeProto;

/// Into how many parts, of equally many bytes, the forward pass is cut at most.
const CUTS: [usize; 11] = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64];

/// What is computed again.
#[derive(Clone, Default)]
pub(super) struct Plan<'g> {
    /// From first to last. What lies behind the last one is kept.
    segments: Vec<Segment<'g>>,
    /// Most bytes of forward values that are there at a time for the backward pass.
    pub(super) peak: u64,
    /// Bytes that are computed again.
    again: u64,
}

/// Forward nodes in a row, and what of them is computed again.
#[derive(Clone)]
pub(super) struct Segment<'g> {
    first: usize,
    end: usize,
    values: HashSet<&'g str>,
}

impl<'g> Plan<'g> {
    /// The segment that a node lies in, if any, with its number.
    pub(super) fn segment(&self, node: usize) -> Option<(usize, &Segment<'g>)> {
        self.segments.iter().enumerate().find(|(_, segment)| (segment.first..segment.end).contains(&node))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }
}

impl<'g> Segment<'g> {
    /// Appends the segment's nodes once more and lets the sweep's rules read their values.
    ///
    /// Nothing of it can run before `cotangent` is there, which the backward pass of everything later has to give: what
    /// the nodes take from outside passes a choice between itself and itself that depends on the cotangent.
    pub(super) fn enter(&self, sweep: &Sweep<'g>, cotangent: &Expr) {
        let mut copies: HashMap<&str, Expr> = HashMap::new();
        let first = cotangent.reshape_to(&[-1]).slice(0, 0, 1);
        let flag = first.less(&first.number(0.0));
        for node in &sweep.model.graph().node[self.first..self.end] {
            if !node.output.iter().any(|value| self.values.contains(value.as_str())) {
                continue;
            }
            sweep.graph.enter(node.name());
            let inputs: Vec<String> = node
                .input
                .iter()
                .map(|value| {
                    if !copies.contains_key(value.as_str()) && waits(sweep, value) {
                        let data_type = sweep.path.data_type(value).unwrap_or_default();
                        let kept = sweep.graph.value(value, data_type);
                        copies.insert(value, flag.choose(&kept, &kept));
                    }
                    copies.get(value.as_str()).map_or_else(|| value.clone(), |copy| copy.name.to_string())
                })
                .collect();
            let made = sweep.graph.repeat(node, inputs);
            for (value, copy) in node.output.iter().zip(made) {
                if self.values.contains(value.as_str()) {
                    let data_type = sweep.path.data_type(value).unwrap_or_default();
                    copies.insert(value, sweep.graph.value(&copy, data_type));
                }
            }
        }
        copies.retain(|value, _| self.values.contains(value));
        *sweep.copies.borrow_mut() = copies.into_iter().map(|(value, copy)| (value.to_owned(), copy)).collect();
    }
}

/// Whether a value of the forward pass is an array of numbers that differs from run to run.
fn waits(sweep: &Sweep, value: &str) -> bool {
    let number = sweep.path.data_type(value).is_some_and(|data_type| data_type.is_float());
    let scalar = sweep.facts.sizes(value).is_some_and(<[Size]>::is_empty);
    number && !scalar && sweep.topology.constant(value).is_none() && sweep.topology.initializer(value).is_none()
}

/// The forward pass, and what the rules read of it.
pub(super) struct Forward<'g> {
    nodes: &'g [NodeProto],
    /// The node that makes a value, of those that can be run again.
    makers: HashMap<&'g str, usize>,
    bytes: HashMap<&'g str, u64>,
    /// What the rule of each node reads of `makers`' values.
    reads: Vec<Vec<&'g str>>,
    /// Bytes that cross the border before each node.
    crossing: Vec<u64>,
}

impl<'g> Forward<'g> {
    /// `marks` are forward nodes and where in `appended` what their rules wrote begins, in the order of the sweep;
    /// `gradients` are the values that it is all for.
    pub(super) fn new(
        topology: &Topology<'g>,
        path: &Path<'g>,
        facts: &Facts,
        appended: &[NodeProto],
        marks: &[(usize, usize)],
        gradients: &[Expr],
    ) -> Self {
        let nodes = &topology.graph().node[..];
        let runs_again = |node: &NodeProto| captured(node).is_empty();
        let mut makers = HashMap::new();
        let mut bytes = HashMap::new();
        let mut crossing = vec![0u64; nodes.len() + 1];
        for (index, node) in nodes.iter().enumerate().filter(|(index, node)| path.nodes()[*index] && runs_again(node)) {
            for value in node.output.iter().filter(|value| path.is_live(value)) {
                let size = size_of(value, path, facts);
                makers.insert(value.as_str(), index);
                bytes.insert(value.as_str(), size);
                let last = topology.uses(value).last().map_or(index, |usage| usage.node);
                crossing[index + 1..=last.max(index)].iter_mut().for_each(|crossing| *crossing += size);
            }
        }
        let mut wanted: HashSet<&str> = gradients.iter().map(|value| &*value.name).collect();
        let mut reads = vec![Vec::new(); nodes.len()];
        let mut end = appended.len();
        for &(index, start) in marks.iter().rev() {
            let mut read: HashSet<&'g str> = HashSet::new();
            for node in appended[start..end].iter().rev() {
                if !node.output.iter().any(|value| wanted.contains(value.as_str())) {
                    continue;
                }
                wanted.extend(node.input.iter().map(String::as_str));
                if !node.is("Shape") {
                    read.extend(
                        node.input
                            .iter()
                            .filter_map(|value| makers.get_key_value(value.as_str()))
                            .map(|(value, _)| *value),
                    );
                }
            }
            reads[index].extend(read);
            end = start;
        }
        Self { nodes, makers, bytes, reads, crossing }
    }

    /// What is computed again so that the backward pass finds at most `budget` bytes of forward values at a time: of all
    /// ways that are tried, the one that computes least again; where none is enough, the one that keeps least.
    pub(super) fn plan(&self, budget: u64) -> Plan<'g> {
        let mut best = self.with_borders(&[]);
        if best.peak <= budget {
            return best;
        }
        for parts in CUTS {
            let borders = self.borders(parts);
            for count in 1..=borders.len() {
                let plan = self.with_borders(&borders[..count]);
                let better = match (plan.peak <= budget, best.peak <= budget) {
                    (true, true) => plan.again < best.again,
                    (true, false) => true,
                    (false, true) => false,
                    (false, false) => plan.peak < best.peak,
                };
                if better {
                    best = plan;
                }
            }
        }
        best
    }

    /// Where the pass is cut into parts of about equally many bytes that rules read, ascending: in reach of each even
    /// border, where fewest bytes cross.
    fn borders(&self, parts: usize) -> Vec<usize> {
        let read: HashSet<&str> = self.reads.iter().flatten().copied().collect();
        let mut made = vec![0u64; self.nodes.len()];
        read.iter().for_each(|value| made[self.makers[value]] += self.bytes[value]);
        let before: Vec<u64> = made
            .iter()
            .scan(0, |sum, made| {
                let before = *sum;
                *sum += made;
                Some(before)
            })
            .collect();
        let total: u64 = made.iter().sum();
        let part = total / parts as u64;
        let mut borders: Vec<usize> = (1..parts as u64)
            .filter_map(|number| {
                let even = part * number;
                let near = |at: &usize| before[*at].abs_diff(even) <= part * 2 / 5;
                (1..self.nodes.len()).filter(near).min_by_key(|&at| (self.crossing[at], before[at].abs_diff(even)))
            })
            .collect();
        borders.dedup();
        borders
    }

    /// The plan that computes again everything before the last of the ascending borders.
    fn with_borders(&self, borders: &[usize]) -> Plan<'g> {
        // Each value that is kept, with the first segment that needs it: the backward pass needs it until then.
        let mut kept: HashMap<&'g str, usize> = HashMap::new();
        let tail = borders.last().copied().unwrap_or(0);
        self.reads[tail..].iter().flatten().for_each(|value| {
            kept.insert(value, borders.len());
        });
        let mut segments = Vec::with_capacity(borders.len());
        let mut own = vec![0; borders.len() + 1];
        for (at, &end) in borders.iter().enumerate().rev() {
            let first = if at == 0 { 0 } else { borders[at - 1] };
            let mut values = HashSet::new();
            let mut open: Vec<&'g str> = self.reads[first..end].iter().flatten().copied().collect();
            while let Some(value) = open.pop() {
                let Some((&value, &maker)) = self.makers.get_key_value(value) else { continue };
                if !(first..end).contains(&maker) || kept.contains_key(value) {
                    kept.insert(value, at);
                } else if values.insert(value) {
                    own[at] += self.bytes[value];
                    open.extend(self.nodes[maker].input.iter().map(String::as_str));
                }
            }
            segments.push(Segment { first, end, values });
        }
        segments.reverse();
        let mut needed = vec![0; borders.len() + 1];
        kept.iter().for_each(|(value, &until)| needed[until] += self.bytes[value]);
        let mut sum = 0;
        let peak = needed.iter().zip(&own).map(|(needed, own)| {
            sum += needed;
            sum + own
        });
        Plan { segments, peak: peak.max().unwrap_or(0), again: own.iter().sum() }
    }
}

/// Bytes of a value in the largest of the runs that were seen.
fn size_of(value: &str, path: &Path, facts: &Facts) -> u64 {
    let each = path.data_type(value).map_or(4, |data_type| data_type.bits().unwrap_or(32) / 8);
    let sizes = facts.sizes(value).unwrap_or_default();
    let runs = sizes.iter().map(|size| size.seen().len()).max().unwrap_or(1);
    let of_run = |run| sizes.iter().fold(each, |product, size| product.saturating_mul(size.in_run(run) as u64));
    (0..runs).map(of_run).max().unwrap_or(0)
}
