//! To come.

use super::Rule;

pub(super) const RULES: &[(&str, Rule)] = &[];
