//! Diffusion: schedules, samplers, UNets with swappable keys and values, and the text-to-image pipeline.
