//! Concepts: sets of cross-attention weights, their files and their composition.
