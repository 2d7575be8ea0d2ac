//! The sizes that a UNet's inputs will have over all stages of a schedule, for providers that build for sizes ahead: with
//! them TensorRT builds one engine before the first step, and none in the middle of a walk.

use std::ops::RangeInclusive;

use super::unet::SAMPLE;
use crate::error::{Error, Result};
use crate::runtime::{Dimension, Port, ShapeProfile};

/// The states that a UNet will be asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedStates {
    /// The most at once: pictures, twice as many with guidance.
    pub batch: usize,
    /// Channels of a state.
    pub channels: usize,
    /// Rows at stage 0.
    pub height: usize,
    /// Columns at stage 0.
    pub width: usize,
    /// The stages that it serves, at each of which the sides are halved once more.
    pub stages: RangeInclusive<usize>,
    /// Rows of a prompt's encoding.
    pub tokens: RangeInclusive<usize>,
}

impl ExpectedStates {
    /// A profile for each of these inputs that has an open dimension: tuned for the largest states and the shortest prompts.
    ///
    /// # Errors
    /// [`crate::Status::Unsupported`] for an open dimension whose meaning is not known, by the input's name.
    pub fn profiles<'a>(&self, inputs: impl IntoIterator<Item = &'a Port>) -> Result<Vec<ShapeProfile>> {
        let is_open = |dim: &Dimension| matches!(dim, Dimension::Open(_));
        let open = inputs.into_iter().filter(|port| port.dims.iter().any(is_open));
        open.map(|port| self.profile(port)).collect()
    }

    fn profile(&self, port: &Port) -> Result<ShapeProfile> {
        let mut profile = ShapeProfile { input: port.name.clone(), min: Vec::new(), opt: Vec::new(), max: Vec::new() };
        for (index, dim) in port.dims.iter().enumerate() {
            let [min, opt, max] = match dim {
                Dimension::Fixed(size) => [*size; 3],
                Dimension::Open(_) => self.sizes(port, index)?,
            };
            profile.min.push(min);
            profile.opt.push(opt);
            profile.max.push(max);
        }
        Ok(profile)
    }

    /// The smallest, the usual and the largest size of an open dimension.
    fn sizes(&self, port: &Port, index: usize) -> Result<[usize; 3]> {
        let side = |full: usize| [full >> self.stages.end(), full >> self.stages.start(), full >> self.stages.start()];
        Ok(match (port.name.as_str(), index) {
            (_, 0) => [1, self.batch, self.batch],
            (SAMPLE, 1) => [self.channels; 3],
            (SAMPLE, 2) => side(self.height),
            (SAMPLE, 3) => side(self.width),
            // Encodings, keys and values: [B, tokens, features].
            (_, 1) if port.dims.len() == 3 => [*self.tokens.start(), *self.tokens.start(), *self.tokens.end()],
            (name, _) => {
                return Err(Error::unsupported(format!(
                    "the sizes of dimension {index} of {name:?} are not known: give TensorRT's profiles of all inputs"
                )));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::ElementType;

    fn port(name: &str, dims: &[Option<usize>]) -> Port {
        let dims = dims.iter().map(|dim| dim.map_or(Dimension::Open(String::new()), Dimension::Fixed)).collect();
        Port { name: name.to_owned(), dtype: ElementType::F32, dims }
    }

    fn expected() -> ExpectedStates {
        ExpectedStates { batch: 8, channels: 4, height: 64, width: 96, stages: 0..=2, tokens: 77..=231 }
    }

    #[test]
    fn profiles_span_all_stages() {
        let ports = [
            port("sample", &[None, Some(4), None, None]),
            port("timestep", &[]),
            port("k.0", &[None, None, Some(320)]),
            port("class_labels", &[None]),
            port("time_ids", &[Some(2), Some(6)]),
        ];
        let found = expected().profiles(&ports).unwrap();
        let shapes: Vec<_> = found.iter().map(|one| (one.input.as_str(), &*one.min, &*one.opt, &*one.max)).collect();
        assert_eq!(
            shapes,
            [
                ("sample", &[1, 4, 16, 24][..], &[8, 4, 64, 96][..], &[8, 4, 64, 96][..]),
                ("k.0", &[1, 77, 320], &[8, 77, 320], &[8, 231, 320]),
                ("class_labels", &[1], &[8], &[8]),
            ]
        );
        // One that serves the later stages alone.
        let later = ExpectedStates { stages: 1..=2, ..expected() }.profiles(&ports[..1]).unwrap();
        assert_eq!((&*later[0].min, &*later[0].max), (&[1, 4, 16, 24][..], &[8, 4, 32, 48][..]));
    }

    #[test]
    fn an_open_dimension_of_no_known_meaning_is_named() {
        let error = expected().profiles(&[port("timestep_cond", &[None, None])]).unwrap_err();
        assert!(error.message().contains("dimension 1 of \"timestep_cond\""), "{error}");
    }
}
