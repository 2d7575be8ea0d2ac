//! Decomposed diffusion: processes whose state changes its dimension (DVDP, arXiv 2211.16032).
//!
//! A picture is split into orthogonal components: what is constant in blocks of 2 x 2 pixels and what is not, and the
//! former again. Components that matter less vanish faster as noise grows, and are dropped at *turning points*; so early
//! denoising runs on a small state, and a *lift* brings a component back as noise once it is needed. A process without
//! turning points is a plain one, and every walk of this library goes through here.
//!
//! ```text
//! y_i = signal_i v_i + sigma noise            a component: its clean coordinates v_i, its own signal, one sigma for all
//! signal_i = sqrt(alpha_bar_t) r^((t / T)^q)  where it is dropped at time T; r = 1: subspace diffusion, arXiv 2205.01490
//! ```
//!
//! | file | what |
//! |---|---|
//! | `operators.rs` | the orthonormal coordinates: `down`, `up`, all components |
//! | `schedule.rs` | the process as data: JSON, marginals, kernels, posterior, the error of dropping |
//! | `plan.rs` | which times a walk visits, the coefficients of every component there, how many calls that takes |
//! | `ordinary.rs` | what models of smaller pictures are told, which were not trained for the process |
//! | `choose.rs` | turning points from a data set's statistics and a budget for what dropping costs |
//! | `trajectory.rs` | a walk under way, step by step and lift by lift |
//!
//! Pure arithmetic: it knows no models, prompts or pictures.

mod choose;
pub mod operators;
mod ordinary;
mod plan;
mod schedule;
mod trajectory;

pub use choose::{Budget, Choice, Statistics, choose_turning_points, predicted_cost};
pub use plan::{Plan, StagedStep};
pub use schedule::{Attenuation, Decomposition, MAX_TURNING_POINTS, Schedule};
pub use trajectory::Trajectory;
