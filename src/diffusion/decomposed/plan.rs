//! A whole walk: which times it visits, each component's coefficients there, and where the state changes its size.

use super::super::schedule::{self, Leg, PlanOptions, Step};
use super::ordinary;
use super::schedule::Schedule;
use crate::error::{Error, Result};

/// One step: a prediction for the whole state, then a step of each component, then perhaps a lift.
#[derive(Clone, Debug, PartialEq)]
pub struct StagedStep {
    /// How often the sides are halved while the model sees the state.
    pub stage: usize,
    /// The components that are alive, the finest first. All have the same timestep, input scale and sigma.
    pub components: Vec<Step>,
    /// After the step the sides double, and the new component is noise of this deviation.
    pub lift: Option<f64>,
}

impl StagedStep {
    /// The component that is never dropped: a step of the plain process.
    pub fn last(&self) -> &Step {
        // A step has at least one component: both constructors of a plan see to it.
        &self.components[self.components.len() - 1]
    }

    /// The timestep that the model is told, in units of training steps.
    pub fn timestep(&self) -> f64 {
        self.last().timestep
    }

    /// Whether the step adds fresh noise, apart from a lift's.
    pub fn needs_noise(&self) -> bool {
        self.components.iter().any(Step::needs_noise)
    }
}

/// Every step of a walk.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    steps: Vec<StagedStep>,
    start: usize,
    initial_sigma: f64,
}

impl From<schedule::Plan> for Plan {
    /// The walk of a plain process: one component, one size.
    fn from(plain: schedule::Plan) -> Self {
        let staged = |step| StagedStep { stage: 0, components: vec![step], lift: None };
        let steps = plain.steps.into_iter().map(staged).collect();
        Self { steps, start: plain.start, initial_sigma: plain.initial_sigma }
    }
}

impl Plan {
    /// The walk of a schedule by its sampler. It visits the timesteps of the plain walk of as many steps and, where they
    /// are not among those, the turning points; [`PlanOptions::start`] counts all of them.
    ///
    /// A multistep sampler's steps are of first order at the start and after each lift.
    ///
    /// # Errors
    /// Those of [`schedule::Plan::new`]; with turning points also [`crate::Status::InvalidArgument`] for so few steps that
    /// none is at the full size.
    pub fn new(schedule: &Schedule, options: PlanOptions) -> Result<Self> {
        let config = schedule.config();
        if schedule.turning_points().is_empty() {
            return Ok(schedule::Plan::new(config, options)?.into());
        }
        options.check(config)?;
        let legs = respace(schedule, options.steps);
        schedule::check_start(config, options.start, legs.len())?;
        // Before each leg, and after the last.
        let times: Vec<usize> = legs.iter().map(|leg| leg.timestep as usize + 1).chain([0]).collect();
        let stages: Vec<usize> = times.iter().map(|time| schedule.stage(*time)).collect();
        if !stages[..legs.len()].contains(&0) {
            return Err(Error::invalid_argument(format!(
                "{} steps visit no time below the first turning point, {}: nothing would be drawn at full size",
                options.steps,
                schedule.turning_points()[0]
            )));
        }
        let fresh = |index: usize| index <= options.start || stages[index] != stages[index - 1];
        let mut steps: Vec<StagedStep> = stages[..legs.len()]
            .iter()
            .map(|stage| StagedStep { stage: *stage, components: Vec::new(), lift: None })
            .collect();
        for component in 0..=schedule.turning_points().len() {
            let faded = faded(schedule, component, &legs, &times);
            let coefficients = schedule::steps_of(config, options, &faded, fresh)?;
            for (index, (step, mut coefficients)) in steps.iter_mut().zip(coefficients).enumerate() {
                if step.stage <= component {
                    if schedule.decomposition().ordinary_models && step.stage > 0 {
                        ordinary::serve(&mut coefficients, step.stage, &config.training, config.prediction);
                    }
                    step.components.push(coefficients);
                } else if stages[index + 1] == component {
                    let spread = schedule.decomposition().lift_std.get(component).copied().unwrap_or(0.0);
                    let there = faded[index].there;
                    step.lift = Some(libm::hypot(there.sigma(), there.signal() * spread));
                }
            }
        }
        Ok(Self { steps, start: options.start, initial_sigma: 1.0 })
    }

    /// All steps; those before [`Plan::start`] are not run.
    pub fn steps(&self) -> &[StagedStep] {
        &self.steps
    }

    /// The first step that is run.
    pub fn start(&self) -> usize {
        self.start
    }

    /// A walk from step 0 begins at standard normal noise times this.
    pub fn initial_sigma(&self) -> f64 {
        self.initial_sigma
    }

    /// How many steps are run.
    pub fn len(&self) -> usize {
        self.steps.len() - self.start
    }

    /// Never: a plan has at least one step.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The stage of the first step that is run, which is the greatest.
    pub fn first_stage(&self) -> usize {
        self.steps.get(self.start).map_or(0, |step| step.stage)
    }

    /// Model calls at each stage. Over all times of a schedule they are `T_1 - 1`, then `T_{k+1} - T_k`, and
    /// `T - T_K + 1` at the last one.
    pub fn calls(&self) -> Vec<usize> {
        let mut calls = vec![0; self.first_stage() + 1];
        self.steps[self.start..].iter().for_each(|step| calls[step.stage] += 1);
        calls
    }

    /// Pixels that the model sees in all calls together, for pictures of this size: `sum of calls_k height width / 4^k`.
    pub fn pixel_evaluations(&self, height: usize, width: usize) -> u64 {
        let pixels = |stage: usize| (height >> stage) as u64 * (width >> stage) as u64;
        self.calls().into_iter().enumerate().map(|(stage, calls)| calls as u64 * pixels(stage)).sum()
    }
}

/// The legs of the plain walk with a stop at each turning point.
fn respace(schedule: &Schedule, steps: usize) -> Vec<Leg> {
    let config = schedule.config();
    let legs = schedule::legs(config, steps);
    let end = legs.last().map_or(schedule::Level::CLEAN, |leg| leg.there);
    let mut visited: Vec<_> = legs.iter().map(|leg| (leg.timestep, leg.here)).collect();
    for turning in schedule.turning_points() {
        let timestep = (turning - 1) as f64;
        if visited.iter().all(|(visited, _)| *visited != timestep) {
            visited.push((timestep, schedule::level_of_timestep(config, timestep)));
        }
    }
    visited.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    let there = visited.iter().skip(1).map(|(_, level)| *level).chain([end]);
    visited.iter().zip(there).map(|(&(timestep, here), there)| Leg { timestep, here, there }).collect()
}

/// The legs of a component. Before it is lifted, where it is not there, its signal is that at its drop.
fn faded(schedule: &Schedule, component: usize, legs: &[Leg], times: &[usize]) -> Vec<Leg> {
    let dropped = schedule.turning_points().get(component).copied().unwrap_or(usize::MAX);
    let fade = |time: usize| schedule.fade(component, time.min(dropped));
    let leg = |(leg, pair): (&Leg, &[usize])| Leg {
        here: leg.here.faded(fade(pair[0])),
        there: leg.there.faded(fade(pair[1])),
        ..*leg
    };
    legs.iter().zip(times.windows(2)).map(leg).collect()
}
